"""Text to token ids and back, for tokenizers trained here and for those of Hugging Face folders.

Prompt and response are tokenised apart: a prompt may get a prefix such as BOS and never a suffix, a
response gets no prefix and, if it is finished, one end token. Files are those of Hugging Face:

  tokenizer.json         kept to the byte
  tokenizer_config.json  names of the special tokens; kept but for the class
  chat_template.jinja    the chat template, if there is one

A tokenizer that marks the start of a text with a blank (SentencePiece's `▁`) does so for a response
too, as it is a text of its own.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from gram_jax.errors import UserError

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
_BYTES = 256
_TOKEN_NAMES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


class Tokenizer:
    """A tokenizer with its special tokens and its chat template.

    Attributes:
      bos_id, eos_id, pad_id: ids of the special tokens, None where there is none.
      vocab_size: one more than the largest id, which is what an embedding must cover.
      special_tokens: {"bos_token": "<s>", ...}, the names that chat templates use.
      special_ids: ids of all special tokens, in order.
      chat_template: Jinja source, or None.
      prefix_ids: what every plain prompt starts with, such as [bos_id].
    """

    def __init__(
        self, content: str, config: dict[str, Any], chat_template: str | None, origin: str
    ) -> None:
        """Makes a tokenizer from the content of its files.

        Args:
          content: the text of tokenizer.json.
          config: the object in tokenizer_config.json.
          chat_template: Jinja source, or None.
          origin: where this came from, for messages.

        Raises:
          UserError: the content is no tokenizer, or lacks a special token that the config names.
        """
        try:
            backend = tokenizers.Tokenizer.from_str(content)
        except Exception as error:  # the Rust library raises bare Exception
            raise UserError(f"{origin}: tokenizer.json cannot be used: {error}") from None
        # A file may ask for truncation or padding, which would change scores without a word.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._content = content
        self._config = config
        self.chat_template = chat_template
        self.special_tokens = _special_tokens(config)
        self.bos_id = self._special_id("bos_token", origin)
        self.eos_id = self._special_id("eos_token", origin)
        # Padding is never read, so a pad token the vocabulary lacks is no fault.
        self.pad_id = backend.token_to_id(self.special_tokens.get("pad_token", ""))
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        self.prefix_ids = self._find_prefix()
        added = backend.get_added_tokens_decoder()
        self.special_ids = sorted(i for i, token in added.items() if token.special)
        ends = {token.content for token in added.values() if token.special}
        if "eos_token" in self.special_tokens:
            ends.add(self.special_tokens["eos_token"])
        self._end_tokens = tuple(sorted(ends))

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Loads the tokenizer of a Hugging Face folder, or of one of ours.

        Special tokens come from tokenizer_config.json, else special_tokens_map.json; the end token
        also from generation_config.json or config.json, by id. chat_template.jinja goes before the
        template in tokenizer_config.json.

        Raises:
          UserError: there is no such folder, no tokenizer.json in it, or a file is damaged.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise UserError(f"{folder}: there is no such folder to load a tokenizer from")
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise UserError(
                f"{folder}: there is no tokenizer.json in this folder; save the tokenizer in the"
                " `tokenizers` format (transformers: AutoTokenizer.from_pretrained(...)"
                ".save_pretrained(...))"
            )
        config = _read_object(folder / "tokenizer_config.json")
        for name, token in _read_object(folder / "special_tokens_map.json").items():
            if config.get(name) is None:
                config[name] = token
        template = _template_of(config, folder)
        tokenizer = cls(_read_text(path), config, template, str(folder))
        if tokenizer.eos_id is None:
            tokenizer._adopt_end_token(folder)
        return tokenizer

    @classmethod
    def train(
        cls, texts: Iterable[str], vocab_size: int, chat_template: str | None = None
    ) -> Tokenizer:
        """Trains a byte-level BPE tokenizer with BOS, EOS and PAD; the same texts give the same.

        Args:
          texts: what to learn merges from.
          vocab_size: at most this many entries, special tokens and the 256 bytes included.
          chat_template: Jinja source, or None.

        Raises:
          UserError: vocab_size leaves no room for the bytes.
        """
        specials = [BOS, EOS, PAD]
        if vocab_size < _BYTES + len(specials):
            raise UserError(
                f"vocab_size is {vocab_size}; {_BYTES} bytes and {len(specials)} special tokens"
                f" need at least {_BYTES + len(specials)}"
            )
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        backend.train_from_iterator(
            texts,
            trainers.BpeTrainer(
                vocab_size=vocab_size,
                special_tokens=specials,
                initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
                show_progress=False,
            ),
        )
        backend.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A",
            pair=f"{BOS} $A $B",
            special_tokens=[(BOS, backend.token_to_id(BOS))],
        )
        config = {
            "bos_token": BOS,
            "eos_token": EOS,
            "pad_token": PAD,
            "clean_up_tokenization_spaces": False,
        }
        return cls(backend.to_str(pretty=True), config, chat_template, "the trained tokenizer")

    def save(self, folder: str | Path) -> None:
        """Writes the files that `load` and transformers (4 and 5) read; the folder is made.

        Raises:
          OSError: the folder cannot be written.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        # auto_map points at Python files that are not part of this folder.
        dropped = ("chat_template", "auto_map")
        config = {name: value for name, value in self._config.items() if name not in dropped}
        # Any other class may rebuild the tokenizer by its own rules; this one takes it as it is.
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        # Of this class transformers 4 expects token_type_ids, too, which decoders refuse.
        config.setdefault("model_input_names", ["input_ids", "attention_mask"])
        text = json.dumps(config, indent=2, ensure_ascii=False, sort_keys=True)
        _write_text(folder / "tokenizer.json", self._content)
        _write_text(folder / "tokenizer_config.json", text + "\n")
        template = folder / "chat_template.jinja"
        if self.chat_template is None:
            template.unlink(missing_ok=True)
        else:
            _write_text(template, self.chat_template)

    def with_padding(self, pad_id: int) -> Tokenizer:
        """The same tokenizer with another token for padding, if it has one of this id."""
        token = self._backend.id_to_token(pad_id)
        if token is None or pad_id == self.pad_id:
            return self
        config = {**self._config, "pad_token": token}
        return Tokenizer(self._content, config, self.chat_template, "the tokenizer")

    def encode_prompt(self, text: str, *, rendered: bool = False) -> list[int]:
        """Returns the ids of a prompt: the prefix (unless it is written out in the text), the text.

        Args:
          text: the prompt.
          rendered: the text came out of a chat template, which writes its own special tokens.
        """
        return self.encode_prompts([text], rendered=rendered)[0]

    def encode_prompts(self, texts: Sequence[str], *, rendered: bool = False) -> list[list[int]]:
        """`encode_prompt` for many texts at once."""
        encoded = self._encode_plain(texts)
        if rendered:
            return encoded
        prefix = self.prefix_ids
        return [ids if ids[: len(prefix)] == prefix else prefix + ids for ids in encoded]

    def encode_response(self, text: str, *, add_eos: bool = True) -> list[int]:
        """Returns the ids of a response: no prefix; EOS at the end if asked for and not there."""
        return self.encode_responses([text], add_eos=add_eos)[0]

    def encode_responses(self, texts: Sequence[str], *, add_eos: bool = True) -> list[list[int]]:
        """`encode_response` for many texts at once.

        Raises:
          UserError: add_eos, but the tokenizer has no end token.
        """
        encoded = self._encode_plain(texts)
        if not add_eos:
            return encoded
        eos_id = self.eos_id
        if eos_id is None:
            raise UserError(
                "add_eos is on, but the tokenizer has no end token; name `eos_token` in its"
                " tokenizer_config.json or set add_eos to false"
            )
        return [ids if ids[-1:] == [eos_id] else [*ids, eos_id] for ids in encoded]

    def token_spans(self, texts: Sequence[str]) -> list[list[tuple[int, int]]]:
        """Returns (start, end) in characters for each token of each text, as of responses.

        A token that begins with a blank has it in its span. Tokens that are bytes of one character
        all have that character's span.
        """
        encodings = self._spanning.encode_batch(list(texts), add_special_tokens=False)
        return [encoding.offsets for encoding in encodings]

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = False) -> str:
        """Returns the text of the ids."""
        return str(self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Returns the text that each token adds to that of the tokens before it.

        Joined, they are the decoded text. The text of a character that several tokens share stands
        with the last of them.
        """
        pieces, start, done = list[str](), 0, 0  # decoded from start on; up to done it is given out
        before = ""
        for end in range(1, len(ids) + 1):
            text = self.decode(ids[start:end])
            # Half a character is shown as U+FFFD until the rest of it is there.
            if end < len(ids) and end - done < 8 and text.endswith("\ufffd"):
                pieces.append("")
                continue
            pieces.append(text[len(before) :])
            start, done = done, end
            before = self.decode(ids[start:end])
        return pieces

    def end_token_of(self, text: str) -> str | None:
        """Returns the special token (end of turn, or EOS) that the text ends with, or None."""
        if not text.endswith(self._end_tokens):
            return None
        return max((token for token in self._end_tokens if text.endswith(token)), key=len)

    def fingerprint(self) -> str:
        """Returns a SHA-256, in hex, of all that decides which ids a text gets."""
        parts = [self._content, self.chat_template, self.prefix_ids, self.special_tokens]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @functools.cached_property
    def _spanning(self) -> tokenizers.Tokenizer:
        """The tokenizer without its post-processor, which may trim blanks off spans (Llama 3)."""
        bare = json.dumps(json.loads(self._content) | {"post_processor": None})
        backend = tokenizers.Tokenizer.from_str(bare)
        backend.no_truncation()
        backend.no_padding()
        return backend

    def _encode_plain(self, texts: Sequence[str]) -> list[list[int]]:
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def _special_id(self, name: str, origin: str) -> int | None:
        token = self.special_tokens.get(name)
        if token is None:
            return None
        token_id: int | None = self._backend.token_to_id(token)
        if token_id is None:
            raise UserError(f"{origin}: {name} is {token!r}, which tokenizer.json does not have")
        return token_id

    def _find_prefix(self) -> list[int]:
        """What the post-processor puts first; transformers 5, too, overlooks `add_bos_token`."""
        probe = self._backend.encode("a")
        marks = [*probe.special_tokens_mask, 0]
        return list(probe.ids[: marks.index(0)])

    def _adopt_end_token(self, folder: Path) -> None:
        for name in ("generation_config.json", "config.json"):
            value = _read_object(folder / name).get("eos_token_id")
            token_id = value[0] if isinstance(value, list) and value else value
            if isinstance(token_id, int):
                token = self._backend.id_to_token(token_id)
                if token is None:
                    raise UserError(
                        f"{folder / name}: eos_token_id is {token_id}, which is not an id of"
                        " tokenizer.json"
                    )
                self.eos_id = token_id
                # Written down by name, so that the folder we save says it too.
                self._config["eos_token"] = self.special_tokens["eos_token"] = token
                self._end_tokens = tuple(sorted({*self._end_tokens, token}))
                return


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in _TOKEN_NAMES:
        value = config.get(f"{name}_token")
        token = value.get("content") if isinstance(value, dict) else value
        if isinstance(token, str) and token:
            found[f"{name}_token"] = token
    return found


def _template_of(config: dict[str, Any], folder: Path) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return _read_text(path)
    value = config.get("chat_template")
    if isinstance(value, list):
        named = {entry.get("name"): entry.get("template") for entry in value}
        value = named.get("default")
    return value if isinstance(value, str) else None


def _read_object(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file, or {} if there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not JSON: {error.msg}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: a JSON object is expected")
    return value


def _read_text(path: Path) -> str:
    """Reads UTF-8 without translating line ends, which would change templates and hashes."""
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8") from None


def _write_text(path: Path, text: str) -> None:
    path.write_bytes(text.encode("utf-8"))
