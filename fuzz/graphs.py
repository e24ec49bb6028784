"""Mutates a graph and rewrites it for the kernels: bytes, None, ValueError or LookupError, and nothing else.

python fuzz/graphs.py MINUTES [SEED]
"""

from __future__ import annotations

import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from pard_onnx.runtime.kernels.graph import rewritten
from pard_onnx.runtime.kernels.nodes import BYTES, VARINT, Field, fields, message

MODEL = Path(__file__).with_name("model.onnx")
LONGEST_SECONDS = 10
FIXED64, FIXED32 = 1, 5  # wire types
NUMBERS = (0, 1, 2, 3, 4, 7, 8, 16, 31, 32, 64, 128, 2**31, 2**32 + 4, 2**62, 2**63 - 1, 2**63, 2**64 - 16, 2**64 - 1)
TEXTS = (b"", b"\0", b"\xff", b"Add", b"MatMulNBits", b"GroupQueryAttention", b"com.microsoft", b"-1", b"1e9")
TEXTS += (b"\xc2\xb2", b"9" * 5000, b"../x", b"x" * 300, b"offset", b"location", b"Sigmoid", b"Cast", b"pard_onnx")


def mutated(data: bytes, random: random.Random) -> bytes:
    """The message with one field changed, at a random depth; or with a few bytes changed."""
    if random.random() < 0.1:
        return _scrambled(data, random)
    try:
        parts = list(fields(data))
    except ValueError:
        return _scrambled(data, random)
    if not parts:
        return message([_field(random)])
    at = random.randrange(len(parts))
    number, wire, value = parts[at]
    if isinstance(value, bytes) and wire == BYTES and random.random() < 0.8:
        parts[at] = (number, wire, mutated(value, random) if _is_message(value) else random.choice(TEXTS))
    else:
        random.choice(CHANGES)(parts, at, random)
    return message(parts)


def _is_message(data: bytes) -> bool:
    """Whether the bytes look like one: a text seldom does."""
    try:
        return all(0 < number < 64 for number, _, _ in fields(data))
    except ValueError:
        return False


def _scrambled(data: bytes, random: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(random.randint(1, 4)):
        if out:
            out[random.randrange(len(out))] = random.randrange(256)
    return bytes(out[: random.randint(0, len(out))] if random.random() < 0.2 else out)


def _field(random: random.Random) -> Field:
    number = random.choice([random.randint(1, 21), random.choice(NUMBERS) >> 3])
    wire = random.choice([VARINT, BYTES, FIXED32, FIXED64])
    fixed = {FIXED32: b"\xff" * 4, FIXED64: b"\xff" * 8, BYTES: random.choice(TEXTS)}
    return number, wire, fixed.get(wire, random.choice(NUMBERS))


def _remove(parts: list[Field], at: int, random: random.Random) -> None:
    del parts[at]


def _repeat(parts: list[Field], at: int, random: random.Random) -> None:
    parts.insert(random.randint(0, len(parts)), parts[at])


def _insert(parts: list[Field], at: int, random: random.Random) -> None:
    parts.insert(at, _field(random))


def _swap(parts: list[Field], at: int, random: random.Random) -> None:
    other = random.randrange(len(parts))
    parts[at], parts[other] = parts[other], parts[at]


def _exchange_values(parts: list[Field], at: int, random: random.Random) -> None:
    """What another field of the same wire type holds: names, shapes and positions that belong elsewhere."""
    same = [part for part in parts if part[1] == parts[at][1]]
    parts[at] = (*parts[at][:2], random.choice(same)[2])


def _renumber(parts: list[Field], at: int, random: random.Random) -> None:
    parts[at] = (_field(random)[0], *parts[at][1:])


def _other_number(parts: list[Field], at: int, random: random.Random) -> None:
    if parts[at][1] == VARINT:
        parts[at] = (*parts[at][:2], random.choice(NUMBERS))
    else:
        parts[at] = _field(random)


CHANGES: list[Callable[[list[Field], int, random.Random], None]]
CHANGES = [_remove, _repeat, _insert, _swap, _renumber, *[_exchange_values, _other_number] * 2]


class Hang(BaseException):
    """One graph took too long."""


def _hang(signum: int, frame: FrameType | None) -> None:
    raise Hang


@contextmanager
def _watched() -> Iterator[None]:
    """Raises Hang after LONGEST_SECONDS, where the system has alarms."""
    if not hasattr(signal, "SIGALRM"):
        yield
        return
    before = signal.signal(signal.SIGALRM, _hang)
    signal.alarm(LONGEST_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def run(rounds: int, seed: int, seconds: float = float("inf")) -> dict[str, int]:
    """Rewrites mutated graphs; returns how many were rewritten, left alone and refused."""
    random_numbers, model = random.Random(seed), MODEL.read_bytes()
    found, end = {"rewritten": 0, "left": 0, "refused": 0}, time.monotonic() + seconds
    for _ in range(rounds):
        if time.monotonic() > end:
            break
        graph = model
        for _ in range(random_numbers.randint(1, 4)):
            graph = mutated(graph, random_numbers)
        try:
            with _watched():
                out = rewritten(graph, Path("/model"))
            found["left" if out is None else "rewritten"] += 1
        except (ValueError, LookupError):  # `with_kernel` makes one error of both
            found["refused"] += 1
        except BaseException:
            Path(f"crash-graph-{seed}").write_bytes(graph)
            raise
    return found


if __name__ == "__main__":
    print(run(sys.maxsize, int(sys.argv[2]) if len(sys.argv) > 2 else 1, 60 * float(sys.argv[1])))
