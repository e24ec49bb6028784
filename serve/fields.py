"""The fields of requests in OpenAI's form: what each one is, how it is checked, and which option it sets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pard_onnx.models.checks import AUTO, finite_number, nearest_name, require_whole, true_or_false
from pard_onnx.models.errors import BadInput, shown
from pard_onnx.models.logs import logger
from pard_onnx.runtime.embedding import POOLINGS
from pard_onnx.runtime.sampling.logprobs import MOST_TOP
from pard_onnx.runtime.sampling.settings import MOST_SEED
from pard_onnx.runtime.text.control_tokens import HANDLINGS
from pard_onnx.runtime.text.overflow import OVERFLOWS

from .errors import ApiError, bad_field

LOG = logger(__name__)
Check = Callable[[str, Any], Any]
MOST_WHOLE = 2**53 - 1  # that JSON's readers agree on
MOST_CHOICES = 128  # texts that one request may ask for


@dataclass(frozen=True, slots=True)
class Field:
    """One field. Null is as if it was not given."""

    check: Check  # (name, value) to what is kept; raises BadInput, which names the field
    option: str | None = None  # the keyword of `Pair.stream` that it sets; None for what the server reads itself


@dataclass(frozen=True, slots=True)
class Form:
    """The fields that an endpoint takes."""

    fields: Mapping[str, Field]
    ignored: frozenset[str]  # that have no effect here and are no mistake, under --strict too
    refused: Mapping[str, str]  # fields that would change the answer and cannot be followed, with the fix
    inner: Mapping[str, str] = field(default_factory=dict)  # options that a part of a field sets, with its name

    @property
    def names(self) -> dict[str, str]:
        """Options that requests set by another name, with that name."""
        own = {one.option: name for name, one in self.fields.items() if one.option and one.option != name}
        return own | dict(self.inner)


@dataclass(frozen=True, slots=True)
class Read:
    """The fields of one request."""

    own: Mapping[str, Any]  # what the server reads itself, by field
    options: dict[str, Any]  # keyword arguments of `Pair.stream`


def read_fields(body: object, form: Form, *, strict: bool) -> Read:
    """The fields of a request's body. Raises ApiError (400), which names the first field that cannot be used."""
    if not isinstance(body, dict):
        raise ApiError(400, f"the body of the request must be a JSON object, not {shown(body)}")
    own: dict[str, Any] = {}
    options: dict[str, Any] = {}
    for name, value in body.items():
        if value is None or name in form.ignored:
            continue
        if name in form.refused:
            raise bad_field(name, f"{name}: {form.refused[name]}")
        field = form.fields.get(name)
        if field is None:
            _unknown(name, form, strict)
            continue
        try:
            found = field.check(name, value)
        except BadInput as error:
            raise bad_field(name, str(error)) from error
        if field.option is None:
            own[name] = found
        else:
            options[field.option] = found
    return Read(own, options)


def _unknown(name: str, form: Form, strict: bool) -> None:
    if strict:
        nearest = nearest_name(name, form.fields)
        hint = f"did you mean {nearest}?" if nearest else "leave it out"
        raise bad_field(name, f"{shown(name)}: unknown field; {hint}")
    LOG.debug("unknown field %s is ignored", shown(name))


# Checks


def whole(least: int, most: int | None = None) -> Check:
    return lambda name, value: require_whole(name, value, least, most)


def flag(name: str, value: Any) -> bool:
    return true_or_false(name, value)


def number(least: float, most: float) -> Check:
    def check(name: str, value: Any) -> float:
        found = finite_number(name, value)
        if not least <= found <= most:
            raise BadInput(f"{name} must be from {least:g} to {most:g}, not {shown(value)}")
        return found

    return check


def text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise BadInput(f"{name} must be text, not {shown(value)}")
    return value


def one_of(*known: str) -> Check:
    def check(name: str, value: Any) -> str:
        if value not in known:
            raise BadInput(f"{name} must be {' or '.join(map(repr, known))}, not {shown(value)}")
        return str(value)

    return check


def an_object(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadInput(f"{name} must be an object, not {shown(value)}")
    return value


def only_text(name: str, value: Any) -> list[Any]:
    if value != ["text"]:
        raise BadInput(f'{name}: the model writes text only; give ["text"], or leave it out')
    return ["text"]


def a_list(name: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise BadInput(f"{name} must be a list, not {shown(value)}")
    return value


def stop_texts(name: str, value: Any) -> list[str]:
    """One text or a list of them."""
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list) or not all(isinstance(item, str) and item for item in items):
        raise BadInput(f"{name} must be text of at least one character, or a list of such texts, not {shown(value)}")
    return items


def token_ids(name: str, value: Any) -> list[int]:
    return [require_whole(f"an id of {name}", item, 0) for item in a_list(name, value)]


def token_biases(name: str, value: Any) -> dict[int, float]:
    """Keys of JSON objects are text."""
    out: dict[int, float] = {}
    for key, bias in an_object(name, value).items():
        if not key.isascii() or not key.isdigit() or len(key) > 9:
            raise BadInput(f"{name} must map token ids to numbers; {shown(key)} is no id")
        out[int(key)] = finite_number(f"{name}: the bias of id {key}", bias)
    return out


def draft_length(name: str, value: Any) -> int | str:
    """Ranges are checked by `Options`, which names the option alike."""
    if isinstance(value, str) and value != AUTO:
        raise BadInput(f"{name} must be 'auto' or a whole number, not {shown(value)}")
    return AUTO if isinstance(value, str) else require_whole(name, value, 0)


def anything(name: str, value: Any) -> Any:
    """What the library checks, under the same name."""
    return value


def foreground(name: str, value: Any) -> bool:
    if value is not False:
        raise BadInput(f"{name}: the server answers while the client waits; give false, or leave it out")
    return False


def metadata(name: str, value: Any) -> dict[str, str]:
    """OpenAI's limits: 16 texts of 512 characters, by names of 64."""
    found = an_object(name, value)
    for key, one in found.items():
        if not isinstance(one, str) or len(one) > 512 or len(key) > 64:
            raise BadInput(f"{name} must map names of up to 64 characters to texts of up to 512; {shown(key)} does not")
    if len(found) > 16:
        raise BadInput(f"{name} has {len(found)} names; give at most 16")
    return found


def included(name: str, value: Any) -> list[str]:
    for one in a_list(name, value):
        if not isinstance(one, str) or one not in INCLUDABLE:
            raise BadInput(f"{name}: there is no {shown(one)}; known are {', '.join(INCLUDABLE)}")
    return list(value)


def stream_options(name: str, value: Any) -> bool:
    """Whether the stream ends with the usage."""
    wanted = an_object(name, value).get("include_usage")
    return False if wanted is None else true_or_false(f"{name}.include_usage", wanted)


# Of chats and completions. `Sampling` knows the valid ranges, of which these have the part that can be meant

SAMPLING = {
    "temperature": number(0, 100),
    "top_p": number(0, 1),
    "min_p": number(0, 1),
    "presence_penalty": number(-100, 100),
    "frequency_penalty": number(-100, 100),
    "repetition_penalty": number(0, 100),
    "top_k": whole(0, MOST_WHOLE),
    "seed": whole(0, MOST_SEED),
}
COMMON: dict[str, Field] = {
    "model": Field(text),
    "stream": Field(flag),
    "stream_options": Field(stream_options),
    "n": Field(whole(1, MOST_CHOICES)),
    **{name: Field(check, name) for name, check in SAMPLING.items()},
    "logit_bias": Field(token_biases, "logit_bias"),
    "stop": Field(stop_texts, "stop"),
    "stop_token_ids": Field(token_ids, "stop_token_ids"),
    "draft_length": Field(draft_length, "draft_length"),
    "lookup": Field(flag, "lookup"),
    "response_format": Field(anything, "response_format"),
    "regex": Field(text, "regex"),
    "choice": Field(a_list, "choice"),
    "grammar": Field(text, "grammar"),
}
CONVERSATION: dict[str, Field] = {  # of endpoints whose prompts are conversations
    "tool_choice": Field(anything, "tool_choice"),
    "parallel_tool_calls": Field(flag, "parallel_tool_calls"),
    "chat_template_kwargs": Field(an_object, "template_arguments"),
    "max_reasoning_tokens": Field(whole(0, MOST_WHOLE), "max_reasoning_tokens"),
    "special_tokens": Field(one_of(*HANDLINGS), "special_tokens"),
    "overflow": Field(one_of(*OVERFLOWS), "overflow"),
}
CHAT = Form(
    {
        **COMMON,
        **CONVERSATION,
        "messages": Field(a_list),
        "max_tokens": Field(whole(1, MOST_WHOLE), "max_new_tokens"),
        "max_completion_tokens": Field(whole(1, MOST_WHOLE)),
        "logprobs": Field(flag),
        "top_logprobs": Field(whole(0, MOST_TOP)),
        "tools": Field(a_list, "tools"),
        "continue_final_message": Field(flag, "continue_final_message"),
        "modalities": Field(only_text),
    },
    frozenset(
        [
            "user",
            "store",
            "metadata",
            "service_tier",
            "safety_identifier",
            "prompt_cache_key",
            "prompt_cache_retention",
            "verbosity",
            "prediction",
            "reasoning_effort",
        ]
    ),
    {
        "functions": "this is the old form; give tools",
        "function_call": "this is the old form; give tool_choice",
        "audio": "the model writes text only; leave it out",
        "web_search_options": "the server searches nothing; leave it out",
    },
)
COMPLETION = Form(
    {
        **COMMON,
        "prompt": Field(anything),
        "max_tokens": Field(whole(0, MOST_WHOLE), "max_new_tokens"),
        "logprobs": Field(whole(0, MOST_TOP)),
        "echo": Field(flag),
    },
    frozenset(["user", "store", "metadata", "service_tier"]),
    {
        "suffix": "the model does not fill in the middle of a text; leave it out",
        "best_of": "the server returns all texts that it makes; give n",
    },
)
TEXT_LOGPROBS = "message.output_text.logprobs"
INCLUDABLE = (  # of these, all but the first are parts of tools and inputs that the server does not have
    TEXT_LOGPROBS,
    "reasoning.encrypted_content",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
)
RESPONSES = Form(
    {
        **{name: field for name, field in COMMON.items() if name not in ("n", "response_format")},
        **CONVERSATION,
        "input": Field(anything),
        "instructions": Field(text),
        "previous_response_id": Field(text),
        "max_output_tokens": Field(whole(1, MOST_WHOLE), "max_new_tokens"),
        "text": Field(an_object),
        "reasoning": Field(an_object),
        "tools": Field(a_list),
        "truncation": Field(one_of("auto", "disabled")),
        "include": Field(included),
        "top_logprobs": Field(whole(0, MOST_TOP)),
        "store": Field(flag),
        "metadata": Field(metadata),
        "background": Field(foreground),
        "max_tool_calls": Field(whole(1, MOST_WHOLE)),
    },
    frozenset(
        [
            "user",
            "service_tier",
            "safety_identifier",
            "prompt_cache_key",
            "prompt_cache_options",
            "prompt_cache_retention",
            "context_management",
            "access_programs",
            "background_options",
            "image",
        ]
    ),
    {
        "messages": "this endpoint has input",
        "max_tokens": "this endpoint has max_output_tokens",
        "max_completion_tokens": "this endpoint has max_output_tokens",
        "response_format": "this endpoint has text.format",
        "logprobs": f'this endpoint has include: ["{TEXT_LOGPROBS}"]',
        "n": "a response has one text; leave it out",
        "conversation": "the server keeps no conversations; give previous_response_id",
        "prompt": "the server keeps no prompts; give instructions and input",
        "moderation": "the server does not moderate; leave it out",
    },
    {"response_format": "text.format"},
)
EMBEDDINGS = Form(
    {
        "model": Field(text),
        "input": Field(anything),
        "encoding_format": Field(one_of("float", "base64")),
        "dimensions": Field(whole(1, MOST_WHOLE)),
        "pooling": Field(one_of(*POOLINGS)),
    },
    frozenset(["user"]),
    {},
)
TOKENIZE = Form(
    {
        "model": Field(text),
        "prompt": Field(text),
        "content": Field(text),
        "messages": Field(a_list),
        "chat_template_kwargs": Field(an_object),
        "add_special_tokens": Field(flag),
        "add_special": Field(flag),
    },
    frozenset(),
    {},
)
DETOKENIZE = Form({"model": Field(text), "tokens": Field(token_ids)}, frozenset(), {})
