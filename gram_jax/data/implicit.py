"""Preferences whose prompt stands in both responses, at their beginning.

Of chat messages, the prompt is what both conversations begin with: all but their last messages. Of
text, it is the common beginning up to the last place where words end in both, so that no word is
cut in two; the blank belongs to the response. As the two responses may still begin alike, that
place need not be where the asker saw the prompt end; what they share is in both scores and cancels
in their difference. Text with dialogue turns as in hh-rlhf is cut after its last "Assistant:".
"""

from __future__ import annotations

from gram_jax.data.record import Record
from gram_jax.data.sources import PreferenceRow, Prompt, Response
from gram_jax.pair import Pair

_TURN = "\n\nAssistant:"


def implicit_row(record: Record) -> PreferenceRow:
    """The columns chosen and rejected, each with the prompt in it."""
    chosen, rejected = record.value("chosen"), record.value("rejected")
    if isinstance(chosen, list) or isinstance(rejected, list):
        return _conversations(record)
    if record.values.get("prompt") is not None:
        reason = "stands beside responses that hold the prompt; say config.data.format=preferences"
        raise record.error("prompt", f"{reason} if they do not, or remove it")
    a, b = record.text("chosen"), record.text("rejected")
    if _TURN in a and _TURN in b:
        return hh_row(record)
    end = _shared_words(a, b)
    if not end:
        reason = "begins otherwise than chosen, so there is no prompt; write it as column prompt"
        raise record.error("rejected", reason)
    return _row(record, a[:end], a[end:], b[end:])


def hh_row(record: Record) -> PreferenceRow:
    """hh-rlhf: a dialogue with a last turn of the assistant, which is the response.

    The prompt ends with "Assistant:", and the response begins with the blank after it.
    """
    prompts, responses = [], []
    for field in ("chosen", "rejected"):
        before, turn, response = record.text(field).rpartition(_TURN)
        if not turn:
            raise record.error(field, 'must be a dialogue with turns "\\n\\nAssistant:"')
        if not response.strip():
            raise record.error(field, "ends with an empty turn of the assistant")
        prompts.append(before + turn)
        responses.append(response)
    if prompts[0] != prompts[1]:
        raise record.error("rejected", "is another dialogue than chosen, before its last turn")
    return _row(record, prompts[0], *responses)


def _conversations(record: Record) -> PreferenceRow:
    chosen, rejected = record.messages("chosen"), record.messages("rejected")
    if len(chosen) < 2 or chosen[:-1] != rejected[:-1]:
        reason = "must be chosen with another last message, after one message at least"
        raise record.error("rejected", reason)
    prompt = record.values.get("prompt")
    if prompt is not None and all(message.get("content") != prompt for message in chosen[:-1]):
        reason = "is not what a message of chosen says, so it is not clear which of them is meant"
        raise record.error("prompt", reason)
    return _row(record, chosen[:-1], chosen[-1:], rejected[-1:])


def _row(record: Record, prompt: Prompt, chosen: Response, rejected: Response) -> PreferenceRow:
    prompt = record.in_context(prompt)
    return record.comparison(
        prompt,
        (
            record.as_response(chosen, "chosen", prompt),
            record.as_response(rejected, "rejected", prompt),
        ),
        ("chosen", "rejected"),
        Pair(0, 1, margin=record.number("margin", 0.0)),
        record.optional_text("subset"),
    )


def _shared_words(a: str, b: str) -> int:
    """Length of the longest common beginning that ends where a word ends and more follows."""
    end = next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )
    while end and not (
        not a[end - 1].isspace()
        and a[end : end + 1].isspace()
        and b[end : end + 1].isspace()
        and a[end:].strip()
        and b[end:].strip()
    ):
        end -= 1
    return end
