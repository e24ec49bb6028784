"""The forms in which models write calls of tools: a reader for each way in which a call can begin, and a table."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from .call_syntax import NAME, Cursor, NotACall, PythonCall, Reading, json_object
from .tool_calls import CallReader, Read
from .writer import MARK

TOOL_CALL, TOOL_CALL_END = "<tool_call>", "</tool_call>"
PYTHON_TAG = "<|python_tag|>"
TOOL_CALLS, CALL_ID, ARGS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"
CODE, CODE_END = "<code>", "</code>"
TOOL_CODE, FENCE = "```tool_code\n", "```"
R1_CALLS, R1_CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
R1_CALL, R1_CALL_END, R1_NAME = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"
ARGUMENT_KEYS = ("arguments", "parameters")
INTERPRETERS = ("code_interpreter", "ipython", "python")  # names of a tool that runs Python code
NOTHING = "{}"


def json_call(reader: CallReader, *, offered: bool = False) -> Reading[tuple[str, str | None]]:
    """A JSON object with a name and arguments; None if it has no arguments. offered: it has the name of an offered
    tool, and nothing else that a call does not have, so that other JSON is given as text at once."""
    cursor = reader.cursor
    name = arguments = None
    yield from cursor.literal("{")
    yield from cursor.spaces()
    while True:
        key = yield from cursor.key()
        if key == "name":
            name = yield from cursor.string()
            if offered:
                reader.parameters_of(name)
        elif key in ARGUMENT_KEYS:
            reader.opens(name)
            arguments = yield from argument_object(cursor)
            reader.closes()
        elif offered and key not in ("type", "id"):
            raise NotACall
        else:
            yield from cursor.value()
        if not (yield from cursor.goes_on("}")):
            break
    if name is None or not NAME.fullmatch(name):
        raise NotACall
    return name, arguments


def argument_object(cursor: Cursor) -> Reading[str]:
    """The arguments of a call: an object, an object as a JSON string, or null, which is none."""
    start, first = cursor.at, (yield from cursor.peek())
    if first == '"':
        return checked_object((yield from cursor.string()))
    if first == "n":
        yield from cursor.literal("null")
        return NOTHING
    yield from cursor.members()
    return cursor.text[start : cursor.at]


def checked_object(text: str) -> str:
    """The text if it is a JSON object, or NotACall."""
    whole = Cursor()
    whole.text, whole.ended = text.strip(), True
    for _ in whole.members():
        pass
    if not whole.at_end:
        raise NotACall
    return whole.text


def tagged_json(reader: CallReader) -> Reading[None]:
    """`<tool_call>`, a JSON object or a list of them, `</tool_call>`."""
    cursor = reader.cursor
    yield from reader.literal(TOOL_CALL)
    yield from cursor.spaces()
    calls = []
    several = yield from reader.goes_past("[")
    while True:
        yield from cursor.spaces()
        name, arguments = yield from json_call(reader)
        calls.append((name, arguments or NOTHING))
        if not several or not (yield from cursor.goes_on("]")):
            break
    yield from cursor.spaces()
    yield from reader.literal_or_end(TOOL_CALL_END)
    reader.add(*calls)


def bare_json(reader: CallReader) -> Reading[None]:
    """A JSON object that has the name of an offered tool, and parameters; more may follow after semicolons."""
    yield from json_sequence(reader, offered=True)


def json_sequence(reader: CallReader, *, offered: bool) -> Reading[None]:
    cursor = reader.cursor
    while True:
        name, arguments = yield from json_call(reader, offered=offered)
        if arguments is None:
            raise NotACall
        reader.add((name, arguments))
        yield from cursor.spaces()
        if (yield from cursor.peek()) == ";":
            cursor.at += 1
            yield from cursor.spaces()
        if (yield from cursor.peek()) != "{":
            return


def python_tag(reader: CallReader) -> Reading[None]:
    """`<|python_tag|>` with JSON, `NAME.call(...)` or the code of an offered interpreter."""
    cursor = reader.cursor
    yield from reader.literal(PYTHON_TAG)
    yield from cursor.spaces()
    start = cursor.at
    if (yield from cursor.peek()) == "{":
        yield from json_sequence(reader, offered=False)
        return
    try:
        call = yield from cursor.python_call(".call")
        yield from cursor.spaces()
        if not cursor.at_end and (yield from cursor.peek()) != ";":
            raise NotACall
        parameters = reader.parameters_of(call.name) if call.positional else ()
        reader.add((call.name, call.arguments(parameters)))
    except NotACall:
        interpreter = next((name for name in INTERPRETERS if name in reader.parameters), None)
        cursor.at = start
        if interpreter is None:
            raise
        while not cursor.ended:
            yield
        cursor.at = len(cursor.text)
        code = MARK.sub("", cursor.text[start:]).strip()
        if not code:
            raise
        first = next(iter(reader.parameters[interpreter]), "code")
        reader.add((interpreter, json_object({first: json.dumps(code, ensure_ascii=False)})))


def mistral(reader: CallReader) -> Reading[None]:
    """`[TOOL_CALLS]` with a JSON list of calls, or with `NAME[ARGS]{...}`, where `[CALL_ID]` may be before `[ARGS]`."""
    cursor = reader.cursor
    yield from reader.literal(TOOL_CALLS)
    yield from cursor.spaces()
    if (yield from reader.goes_past("[")):
        while True:
            yield from cursor.spaces()
            name, arguments = yield from json_call(reader)
            reader.add((name, arguments or NOTHING))
            if not (yield from cursor.goes_on("]")):
                break
        reader.add()
        return
    name = yield from cursor.name()
    if (yield from reader.goes_past(CALL_ID)):
        yield from cursor.name()
    yield from reader.goes_past(ARGS)
    yield from cursor.spaces()
    if (yield from cursor.peek()) != "{":  # the text may end within the name
        raise NotACall
    reader.opens(name)
    start = cursor.at
    yield from cursor.members()
    reader.closes()
    reader.add((name, cursor.text[start : cursor.at]))


def python_list(reader: CallReader) -> Reading[None]:
    """`[NAME(...), NAME(...)]`, calls of offered tools in Python's syntax."""
    cursor = reader.cursor
    yield from cursor.literal("[")
    calls = []
    while True:
        yield from cursor.spaces()
        calls.append((yield from offered_call(reader)))
        if not (yield from cursor.goes_on("]")):
            break
    reader.add(*calls)


def offered_call(reader: CallReader) -> Reading[tuple[str, str]]:
    call: PythonCall = yield from reader.cursor.python_call()
    return call.name, call.arguments(reader.parameters_of(call.name))


def code_block(begin: str, end: str) -> Read:
    """Python code whose statements are calls of offered tools, which may be assigned or printed."""

    def read(reader: CallReader) -> Reading[None]:
        cursor = reader.cursor
        yield from reader.literal(begin)
        calls = []
        while True:
            yield from cursor.spaces()
            if (yield from reader.goes_past(end)):
                break
            yield from assignment(cursor)
            printed = yield from reader.goes_past("print(")
            calls.append((yield from offered_call(reader)))
            if printed:
                yield from cursor.literal(")")
        if not calls:
            raise NotACall
        reader.add(*calls)

    return read


def assignment(cursor: Cursor) -> Reading[None]:
    """Go past `NAME =`, if that is next."""
    start = cursor.at
    yield from cursor.run(NAME)
    yield from cursor.spaces()
    if (yield from cursor.peek()) == "=":
        cursor.at += 1
        yield from cursor.spaces()
    else:
        cursor.at = start


def deepseek_r1(reader: CallReader) -> Reading[None]:
    """Calls between special tags, with the arguments as a block of JSON."""
    cursor = reader.cursor
    yield from reader.literal(R1_CALLS)
    yield from cursor.spaces()
    while True:
        yield from reader.literal(R1_CALL)
        yield from cursor.literal("function")
        yield from reader.literal(R1_NAME)
        name = yield from cursor.name()
        yield from cursor.literal("\n```json\n")
        yield from cursor.spaces()
        start = cursor.at
        reader.opens(name)
        yield from cursor.members()
        reader.closes()
        call = name, cursor.text[start : cursor.at]
        yield from cursor.spaces()
        yield from cursor.literal(FENCE)
        yield from reader.literal_or_end(R1_CALL_END)
        reader.add(call)
        yield from cursor.spaces()
        if (yield from reader.goes_past(R1_CALLS_END)) or cursor.at_end:
            reader.add()
            return


# The table


@dataclass(frozen=True, slots=True)
class Written:
    """How a model writes calls, for grammars: `begin`, calls with `separator` between them, and `end`. A call is
    `before`, its name, `between`, the arguments as a JSON object, and `after`. Tags stand in the texts."""

    before: str
    between: str
    after: str
    separator: str | None = None  # None: one call only
    begin: str = ""
    end: str = ""


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """The form in which some models write calls of tools."""

    name: str
    # Texts that are in the chat templates of these models: all of one of the groups
    signs: tuple[tuple[str, ...], ...]
    written: Written
    begins: Mapping[str, Read] = field(default_factory=dict)  # by the text that a call begins with anywhere
    firsts: Mapping[str, Read] = field(default_factory=dict)  # by the character that a call begins with before any text
    no_signs: tuple[str, ...] = ()  # texts that are not in them
    tags: tuple[str, ...] = ()  # texts that may be special tokens of a tokenizer
    short_ids: bool = False  # ids of calls are nine letters and digits, which the template checks

    def reader(
        self,
        parameters: Mapping[str, Sequence[str]],
        make_id: Callable[[int], str],
        *,
        tags: Mapping[str, str] | None = None,
        guided: bool = False,
    ) -> CallReader:
        """Of one reply; arguments as of `CallReader`."""
        return CallReader(self.begins, self.firsts, parameters, make_id, tags=tags, guided=guided)


JSON_CALL = '{"name": "'
JSON_ARGUMENTS = '", "arguments": '
R1_CALL_TAGS = (R1_CALLS, R1_CALLS_END, R1_CALL, R1_CALL_END, R1_NAME)
TOOL_FORMATS = (
    ToolFormat(
        "deepseek-r1",
        ((R1_CALL, "```json"),),
        Written(f"{R1_CALL}function{R1_NAME}", "\n```json\n", f"\n```{R1_CALL_END}", "\n", R1_CALLS, R1_CALLS_END),
        {R1_CALLS: deepseek_r1},
        tags=R1_CALL_TAGS,
    ),
    ToolFormat(
        "mistral-args",
        ((TOOL_CALLS, ARGS),),
        Written(TOOL_CALLS, ARGS, "", ""),
        {TOOL_CALLS: mistral},
        tags=(TOOL_CALLS, CALL_ID, ARGS),
        short_ids=True,
    ),
    ToolFormat(
        "mistral",
        ((TOOL_CALLS,),),
        Written(JSON_CALL, JSON_ARGUMENTS, "}", ", ", f"{TOOL_CALLS}[", "]"),
        {TOOL_CALLS: mistral},
        tags=(TOOL_CALLS, CALL_ID, ARGS),
        short_ids=True,
    ),
    ToolFormat(
        "smollm3",
        ((TOOL_CALL, "python_tools"),),
        Written(f"{TOOL_CALL}\n{JSON_CALL}", JSON_ARGUMENTS, f"}}\n{TOOL_CALL_END}", "\n"),
        {TOOL_CALL: tagged_json, CODE: code_block(CODE, CODE_END)},
        tags=(TOOL_CALL, TOOL_CALL_END, CODE, CODE_END),
    ),
    ToolFormat(
        "hermes",
        ((TOOL_CALL,),),
        Written(f"{TOOL_CALL}\n{JSON_CALL}", JSON_ARGUMENTS, f"}}\n{TOOL_CALL_END}", "\n"),
        {TOOL_CALL: tagged_json},
        no_signs=("<function=", "<arg_key>"),
        tags=(TOOL_CALL, TOOL_CALL_END),
    ),
    ToolFormat(
        "tool-code",
        (("tool_code",),),
        Written("", "(**", ")", "\n", TOOL_CODE, f"\n{FENCE}"),
        {TOOL_CODE: code_block(TOOL_CODE, FENCE)},
    ),
    ToolFormat(
        "pythonic",
        (("[func_name1(",), ("[func_name(",), ("[function_name(",), ("[function_name1(",)),
        Written("", "(**", ")", ", ", "[", "]"),
        {PYTHON_TAG: python_tag},
        {"[": python_list},
        tags=(PYTHON_TAG,),
    ),
    ToolFormat(
        "llama",
        (('"parameters": ',), (r"\"parameters\": ",), (PYTHON_TAG,)),
        Written(JSON_CALL, '", "parameters": ', "}"),
        {PYTHON_TAG: python_tag},
        {"{": bare_json},
        tags=(PYTHON_TAG,),
    ),
)


@lru_cache(maxsize=8)
def tool_format(template: str) -> ToolFormat | None:
    """The form of calls that a chat template shows; None if it shows none that is known."""
    for form in TOOL_FORMATS:
        shown = any(all(sign in template for sign in group) for group in form.signs)
        if shown and not any(sign in template for sign in form.no_signs):
            return form
    return None
