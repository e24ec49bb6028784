"""Values of wrong types for every argument of the public API: BadInput that names the argument, or success."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from dataclasses import fields
from decimal import Decimal
from fractions import Fraction
from itertools import repeat
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import pytest

from pard_onnx import BadInput, Chat, Failure, Options, Pair, PardWarning, Sampling, load
from pard_onnx.runtime.options import OptionArguments


class Broken:
    """An object that cannot be shown."""

    def __repr__(self) -> str:
        raise RuntimeError("no text")


class BytesPath:
    def __fspath__(self) -> bytes:
        return b"folder"


VALUES: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "True": lambda: True,
    "False": lambda: False,
    "0": lambda: 0,
    "1": lambda: 1,
    "-1": lambda: -1,
    "5": lambda: 5,
    "2**63": lambda: 2**63,
    "10**400": lambda: 10**400,
    "10**5000": lambda: 10**5000,
    "-10**5000": lambda: -(10**5000),
    "0.0": lambda: 0.0,
    "1.0": lambda: 1.0,
    "1.5": lambda: 1.5,
    "-1.5": lambda: -1.5,
    "nan": lambda: float("nan"),
    "inf": lambda: float("inf"),
    "-inf": lambda: -float("inf"),
    "1j": lambda: 1j,
    "Decimal": lambda: Decimal("0.5"),
    "Fraction": lambda: Fraction(1, 2),
    "empty text": lambda: "",
    "text": lambda: "fox",
    "digits": lambda: "1",
    "no": lambda: "no",
    "long text": lambda: "x" * 100_000,
    "null": lambda: "a\0b",
    "surrogate": lambda: "a\ud800",
    "empty bytes": lambda: b"",
    "bytes": lambda: b"fox",
    "bytearray": lambda: bytearray(b"fox"),
    "memoryview": lambda: memoryview(b"fox"),
    "path": lambda: PurePath("fox"),
    "bytes path": BytesPath,
    "empty list": list,
    "ints": lambda: [1, 2],
    "ints and floats": lambda: [1, 2.0],
    "ints and nan": lambda: [1, float("nan")],
    "bools": lambda: [True, False],
    "negative": lambda: [1, -2],
    "huge": lambda: [10**5000],
    "texts": lambda: ["fox", "dog"],
    "texts and None": lambda: ["fox", None],
    "bytes in a list": lambda: [b"fox"],
    "nested": lambda: [[1, 2]],
    "message": lambda: [{"role": "user", "content": "fox"}],
    "message with bytes": lambda: [{"role": "user", "content": b"fox"}],
    "message with an object": lambda: [{"role": "user", "content": Broken()}],
    "message without role": lambda: [{"content": "fox"}],
    "message with role 5": lambda: [{"role": 5, "content": "fox"}],
    "broken in a list": lambda: [Broken()],
    "tuple": lambda: (1,),
    "pairs": lambda: [(1, 2.0)],
    "pairs of text": lambda: [("a", "b")],
    "set": lambda: {1, 2},
    "dict": lambda: {1: 2.0},
    "dict of text": lambda: {"a": "b"},
    "dict of nan": lambda: {1: float("nan")},
    "empty dict": dict,
    "object": object,
    "broken": Broken,
    "type": lambda: int,
    "function": lambda: len,
    "iterator": lambda: iter([1, 2]),
    "endless numbers": lambda: repeat(1),
    "endless texts": lambda: repeat("fox"),
    "endless messages": lambda: repeat({"role": "user", "content": "fox"}),
    "message with endless parts": lambda: [{"role": "user", "content": repeat({"type": "text", "text": "fox"})}],
    "range": lambda: range(3),
    "np.int64": lambda: np.int64(3),
    "np.uint8": lambda: np.uint8(3),
    "np.float32": lambda: np.float32(0.5),
    "np.float64": lambda: np.float64(0.5),
    "np.nan": lambda: np.float32("nan"),
    "np.bool": lambda: np.True_,
    "np.str": lambda: np.str_("fox"),
    "np.bytes": lambda: np.bytes_(b"fox"),
    "array": lambda: np.array([1, 2]),
    "array of floats": lambda: np.array([1.0, 2.0]),
    "array of bools": lambda: np.array([True, False]),
    "array of nothing": lambda: np.array([]),
    "array of no dimension": lambda: np.array(1),
    "array of two dimensions": lambda: np.array([[1, 2], [3, 4]]),
    "array of objects": lambda: np.array([None, "a"], dtype=object),
}
# Of these, every value is a variable for a template, or text that it may hold
FREE = ("template_arguments",)


@pytest.fixture(scope="module")
def pair(pair_folders: tuple[Path, Path]) -> Iterator[Pair]:
    with load(*pair_folders, threads=1) as out:
        yield out


def refused_or_taken(names: tuple[str, ...], call: Callable[[Any], object]) -> dict[str, bool]:
    """By value, whether it was taken; fails for any other error than BadInput, and for one that names none of these."""
    found: dict[str, bool] = {}
    for name, make in VALUES.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", PardWarning)
                call(make())
            found[name] = True
        except BadInput as error:
            text = str(error)
            assert any(word in text for word in names), f"{names[0]}={name}: {text}"
            assert len(text) < 1000 and "\n" not in text, f"{names[0]}={name}: {text}"
            found[name] = False
        except Exception as error:
            pytest.fail(f"{names[0]}={name}: {type(error).__name__}: {error}")
    return found


# What the messages call an argument, where that is not its name
ALSO = {
    "draft_revision": ("revision ",),
    "stop": ("stop string",),
    "prompt": ("token id", "message", "content"),
    "messages": ("message", "content"),
    "message": ("the prompt", "content"),
    "target": ("no such", "hub id", "fox", "exported", "folder"),
    "draft": ("no such", "hub id", "fox", "exported", "folder"),
    "path": ("no such file", "cannot be", "is no saved", "exists already", "is there already"),
    "system": ("the prompt is not valid Unicode", "system message"),
    "provider_options": ("option",),
    "draft_provider_options": ("option", "draft"),
    "draft_provider": ("provider",),
    "template_arguments": ("variable", "the chat template"),
}
OPTIONS = [*OptionArguments.__annotations__]
TAKEN = {
    "max_new_tokens": {"1", "5", "2**63", "np.int64", "np.uint8", "array of no dimension"},
    "lookup": {"True", "False", "np.bool"},
    "exact": {"True", "False", "np.bool"},
    "chat": {"True", "False", "np.bool"},
    "sampling": set(),
    "share_threads": {"False"},
    "fallback": {"True", "False", "np.bool"},
}


def names_of(argument: str) -> tuple[str, ...]:
    return (argument, *ALSO.get(argument, ()))


@pytest.mark.parametrize("name", [one.name for one in fields(Options)])
def test_options(name: str) -> None:
    found = refused_or_taken(names_of(name), lambda value: Options(**{name: value}))
    if name in TAKEN:
        assert {value for value, taken in found.items() if taken} == TAKEN[name]


@pytest.mark.parametrize("name", [one.name for one in fields(Sampling)])
def test_sampling(name: str) -> None:
    refused_or_taken(names_of(name), lambda value: Sampling(**{name: value}))


@pytest.mark.parametrize("name", OPTIONS)
def test_options_of_a_generation(pair: Pair, name: str) -> None:
    given = {"max_new_tokens": 1} if name != "max_new_tokens" else {"prompt": [1] * (pair.capacity - 2)}

    def generate(value: Any) -> None:
        options: Any = {**given, name: value}
        pair.generate(options.pop("prompt", "fox"), **options)

    refused_or_taken(names_of(name), generate)


@pytest.mark.parametrize("name", ["max_new_tokens", "stop", "template_arguments", "temperature"])
def test_options_of_a_turn(pair: Pair, name: str) -> None:
    with pair.chat(messages=[{"role": "user", "content": "fox " * 40}]) as chat:

        def send(value: Any) -> None:
            options: Any = {"max_new_tokens": 1, name: value}
            stream = chat.stream("fox", **options)
            stream.close()

        refused_or_taken(names_of(name), send)


def test_prompts(pair: Pair) -> None:
    taken = {"text", "digits", "no", "ints", "tuple", "iterator", "range", "np.str", "array", "message", "memoryview"}
    taken |= {"null", "long text", "array of no dimension"}
    found = refused_or_taken(names_of("prompt"), pair.encode)
    assert {name for name, good in found.items() if good} - {"empty list", "array of nothing"} == taken
    refused_or_taken(names_of("prompt"), lambda value: pair.generate(value, max_new_tokens=1))
    refused_or_taken(names_of("chat"), lambda value: pair.encode("fox", chat=value))
    refused_or_taken(names_of("template_arguments"), lambda value: pair.encode("fox", template_arguments=value))


def test_conversations(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    refused_or_taken(names_of("system"), lambda value: pair.chat(value))
    refused_or_taken(names_of("messages"), lambda value: pair.chat(messages=value))
    refused_or_taken(names_of("template_arguments"), lambda value: pair.chat(template_arguments=value))
    refused_or_taken(names_of("path"), lambda value: pair.restore(value))
    chat: Chat = pair.chat()
    refused_or_taken(names_of("message"), lambda value: chat.stream(value, max_new_tokens=1).close())
    refused_or_taken(names_of("path"), lambda value: chat.save(value))
    (tmp_path / "good.chat").unlink(missing_ok=True)
    chat.save("good.chat")
    refused_or_taken(names_of("template_arguments"), lambda value: pair.restore("good.chat", value))


@pytest.mark.parametrize("name", list(inspect.signature(load).parameters))
def test_loading(pair_folders: tuple[Path, Path], name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    target, draft = pair_folders

    def open_(value: Any) -> None:
        if name == "share_threads" and isinstance(value, bool | np.bool_) and value:
            raise BadInput("share_threads: one pool cannot be tried here; ONNX Runtime then refuses other sessions")
        given: Any = {"target": target, "draft": draft, "threads": 1, name: value}
        try:
            load(**given).close()
        except Failure as error:  # the hub, which is not asked here
            raise BadInput(f"{name}: {error}") from error

    refused_or_taken(names_of(name), open_)
