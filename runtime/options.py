"""`Options` of a generation, checked when they are made."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, TypedDict, cast

from pard_onnx.models.checks import (
    AUTO,
    DRAFT_LIMIT,
    finite_number,
    function,
    listed,
    nearest_name,
    require_whole,
    true_or_false,
    whole_number,
)
from pard_onnx.models.errors import BadInput, shown

from .guided.calls import call_grammar
from .guided.grammar import Grammar, chosen_grammar
from .sampling.logprobs import checked_top
from .sampling.processor import LogitsProcessor
from .sampling.settings import STARTS, Sampling
from .text.control_tokens import checked_handling
from .text.overflow import Overflow, checked_overflow
from .text.reply import ReplyForm
from .text.template import checked_arguments
from .text.tokenizer import Text
from .text.tools import Tool, ToolChoice, ToolUse, checked_tools
from .text.writer import StopWhen, checked_stops


class OptionArguments(TypedDict, total=False):
    """The keyword arguments of `generate`, `stream`, `chat.send` and `chat.stream`; see `Options` and `Sampling`.

    sampling: where the settings of `Sampling` start from, "greedy" (the default) or "model", the model's own
    generation_config.json. Settings that are given beat it.
    """

    max_new_tokens: int
    draft_length: int | Literal["auto"]
    lookup: bool
    stop: str | Sequence[str]
    stop_token_ids: int | Sequence[int]
    exact: bool
    chat: bool
    template_arguments: Mapping[str, object]
    special_tokens: Literal["text", "encode", "refuse"]
    timeout: float | None
    response_format: Any
    regex: str | None
    choice: Sequence[str] | None
    grammar: str | Grammar | None
    sampling: Literal["greedy", "model"]
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    seed: int | None
    logprobs: int | None
    prompt_logprobs: int | None
    tools: Sequence[Tool | Callable[..., Any]] | None
    tool_choice: ToolChoice | None
    parallel_tool_calls: bool
    max_reasoning_tokens: int | None
    stop_when: StopWhen | None
    logits_processor: LogitsProcessor | None
    overflow: Overflow
    continue_final_message: bool


GREEDY = Sampling()
FUNCTIONS = {  # by option: the arguments of the user's function
    "stop_when": ("the text so far", "the tokens so far"),
    "logits_processor": ("the tokens before a row", "the row"),
}
SAMPLING = tuple(setting.name for setting in fields(Sampling))


@dataclass(frozen=True, slots=True)
class Options:
    """How one generation runs. BadInput names the value and the fix."""

    max_new_tokens: int = 128
    # The number of tokens that are drafted in a round, 1 to 32; 0 is plain decoding; "auto" decides it anew for each
    # round, from the measured costs of steps and the acceptance of drafts.
    draft_length: int | Literal["auto"] = AUTO
    lookup: bool = True  # with "auto": repetitions of earlier text are proposed, too
    # Strings that end the text, of which they are not a part. Special tokens in them are meant as tokens, too.
    stop: str | Sequence[str] = ()
    stop_token_ids: int | Sequence[int] = ()  # ids that end the text as the model's own EOS does; kept as a tuple
    exact: bool = True  # plain decoding and any draft give the same tokens, bit for bit, on quantized targets too
    chat: bool = False  # a text prompt is a user's message, to which the chat template is applied
    # Further variables of the chat template by name, as apply_chat_template's keywords: tools, enable_thinking, ...
    template_arguments: Mapping[str, object] = field(default_factory=dict, hash=False)
    # What becomes of special tokens, such as <|im_end|>, in messages of users and tools: they stay text ("text"),
    # "encode" makes tokens of them, "refuse" raises BadInput. Those of a plain prompt are always encoded.
    special_tokens: Literal["text", "encode", "refuse"] = "text"
    # Seconds after which the generation ends with the text so far. Failure where a prompt of megabytes is not encoded
    # by then.
    timeout: float | None = None
    sampling: Sampling = GREEDY
    # What the model of a chat may call: Python functions with type hints and docstrings, or OpenAI's JSON objects; kept
    # as the latter.
    tools: Sequence[Tool | Callable[..., Any]] | None = field(default=(), hash=False)
    # "auto": the model may call tools; "none": it is not told of them; "required": it must call one or more; the name
    # of a tool, or OpenAI's object with it: it must call this one; OpenAI's allowed_tools: "auto" or "required" with
    # some of the tools. Calls that must be made follow the tools' schemas.
    tool_choice: ToolChoice | None = field(default="auto", hash=False)
    parallel_tool_calls: bool = True  # False: the reply ends with its first call
    # The thinking of a chat's model ends after so many tokens; None: where the model ends it
    max_reasoning_tokens: int | None = None
    # What the text must be: at most one of these, which is kept as `grammar`. llguidance follows it (extra `guided`).
    # Where max_new_tokens, a stop string or the timeout ends the generation, the text may be a beginning only.
    # JSON: {"type": "json_object"}, {"type": "json_schema", "json_schema": {"schema": ...}}, a JSON schema as it is, or
    # a pydantic model
    response_format: Any = None
    regex: str | None = None  # a regular expression that matches the whole text
    choice: Sequence[str] | None = None  # one of these texts
    grammar: str | Grammar | None = None  # llguidance's variant of Lark, or a `Grammar`
    # The log probability of each new token, and of so many most likely ones for its place (0 to 20); None: none. They
    # are the model's own, before penalties, bias, grammars and filters, and the same whatever is drafted.
    logprobs: int | None = None
    prompt_logprobs: int | None = None  # as `logprobs`, of the prompt's tokens, which are then all computed anew
    # A function of the text and the tokens so far, called after each token: True ends the text with that token. What it
    # raises ends the generation.
    stop_when: StopWhen | None = None
    # A function of the tokens before a row, those of the prompt included, and the row of logits, [vocabulary], after
    # penalties and logit_bias: it returns the row to choose from. It must depend on nothing else, or the text depends
    # on drafts.
    logits_processor: LogitsProcessor | None = None
    # What becomes of a conversation that leaves no room for the reply: "error" refuses one that fills the capacity,
    # "drop-oldest" and "drop-middle" leave out whole turns, see `text/overflow.py`.
    overflow: Overflow = "error"
    # The reply goes on with the last message, an assistant's, whose text it does not repeat. A grammar is for what is
    # written anew.
    continue_final_message: bool = False

    def __post_init__(self) -> None:
        keep = object.__setattr__
        keep(self, "tools", checked_tools(self.tools))
        keep(self, "parallel_tool_calls", true_or_false("parallel_tool_calls", self.parallel_tool_calls))
        if self.max_reasoning_tokens is not None:
            keep(self, "max_reasoning_tokens", require_whole("max_reasoning_tokens", self.max_reasoning_tokens, 0))
        keep(self, "template_arguments", checked_arguments(self.template_arguments))
        checked_handling(self.special_tokens)
        if not isinstance(self.sampling, Sampling):
            raise BadInput(f"the sampling of Options must be a Sampling, not {shown(self.sampling)}")
        keep(self, "stop", checked_stops(self.stop))
        keep(self, "stop_token_ids", checked_ids(self.stop_token_ids))
        keep(self, "max_new_tokens", require_whole("max_new_tokens", self.max_new_tokens, 1))
        for name in ("lookup", "exact", "chat", "continue_final_message"):
            keep(self, name, true_or_false(name, getattr(self, name)))
        if isinstance(self.draft_length, str) and self.draft_length != AUTO:
            raise BadInput(f"draft_length must be 'auto' or from 0 to {DRAFT_LIMIT}, not {shown(self.draft_length)}")
        if not isinstance(self.draft_length, str):
            keep(self, "draft_length", require_whole("draft_length", self.draft_length, 0, DRAFT_LIMIT))
        for name in ("logprobs", "prompt_logprobs"):
            keep(self, name, checked_top(name, getattr(self, name)))
        checked_overflow(self.overflow)
        for name, taken in FUNCTIONS.items():
            if getattr(self, name) is not None:
                function(name, getattr(self, name), *taken)
        if self.timeout is not None:
            keep(self, "timeout", checked_timeout(self.timeout))
        keep(self, "grammar", chosen_grammar(self.response_format, self.regex, self.choice, self.grammar))
        for name in ("response_format", "regex", "choice"):
            keep(self, name, None)
        guide, use = self.guide, ToolUse.of(self.described_tools, self.tool_choice, self.parallel_tool_calls)
        if guide and use and use.forced:
            raise BadInput(
                f"{guide.argument} and a tool_choice that makes calls cannot both hold; leave one of them out"
            )

    @property
    def guide(self) -> Grammar | None:
        """What the text must be; None where it is free."""
        return self.grammar if isinstance(self.grammar, Grammar) else None

    @property
    def described_tools(self) -> tuple[dict[str, Any], ...]:
        """The tools in OpenAI's form."""
        return cast("tuple[dict[str, Any], ...]", self.tools)

    @property
    def tool_use(self) -> ToolUse | None:
        """The tools that the model is told of; None if there are none."""
        if not self.tools:
            return None
        return ToolUse.of(self.described_tools, self.tool_choice, self.parallel_tool_calls)

    def for_reply(self, form: ReplyForm, text: Text) -> Options:
        """The options whose grammar is that of a whole reply: of calls that must be made, and after the reasoning."""
        guide = self.guide
        if form.calls and form.tools and form.tools.forced:
            guide = call_grammar(form.calls, form.tools, text.token_id)
        if guide is None:
            return self
        if form.thinking:
            guide = guide.after(form.thinking.end, form.begun, form.thinking.begin)
        return replace(self, grammar=guide, tools=(), tool_choice=None)

    def require_plain(self) -> None:
        """BadInput for options that only the reply to a chat can have."""
        continued = self.continue_final_message or None
        for name, value in (
            ("tools", self.tools or None),
            ("max_reasoning_tokens", self.max_reasoning_tokens),
            ("continue_final_message", continued),
        ):
            if value is not None:
                raise BadInput(f"{name} is for chats; give messages as the prompt, or chat=True")

    @classmethod
    def from_keywords(
        cls, arguments: Mapping[str, Any], model_sampling: Callable[[], Sampling] = lambda: GREEDY
    ) -> Options:
        """The options from keyword arguments; for an unknown one, BadInput names the most similar known one.

        model_sampling: gives the model's own settings.
        """
        known = [known.name for known in fields(cls)] + list(SAMPLING)
        for name in arguments:
            if name not in known:
                nearest = nearest_name(name, known)
                hint = f"did you mean {nearest}?" if nearest else f"known are {', '.join(known)}"
                raise BadInput(f"unknown option {name}; {hint}")
        start = arguments.get("sampling", STARTS[0])
        if not isinstance(start, str) or start not in STARTS:
            raise BadInput(
                f"sampling must be 'greedy' or 'model', not {shown(start)}; settings are options of their own"
            )
        given = {name: arguments[name] for name in SAMPLING if name in arguments}
        own = {name: value for name, value in arguments.items() if name not in (*SAMPLING, "sampling")}
        return cls(**own, sampling=replace(model_sampling() if start == "model" else GREEDY, **given))


def checked_timeout(value: object) -> float:
    """The user's timeout in seconds; BadInput for what is no number, or not above 0."""
    with suppress(BadInput):
        if (seconds := finite_number("timeout", value)) > 0:
            return seconds
    raise BadInput(f"timeout must be a number of seconds above 0, or None, not {shown(value)}")


def checked_ids(ids: object) -> tuple[int, ...]:
    """The user's stop_token_ids, one id or several; BadInput for what is not an id."""
    several = isinstance(ids, Iterable) and not isinstance(ids, str | bytes | bytearray | Mapping)
    found = tuple(
        whole_number("an id of stop_token_ids", item) for item in (listed(ids, "stop_token_ids") if several else [ids])
    )
    for token in found:
        if token < 0:
            raise BadInput(f"an id of stop_token_ids must be at least 0, not {token}")
    return found
