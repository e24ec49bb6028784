"""Mixed precision: which matrices get 8 bits, for a given size; pure, from the losses that sensitivity.py measures."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from pard_onnx.models.checkpoints.checkpoint import Checkpoint
from pard_onnx.models.errors import BadInput
from pard_onnx.models.families import shapes
from pard_onnx.models.manifest import MixedChoice
from pard_onnx.models.precision import INT8, Format, Recipe
from pard_onnx.quantize.packing.pack import fit_block, stored_bytes
from pard_onnx.quantize.packing.prepared import EMBEDDING, HEAD

PROTECTED = ("self_attn.k_proj", "self_attn.v_proj")  # what they err stays in the cache for all later tokens,
PROTECTION = 4.0  # of which calibration text has few: their loss counts so many times
BUDGET = re.compile(r"(\d+(?:\.\d+)?)(MB)?")


@dataclass(frozen=True, slots=True)
class Unit:
    """Matrices that get the same format: they share their input and what they are for."""

    names: tuple[str, ...]
    loss: float
    extra_bytes: int  # of 8 bits over 4

    @property
    def protected(self) -> bool:
        return any(name.endswith(PROTECTED) for name in self.names)


def choose(units: Sequence[Unit], room: int) -> tuple[MixedChoice, ...]:
    """8 bits for those that lose most a byte, as long as they fit in `room` bytes."""
    ranked = sorted(units, key=_gain, reverse=True)
    found = []
    for unit in ranked:
        fits = unit.extra_bytes <= room
        room -= unit.extra_bytes if fits else 0
        found.append(MixedChoice(unit.names, 8 if fits else 4, unit.loss, unit.extra_bytes, unit.protected))
    return tuple(found)


def _gain(unit: Unit) -> float:
    return unit.loss * (PROTECTION if unit.protected else 1.0) / unit.extra_bytes


def mixed(recipe: Recipe, choices: Sequence[MixedChoice]) -> Recipe:
    """The recipe with 8 bits where they were chosen; a tied head is chosen by the head's name."""
    names = [name for choice in choices if choice.bits == 8 for name in choice.names]
    inner = tuple((name, _eight(recipe.matrices)) for name in names if name not in (HEAD, EMBEDDING))
    head = _eight(recipe.head) if HEAD in names else recipe.head
    embedding = _eight(recipe.embedding) if EMBEDDING in names else recipe.embedding
    return replace(recipe, head=head, embedding=embedding, overrides=(*inner, *recipe.overrides))


def _eight(fmt: Format) -> Format:
    """8 bits have levels enough without zero points."""
    return replace(INT8, block=fmt.block)


def budget_bytes(text: str, checkpoint: Checkpoint, recipe: Recipe) -> int:
    """'0.6' of what all matrices take at 8 bits, or '600MB'. Raises BadInput for what is not enough for 4 bits."""
    matched = BUDGET.fullmatch(text.replace(" ", ""))
    if not matched:
        raise BadInput(f"--budget {text}: give a share of the size at 8 bits as 0.6, or a size as 600MB")
    least, most = size(checkpoint, recipe), size(checkpoint, Recipe(*(_eight(recipe.matrices),) * 3))
    budget = int(float(matched[1]) * (1e6 if matched[2] else most))
    if budget < least:
        raise BadInput(f"--budget {text}: is less than the {least / 1e6:.1f} MB that 4 bits take ({least / most:.2f})")
    return budget


def size(checkpoint: Checkpoint, recipe: Recipe) -> int:
    """Bytes of all matrices."""
    return sum(_bytes(shape, recipe.of(name)) for name, shape in matrices(checkpoint))


def extra_bytes(checkpoint: Checkpoint, recipe: Recipe, names: Sequence[str]) -> int:
    """What the matrices `names` take more at 8 bits."""
    shape = dict(matrices(checkpoint))
    return sum(_bytes(shape[n], _eight(recipe.of(n))) - _bytes(shape[n], recipe.of(n)) for n in names)


def matrices(checkpoint: Checkpoint) -> Iterator[tuple[str, tuple[int, int]]]:
    """Stored matrices by the names that recipes know; a tied one is the head's."""
    for name, shape in shapes(checkpoint.spec):
        stem = name.removesuffix(".weight")
        if len(shape) == 2:
            yield HEAD if checkpoint.spec.tied and stem == EMBEDDING else stem, (shape[0], shape[1])


def _bytes(shape: tuple[int, int], fmt: Format) -> int:
    return stored_bytes(*shape, fit_block(fmt, shape[1], ""))
