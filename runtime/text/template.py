"""Chat templates: the text that transformers' `apply_chat_template` writes, without transformers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from pard_onnx.models.errors import BadInput, shown
from pard_onnx.models.template_budget import TooMuchWork, limited

if TYPE_CHECKING:  # jinja2 is imported when a template is read: prompts that are text need none
    from jinja2 import Template, nodes

Message = Mapping[str, Any]
CONTENT = "content"
DEEPEST = 64  # levels of lists and objects in a message, or in a variable of a template
CALLS = "tool_calls"
ASSISTANT = "assistant"
END_MARK = "CONTINUE_FINAL_MESSAGE_TAG "
# What OpenAI-like servers and templates call the thinking that a message's content leaves out; Qwen3's name first
THINKING = ("reasoning_content", "reasoning", "thinking")


def render(template: str, messages: Sequence[Message], variables: Mapping[str, object]) -> str:
    """The text that a Hugging Face chat template writes, with the variables that transformers gives to templates.

    As in transformers, a key of a message whose value is None is left out. A message's thinking is given under the name
    that the template reads. A template that loops over the parts of a content gets the parts; any other gets their
    texts as one string.

    Raises BadInput for parts that are not text, and for contents that the template would write as Python objects.
    """
    known = {"tools": None, "documents": None, "add_generation_prompt": True} | dict(variables)

    def write(chosen: Sequence[Message]) -> str:
        return compiled(template).render(known | {"messages": chosen})

    present = [{key: value for key, value in message.items() if value is not None} for message in messages]
    if any(name in message for message in present for name in THINKING):
        present = [with_thinking(message, thinking_names(template)) for message in present]
    with limited():
        if any(CALLS in message for message in present):
            return write_calls(template, present, write)
        joined = [with_joined_parts(message) for message in present]
        return write_conversation(template, present, joined, write)


def write_calls(template: str, present: list[dict[str, Any]], write: Callable[[Sequence[Message]], str]) -> str:
    """See `write_conversation`, for messages with calls of tools.

    OpenAI's arguments are JSON text, which few templates read, and its messages with calls have no content, which some
    templates ask for.
    """
    form = argument_form(template)
    present = [with_arguments(message, form) for message in present]
    joined = [with_joined_parts(message) for message in present]
    try:
        return write_conversation(template, present, joined, write)
    except TooMuchWork:
        raise
    except Exception:
        if all(CONTENT in message for message in present):
            raise
        present, joined = ([{CONTENT: "", **message} for message in one] for one in (present, joined))
        return write_conversation(template, present, joined, write)


def write_conversation(
    template: str,
    present: list[dict[str, Any]],
    joined: list[dict[str, Any]],
    write: Callable[[Sequence[Message]], str],
) -> str:
    """See `render`. present, joined: the messages, with the parts of contents, and with those of one content joined."""
    text = None
    if joined != present and loops_over_parts(template):
        try:
            first = write(present)
            both = zip(present, joined, strict=True)
            mixed = [strings if is_python_text(parts.get(CONTENT), first) else parts for parts, strings in both]
            text = first if mixed == present else write(mixed)
        except TooMuchWork:
            raise
        except Exception:  # a template may loop over the parts of some roles only
            text = None
    text = write(joined) if text is None else text
    for message in joined:
        if is_python_text(message.get(CONTENT), text):
            raise BadInput(
                f"the chat template takes no content of the type {type(message[CONTENT]).__name__}; give text, or a "
                'list of parts {"type": "text", "text": ...}'
            )
    return text


def with_end_mark(message: Message) -> dict[str, Any]:
    """The assistant's message, with a mark at the end of its text, up to which `up_to_end_mark` cuts what the template
    writes. BadInput for a message that has no text to continue.

    The mark is transformers'. It ends in a space, which shows whether the template trims texts.
    """
    content = message.get(CONTENT)
    if message.get("role") != ASSISTANT or message.get(CALLS):
        found = "calls tools" if message.get(CALLS) else f"has the role {shown(message.get('role'))}"
        raise BadInput(f"continue_final_message: the last message must be an assistant's text, but it {found}")
    if isinstance(content, list | tuple):
        last = max((place for place, part in enumerate(content) if has_text(part)), default=None)
        if last is not None:
            return {**message, CONTENT: [*content[:last], marked_part(content[last]), *content[last + 1 :]]}
    if not isinstance(content, str):
        raise BadInput(f"continue_final_message: the last message has no text, but {shown(content)}; give it a content")
    return {**message, CONTENT: content + END_MARK}


def has_text(part: object) -> bool:
    return isinstance(part, Mapping) and isinstance(part.get("text"), str)


def marked_part(part: Mapping[str, Any]) -> dict[str, Any]:
    return {**part, "text": part["text"] + END_MARK}


def up_to_end_mark(text: str) -> str:
    """What a template wrote up to the mark of `with_end_mark`; BadInput where it left the mark out."""
    at = text.rfind(END_MARK.strip())
    if at < 0:
        raise BadInput("continue_final_message: the chat template leaves out the last message; end with a question")
    return text[:at] if text.startswith(END_MARK, at) else text[:at].rstrip()


def checked_arguments(arguments: Mapping[str, object] | None) -> dict[str, object]:
    """A copy of the user's template arguments; BadInput for what no template can take."""
    if arguments is None:
        return {}
    if not isinstance(arguments, Mapping) or not all(isinstance(name, str) for name in arguments):
        raise BadInput(f'template_arguments are names with values, such as {{"tools": [...]}}, not {shown(arguments)}')
    if "messages" in arguments:
        raise BadInput("template_arguments have messages; give them as the prompt or with pair.chat(messages=...)")
    require_finite(arguments, "template_arguments: a variable")
    for name in ("tools", "documents"):
        items = arguments.get(name)
        if items is None:
            continue
        if not isinstance(items, list | tuple) or not all(isinstance(item, Mapping) for item in items):
            raise BadInput(f"{name} in template_arguments are a list of JSON objects, not {shown(items)}")
    return dict(arguments)


def require_finite(value: object, name: str, depth: int = DEEPEST) -> None:
    """BadInput, with the value's name, for what is nested too deep, as a value that contains itself is, and for an
    iterator in it: that may have no end, and a template that is rendered twice finds nothing in it."""
    if not depth:
        raise BadInput(f"{name} is nested more than {DEEPEST} levels deep, or contains itself")
    if isinstance(value, Iterator):
        raise BadInput(f"{name} has an iterator, {shown(value)}; give a list of its items")
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            require_finite(item, name, depth - 1)


@dataclass(frozen=True, slots=True)
class ArgumentForm:
    """In which form a template reads the arguments of calls."""

    text: bool  # JSON text, written as it is
    objects: bool


PROBE = '{"probe": 1}'


@lru_cache(maxsize=8)
def argument_form(template: str) -> ArgumentForm:
    """Found by trying both."""

    def written(arguments: object) -> str | None:
        call = {"id": "123456789", "type": "function", "function": {"name": "probe", "arguments": arguments}}
        messages = [
            {"role": "user", CONTENT: "?"},
            {"role": "assistant", CONTENT: "", CALLS: [call]},
            {"role": "tool", "name": "probe", "tool_call_id": call["id"], CONTENT: "1"},
        ]
        variables = {"tools": None, "documents": None, "add_generation_prompt": True, "bos_token": "", "eos_token": ""}
        try:
            return compiled(template).render(variables | {"messages": messages})
        except TooMuchWork:
            raise
        except Exception:
            return None

    return ArgumentForm(PROBE in (written(PROBE) or ""), written(json.loads(PROBE)) is not None)


def with_arguments(message: dict[str, Any], form: ArgumentForm) -> dict[str, Any]:
    """The message, with the arguments of its calls in a form that the template reads."""
    calls = message.get(CALLS)
    if not isinstance(calls, list | tuple):
        return message

    from pard_onnx.models.chat_template import to_json

    def converted(arguments: Any) -> Any:
        if isinstance(arguments, str) and not form.text:
            try:
                found = json.loads(arguments)
            except (ValueError, RecursionError):
                return arguments
            return found if isinstance(found, dict) else arguments
        if isinstance(arguments, Mapping) and form.text and not form.objects:
            return to_json(arguments)
        return arguments

    def call(one: Any) -> Any:
        if not isinstance(one, Mapping):
            return one
        if isinstance(one.get("function"), Mapping):
            return {**one, "function": call(one["function"])}
        return {**one, "arguments": converted(one["arguments"])} if "arguments" in one else one

    return {**message, CALLS: [call(one) for one in calls]}


def with_thinking(message: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """The message, with its thinking under the first of `names`, which the template reads, if it has none of them."""
    found = next((message[name] for name in THINKING if name in message), None)
    if found is None or not names or any(name in message for name in names):
        return message
    return {**message, names[0]: found}


@lru_cache(maxsize=8)
def thinking_names(template: str) -> tuple[str, ...]:
    """The names of THINKING that the template reads of messages."""
    from jinja2 import nodes

    from pard_onnx.models.chat_template import environment

    tree = environment().parse(template)
    read: set[object] = {node.attr for node in tree.find_all(nodes.Getattr)}
    read |= {node.arg.value for node in tree.find_all(nodes.Getitem) if isinstance(node.arg, nodes.Const)}
    for call in tree.find_all(nodes.Call):  # message.get("reasoning")
        if isinstance(call.node, nodes.Getattr) and call.node.attr == "get":
            read |= {arg.value for arg in call.args[:1] if isinstance(arg, nodes.Const)}
    return tuple(name for name in THINKING if name in read)


def with_joined_parts(message: Message) -> dict[str, Any]:
    """The message, with the text of all parts if its content is a list of parts; BadInput for a part of another type.

    A list of anything else is data for the template, such as the result of a tool.
    """
    content = message.get(CONTENT)
    if not isinstance(content, list | tuple):
        return dict(message)
    if content and not any(isinstance(part, Mapping) and "type" in part for part in content):
        return dict(message)
    return {**message, CONTENT: "".join(part_text(part) for part in content)}


def part_text(part: Any) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    if kind != "text":
        raise BadInput(
            f"a message has a part of the type {shown(kind)}, but the model reads text only; leave that part out"
        )
    text = part.get("text")
    if not isinstance(text, str):
        raise BadInput(f'a text part is {{"type": "text", "text": ...}} with text, not {shown(text)}')
    return text


def text_of(message: Any) -> str:
    """The text of a message's content; empty if it has none."""
    content = with_joined_parts(message).get(CONTENT)
    return content if isinstance(content, str) else ""


def is_python_text(content: Any, text: str) -> bool:
    """Whether the text has a list or an object in Python's notation, which is not JSON's."""
    if not content or not isinstance(content, list | tuple | Mapping):
        return False
    from pard_onnx.models.chat_template import to_json

    written = str(content)
    return written in text and written != to_json(content, default=str)


@lru_cache(maxsize=8)
def loops_over_parts(template: str) -> bool:
    """Whether the template has a loop over a message's content, directly or by way of variables and macros."""
    from jinja2 import nodes

    from pard_onnx.models.chat_template import environment

    tree = environment().parse(template)
    macros = {macro.name: [arg.name for arg in macro.args] for macro in tree.find_all(nodes.Macro)}
    names: set[str] = {CONTENT}
    before = -1
    while len(names) != before:
        before = len(names)
        for assign in tree.find_all(nodes.Assign):
            if isinstance(assign.target, nodes.Name) and is_content(assign.node, names):
                names.add(assign.target.name)
        for call in tree.find_all(nodes.Call):
            if isinstance(call.node, nodes.Name) and call.node.name in macros:
                taken = zip(macros[call.node.name], call.args, strict=False)
                names |= {name for name, value in taken if is_content(value, names)}
    return any(is_content(loop.iter, names) for loop in tree.find_all(nodes.For))


def is_content(node: nodes.Node | None, names: set[str]) -> bool:
    """Whether the expression is a message's content. names: variables that hold one."""
    from jinja2 import nodes

    match node:
        case nodes.Name():
            return node.name in names
        case nodes.Getattr():
            return node.attr == CONTENT
        case nodes.Getitem():
            return isinstance(node.arg, nodes.Const) and node.arg.value == CONTENT
        case nodes.Call():  # message.get("content")
            return (
                isinstance(node.node, nodes.Getattr)
                and node.node.attr == "get"
                and any(isinstance(arg, nodes.Const) and arg.value == CONTENT for arg in node.args[:1])
            )
        case nodes.Filter():
            return is_content(node.node, names)
        case nodes.CondExpr():
            return is_content(node.expr1, names) or is_content(node.expr2, names)
        case nodes.Or() | nodes.And():
            return is_content(node.left, names) or is_content(node.right, names)
    return False


@lru_cache(maxsize=8)
def compiled(template: str) -> Template:
    """The compiled template; kept, since this takes milliseconds. BadInput for a template that is broken."""
    from pard_onnx.models.chat_template import environment, template_problem

    try:
        return environment().from_string(template)
    except Exception as error:
        problem = template_problem(template) or " ".join(str(error).split())
        raise BadInput(f"the model's chat template is broken: {problem}; give the prompt as text") from error
