"""Two tables: the recipes that users name, and the algorithms that round weights.

A recipe is a format and the way in which weights are rounded to it. Another recipe or algorithm is another entry here;
an algorithm's functions are in algorithms/.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Literal

from pard_onnx.models.checks import nearest_name
from pard_onnx.models.errors import BadInput
from pard_onnx.models.precision import A8W8, A16W8, DYNAMIC_INT8, INT4, INT8, Format, Precision, Recipe
from pard_onnx.models.spec import ModelSpec, Role
from pard_onnx.quantize.algorithms.grid import Round, round_by_importance, round_by_search
from pard_onnx.quantize.packing.pack import SMALLEST_BLOCK, Float, pack

if TYPE_CHECKING:
    from torch import Tensor

INT4_ZERO = replace(INT4, symmetric=False)
BLOCKS = (16, 32, 64, 128, 256)
SMALL_HIDDEN = 1024  # below it a model is small: it loses more by 4 bits than a larger one, and its steps are short
SMALL_BLOCK = 32
LAST_LAYERS = 15  # a small model's last layers, one of so many, have 8 bits: what they lose, no later layer evens out
KEYS_AND_VALUES = ("*.k_proj", "*.v_proj")  # small matrices, whose errors stay in the KV cache for all later tokens


@dataclass(frozen=True, slots=True)
class Algorithm:
    """How the rows of a matrix are rounded to a format."""

    from_weights: Round  # rounds by the weights alone, without calibration text
    # Makes the rounding function for a matrix from X X^T [in, in] of its calibration inputs
    from_gram: Callable[[Tensor], Round] | None = None
    # The same from the sums of squares [in] of its calibration inputs, which take less time and memory
    from_squares: Callable[[Float], Round] | None = None


def _gptq(gram: Tensor) -> Round:
    from pard_onnx.quantize.algorithms import gptq  # torch takes seconds to import, and most algorithms do without

    return partial(gptq.gptq, gptq.GramFactor.of(gram))


ALGORITHMS: dict[str, Algorithm] = {
    "rtn": Algorithm(pack),
    "importance": Algorithm(pack, from_squares=round_by_importance),
    "gptq": Algorithm(round_by_search, _gptq),
}


@dataclass(frozen=True, slots=True)
class NamedRecipe:
    """A quantization recipe under the name that `--recipe` takes."""

    name: str
    format: Format  # of every matrix, unless `mixed` gives some of them more bits
    rounding: str  # a key of ALGORITHMS
    awq: bool = False  # input columns are scaled by AWQ before the weights are rounded
    smooth: bool = False  # input columns are scaled so that activations lose less by 8 bits
    mixed: bool = False  # the matrices that lose most by 4 bits get 8 bits
    ends: Format | None = None  # of the LM head and the embedding; None: that of the other matrices
    eight_bits: tuple[str, ...] = ()  # patterns of the matrices that have 8 bits in any case
    # Small models get blocks of SMALL_BLOCK and 8 bits in their last layers; larger ones no 8 bits by `eight_bits`
    by_size: bool = False
    chosen_block: bool = False  # whether the user chose the block size

    @property
    def algorithm(self) -> Algorithm:
        return ALGORITHMS[self.rounding]

    @property
    def needs_text(self) -> bool:
        """Whether the recipe runs calibration text through the model."""
        by_squares = self.smooth or self.algorithm.from_squares is not None
        return by_squares or self.needs_gram or self.mixed or self.qdq

    @property
    def needs_gram(self) -> bool:
        """Whether the recipe needs X X^T of the matrices' inputs: more text, time and memory than their squares."""
        return self.awq or self.algorithm.from_gram is not None

    @property
    def qdq(self) -> bool:
        """Whether activations are quantized too, by scales that are measured beforehand (QuantizeLinear pairs)."""
        return self.format.kind == "qdq"

    @property
    def precision(self) -> Precision:
        if self.qdq:
            return "int8-a8w8" if self.format.activations == 8 else "int8-a16w8"
        return "int4" if self.format.bits == 4 else "int8"

    def formats(self, spec: ModelSpec) -> Recipe:
        """The format of every matrix, before any is given more bits.

        Raises BadInput for a role that cannot have it, and for a block size by the user that divides no width.
        """
        if self.chosen_block:
            _require_block(self.format.block, spec)
        fmt, small = self.format, self.by_size and spec.hidden < SMALL_HIDDEN
        if small:
            fmt = replace(fmt, block=SMALL_BLOCK)
        lookup = INT8 if fmt.kind == "dynamic" else fmt  # dynamic int8 has no embedding lookup
        patterns = self.eight_bits if small or not self.by_size else ()
        last = range(spec.layers - spec.layers // LAST_LAYERS, spec.layers) if small else ()
        eight = tuple((pattern, INT8) for pattern in (*patterns, *(f"model.layers.{layer}.*" for layer in last)))
        recipe = Recipe(fmt, self.ends or lookup, self.ends or lookup, eight)
        recipe.require(spec.role)
        return recipe

    def with_block(self, block: int) -> NamedRecipe:
        """The recipe with another block size. Raises BadInput if its format does not have that size."""
        if block not in BLOCKS or self.format.kind != "nbits":
            known = ", ".join(map(str, BLOCKS)) if self.format.kind == "nbits" else "none: it has one scale a row"
            raise BadInput(f"--block-size {block}: blocks of {self.name} are {known}")
        return replace(
            self,
            name=f"{self.name}-b{block}",
            format=replace(self.format, block=block),
            by_size=False,
            chosen_block=True,
        )


def _require_block(block: int, spec: ModelSpec) -> None:
    widths = (spec.hidden, spec.intermediate, spec.heads * spec.head_dim)
    if all(width % block for width in widths):
        largest = max((size for size in BLOCKS if any(width % size == 0 for width in widths)), default=None)
        known = f"the largest that does is {largest}" if largest else "leave it out"
        raise BadInput(f"--block-size {block}: divides none of the widths {', '.join(map(str, widths))}; {known}")


RECIPES = {
    recipe.name: recipe
    for recipe in (
        NamedRecipe("int4-rtn", INT4, "rtn"),
        NamedRecipe("int4-rtn-asym", INT4_ZERO, "rtn"),
        NamedRecipe("int4-importance", INT4, "importance"),
        NamedRecipe("int4-gptq", INT4, "gptq"),
        NamedRecipe("int4-gptq-asym", INT4_ZERO, "gptq"),
        NamedRecipe("int4-awq", INT4, "importance", awq=True),
        NamedRecipe("int4-awq-asym", INT4_ZERO, "importance", awq=True),
        NamedRecipe("int4-awq-gptq", INT4, "gptq", awq=True),
        NamedRecipe("int4-mixed", INT4, "gptq", mixed=True),
        NamedRecipe("int4-good", INT4_ZERO, "importance", ends=INT8, eight_bits=KEYS_AND_VALUES, by_size=True),
        NamedRecipe("int4-best", replace(INT4_ZERO, block=32), "gptq", ends=INT8, eight_bits=KEYS_AND_VALUES),
        NamedRecipe("int8-rtn", INT8, "rtn"),
        NamedRecipe("int8-gptq", INT8, "gptq"),
        NamedRecipe("int8-smooth", INT8, "rtn", smooth=True),
        NamedRecipe("int8-best", replace(INT8, block=32), "rtn", smooth=True),
        NamedRecipe("int8-dynamic", DYNAMIC_INT8, "rtn"),
        NamedRecipe("int8-a8w8", A8W8, "rtn"),
        NamedRecipe("int8-a16w8", A16W8, "rtn"),
    )
}
assert min(BLOCKS) == SMALLEST_BLOCK
# Recipes that can be a draft's fastest. int8 loses next to nothing by rounding to nearest, so that GPTQ gains nothing
# there. Floats read four to eight times the bytes.
DRAFT_FORMATS = ("int4-rtn", "int4-gptq", "int8-rtn", "int8-dynamic")


Quality = Literal["fast", "good", "best"]
DEFAULT_QUALITY: Quality = "good"
# By quality, precision and role. fast: by the weights alone. good: a short pass over calibration text. best: minutes
# or hours of it, and slower steps. A draft keeps the format with the fastest steps: what it loses costs acceptance.
QUALITIES: dict[Quality, dict[tuple[Precision, Role], str]] = {
    "fast": {
        ("int4", "target"): "int4-rtn",
        ("int4", "draft"): "int4-rtn",
        ("int8", "target"): "int8-rtn",
        ("int8", "draft"): "int8-rtn",
    },
    "good": {
        ("int4", "target"): "int4-good",
        ("int4", "draft"): "int4-importance",
        ("int8", "target"): "int8-smooth",
        ("int8", "draft"): "int8-smooth",
    },
    "best": {
        ("int4", "target"): "int4-best",
        ("int4", "draft"): "int4-gptq",
        ("int8", "target"): "int8-best",
        ("int8", "draft"): "int8-best",
    },
}


def recipe_of_quality(quality: Quality, precision: Precision, role: Role) -> NamedRecipe:
    """The recipe of a quality. Raises BadInput for a precision that stores floats, which have one quality."""
    found = QUALITIES[quality].get((precision, role))
    if found is None:
        raise BadInput(f"--quality {quality} beside {precision}: only int4 and int8 have qualities; leave it out")
    return RECIPES[found]


def named_recipe(name: str, block: int | None = None) -> NamedRecipe:
    """The recipe of that name, with blocks of `block` weights if given.

    Raises BadInput for a name that is not in the table, with the nearest one that is.
    """
    if name not in RECIPES:
        nearest = nearest_name(name, RECIPES, least_similarity=0)
        raise BadInput(f"--recipe {name}: no such recipe; the nearest is {nearest} (all: {', '.join(RECIPES)})")
    recipe = RECIPES[name]
    return recipe if block is None or block == recipe.format.block else recipe.with_block(block)
