"""Prompts and responses, plain or chat, to text and to token ids: one way for training and scoring.

Chat templates are rendered as transformers renders them. The text is then cut in two where the
response begins, so that several responses can share one prompt.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils
import numpy as np
import numpy.typing as npt

from gram_jax.data.sources import Message, Prompt, Response
from gram_jax.data.tokenizer import Tokenizer
from gram_jax.errors import UserError

# A response that no template writes of itself, to see where the template puts responses.
_PROBE = "\ue000"
_REASONING = ("reasoning_content", "thinking", "reasoning")

TokenIds = npt.NDArray[np.int32]


class ExampleError(UserError, ValueError):
    """One example cannot be used; whoever knows its file and line says so with `DataError`.

    Attributes:
      reason: what is wrong.
      field: `prompt` or `response`.
      index: which response, where there are several.
    """

    def __init__(self, reason: str, *, field: str, index: int = 0) -> None:
        self.reason = reason
        self.field = field
        self.index = index
        super().__init__(f"field {field!r}: {reason}")


class Rendered(NamedTuple):
    """A prompt and a response as text.

    Attributes:
      prompt_text: what the response is conditioned on.
      response_text: the response, with its end-of-turn token if the template writes one, and then
        without what follows it (most templates write a newline after it).
      is_chat: the text came out of a chat template, which writes all special tokens itself.
      end_token: the end-of-turn token that response_text ends with, or None.
    """

    prompt_text: str
    response_text: str
    is_chat: bool
    end_token: str | None


def render(prompt: Prompt, response: Response, tokenizer: Tokenizer) -> Rendered:
    """Renders a prompt and one response; see `render_candidates`."""
    return render_candidates(prompt, [response], tokenizer)[0]


def render_candidates(
    prompt: Prompt,
    responses: Sequence[Response],
    tokenizer: Tokenizer,
    *,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[Rendered]:
    """Renders a prompt with each of its responses; all get the same prompt_text.

    Plain text is left as it is. Messages go through the chat template twice: with the generation
    prompt, which gives prompt_text, and with the response as the assistant's message, of which
    response_text is the rest. Some templates open a generation with what they do not write
    before a given response (`<think>`); there prompt_text ends where the two part, found with a
    probe in place of the response so that it is the same for all. What a template writes before a
    response of itself (Qwen3's empty think block) belongs to the response, unless the generation
    prompt has it too. `chat_template_kwargs` are variables for the template.

    Raises:
      UserError: the prompt is messages, but there is no template, or it fails, or it renders the
        conversation otherwise once there is a response.
      ExampleError: a response is not text or one assistant message, or is empty.
    """
    check_candidates(prompt, responses)
    if isinstance(prompt, str):
        return [Rendered(prompt, str(response), False, None) for response in responses]
    header = _prompt_text(prompt, tokenizer, chat_template_kwargs)
    rendered: list[Rendered] = []
    for response in responses:
        full = apply_chat_template(
            [*prompt, _assistant_message(response)],
            tokenizer,
            chat_template_kwargs=chat_template_kwargs,
        )
        if not full.startswith(header):
            _fail_rewritten(header, full)
        text = full[len(header) :]
        end_token = tokenizer.end_token_of(text.rstrip())
        rendered.append(Rendered(header, text.rstrip() if end_token else text, True, end_token))
    return rendered


def encode_candidates(
    prompt: Prompt,
    responses: Sequence[Response],
    tokenizer: Tokenizer,
    *,
    add_eos: bool = True,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> tuple[TokenIds, list[TokenIds]]:
    """Tokenises a prompt and its responses, apart.

    With `add_eos` each response ends with one end token: the template's end-of-turn token if it
    writes one, else EOS. Without, it has neither.

    Returns:
      (prompt ids [T], response ids, one [T_n] for each response), int32, none of them empty.

    Raises:
      UserError: see `render_candidates`; or add_eos, but there is no end token.
      ExampleError: a response is empty, or the prompt is and the tokenizer puts nothing before it.
    """
    rendered = render_candidates(
        prompt, responses, tokenizer, chat_template_kwargs=chat_template_kwargs
    )
    if not rendered:
        raise ExampleError("is missing; a prompt needs at least one", field="response")
    prompt_ids = tokenizer.encode_prompt(rendered[0].prompt_text, rendered=rendered[0].is_chat)
    if not prompt_ids:
        reason = "is empty, and the tokenizer has no BOS to stand in for it; write a prompt"
        raise ExampleError(reason, field="prompt")
    encoded = [_encode_response(candidate, tokenizer, add_eos) for candidate in rendered]
    for index, ids in enumerate(encoded):
        if not ids:
            raise ExampleError("has no tokens", field="response", index=index)
    return _array(prompt_ids), [_array(ids) for ids in encoded]


def apply_chat_template(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    *,
    add_generation_prompt: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> str:
    """Renders messages with the tokenizer's chat template, as transformers does.

    A first message of the role "tools" holds a JSON list, which the template gets as its `tools`.
    `chat_template_kwargs` are further variables for the template, such as enable_thinking.

    Raises:
      UserError: there is no template, it is faulty, or it refuses these messages.
    """
    if tokenizer.chat_template is None:
        raise UserError(
            "the prompt is chat messages, but the tokenizer has no chat template; add a"
            " chat_template.jinja to its folder or write the prompt as text"
        )
    messages, tools = _without_tools(messages, tokenizer.chat_template)
    try:
        return _compiled(tokenizer.chat_template).render(
            messages=[_as_templates_expect(message) for message in messages],
            tools=tools,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **{**tokenizer.special_tokens, **(chat_template_kwargs or {})},
        )
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"the chat template is faulty at line {error.lineno}: {error}") from None
    except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
        roles = ", ".join(str(message.get("role")) for message in messages)
        raise UserError(f"the chat template refuses the messages [{roles}]: {error}") from None


def _without_tools(
    messages: Sequence[Message], template: str
) -> tuple[Sequence[Message], list[Any] | None]:
    """Splits off the tools, which templates take apart from the messages."""
    if not messages or messages[0].get("role") != "tools":
        return messages, None
    try:
        tools = json.loads(messages[0]["content"])
    except (TypeError, ValueError, RecursionError):
        tools = None
    if not isinstance(tools, list):
        raise UserError('the content of a message of the role "tools" must be a JSON list')
    if not re.search(r"\btools\b", template):
        raise UserError("the row has tools, but the chat template does not write them; remove one")
    return messages[1:], tools


def check_candidates(prompt: Prompt, responses: Sequence[Response]) -> None:
    """Checks that a prompt can be answered, and that each response is one to it.

    Raises:
      ExampleError: which of them is not, and why.
    """
    for index, response in enumerate(responses):
        _check_response(prompt, response, index)
    if isinstance(prompt, str):
        return
    if not prompt:
        raise ExampleError("is an empty list of messages", field="prompt")
    if prompt[-1].get("role") == "assistant":
        raise ExampleError(
            "ends with an assistant message; move it to the response", field="prompt"
        )


def _check_response(prompt: Prompt, response: Response, index: int) -> None:
    if isinstance(response, str):
        if not response:
            raise ExampleError("is empty", field="response", index=index)
        return
    if isinstance(prompt, str):
        reason = "is chat messages, but the prompt is text; make both the same"
        raise ExampleError(reason, field="response", index=index)
    if len(response) != 1 or response[0].get("role") != "assistant":
        reason = "must be one assistant message; earlier turns go in the prompt"
        raise ExampleError(reason, field="response", index=index)
    if not response[0].get("content") and not response[0].get("tool_calls"):
        raise ExampleError("is empty", field="response", index=index)


def _assistant_message(response: Response) -> Message:
    if isinstance(response, str):
        return {"role": "assistant", "content": response}
    return response[0]


def _prompt_text(
    prompt: list[Message], tokenizer: Tokenizer, chat_template_kwargs: Mapping[str, Any] | None
) -> str:
    """The part of the generation prompt that also stands before a given response."""
    chat = functools.partial(
        apply_chat_template, tokenizer=tokenizer, chat_template_kwargs=chat_template_kwargs
    )
    opening = chat(prompt, add_generation_prompt=True)
    probed = chat([*prompt, _assistant_message(_PROBE)])
    if probed.startswith(opening):
        return opening
    shared = opening[: shared_length(opening, probed)]
    if not shared.startswith(chat(prompt)):
        _fail_rewritten(opening, probed)
    return shared


def shared_length(first: Sequence[Any], second: Sequence[Any]) -> int:
    """How long what both texts, or both lists of ids, begin with is."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def _fail_rewritten(before: str, after: str) -> NoReturn:
    position = shared_length(before, after)
    raise UserError(
        "the chat template writes the conversation before a response otherwise once the response is"
        f" there: {before[position : position + 40]!r} becomes"
        f" {after[position : position + 40]!r}; use a template that only appends, or text prompts"
    )


def _encode_response(rendered: Rendered, tokenizer: Tokenizer, add_eos: bool) -> list[int]:
    if rendered.end_token is None:
        return tokenizer.encode_response(rendered.response_text, add_eos=add_eos)
    text = rendered.response_text
    if not add_eos:
        text = text.removesuffix(rendered.end_token)
    return tokenizer.encode_response(text, add_eos=False)


def _array(ids: list[int]) -> TokenIds:
    return np.asarray(ids, dtype=np.int32)


def _as_templates_expect(message: Message) -> Message:
    """Leaves out null fields, and gives reasoning under each name that templates read."""
    given = {name: value for name, value in message.items() if value is not None}
    reasoning = next((given[name] for name in _REASONING if name in given), None)
    if reasoning is None:
        return given
    return {"thinking": reasoning, **given, "reasoning_content": reasoning}


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what the assistant wrote; here the block is plain text."""

    tags = {"generation"}  # noqa: RUF012, the base class declares it so

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(jinja2.utils.Namespace):
    """Templates come from strangers: no underscore names, by which a sandbox is left."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # `namespace(self=...)` must work
        values = dict(*args[1:], **kwargs)
        for name in values:
            _refuse_private(name)
        jinja2.utils.Namespace.__init__(args[0], values)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


class _Dict:
    """`dict(...)` for templates, without the class behind it."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _refuse_private(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}")


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["dict"] = _Dict()
    environment.globals["namespace"] = _Namespace
    return environment.from_string(template)
