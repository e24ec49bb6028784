"""`Document`: one conversation or text of a data set, and the forms in which data sets hold them.

A line of JSON has one of these keys (or is an item of a JSON array in a file of its own):

conversation     AMD's form: pairs {"human": ..., "assistant": ...}, as many as there are
messages         OpenAI's form: {"role": ..., "content": ...}, with `tools` beside it where there are some
conversations    ShareGPT's form: {"from": "human" | "gpt" | "system", "value": ...}
prompt           a question, for replies that the target writes; with `completion` or `response` beside it, a pair
text             plain text

Any other file is one plain text.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pard_onnx.models.checks import nearest_name
from pard_onnx.models.errors import BadInput, shown
from pard_onnx.models.extras import install_command
from pard_onnx.models.hub import HUB_ID
from pard_onnx.models.json_files import unique_keys

JSON_ENDINGS = (".jsonl", ".json", ".ndjson")
ROLE = re.compile(r"[\w.-]+( [\w.-]+)*")  # no place for a special token or a line end
SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "system": "system",
    "tool": "tool",
    "function": "tool",
}
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
REPLACES_CONTENT = ("tool_calls", "function_call", "reasoning_content", "thinking")  # of an assistant's message
CONVERSATIONS = ("messages", "conversation", "conversations")
REPLIES = ("completion", "response")
KEYS = (*CONVERSATIONS, "prompt", "text")
BESIDE = (*REPLIES, "system", "tools")  # what is read beside one of them
LINE = 1 << 26  # characters; a longer line is no conversation
HUB_NAME = re.compile(r"(?P<repository>[^:/]+/[^:/]+)(/(?P<config>[^:/]+))?(:(?P<split>.+))?")

Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Document:
    """A conversation, or a text without turns."""

    place: str  # where it stands, for errors
    messages: tuple[Message, ...] = ()
    text: str = ""
    tools: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class DataSet:
    """What a user named as data: files, or a data set of the hub."""

    names: tuple[str, ...]
    digest: str  # of the content
    read: Callable[[], Iterator[Document]]  # from the beginning, at each call; raises BadInput


def open_data(names: Sequence[str]) -> DataSet:
    """The data of these files and data sets of the hub (`org/name[/configuration][:split]`). Raises BadInput."""
    parts = [_open_one(name) for name in names]
    digest = hashlib.sha256("".join(part.digest for part in parts).encode()).hexdigest()

    def read() -> Iterator[Document]:
        for part in parts:
            yield from part.read()

    return DataSet(tuple(names), digest, read)


def _open_one(name: str) -> DataSet:
    path = Path(name).expanduser()
    try:
        is_file, is_folder, exists = path.is_file(), path.is_dir(), path.exists()
    except OSError as error:  # a name that is too long, a folder that may not be searched
        raise BadInput(f"--data {shown(name)}: cannot be read: {error.strerror}; name a file") from error
    if is_file:
        return DataSet((name,), _file_digest(path), lambda: _file_documents(path))
    if name and is_folder:  # Path("") is the current folder
        raise BadInput(f"--data {name}: is a folder; name its files, JSON lines or plain text")
    if name and exists:
        raise BadInput(f"--data {name}: is a pipe or a device, which cannot be read several times; save it to a file")
    match = HUB_NAME.fullmatch(name)
    if not match or not HUB_ID.fullmatch(match["repository"]) or path.suffix.lower() in JSON_ENDINGS:
        raise BadInput(
            f"--data {name}: there is no such file; name one of JSON lines, or a data set of the hub, "
            "ORG/NAME[/CONFIG][:SPLIT]"
        )
    return _hub_data(name, match["repository"], match["config"], match["split"] or "train")


def _file_digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise BadInput(f"--data {path}: cannot be read: {error.strerror}") from error


def _hub_data(name: str, repository: str, config: str | None, split: str) -> DataSet:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise BadInput(
            f"--data {name}: a data set of the hub needs the datasets package; run: {install_command('adapt')}"
        ) from error
    try:
        found: Any = load_dataset(repository, config, split=split)
    except Exception as error:  # of many kinds: its own, huggingface_hub's, the network's
        raise BadInput(
            f"--data {name}: cannot be loaded from the hub: {error}; name another one, ORG/NAME[/CONFIG][:SPLIT], or "
            "download it and name its file"
        ) from error
    columns = [column for column in found.column_names if column in (*KEYS, *BESIDE)]
    if not set(columns) & set(KEYS):
        has = ", ".join(map(str, found.column_names))
        raise BadInput(
            f"--data {name}: has the columns {has}, and none of {', '.join(KEYS)}; save it as JSON lines with one of "
            "these keys"
        )
    found = found.select_columns(columns)  # others, such as images, take time to read

    def read() -> Iterator[Document]:
        for number, row in enumerate(found, 1):
            yield document_of(row, f"{name} row {number}")

    facts = f"{repository} {config} {split} {found._fingerprint} {len(found)}"
    return DataSet((name,), hashlib.sha256(facts.encode()).hexdigest(), read)


# Files


def _file_documents(path: Path) -> Iterator[Document]:
    try:
        if path.suffix.lower() not in JSON_ENDINGS:
            text = path.read_text(encoding="utf-8-sig")
            if len(text) > LINE:
                raise BadInput(f"{path}: has {len(text)} characters, too many for one text; make it several files")
            if text.strip():
                yield Document(str(path), text=text)
            return
        with path.open(encoding="utf-8-sig") as file:
            first = next((line for line in file if line.strip()), "")
            file.seek(0)
            if first.lstrip().startswith("["):
                yield from _array_documents(path, file.read())
            else:
                yield from _line_documents(path, file)
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: not UTF-8 text: {error}; save it as UTF-8") from error
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror}") from error


def _array_documents(path: Path, whole: str) -> Iterator[Document]:
    for number, value in enumerate(_parsed(whole.removeprefix("\ufeff"), str(path)), 1):
        yield document_of(value, f"{path} item {number}")


def _line_documents(path: Path, lines: Iterator[str]) -> Iterator[Document]:
    for number, line in enumerate(lines, 1):
        place = f"{path} line {number}"
        if len(line) > LINE:
            raise BadInput(f"{place}: has {len(line)} characters; a line is one conversation or text: make it several")
        if line.strip("\ufeff \t\r\n"):
            yield document_of(_parsed(line.removeprefix("\ufeff").strip(), place, "write one object a line"), place)


def _parsed(text: str, place: str, advice: str = "correct it") -> Any:
    try:
        return json.loads(text, object_pairs_hook=unique_keys)
    except json.JSONDecodeError as error:
        at = f"line {error.lineno} column {error.colno}" if "\n" in text else f"column {error.colno}"
        raise BadInput(f"{place}: is not JSON ({error.msg} at {at}); {advice}") from None
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{place}: is not JSON ({error}); correct it or remove it") from None


# Forms


def document_of(value: Any, place: str) -> Document:
    """The document that one object of a data set holds. Raises BadInput, naming its place."""
    if not isinstance(value, Mapping):
        raise BadInput(f"{place}: is {shown(value)}; it must be an object with one of the keys {', '.join(KEYS)}")
    key = next((key for key in KEYS if value.get(key) is not None), None)
    if key is None:
        near = nearest_name(next(iter(value), ""), KEYS)
        meant = f"; is {shown(next(iter(value)))} meant as {near}?" if near else ""
        raise BadInput(f"{place}: has none of the keys {', '.join(KEYS)}{meant}")
    if key == "text":
        return Document(place, text=_text(value["text"], place, "text"))
    if key == "prompt":
        return Document(place, _prompted(value, place))
    items = _as_list(_rows(value[key]), place, key)
    messages = [message for item in items for message in _messages_of(item, place)]
    if isinstance(system := value.get("system"), str) and system and messages and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    tools = _as_list(value["tools"], place, "tools") if value.get("tools") else []
    if not all(isinstance(tool, Mapping) for tool in tools):
        raise BadInput(f"{place}: tools are a list of objects in OpenAI's form, not {shown(value['tools'])}")
    _require_unicode(json.dumps(tools, ensure_ascii=False, default=str), place, "tools")
    return Document(place, tuple(messages), tools=tuple(tools))


def require_roles(document: Document, template: str) -> None:
    """BadInput for a message whose role is neither one of OpenAI's form nor named in the chat template."""
    for message in document.messages:
        role = message["role"]
        if role in ROLES or f"'{role}'" in template or f'"{role}"' in template:
            continue
        meant = SPEAKERS.get(role.lower()) or nearest_name(role, ROLES)
        fix = f"write {meant}" if meant else f"known are {', '.join(ROLES)}"
        raise BadInput(f"{document.place}: the role of a message is {shown(role)}; {fix}")


def _prompted(value: Mapping[str, Any], place: str) -> tuple[Message, ...]:
    """`prompt`, a text or messages, and the reply beside it, if there is one."""
    prompt = value["prompt"]
    if isinstance(prompt, str):
        messages = [{"role": "user", "content": prompt}]
    else:
        messages = [message for item in _as_list(prompt, place, "prompt") for message in _messages_of(item, place)]
    for key in REPLIES:
        reply = value.get(key)
        if isinstance(reply, str):
            return (*messages, {"role": "assistant", "content": reply})
        if reply is not None:
            return (*messages, *(one for item in _as_list(reply, place, key) for one in _messages_of(item, place)))
    return tuple(messages)


def _messages_of(item: Any, place: str) -> list[Message]:
    """The messages that one item of a conversation stands for, whatever form it has."""
    if isinstance(item, Mapping) and item.get("role") is not None:
        return [_message(item, place)]
    if isinstance(item, Mapping) and item.get("from") is not None:
        role = SPEAKERS.get(str(item["from"]).lower())
        if role is None:
            raise BadInput(f"{place}: a turn is from {shown(item['from'])}; known are {', '.join(SPEAKERS)}")
        return [{"role": role, "content": _text(item.get("value"), place, "value")}]
    pairs = (("system", "system"), ("human", "user"), ("assistant", "assistant"))
    found = [(role, item[key]) for key, role in pairs if item.get(key) is not None] if isinstance(item, Mapping) else []
    if not found:
        raise BadInput(
            f'{place}: a turn is {shown(item)}; it must be {{"role", "content"}}, {{"human", "assistant"}} or '
            '{"from", "value"}'
        )
    return [{"role": role, "content": _text(text, place, role)} for role, text in found]


def _message(item: Mapping[str, Any], place: str) -> Message:
    role, content = item["role"], item.get("content")
    if not isinstance(role, str) or not ROLE.fullmatch(role):
        raise BadInput(f"{place}: the role of a message is a word such as user or assistant, not {shown(role)}")
    if not isinstance(content, str | list | None):
        raise BadInput(f"{place}: the content of a message is text or a list of parts, not {shown(content)}")
    if content is None and not any(item.get(key) for key in REPLACES_CONTENT):
        raise BadInput(f"{place}: the content of a message from {role} is null or missing; give its text, or remove it")
    _require_unicode(json.dumps(item, ensure_ascii=False, default=str), place, f"the message from {role}")
    return {key: value for key, value in item.items() if value is not None}


def _text(value: Any, place: str, name: str) -> str:
    if not isinstance(value, str):
        raise BadInput(f"{place}: {name} must be text, not {shown(value)}")
    _require_unicode(value, place, name)
    return value


def _require_unicode(text: str, place: str, name: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadInput(f"{place}: {name} is not valid Unicode: {error}; remove half surrogate pairs") from error


def _rows(value: Any) -> Any:
    """A list of objects, where they are stored by columns, as some data sets of the hub store them."""
    if isinstance(value, Mapping) and value and all(isinstance(column, list) for column in value.values()):
        return [dict(zip(value, row, strict=False)) for row in zip(*value.values(), strict=False)]
    return value


def _as_list(value: Any, place: str, name: str) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise BadInput(f"{place}: {name} must be a list, not {shown(value)}")
    return list(value)
