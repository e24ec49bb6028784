"""`Reply`: the text of one reply of a chat, parted into reasoning, calls of tools, and the answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from hashlib import blake2b

from pard_onnx.models.errors import BadInput

from .reasoning import ReasoningBudget, Thinking, ThinkingReader, thinking_of
from .tokenizer import Text
from .tool_calls import CallReader, ToolCall, ToolCallDelta
from .tool_formats import ToolFormat, tool_format
from .tools import ToolUse
from .writer import MARK, Stops

SHORT_ID = 9  # characters
TAIL = 16  # tokens at the end of a prompt that may be the first tag of the thinking and line ends


@dataclass(frozen=True, slots=True)
class ReplyForm:
    """How the reply to one prompt is read."""

    thinking: Thinking | None = None  # how the model thinks; None: it does not
    begun: bool = False  # whether the prompt ends in the first tag of the thinking
    tools: ToolUse | None = None  # None: no tool is called
    calls: ToolFormat | None = None  # how the model writes calls
    parameters: Mapping[str, Sequence[str]] = field(default_factory=dict)  # of each tool, by name

    @property
    def tags(self) -> tuple[str, ...]:
        """Texts that may be special tokens of a tokenizer, and are then not in the decoded text."""
        return (*(self.thinking.tags if self.thinking else ()), *(self.calls.tags if self.calls else ()))

    def reader(self, prompt: Sequence[int], stops: Stops) -> Reply:
        """Of one generation; see `Reply`."""
        calls, guided = None, self.tools is not None and bool(self.tools.forced)
        if self.tools and self.calls:
            make_id = call_ids(prompt, short=self.calls.short_ids)
            calls = self.calls.reader(self.parameters, make_id, tags=stops.tags, guided=guided)
        one_call = self.tools is not None and not self.tools.several
        thinking = thinking_reader(self.thinking, self.begun, stops.tags) if self.thinking else None
        return Reply(thinking, calls, one_call=one_call, guided=guided)

    def budget(
        self,
        thinking: Thinking,
        tokens: int,
        cut: Sequence[int],
        stops: Stops,
        push: Callable[[int], str],
        prompt_length: int,
    ) -> ReasoningBudget:
        """The budget of one generation. push: decodes the reply's tokens; others as of `ReasoningBudget`."""
        reader = thinking_reader(thinking, self.begun, stops.tags)

        def text(token: int) -> str:
            return push(token) + stops.marks.get(token, "")

        return ReasoningBudget(tokens, cut, reader, text, prompt_length)


def thinking_reader(thinking: Thinking, begun: bool, tags: Mapping[str, str]) -> ThinkingReader:
    """tags: what stands in the text for those that are special tokens."""
    begin, end = thinking.tags
    return ThinkingReader(tags.get(begin, begin), tags.get(end, end), begun)


def with_tools(text: Text, arguments: Mapping[str, object], use: ToolUse | None) -> Mapping[str, object]:
    """The template's variables with the tools; BadInput where its template cannot tell the model of them, or where
    the form of its calls is not known."""
    if use is None:
        return arguments
    if arguments.get("tools"):
        raise BadInput("tools are given twice, as tools= and in template_arguments; leave those out")
    if not text.writes_tools():
        raise BadInput("this model's chat template ignores tools; describe them in a message, or use another model")
    if tool_format(text.template) is None:
        raise BadInput(
            "this model writes calls of tools in a form that is not known; give the tools in template_arguments, and "
            "the reply's text has the calls as the model writes them"
        )
    return {**arguments, "tools": list(use.tools)}


def reply_form(
    text: Text, prompt: Sequence[int], use: ToolUse | None, arguments: Mapping[str, object], opening: str = ""
) -> ReplyForm | None:
    """How the reply to a conversation is read; None if all of it is the answer.

    prompt: the conversation's ids; arguments: the template's variables. opening: the text that the reply continues.
    """
    thinking = thinking_of(text.template, lambda tag: text.token_id(tag) is not None)
    if thinking is None and use is None:
        return None
    tail = text.decode(prompt[-TAIL:], skip_special_tokens=False).rstrip()
    begun = thinking is not None and (
        tail.endswith(thinking.begin) or opening.rfind(thinking.begin) > opening.rfind(thinking.end)
    )
    if use is None:
        return ReplyForm(thinking, begun)
    return ReplyForm(thinking, begun, use, tool_format(text.template), use.parameters(arguments))


class Reply:
    """Parts a text, as it comes. The reader takes what it has found in between."""

    def __init__(
        self,
        thinking: ThinkingReader | None,
        calls: CallReader | None,
        *,
        one_call: bool = False,
        guided: bool = False,
    ) -> None:
        """one_call: the reply ends with its first call. guided: calls are all that the answer may have."""
        self._thinking, self._calls, self._one_call, self._guided = thinking, calls, one_call, guided
        self._parts: list[str] = []
        self._reasoning: list[str] = []  # since the last `take`
        self._deltas: list[ToolCallDelta] = []

    @property
    def reasoning(self) -> str:
        """All of it so far."""
        return "".join(self._parts)

    @property
    def calls(self) -> tuple[ToolCall, ...]:
        """Those that are complete."""
        found = tuple(self._calls.calls) if self._calls else ()
        return found[:1] if self._one_call else found

    @property
    def ended(self) -> bool:
        """Whether there is a call, and no other may follow."""
        return self._one_call and bool(self.calls)

    @property
    def found(self) -> bool:
        """Whether there is something to take."""
        return bool(self._reasoning or self._deltas)

    def take(self) -> tuple[str, tuple[ToolCallDelta, ...]]:
        """The reasoning, and the parts of calls, since this was last called."""
        taken = "".join(self._reasoning), tuple(self._deltas)
        self._reasoning, self._deltas = [], []
        return taken

    def push(self, text: str) -> str:
        """The answer's text in this piece of text."""
        return self._part(text, ended=False)

    def finish(self) -> str:
        """The answer's text that was held back, once the reply has ended."""
        return self._part("", ended=True)

    def _part(self, text: str, *, ended: bool) -> str:
        if self._thinking:
            parted = self._thinking.finish() if ended else self._thinking.push(text)
            if parted.reasoning:
                self._parts.append(parted.reasoning)
                self._reasoning.append(parted.reasoning)
            text = parted.text
        if self._calls is None:
            return MARK.sub("", text)
        found = self._calls.push(text)
        answer, deltas = found.text, found.calls
        if ended:
            last = self._calls.finish()
            answer, deltas = answer + last.text, deltas + last.calls
        self._deltas += [delta for delta in deltas if not self._one_call or delta.index == 0]
        return "" if self._guided else answer  # where calls must be made, this is the beginning of one that was cut


def call_ids(prompt: Sequence[int], *, short: bool) -> Callable[[int], str]:
    """Ids of calls: the same for the same prompt and place, so that a generation can be repeated."""

    @cache
    def make(index: int) -> str:
        digest = blake2b(repr((index, list(prompt))).encode(), digest_size=12, usedforsecurity=False).hexdigest()
        return digest[:SHORT_ID] if short else f"call_{digest}"

    return make
