"""Long use of the shipped pair: memory, open files and threads stay what they are after a short time."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Timer
from typing import Any

import psutil
import pytest

from pard_onnx import Failure, Pair, load

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

GENERATIONS, CHATS, LOADS = 1000, 200, 60
WARM_UP = 0.1  # the share of the runs after which the growth is counted: arenas and caches of buffers fill first
MIB = 2**20
PROMPTS = ("def f(x):", "class Stack:", "import os\n", "x = [", "# sort\n", "for i in range(")


@dataclass(frozen=True)
class Usage:
    """What the process holds."""

    resident: int  # bytes
    files: int
    threads: int

    @classmethod
    def now(cls) -> Usage:
        gc.collect()
        process = psutil.Process()
        files = process.num_fds() if hasattr(process, "num_fds") else process.num_handles()
        return cls(process.memory_info().rss, files, process.num_threads())


def soak(name: str, count: int, run: Callable[[int], object], most_bytes: int) -> None:
    """Run it so many times; fail where the process holds more at the end than after the first runs."""
    for number in range(count):
        if number == round(WARM_UP * count):
            before = Usage.now()
        run(number)
    after = Usage.now()
    grown = after.resident - before.resident
    print(
        f"{name}: {count} runs, {before.resident / MIB:.1f} to {after.resident / MIB:.1f} MiB ({grown / MIB:+.2f}), "
        f"files {before.files} to {after.files}, threads {before.threads} to {after.threads}"
    )
    assert grown <= most_bytes, f"{name}: {grown / MIB:.1f} MiB more than after the first runs"
    assert after.files <= before.files and after.threads <= before.threads, (before, after)


def options(chance: random.Random) -> dict[str, Any]:
    length = chance.choice(["auto", 0, 1, 7, 32])
    out: dict[str, Any] = {"max_new_tokens": chance.randint(1, 60), "draft_length": length}
    if chance.random() < 0.3:
        out |= {"temperature": 0.8, "top_k": 20, "repetition_penalty": 1.1}
    if chance.random() < 0.2:
        out |= {"stop": ["\n\n", "return"]}
    if chance.random() < 0.1:
        out |= {"timeout": chance.choice([1e-6, 0.01, 5.0])}
    return out


def read_somehow(stream: Any, chance: random.Random) -> None:
    """To the end, or cancelled from another thread, cancelled in the loop, closed early or dropped."""
    way = chance.randrange(6)
    if way == 0:
        with stream:
            Timer(chance.random() * 0.01, stream.cancel).start()
            for _ in stream:
                pass
    elif way == 1:
        for number, _ in enumerate(stream):
            if number == 1:
                stream.cancel()
    elif way == 2:
        next(stream, None)
        stream.close()
    elif way == 3:
        next(stream, None)
        del stream
    else:
        stream.read()


@pytest.fixture(scope="module")
def folders(demo_folder: Callable[[str, str], Path]) -> tuple[Path, Path]:
    return demo_folder("demo-target", "int4"), demo_folder("demo-draft", "int8")


@pytest.fixture
def pair(folders: tuple[Path, Path]) -> Iterator[Pair]:
    with load(*folders) as out:
        yield out


def test_generations(pair: Pair) -> None:
    chance = random.Random(0)
    expected = pair.generate(PROMPTS[0], max_new_tokens=40).tokens

    def run(number: int) -> None:
        prompt = chance.choice(PROMPTS) * chance.randint(1, 20)
        read_somehow(pair.stream(prompt, **options(chance)), chance)
        if number % 50 == 0:
            assert pair.generate(PROMPTS[0], max_new_tokens=40).tokens == expected

    soak("generations", GENERATIONS, run, 16 * MIB)


def test_chats(pair: Pair, tmp_path: Path) -> None:
    chance = random.Random(1)

    def run(number: int) -> None:
        chat = pair.chat(chance.choice([None, "You write code."]))
        for _ in range(chance.randint(1, 4)):
            read_somehow(chat.stream(chance.choice(PROMPTS), **options(chance)), chance)
        if number % 10 == 0:
            chat.save(tmp_path / "saved.chat")
            with pair.restore(tmp_path / "saved.chat") as again:
                read_somehow(again.stream("go on", **options(chance)), chance)
        if chance.random() < 0.5:
            chat.close()

    soak("chats", CHATS, run, 16 * MIB)


def test_loads(folders: tuple[Path, Path]) -> None:
    chance = random.Random(2)

    def run(number: int) -> None:
        pair = load(*folders)
        stream = pair.stream(PROMPTS[0], max_new_tokens=8)
        if number % 3 == 0:
            next(stream)
            with pytest.raises(Failure):
                pair.close()
        stream.close()
        if number % 2:
            read_somehow(pair.stream(PROMPTS[1], **options(chance)), chance)
        pair.close()

    soak("loads", LOADS, run, 32 * MIB)
