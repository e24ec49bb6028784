"""Tokens a second of PARD's training, beside the packing of AMD's reference.

    python benchmarks/measures/training_speed.py [--draft DIR] [--draft-length 8] [--tokens 512] [--samples 4] [--bf16]

The reference packs a mask for each position behind each token of each sample and attends with a dense mask; its samples
are sequences of their own. pard-adapt keeps a shrinking part of the masks (COD), places them where replies go on, packs
several samples in a sequence, and skips the parts of the mask that nothing sees. In between, one change after the other
is measured. The ways take turns, so that a slow moment hits all of them; a second is one of forward pass, backward
pass and AdamW's step, and a token is a real one, whatever masks follow it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from pard_onnx.models import demo
from pard_onnx.models.adapt.attention import with_packed_attention
from pard_onnx.models.adapt.objective import Pard
from pard_onnx.models.adapt.packing import PackedSequence, pack_samples
from pard_onnx.models.adapt.run import optimizer_of
from pard_onnx.models.adapt.samples import Sample
from pard_onnx.models.adapt.settings import Attention, Precision, Settings
from pard_onnx.models.adapt.start import Start, start_from

REPLIES = 0.7  # the share of a sample's tokens that are replies


@dataclass(frozen=True, slots=True)
class Way:
    """A way to pack and to attend."""

    name: str
    drops: bool  # COD
    everywhere: bool  # masks behind each token, and not only where replies go on
    packs: bool  # several samples in a sequence
    attention: Attention


WAYS = (
    Way("reference: all masks, dense", False, True, False, "dense"),
    Way("COD, dense", True, True, False, "dense"),
    Way("COD, masks at replies, dense", True, False, False, "dense"),
    Way("the same, attention in parts", True, False, False, "auto"),
    Way("pard-adapt: the same, samples packed", True, False, True, "auto"),
)


@dataclass(frozen=True, slots=True)
class Row:
    """What was measured of a way."""

    name: str
    tokens_per_second: float  # real tokens
    packed_tokens: int  # of a step, masks included
    seconds: float  # of a step
    teraflops: float  # of the matrices' products, six operations a weight and packed token


def samples_of(count: int, longest: int, seed: int = 0) -> list[Sample]:
    """Samples of a quarter of `longest` tokens up to all of it. Which tokens they are does not matter for the speed."""
    rng = np.random.default_rng(seed)
    lengths = np.linspace(longest // 4, longest, count).astype(int)
    return [Sample(rng.integers(0, 1000, n), np.arange(n) >= (1 - REPLIES) * n) for n in lengths]


def sequences(way: Way, samples: Sequence[Sample], settings: Settings, mask_id: int) -> list[PackedSequence]:
    """The packed sequences of a step."""
    drop = settings.drop if way.drops else replace(settings.drop, ratio=1.0, floor=1.0)
    groups: list[list[Sample]] = [[one] for one in samples]
    if way.packs:
        groups, left = [[]], 0
        for one in samples:
            if groups[-1] and len(one.ids) > left:
                groups.append([])
            left = (left if groups[-1] else settings.sequence_tokens) - len(one.ids)
            groups[-1].append(one)
    out = []
    for group in groups:
        rng = np.random.default_rng(0)
        # Where all tokens are replies, each has masks. Prompts are learned then too, which costs a little more
        parts = [(one.ids, np.ones_like(one.replies) if way.everywhere else one.replies) for one in group]
        out.append(pack_samples(parts, mask_id, drop, rng))
    return out


def step_of(way: Way, start: Start, settings: Settings, samples: Sequence[Sample]) -> tuple[Callable[[], None], int]:
    """A function that trains one step, and the packed tokens of a step."""
    device = start.model.device
    objective = Pard(replace(settings, attention=way.attention), device)
    packs = sequences(way, samples, settings, start.mask_id)
    optimizer = optimizer_of(start.model, settings)
    labels = sum(int(np.count_nonzero(one.labels >= 0)) for one in packs)

    def step() -> None:
        for packed in packs:
            with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
                loss = objective.losses(start.model, packed).total / labels
            torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return step, sum(len(one.ids) for one in packs)


def measured(start: Start, settings: Settings, samples: Sequence[Sample], repeats: int) -> list[Row]:
    """The ways, whose steps take turns."""
    with with_packed_attention(start.model):
        steps = [step_of(way, start, settings, samples) for way in WAYS]
        for step, _ in steps:  # the first one allocates memory, and compiles on a GPU
            step()
        times: list[list[float]] = [[] for _ in steps]
        for _ in range(repeats):
            for (step, _), own in zip(steps, times, strict=True):
                began = perf_counter()
                step()
                own.append(perf_counter() - began)
    real = sum(len(one.ids) for one in samples)
    matrix: Any = start.model.get_input_embeddings()
    embedding = matrix.weight.numel()
    weights = sum(one.numel() for one in start.model.parameters())
    weights -= 0 if start.model.config.tie_word_embeddings else embedding  # a tied one is the head's matrix too
    out = []
    for way, (_, packed), own in zip(WAYS, steps, times, strict=True):
        seconds = median(own)
        out.append(Row(way.name, real / seconds, packed, seconds, 6 * weights * packed / seconds / 1e12))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draft", type=Path, default=demo.TARGET.parent / "ar-draft", help="a checkpoint folder")
    parser.add_argument("--draft-length", type=int, default=8, metavar="K")
    parser.add_argument("--tokens", type=int, default=512, help="real tokens of a sequence, and of the longest sample")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, help="of torch on the CPU")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    start = start_from(arguments.draft)
    start.model.train()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.nn.Module.to(start.model, device)
    precision: Precision = "bf16" if arguments.bf16 else "fp32"
    settings = Settings(draft_length=arguments.draft_length, sequence_tokens=arguments.tokens, precision=precision)
    samples = samples_of(arguments.samples, arguments.tokens)
    rows = measured(start, settings, samples, arguments.repeats)
    real = sum(len(one.ids) for one in samples)
    title = f"{start.note}, K = {settings.draft_length}, {real} tokens, {device} {precision}"
    table = Table("way", "tokens/s", "beside the reference", "packed tokens", "s/step", "TFLOP/s", title=title)
    for row in rows:
        numbers = (f"{row.tokens_per_second / rows[0].tokens_per_second:.2f}x", f"{row.packed_tokens:,}")
        table.add_row(row.name, f"{row.tokens_per_second:,.0f}", *numbers, f"{row.seconds:.3f}", f"{row.teraflops:.3f}")
    Console().print(table)
    if arguments.json:
        found = {"title": title, "rows": [{name: getattr(row, name) for name in Row.__slots__} for row in rows]}
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
