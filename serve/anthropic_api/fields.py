"""`MessageRequest`: the fields of POST /v1/messages, Anthropic's and the server's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pard_onnx.models.checks import require_whole, true_or_false
from pard_onnx.models.errors import BadInput
from pard_onnx.runtime.text.control_tokens import HANDLINGS
from pard_onnx.runtime.text.overflow import OVERFLOWS
from pard_onnx.runtime.text.tools import AUTO, NONE, REQUIRED
from pard_onnx.serve.errors import bad_field
from pard_onnx.serve.fields import (  # fmt: skip
    COMMON,
    MOST_WHOLE,
    Field,
    Form,
    a_list,
    an_object,
    anything,
    flag,
    one_of,
    read_fields,
    stop_texts,
    text,
    whole,
)
from pard_onnx.serve.registry import OpenModel

from .content import Conversation, Message, conversation, tools_of

SWITCH = "enable_thinking"  # the variable by which chat templates turn the thinking on and off
OMITTED = "omitted"
CHOICES = {"auto": AUTO, "any": REQUIRED, "none": NONE}  # of tools


@dataclass(frozen=True, slots=True)
class Thinking:
    """What a request says of the thinking."""

    on: bool
    budget: int | None = None  # tokens
    hidden: bool = False  # whether its text is left out of the answer


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """What a request says of the use of its tools."""

    choice: str | dict[str, Any]
    several: bool  # whether more than one call may be made


def thinking(name: str, value: Any) -> Thinking:
    given = an_object(name, value)
    kind = one_of("enabled", "adaptive", "disabled")(f"{name}.type", given.get("type"))
    shows = given.get("display")
    if shows is not None:
        one_of("summarized", OMITTED)(f"{name}.display", shows)
    budget = None
    if kind == "enabled":
        budget = require_whole(f"{name}.budget_tokens", given.get("budget_tokens"), 1, MOST_WHOLE)
    return Thinking(kind != "disabled", budget, shows == OMITTED)


def tool_choice(name: str, value: Any) -> ToolChoice:
    given = an_object(name, value)
    kind = one_of(*CHOICES, "tool")(f"{name}.type", given.get("type"))
    one = given.get("disable_parallel_tool_use")
    several = one is None or not true_or_false(f"{name}.disable_parallel_tool_use", one)
    if kind != "tool":
        return ToolChoice(CHOICES[kind], several)
    function = {"name": text(f"{name}.name", given.get("name"))}
    return ToolChoice({"type": "function", "function": function}, several)


def output_format(name: str, value: Any) -> dict[str, Any]:
    """The format in OpenAI's form."""
    given = an_object(name, value)
    one_of("json_schema")(f"{name}.type", given.get("type"))
    return {"type": "json_schema", "json_schema": {"schema": an_object(f"{name}.schema", given.get("schema"))}}


def output_config(name: str, value: Any) -> dict[str, Any] | None:
    """The format in it; the rest has no effect."""
    found = an_object(name, value).get("format")
    return None if found is None else output_format(f"{name}.format", found)


def stop_sequences(name: str, value: Any) -> list[str]:
    return stop_texts(name, a_list(name, value))


OF_OPENAI = ("n", "stream_options", "stop", "response_format")  # forms that Anthropic has its own fields for
MESSAGES = Form(
    {
        **{name: one for name, one in COMMON.items() if name not in OF_OPENAI},
        "messages": Field(a_list),
        "system": Field(anything),
        "max_tokens": Field(whole(1, MOST_WHOLE), "max_new_tokens"),
        "stop_sequences": Field(stop_sequences, "stop"),
        "tools": Field(tools_of, "tools"),
        "tool_choice": Field(tool_choice),
        "thinking": Field(thinking),
        "output_config": Field(output_config),
        "output_format": Field(output_format),
        "stream": Field(flag),
        "chat_template_kwargs": Field(an_object, "template_arguments"),
        "special_tokens": Field(one_of(*HANDLINGS), "special_tokens"),
        "overflow": Field(one_of(*OVERFLOWS), "overflow"),
    },
    frozenset(
        [
            "metadata",
            "cache_control",
            "service_tier",
            "inference_geo",
            "speed",
            "diagnostics",
            "context_management",
            "user_profile_id",
            "workspace_id",
            "anthropic_version",
            "anthropic_beta",
            "betas",
        ]
    ),
    {
        "mcp_servers": "the server calls no other servers; give their tools in tools, and run them",
        "container": "the server runs no code; leave it out",
        "fallbacks": "the server has no fallbacks; name one model",
    },
)


@dataclass(frozen=True, slots=True)
class MessageRequest:
    """What a request for a message asks for."""

    model: str | None
    conversation: Conversation
    options: Mapping[str, Any]  # keyword arguments of `Pair.stream`
    thinking: Thinking | None
    stream: bool

    @classmethod
    def read(cls, body: object, *, strict: bool, counts: bool = False) -> MessageRequest:
        """counts: whether only tokens are counted. Raises ApiError (400), which names the field."""
        found = read_fields(body, MESSAGES, strict=strict)
        own, options = found.own, found.options
        if "max_new_tokens" not in options and not counts:
            raise bad_field("max_tokens", "max_tokens: give the most tokens that the answer may have")
        if not own.get("messages"):
            raise bad_field("messages", "messages: give a list of at least one message")
        if not options.get("tools", True):
            del options["tools"]
        if "tool_choice" in own:
            chosen = own["tool_choice"]
            options |= {"tool_choice": chosen.choice, "parallel_tool_calls": chosen.several}
        try:
            spoken = conversation(own.get("system"), own["messages"])
        except BadInput as error:
            raise bad_field("messages", str(error)) from error
        formats = [own[name] for name in ("output_config", "output_format") if own.get(name)]
        if formats:
            options["response_format"] = formats[0]
        if spoken.continued:
            require_free(own.get("thinking"), bool(formats))
            options["continue_final_message"] = True
        return cls(own.get("model"), spoken, options, own.get("thinking"), own.get("stream", False))

    @property
    def messages(self) -> list[Message]:
        return self.conversation.messages

    @property
    def shows_thinking(self) -> bool:
        """Whether the answer has the text of the thinking."""
        return self.thinking is None or not self.thinking.hidden

    def options_for(self, model: OpenModel) -> dict[str, Any]:
        """The options for this model: its chat template may have a switch for the thinking, and its model may think all
        the same."""
        options, wanted = dict(self.options), self.thinking
        if wanted is None:
            return options
        if SWITCH in model.pair.text.template:
            options["template_arguments"] = {SWITCH: wanted.on, **options.get("template_arguments", {})}
        budget = wanted.budget if wanted.on else 0
        return options if budget is None else {**options, "max_reasoning_tokens": budget}


def require_free(wanted: Thinking | None, has_format: bool) -> None:
    """ApiError (400) for what cannot be beside a reply that has begun."""
    budgeted = wanted is not None and wanted.budget is not None
    for name, given in (("output_config.format", has_format), ("thinking", budgeted)):
        if given:
            message = f"the last message begins the reply, and {name} is not possible then; end with one of the user"
            raise bad_field("messages", f"messages: {message}")
