"""Where the replies stand in the text that a chat template writes of a conversation.

1. A template that has `{% generation %}` says it itself.
2. Of any other template, a reply is what it writes with the assistant's message after what it writes, without that
   message, as the prompt of a reply. Some templates write an earlier reply in another way than the last one (Qwen3
   leaves out its thinking): then a conversation becomes several texts, each up to another reply, since that is what
   the model reads and writes in each turn.
3. Where the prompt is not the beginning of the text (DeepSeek-R1's ends in <think>, which a reply in the history has
   not), and where the template has no prompt of its own for replies, a reply begins with the message's content.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pard_onnx.models.chat_template import GENERATION_MARKS
from pard_onnx.models.errors import BadInput, shown

Message = Mapping[str, Any]
Render = Callable[[Sequence[Message], bool], str]  # messages, and whether the prompt of a reply follows
ASSISTANT, CONTENT = "assistant", "content"
MARKS = range(0xE000, 0xF8FF)  # characters for private use
ADVICE = "put {% generation %} and {% endgeneration %} around the assistant's words in the chat template"


@dataclass(frozen=True, slots=True)
class MarkedText:
    """A text, and which of its characters are replies."""

    text: str
    replies: tuple[tuple[int, int], ...]  # first character, and the one after the last
    by_tags: bool = False  # whether the template itself says where they are


def marked_texts(messages: Sequence[Message], render: Render) -> list[MarkedText]:
    """The texts that a template writes of a conversation, with every reply in one of them; none without a reply.

    Raises BadInput where the template does not say where replies are, and what `render` raises.
    """
    if not any(_is_reply(messages, place) for place in range(len(messages))):
        return []
    return _by_tags(messages, render) or _by_prompts(messages, render)


def _is_reply(messages: Sequence[Message], place: int) -> bool:
    """Whether a message is an assistant's that follows another one; the first of all answers nothing."""
    return place > 0 and messages[place].get("role") == ASSISTANT


# The template says where


def _by_tags(messages: Sequence[Message], render: Render) -> list[MarkedText]:
    """By `{% generation %}`; empty for a template that has none, or changes what it has written in one."""
    plain = render(messages, False)
    before, after = _unused(plain, 2)
    token = GENERATION_MARKS.set((before, after))
    try:
        marked = render(messages, False)
    finally:
        GENERATION_MARKS.reset(token)
    if marked == plain or marked.replace(before, "").replace(after, "") != plain:
        return []
    spans: list[tuple[int, int]] = []
    at, begin, depth = 0, 0, 0
    for character in marked:
        if character == before:
            begin, depth = (at if depth == 0 else begin), depth + 1
        elif character == after:
            depth -= 1
            if depth == 0 and at > begin:
                spans.append((begin, at))
        else:
            at += 1
    return [MarkedText(plain, tuple(spans), by_tags=True)]


# The prompts say where


def _by_prompts(messages: Sequence[Message], render: Render) -> list[MarkedText]:
    out: list[MarkedText] = []
    for place in range(len(messages)):
        if not _is_reply(messages, place):
            continue
        whole = render(messages[: place + 1], False)
        span = (_begin(messages[:place], messages[place], whole, render), len(whole))
        if span[0] >= span[1]:
            continue  # the template leaves out the message
        if out and whole.startswith(out[-1].text):
            out[-1] = MarkedText(whole, (*out[-1].replies, span))
        else:
            out.append(MarkedText(whole, (span,)))
    return out


def _begin(before: Sequence[Message], reply: Message, whole: str, render: Render) -> int:
    """The first character of the last message's reply in `whole`. Raises BadInput where nothing says it."""
    prompt = render(before, True)
    if not whole.startswith(prompt):
        found = _content_begin(before, reply, whole, render)
        if found is None:
            raise BadInput(
                f"the chat template does not say where replies are: its prompt ends in {shown(prompt[-40:])}, and a "
                f"reply in the conversation does not begin so; {ADVICE}"
            )
        return found
    if prompt != render(before, False):
        return len(prompt)
    # No prompt of its own: only what follows a user's message, as "[/INST]" in Mistral's template, may be one
    found = _content_begin(before, reply, whole, render)
    header = whole[len(prompt) : found]
    if header.strip() and _text_of(reply).strip():
        raise BadInput(
            f"the chat template does not say where replies are: it has no prompt for a reply (add_generation_prompt), "
            f"and writes {shown(header)} before one; {ADVICE}"
        )
    return len(prompt)


def _content_begin(before: Sequence[Message], reply: Message, whole: str, render: Render) -> int | None:
    """Where the content of the last message begins in `whole`, or as much of its end as the template writes."""
    content = _text_of(reply)
    kept = content.rstrip()
    if not kept:
        return None
    (mark,) = _unused(whole + content, 1)
    marked = render([*before, {**reply, CONTENT: kept + mark + content[len(kept) :]}], False)
    end = marked.find(mark)
    if end < 0 or marked.replace(mark, "") != whole:
        return None
    count = 0
    while count < len(kept) and count < end and whole[end - 1 - count] == kept[-1 - count]:
        count += 1
    return end - count if count else None


def _text_of(message: Message) -> str:
    content = message.get(CONTENT)
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, Mapping)]
        content = "".join(text for text in texts if isinstance(text, str))
    return content if isinstance(content, str) else ""


def _unused(text: str, count: int) -> list[str]:
    """Characters for private use that the text has not."""
    used = set(text)
    found = [chr(code) for code in MARKS if chr(code) not in used][:count]
    if len(found) < count:
        raise BadInput("the messages have all characters for private use; leave this conversation out")
    return found
