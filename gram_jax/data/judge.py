"""The judge's template: a file with the text that asks which of two responses is better.

A judge is a language model that reads a question and two responses and answers with one label
token, A or B. What it reads is data, a TOML file (`docs/judge.md`); here the file is checked, its
slots are filled, and the labels' token ids are found. `gram_jax.data.judge_prompts` makes token ids
of comparisons.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from gram_jax.data.prompts import apply_chat_template, shared_length
from gram_jax.data.sources import Message, Prompt, Response
from gram_jax.data.tokenizer import Tokenizer
from gram_jax.errors import UserError

DEFAULT = Path(__file__).parent / "templates" / "judge.toml"

_SLOT = re.compile(r"\{(\w+)\}")
_SLOTS = {
    "prompt": ("question", "response_a", "response_b"),
    "pretrain_prompt": ("question",),
    "pretrain_response": ("response_a", "response_b"),
}
# What rendering itself gives to a chat template.
_RESERVED = ("messages", "tools", "documents", "add_generation_prompt")


class Texts(NamedTuple):
    """What fills the slots of a template."""

    question: str
    response_a: str
    response_b: str

    def swapped(self) -> Texts:
        return Texts(self.question, self.response_b, self.response_a)


class JudgeText(NamedTuple):
    """A judge prompt as text.

    Attributes:
      text: all that the judge reads.
      head: the part of it before the first response, the same for all comparisons of a question.
      is_chat: it came out of a chat template, which writes all special tokens itself.
    """

    text: str
    head: str
    is_chat: bool


# Labels must be the same tokens after responses of any kind, which may end the prompt.
_FILLINGS = (
    Texts("What is 2 + 2?", "4", "It is five"),
    Texts("Say hello", "Hi\n", "Hello there!"),
    Texts("Count to three.", "No", "1\n2\n3\n"),
)


@dataclasses.dataclass(frozen=True, slots=True)
class JudgeTemplate:
    """A judge's template, checked.

    Attributes:
      labels: what the judge answers if the first, or the second, response shown is better.
      prompt: the judge's question, with the slots {question}, {response_a} and {response_b}.
      pretrain_prompt, pretrain_response: the two sides of stage 1 on response pairs, with the slots
        {question}, and {response_a} and {response_b}; both "" if there is no stage 1 on pairs.
      system: the system message before `prompt`, or "" for none.
      chat_template_kwargs: variables for the tokenizer's chat template, as in transformers.
    """

    labels: tuple[str, str]
    prompt: str
    pretrain_prompt: str = ""
    pretrain_response: str = ""
    system: str = ""
    chat_template_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        first, second = self.labels
        if not first or not second or first == second:
            raise UserError(
                f"labels are {first!r} and {second!r}; write two different texts, such as"
                ' ["A", "B"]'
            )
        if bool(self.pretrain_prompt) != bool(self.pretrain_response):
            raise UserError(
                "pretrain_prompt and pretrain_response go together; write both or neither"
            )
        for field, slots in _SLOTS.items():
            if field == "prompt" or getattr(self, field):
                _check_slots(field, getattr(self, field), slots)
        if not self.prompt.partition("{response_a}")[0].strip():
            raise UserError("prompt starts with {response_a}; write words before it")
        for name in _RESERVED:
            if name in self.chat_template_kwargs:
                raise UserError(f"chat_template_kwargs.{name} is set by rendering; remove it")

    @classmethod
    def load(cls, path: str | Path = "") -> JudgeTemplate:
        """Reads a template's TOML file; "" is the default template.

        Raises:
          UserError: the file cannot be read, is not TOML, or is no template.
        """
        path = Path(path) if str(path) else DEFAULT
        try:
            values = tomllib.loads(path.read_bytes().decode("utf-8"))
        except OSError as error:
            reason = error.strerror or str(error)
            raise UserError(
                f"{path}: the judge template cannot be read ({reason}); give the path of a TOML"
                ' file, or "" for the default'
            ) from None
        except UnicodeDecodeError:
            raise UserError(f"{path}: not UTF-8; save the judge template as UTF-8") from None
        except tomllib.TOMLDecodeError as error:
            raise UserError(f"{path}: not TOML: {error}; correct it there") from None
        return cls.from_dict(values, str(path))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], origin: str = "judge template") -> JudgeTemplate:
        """The inverse of `to_dict`.

        Args:
          values: the fields; those with a default may be absent.
          origin: where they come from, for messages.

        Raises:
          UserError: a field is unknown, missing or of the wrong kind, or see the class's checks.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            if name not in names:
                near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]}?" if near else "it has " + ", ".join(names)
                raise UserError(f"{origin}: {name} is not a field of a judge template; {hint}")
        for name in ("labels", "prompt"):
            if name not in values:
                raise UserError(f"{origin}: {name} is missing; docs/judge.md has an example")
        for name, value in values.items():
            if not _is_valid(name, value):
                raise UserError(f"{origin}: {name} must be {_KINDS.get(name, 'text')}; correct it")
        try:
            return cls(**{**values, "labels": tuple(values["labels"])})
        except UserError as error:
            raise UserError(f"{origin}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values, ready for JSON."""
        return {
            **{field.name: getattr(self, field.name) for field in dataclasses.fields(self)},
            "labels": list(self.labels),
            "chat_template_kwargs": dict(self.chat_template_kwargs),
        }

    def fingerprint(self) -> str:
        """Returns a SHA-256, in hex, of all that the template says."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()


def fill(text: str, texts: Texts) -> str:
    """Puts texts into slots in one pass: a text that looks like a slot stays as it is."""
    values = texts._asdict()
    return _SLOT.sub(lambda match: values[match[1]], text)


def render_comparison(template: JudgeTemplate, texts: Texts, tokenizer: Tokenizer) -> JudgeText:
    """Renders the judge prompt that shows response_a first.

    With a chat template the filled prompt is one user turn, followed by the generation prompt, just
    as transformers renders it; without, it is plain text, after `system` and a blank line.

    Raises:
      UserError: the chat template fails, or changes the text of the user turn.
    """
    content = fill(template.prompt, texts)
    before = len(fill(template.prompt.partition("{response_a}")[0], texts))
    if tokenizer.chat_template is None:
        system = f"{template.system}\n\n" if template.system else ""
        return JudgeText(system + content, system + content[:before], False)
    messages: list[Message] = [{"role": "user", "content": content}]
    if template.system:
        messages.insert(0, {"role": "system", "content": template.system})
    text = apply_chat_template(
        messages,
        tokenizer,
        add_generation_prompt=True,
        chat_template_kwargs=template.chat_template_kwargs,
    )
    # Templates may strip a turn (Llama 3); where the responses stand must be known all the same.
    stripped = content.strip()
    start = text.rfind(stripped)
    if start < 0:
        raise UserError(
            "the chat template does not write the text of the judge prompt as it is; use a template"
            " that does, or a tokenizer without one"
        )
    inside = before - (len(content) - len(content.lstrip()))
    return JudgeText(text, text[: start + max(0, inside)], True)


def label_ids(template: JudgeTemplate, tokenizer: Tokenizer) -> tuple[int, int]:
    """Finds the ids of the two labels where the judge writes them: right after its prompt.

    Raises:
      UserError: a label is not one token there, or not always the same one, or both are the same.
    """
    found: list[int] = []
    for label in template.labels:
        ids = {_label_id(template, label, texts, tokenizer) for texts in _FILLINGS}
        if len(ids) > 1:
            raise UserError(
                f"label {label!r} becomes another token after another response; end the judge"
                " prompt with words of its own after the last slot"
            )
        found += ids
    if found[0] == found[1]:
        raise UserError(
            f"labels {template.labels[0]!r} and {template.labels[1]!r} are the same token"
            f" {tokenizer.decode(found[:1])!r} after the judge prompt; choose other labels"
        )
    return found[0], found[1]


def question_text(prompt: Prompt) -> str:
    """A question as text for {question}: text as it is, a single user message as its content.

    Other chats are written turn by turn, each as `role: content`, with a blank line between turns.
    """
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1 and prompt[0]["role"] == "user":
        return _content(prompt[0])
    return "\n\n".join(f"{message['role']}: {_content(message)}" for message in prompt)


def response_text(response: Response) -> str:
    """A response as text for its slot; of an assistant message the content, without reasoning."""
    return response if isinstance(response, str) else _content(response[0])


def _label_id(template: JudgeTemplate, label: str, texts: Texts, tokenizer: Tokenizer) -> int:
    text, _, is_chat = render_comparison(template, texts, tokenizer)
    alone, labelled = tokenizer.encode_prompts([text, text + label], rendered=is_chat)
    if len(labelled) == len(alone) + 1 and labelled[:-1] == alone:
        return labelled[-1]
    parts = [tokenizer.decode([token]) for token in labelled[shared_length(alone, labelled) :]]
    raise UserError(
        f"label {label!r} is not one token after the judge prompt: {text[-12:]!r} + {label!r} ends"
        f" in the tokens {parts!r}; change labels, or the end of the prompt (a blank there often"
        " merges with the label)"
    )


def _content(message: Message) -> str:
    """Content, then tool calls as JSON, as there is no chat template to write them."""
    calls = message.get("tool_calls")
    parts = [message.get("content"), json.dumps(calls, ensure_ascii=False) if calls else None]
    return "\n".join(part for part in parts if part)


def _check_slots(field: str, text: str, slots: tuple[str, ...]) -> None:
    found = _SLOT.findall(text)
    known = ", ".join(f"{{{slot}}}" for slot in slots)
    for name in found:
        if name not in slots:
            raise UserError(f"{field} has {{{name}}}, which is no slot there; it has {known}")
    for slot in slots:
        if found.count(slot) != 1:
            times = "no" if slot not in found else f"{found.count(slot)} times"
            raise UserError(f"{field} has {times} {{{slot}}}; write each of {known} once")
    if "response_a" in slots and found.index("response_a") > found.index("response_b"):
        raise UserError(f"{field} has {{response_b}} before {{response_a}}; swap them")


_KINDS = {
    "labels": 'a list of two texts, such as ["A", "B"]',
    "chat_template_kwargs": "a table of texts, numbers, true and false",
}


def _is_valid(name: str, value: Any) -> bool:
    if name == "labels":
        return (
            isinstance(value, list | tuple)
            and len(value) == 2
            and all(isinstance(label, str) for label in value)
        )
    if name == "chat_template_kwargs":
        return isinstance(value, Mapping) and all(
            isinstance(item, str | int | float) for item in value.values()
        )
    return isinstance(value, str)
