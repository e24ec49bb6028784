"""Mixed precision: which matrices get 8 bits for a given size, from the losses that sensitivity.py measures.

The functions are pure: they run no model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from pard_onnx.models.checkpoints.checkpoint import Checkpoint
from pard_onnx.models.errors import BadInput
from pard_onnx.models.families import shapes
from pard_onnx.models.manifest import MixedChoice
from pard_onnx.models.precision import INT8, Format, Recipe
from pard_onnx.quantize.packing.pack import format_for_width, stored_bytes
from pard_onnx.quantize.packing.prepared import EMBEDDING, HEAD

# Errors of keys and values stay in the KV cache for all later tokens, of which calibration text has few.
PROTECTED = ("self_attn.k_proj", "self_attn.v_proj")
PROTECTION = 4.0  # the factor of their losses
BUDGET = re.compile(r"(\d+(?:\.\d+)?)(MB)?")


@dataclass(frozen=True, slots=True)
class Unit:
    """Matrices that get the same format, because they have the same input and the same purpose."""

    names: tuple[str, ...]
    loss: float  # by 4 bits, as sensitivity.py defines it
    extra_bytes: int  # at 8 bits, compared to 4

    @property
    def protected(self) -> bool:
        return any(name.endswith(PROTECTED) for name in self.names)


def choose_bits(units: Sequence[Unit], room: int) -> tuple[MixedChoice, ...]:
    """Give 8 bits to the units that lose most for each extra byte, as long as `room` bytes suffice."""
    ranked = sorted(units, key=_gain, reverse=True)
    choices = []
    for unit in ranked:
        affordable = unit.extra_bytes <= room
        room -= unit.extra_bytes if affordable else 0
        choices.append(MixedChoice(unit.names, 8 if affordable else 4, unit.loss, unit.extra_bytes, unit.protected))
    return tuple(choices)


def _gain(unit: Unit) -> float:
    return unit.loss * (PROTECTION if unit.protected else 1.0) / unit.extra_bytes


def with_choices(recipe: Recipe, choices: Sequence[MixedChoice]) -> Recipe:
    """The recipe with 8 bits for the matrices of such choices; a tied matrix is chosen by the head's name."""
    names = [name for choice in choices if choice.bits == 8 for name in choice.names]
    inner = tuple((name, _eight(recipe.matrices)) for name in names if name not in (HEAD, EMBEDDING))
    head = _eight(recipe.head) if HEAD in names else recipe.head
    embedding = _eight(recipe.embedding) if EMBEDDING in names else recipe.embedding
    return replace(recipe, head=head, embedding=embedding, overrides=(*inner, *recipe.overrides))


def _eight(fmt: Format) -> Format:
    """The format at 8 bits, which have enough levels to need no zero points."""
    return replace(INT8, block=fmt.block)


def budget_bytes(text: str, checkpoint: Checkpoint, recipe: Recipe) -> int:
    """The bytes of a budget: '0.6' is a share of all matrices' size at 8 bits, '600MB' a size.

    Raises BadInput for other text, and for a budget that is less than the size at 4 bits.
    """
    matched = BUDGET.fullmatch(text.replace(" ", ""))
    if not matched:
        raise BadInput(f"--budget {text}: give a share of the size at 8 bits as 0.6, or a size as 600MB")
    least, most = matrix_bytes(checkpoint, recipe), matrix_bytes(checkpoint, Recipe(*(_eight(recipe.matrices),) * 3))
    budget = int(float(matched[1]) * (1e6 if matched[2] else most))
    if budget < least:
        raise BadInput(f"--budget {text}: is less than the {least / 1e6:.1f} MB that 4 bits take ({least / most:.2f})")
    return budget


def matrix_bytes(checkpoint: Checkpoint, recipe: Recipe) -> int:
    """Bytes of all matrices in the recipe's formats."""
    return sum(_bytes(shape, recipe.of(name)) for name, shape in matrix_shapes(checkpoint))


def extra_bytes(checkpoint: Checkpoint, recipe: Recipe, names: Sequence[str]) -> int:
    """The bytes that the matrices `names` take more at 8 bits than in the recipe's formats."""
    shape = dict(matrix_shapes(checkpoint))
    return sum(_bytes(shape[n], _eight(recipe.of(n))) - _bytes(shape[n], recipe.of(n)) for n in names)


def matrix_shapes(checkpoint: Checkpoint) -> Iterator[tuple[str, tuple[int, int]]]:
    """Names, as recipes have them, and shapes of all stored matrices; a tied matrix has the head's name."""
    for name, shape in shapes(checkpoint.spec):
        stem = name.removesuffix(".weight")
        if len(shape) == 2:
            yield HEAD if checkpoint.spec.tied and stem == EMBEDDING else stem, (shape[0], shape[1])


def _bytes(shape: tuple[int, int], fmt: Format) -> int:
    return stored_bytes(*shape, format_for_width(fmt, shape[1], ""))
