"""Requests in Ollama's form: the fields of chats and of prompts, and what they are for `Pair.stream`."""

from __future__ import annotations

import re
from collections import OrderedDict, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf
from typing import Any

from pard_onnx.models.checks import finite_number, require_whole
from pard_onnx.models.errors import BadInput, shown
from pard_onnx.runtime.guided.grammar import Grammar
from pard_onnx.runtime.sampling.logprobs import MOST_TOP
from pard_onnx.runtime.sampling.settings import MOST_SEED
from pard_onnx.runtime.text.overflow import DROP_OLDEST, turns_of
from pard_onnx.serve.errors import ApiError, bad_field
from pard_onnx.serve.fields import (
    CHAT,
    MOST_WHOLE,
    Check,
    Field,
    Form,
    a_list,
    an_object,
    flag,
    read_fields,
    text,
    token_ids,
    whole,
)

Message = dict[str, Any]
LATEST = ":latest"  # the tag that names have in Ollama where none is given
NO_MODEL = "model is required; GET /api/tags lists the models"
LEVELS = ("low", "medium", "high", "max")  # of thinking
# Go's notation of durations: "1h30m", "1.5s", "-1m"
PART = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(ns|us|µs|μs|ms|s|m|h)", re.ASCII)
DURATION = re.compile(rf"[-+]?(?:0|(?:{PART.pattern})+)", re.ASCII)
SECONDS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
LONGEST = 1e9  # seconds, 31 years; longer is for ever


# Checks


def name_of_model(name: str, value: Any) -> str:
    if not text(name, value):
        raise BadInput(NO_MODEL)
    return str(value)


def keep_alive(name: str, value: Any) -> float:
    """Seconds; inf for ever, as any negative value says."""
    if isinstance(value, str):
        if len(value) > 64 or not DURATION.fullmatch(value):
            raise BadInput(f'{name} must be a number of seconds or a duration such as "5m", not {shown(value)}')
        seconds = sum(float(amount) * SECONDS[unit] for amount, unit in PART.findall(value))
        seconds = -seconds if value.startswith("-") else seconds
    else:
        seconds = finite_number(name, value)
    return seconds if 0 <= seconds <= LONGEST else inf


def thinking(name: str, value: Any) -> bool | str:
    if isinstance(value, bool) or value in LEVELS:
        return value  # type: ignore[no-any-return]
    raise BadInput(f"{name} must be true, false or one of {', '.join(LEVELS)}, not {shown(value)}")


def output_format(name: str, value: Any) -> Grammar | None:
    """ "json", a JSON schema, or "" for free text."""
    if value == "":
        return None
    if value == "json":
        return Grammar.json_schema({"type": "object"}, name)
    if not isinstance(value, dict):
        raise BadInput(f'{name} must be "json" or a JSON schema, not {shown(value)}')
    return Grammar.json_schema(value, name)


def described_tools(name: str, value: Any) -> list[Any]:
    """The type of a tool may be left out; the library checks the rest."""
    return [{"type": "function", **one} if isinstance(one, dict) else one for one in a_list(name, value)]


def seed(name: str, value: Any) -> int | None:
    """A negative seed asks for a fresh one."""
    found = require_whole(name, value, -MOST_WHOLE, MOST_SEED)
    return found if found >= 0 else None


def top_k(name: str, value: Any) -> int:
    return max(0, require_whole(name, value, -1, MOST_WHOLE))


def repeat_penalty(name: str, value: Any) -> float:
    found = finite_number(name, value)
    if not 0 < found <= 100:
        raise BadInput(f"{name} must be above 0 and at most 100, not {shown(value)}")
    return found


def nothing(why: str, *usual: Any) -> Check:
    """A field that is refused unless it has a value that says nothing. why: the reason, with the fix."""

    def check(name: str, value: Any) -> None:
        if value not in ("", [], *usual) or isinstance(value, bool):
            raise BadInput(f"{name}: {why}")

    return check


# Forms

NO_IMAGES = nothing("the model reads text only; leave the images out")
NO_PICTURE = nothing("the model writes text only; leave it out", 0)
NO_MIROSTAT = nothing("the server has no mirostat sampling; give 0, or leave it out", 0)
ALIKE = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "logit_bias", "stop")
OWN = ("stop_token_ids", "draft_length", "lookup", "max_reasoning_tokens", "special_tokens", "overflow")
OPTIONS = Form(
    {
        **{name: CHAT.fields[name] for name in (*ALIKE, *OWN)},
        "top_k": Field(top_k, "top_k"),
        "seed": Field(seed, "seed"),
        "num_predict": Field(whole(-2, MOST_WHOLE)),
        "repeat_penalty": Field(repeat_penalty, "repetition_penalty"),
        "mirostat": Field(NO_MIROSTAT),
        "tfs_z": Field(nothing("the server has no tail-free sampling; give 1, or leave it out", 1)),
        "typical_p": Field(nothing("the server has no typical sampling; give 1, or leave it out", 1)),
    },
    frozenset(
        [  # how a model is loaded, which was decided when it was exported, and what the options above make idle
            "numa", "num_ctx", "num_batch", "num_gpu", "main_gpu", "low_vram", "f16_kv", "logits_all", "vocab_only",
            "use_mmap", "use_mlock", "embedding_only", "num_thread", "num_keep", "repeat_last_n", "penalize_newline",
            "mirostat_tau", "mirostat_eta",
        ]
    ),
    {},
)  # fmt: skip
COMMON = {
    "model": Field(name_of_model),
    "stream": Field(flag),
    "format": Field(output_format, "grammar"),
    "options": Field(an_object),
    "keep_alive": Field(keep_alive),
    "think": Field(thinking),
    "logprobs": Field(flag),
    "top_logprobs": Field(whole(0, MOST_TOP)),
    "truncate": Field(flag),
}
IGNORED = frozenset(["shift", "runner"])
CHATS = Form({**COMMON, "messages": Field(a_list), "tools": Field(described_tools)}, IGNORED, {})
PROMPTS = Form(
    {
        **COMMON,
        "prompt": Field(text),
        "system": Field(text),
        "context": Field(token_ids),
        "raw": Field(flag),
        "images": Field(NO_IMAGES),
        "suffix": Field(nothing("the model does not fill in the middle of a text; leave it out")),
        "template": Field(
            nothing("templates in Go's language are not read; write the whole prompt yourself and give raw: true")
        ),
        "width": Field(NO_PICTURE),
        "height": Field(NO_PICTURE),
        "steps": Field(NO_PICTURE),
    },
    IGNORED,
    {},
)
MESSAGE = Form(
    {
        "role": Field(text),
        "content": Field(text),
        "thinking": Field(text),
        "images": Field(NO_IMAGES),
        "tool_calls": Field(a_list),
        "tool_name": Field(text),
        "tool_call_id": Field(text),
    },
    frozenset(),
    {},
)


@dataclass(frozen=True, slots=True)
class OllamaRequest:
    """What a request for a chat, or for the answer to a prompt, asks for."""

    model: str  # as the client names it
    options: dict[str, Any]  # keyword arguments of `Pair.stream`
    stream: bool
    think: bool | str | None  # None: what the chat template does by itself
    keep_alive: float | None  # seconds that the model stays loaded from now on; None: as before
    messages: list[Message] = field(default_factory=list)
    raw: str = ""  # a prompt that is continued as it is, instead of messages
    context: tuple[int, ...] = ()  # the tokens of an earlier answer, with its prompt, which the messages follow
    tells_context: bool = False  # whether the answer ends with the tokens of the conversation

    @property
    def name(self) -> str:
        """The model's name here."""
        return self.model.removesuffix(LATEST)

    @property
    def is_empty(self) -> bool:
        """Whether nothing is asked: the request loads or unloads the model."""
        return not self.messages and not self.raw

    @classmethod
    def of_chat(cls, body: object, *, strict: bool) -> OllamaRequest:
        """Raises ApiError (400), which names the field."""
        found = read_fields(body, CHATS, strict=strict)
        own, options = found.own, found.options
        common = common_fields(own, options, strict=strict)
        if own.get("tools"):
            options["tools"] = own["tools"]
        messages = conversation(own.get("messages", []), strict=strict)
        if own.get("truncate", True) and len(turns_of(messages)) > 1:
            options.setdefault("overflow", DROP_OLDEST)
        return cls(**common, messages=messages)

    @classmethod
    def of_prompt(cls, body: object, *, strict: bool) -> OllamaRequest:
        """Raises ApiError (400), which names the field."""
        found = read_fields(body, PROMPTS, strict=strict)
        own = found.own
        common = common_fields(own, found.options, strict=strict)
        prompt, system, context = own.get("prompt", ""), own.get("system", ""), tuple(own.get("context", ()))
        if own.get("raw"):
            if system or context:
                raise bad_field("raw", "raw does not support system or context; write them into the prompt")
            return cls(**common, raw=prompt)
        messages: list[Message] = [{"role": "system", "content": system}] if system and prompt else []
        messages += [{"role": "user", "content": prompt}] if prompt else []
        return cls(**common, messages=messages, context=context, tells_context=True)


def required_model(own: Mapping[str, Any]) -> str:
    """The model, as the client names it. ApiError (400) where it names none."""
    if "model" not in own:
        raise bad_field("model", NO_MODEL)
    return str(own["model"])


def common_fields(own: Mapping[str, Any], options: dict[str, Any], *, strict: bool) -> dict[str, Any]:
    """The fields that chats and prompts share. options: gets those that are options of a generation."""
    model = required_model(own)
    chosen = read_fields(own.get("options", {}), OPTIONS, strict=strict)
    options |= chosen.options
    if chosen.own.get("num_predict", 0) > 0:  # -1 and -2: as far as the model goes
        options["max_new_tokens"] = chosen.own["num_predict"]
    if own.get("logprobs"):
        options["logprobs"] = own.get("top_logprobs", 0)
    return {
        "model": model,
        "options": options,
        "stream": own.get("stream", True),
        "think": own.get("think"),
        "keep_alive": own.get("keep_alive"),
    }


# Messages


def conversation(items: list[Any], *, strict: bool) -> list[Message]:
    """The messages as chat templates read them. Raises ApiError (400), which names the place."""
    out: list[Message] = []
    waiting = Waiting()
    for number, item in enumerate(items):
        place = f"messages[{number}]"
        if not isinstance(item, dict):
            raise bad_field("messages", f"{place} must be an object with role and content, not {shown(item)}")
        try:
            out.append(message_of(read_fields(item, MESSAGE, strict=strict).own, waiting))
        except (ApiError, BadInput) as error:
            raise bad_field("messages", f"{place}.{error}") from error
    return out


class Waiting:
    """The calls of a conversation that have no result so far.

    In Ollama's form calls have no ids and results name the tool instead. Some templates read ids, so each call gets
    one, and a result has that of the first call of its tool that waits.
    """

    def __init__(self) -> None:
        self._tools: OrderedDict[str, str] = OrderedDict()  # by id
        self._ids: dict[str, deque[str]] = {}  # by tool; some of them have a result
        self._made = 0

    def add(self, tool: str, id_: str | None) -> str:
        """The id of a call, which may have none."""
        id_ = id_ or f"call{self._made:05d}"  # Mistral's templates ask for 9 letters and digits
        self._made += 1
        self._tools[id_] = tool
        self._ids.setdefault(tool, deque()).append(id_)
        return id_

    def take(self, tool: str | None, id_: str | None) -> tuple[str | None, str | None]:
        """The tool and the id of the call that a result belongs to, as far as they are known."""
        if id_ is None and tool is None:
            id_ = next(iter(self._tools), None)
        elif id_ is None and tool is not None:
            ids = self._ids.get(tool, deque())
            while ids and ids[0] not in self._tools:
                ids.popleft()
            id_ = ids[0] if ids else None
        found = self._tools.pop(id_, None) if id_ is not None else None
        return tool or found, id_


def message_of(own: Mapping[str, Any], waiting: Waiting) -> Message:
    """One message."""
    role = own.get("role")
    if not role:
        raise BadInput("role: give system, user, assistant or tool")
    message: Message = {"role": role, "content": own.get("content", "")}
    if own.get("thinking"):
        message["thinking"] = own["thinking"]
    if own.get("tool_calls"):
        message["tool_calls"] = [call_of(number, call, waiting) for number, call in enumerate(own["tool_calls"])]
    if role != "tool":
        return message
    tool, id_ = waiting.take(own.get("tool_name"), own.get("tool_call_id"))
    named = {"name": tool, "tool_call_id": id_}
    return message | {key: value for key, value in named.items() if value is not None}


def call_of(number: int, call: Any, waiting: Waiting) -> dict[str, Any]:
    """One call of a message, in OpenAI's form, with its arguments as an object."""
    place = f"tool_calls[{number}]"
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        raise BadInput(f'{place} must be {{"function": {{"name": ..., "arguments": {{...}}}}}}, not {shown(call)}')
    name, arguments, id_ = function.get("name"), function.get("arguments"), call.get("id")
    if not isinstance(name, str) or not name:
        raise BadInput(f"{place}.function.name must be text, not {shown(name)}")
    if not isinstance(arguments, dict | None):
        raise BadInput(f"{place}.function.arguments must be an object, not {shown(arguments)}")
    if not isinstance(id_, str | None):
        raise BadInput(f"{place}.id must be text, not {shown(id_)}")
    return {"id": waiting.add(name, id_), "type": "function", "function": {"name": name, "arguments": arguments or {}}}
