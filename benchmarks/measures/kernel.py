"""The time of whole steps with this package's kernels and with ONNX Runtime's, interleaved in one process.

    python benchmarks/measures/kernel.py --model DIR [--widths 1,2,5,9] [--context 256] [--threads 2] [--json]

ONNX Runtime keeps one packed copy of matrices that are equal. The weights of an artificial checkpoint that repeats its
layers then fit into the processor's caches, and its steps are faster than those of any true model. `distinct` is the
share of the weights that are not copies of others.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from time import perf_counter

from rich.console import Console
from rich.table import Table

from pard_onnx.models.manifest import GRAPH, Manifest
from pard_onnx.models.protobuf import fields
from pard_onnx.runtime import kernels
from pard_onnx.runtime.kernels.nodes import MODEL_GRAPH, as_bytes, file_positions
from pard_onnx.runtime.providers.discovery import require_installed
from pard_onnx.runtime.providers.threads import Threads
from pard_onnx.runtime.sessions.dynamic_shapes import FusedDraft, FusedTarget

WIDTHS = "1,2,4,5,8,9,12,16,32,64,512"
VERIFIED = 64  # the most tokens of a step with all rows of logits; wider steps are prefills, with the last row only
NEW_TOKENS = 4  # of a draft's step; the rest are masks
SMAPS = Path("/proc/self/smaps_rollup")


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Milliseconds of a step of `width` tokens: medians and minima."""

    width: int
    ort: float
    ours: float
    ort_fastest: float
    ours_fastest: float


@dataclass(frozen=True, slots=True)
class OpeningCost:
    """The cost of opening a model."""

    seconds: float
    memory: int | None  # MiB by which the process's private memory grew; None if the system does not report it


@contextmanager
def kernel_variable(value: str | None) -> Iterator[None]:
    """Set the environment variable that chooses the kernels while the context is open; None: unset it."""
    before = os.environ.pop(kernels.VARIABLE, None)
    if value is not None:
        os.environ[kernels.VARIABLE] = value
    yield
    os.environ.pop(kernels.VARIABLE, None)
    if before is not None:
        os.environ[kernels.VARIABLE] = before


def private_memory() -> int | None:
    if not SMAPS.exists():
        return None
    lines = [line.split() for line in SMAPS.read_text("utf-8").splitlines()]
    return sum(int(line[1]) for line in lines if line[0] == "Private_Dirty:") >> 10


def open_step(folder: Path, manifest: Manifest, threads: int) -> tuple[Callable[[int, int], None], OpeningCost]:
    """Open a model: a function that runs a step of some width at some context, and the cost of opening."""
    memory, start = private_memory(), perf_counter()
    make = FusedDraft if manifest.role == "draft" else FusedTarget
    session = make(folder, manifest, require_installed("cpu"), Threads(threads))
    seconds, after = perf_counter() - start, private_memory()

    def step(context: int, width: int) -> None:
        session.cache.set_length(context)
        if isinstance(session, FusedTarget):
            session.step([0] * width, width if width <= VERIFIED else 1)
        else:
            real = min(width, NEW_TOKENS)
            session.step([0] * real, width - real + 1)

    return step, OpeningCost(seconds, None if memory is None or after is None else after - memory)


def distinct_share(folder: Path) -> float:
    """The share of the data files' bytes in tensors that are not copies of other tensors."""
    graph = next(as_bytes(v) for n, _, v in fields((folder / GRAPH).read_bytes()) if n == MODEL_GRAPH)
    found = [place for _, place in file_positions(fields(graph))]
    sizes: dict[bytes, int] = {}
    total = 0
    for name in {place.file for place in found}:
        data = (folder / name).read_bytes()
        starts = sorted({place.offset for place in found if place.file == name})
        for start, end in zip(starts, [*starts[1:], len(data)], strict=True):
            sizes[hashlib.sha256(data[start:end]).digest()] = end - start
            total += end - start
    return sum(sizes.values()) / total


def measure(steps: dict[str, Callable[[int, int], None]], context: int, width: int, repeat: int) -> StepTimes:
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for round_number in range(repeat + 1):
        for name, step in steps.items():
            start = perf_counter()
            step(context, width)
            if round_number:  # the first warms up
                seconds[name].append(1000 * (perf_counter() - start))
    return StepTimes(width, median(seconds["ort"]), median(seconds["ours"]), min(seconds["ort"]), min(seconds["ours"]))


def table(rows: list[StepTimes], title: str) -> Table:
    out = Table("tokens", "ONNX Runtime", "ours", "faster", "of one token", title=title)
    for row in rows:
        one = f"{row.ours / rows[0].ours:.2f}" if rows[0].width == 1 else ""
        times = (f"{row.ort:.2f}", f"{row.ours:.2f}", f"{row.ort / row.ours:.2f}x")
        out.add_row(str(row.width), *times, one)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a folder that pard-export has written")
    parser.add_argument("--widths", default=WIDTHS, help="tokens of the steps")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=30)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    manifest = Manifest.read(options.model)
    isa = kernels.isa()
    if isa is None:
        parser.error("the kernels are not built, or switched off")
    steps, costs = {}, {}
    for name, variable in (("ort", kernels.OFF), ("ours", os.environ.get(kernels.VARIABLE))):
        with kernel_variable(variable):
            steps[name], costs[name] = open_step(options.model, manifest, options.threads)
    rows = []
    for width in map(int, options.widths.split(",")):
        repeat = max(3, options.repeat // max(1, width // 16))
        rows.append(measure(steps, options.context, width, repeat))
    share = distinct_share(options.model)
    if options.json:
        opening = {name: asdict(cost) for name, cost in costs.items()}
        result = {"kernel": isa, "distinct": share, "opened": opening, "steps": [asdict(row) for row in rows]}
        print(json.dumps(result, indent=2))
        return
    console = Console()
    title = f"{options.model.name}, {isa}: ms a step, {options.context} tokens of context, {options.threads} threads"
    console.print(table(rows, title))
    for name, cost in costs.items():
        memory = "" if cost.memory is None else f", {cost.memory} MiB"
        console.print(f"{name}: opened in {cost.seconds:.2f} s{memory}")
    console.print(f"{100 * share:.0f} % of the weights are distinct")


if __name__ == "__main__":
    main()
