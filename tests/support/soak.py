"""Long use of a pair, in a process of its own: `python soak.py generations|chats|loads TARGET DRAFT`.

Prints one line of JSON: what the process held after the first runs, and at the end.
"""

from __future__ import annotations

import gc
import json
import random
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Timer
from typing import Any

import psutil

from pard_onnx import Failure, load

GENERATIONS, CHATS, LOADS = 1000, 200, 60
WARM_UP = 0.1  # the share of the runs after which the growth is counted: arenas and caches of buffers fill first
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


def soak(count: int, run: Callable[[int], object]) -> tuple[Usage, Usage]:
    """Run it so many times: what the process held after the first runs, and at the end."""
    for number in range(count):
        if number == round(WARM_UP * count):
            before = Usage.now()
        run(number)
    return before, Usage.now()


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


def generations(folders: list[Path]) -> tuple[Usage, Usage]:
    chance = random.Random(0)
    with load(*folders) as pair:
        expected = pair.generate(PROMPTS[0], max_new_tokens=40).tokens

        def run(number: int) -> None:
            prompt = chance.choice(PROMPTS) * chance.randint(1, 20)
            read_somehow(pair.stream(prompt, **options(chance)), chance)
            if number % 50 == 0:
                assert pair.generate(PROMPTS[0], max_new_tokens=40).tokens == expected

        return soak(GENERATIONS, run)


def chats(folders: list[Path]) -> tuple[Usage, Usage]:
    chance = random.Random(1)
    with load(*folders) as pair, tempfile.TemporaryDirectory() as scratch:
        saved = Path(scratch, "saved.chat")

        def run(number: int) -> None:
            chat = pair.chat(chance.choice([None, "You write code."]))
            for _ in range(chance.randint(1, 4)):
                read_somehow(chat.stream(chance.choice(PROMPTS), **options(chance)), chance)
            if number % 10 == 0:
                chat.save(saved)
                with pair.restore(saved) as again:
                    read_somehow(again.stream("go on", **options(chance)), chance)
            if chance.random() < 0.5:
                chat.close()

        return soak(CHATS, run)


def loads(folders: list[Path]) -> tuple[Usage, Usage]:
    chance = random.Random(2)

    def run(number: int) -> None:
        pair = load(*folders)
        stream = pair.stream(PROMPTS[0], max_new_tokens=8)
        if number % 3 == 0:
            next(stream)
            try:
                pair.close()
                raise AssertionError("closed while a generation ran")
            except Failure:
                pass
        stream.close()
        if number % 2:
            read_somehow(pair.stream(PROMPTS[1], **options(chance)), chance)
        pair.close()

    return soak(LOADS, run)


if __name__ == "__main__":
    work = {"generations": generations, "chats": chats, "loads": loads}[sys.argv[1]]
    print(json.dumps([asdict(usage) for usage in work([Path(name) for name in sys.argv[2:]])]))
