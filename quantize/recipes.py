"""The recipes that users name: a table. What a name stands for is a format, how weights are rounded to it, and more."""

from __future__ import annotations

from dataclasses import dataclass, replace

from pard_onnx.models.checks import nearest_name
from pard_onnx.models.errors import BadInput
from pard_onnx.models.precision import A8W8, A16W8, DYNAMIC_INT8, INT4, INT8, Format, Precision, Recipe
from pard_onnx.models.spec import Role
from pard_onnx.quantize.algorithms.table import ALGORITHMS, Algorithm
from pard_onnx.quantize.packing.pack import SMALLEST_BLOCK

INT4_ZERO = replace(INT4, symmetric=False)
BLOCKS = (16, 32, 64, 128, 256)


@dataclass(frozen=True, slots=True)
class NamedRecipe:
    """rounding: a key of ALGORITHMS; scaled: AWQ's scales are folded in before; mixed: 8 bits for what suffers most."""

    name: str
    format: Format
    rounding: str
    scaled: bool = False
    mixed: bool = False

    @property
    def algorithm(self) -> Algorithm:
        return ALGORITHMS[self.rounding]

    @property
    def calibrated(self) -> bool:
        """Whether it has to see text."""
        return self.scaled or self.mixed or self.static or self.algorithm.given is not None

    @property
    def static(self) -> bool:
        """Whether activations have scales of their own."""
        return self.format.kind == "qdq"

    @property
    def precision(self) -> Precision:
        if self.static:
            return "int8-a8w8" if self.format.activations == 8 else "int8-a16w8"
        return "int4" if self.format.bits == 4 else "int8"

    def formats(self, role: Role) -> Recipe:
        """The format of every matrix, before any is given more bits. Raises BadInput for what the role cannot take."""
        lookup = INT8 if self.format.kind == "dynamic" else self.format  # dynamic int8 has no embedding lookup
        found = Recipe(self.format, lookup, lookup)
        found.require(role)
        return found

    def with_block(self, block: int) -> NamedRecipe:
        if block not in BLOCKS or self.format.kind != "nbits":
            known = ", ".join(map(str, BLOCKS)) if self.format.kind == "nbits" else "none: it has one scale a row"
            raise BadInput(f"--block-size {block}: blocks of {self.name} are {known}")
        return replace(self, name=f"{self.name}-b{block}", format=replace(self.format, block=block))


RECIPES = {
    named.name: named
    for named in (
        NamedRecipe("int4-rtn", INT4, "rtn"),
        NamedRecipe("int4-rtn-asym", INT4_ZERO, "rtn"),
        NamedRecipe("int4-search", INT4, "search"),
        NamedRecipe("int4-kquant", INT4_ZERO, "kquant"),
        NamedRecipe("int4-hqq", INT4_ZERO, "hqq"),
        NamedRecipe("int4-gptq", INT4, "gptq"),
        NamedRecipe("int4-gptq-asym", INT4_ZERO, "gptq"),
        NamedRecipe("int4-awq", INT4, "search", scaled=True),
        NamedRecipe("int4-awq-gptq", INT4, "gptq", scaled=True),
        NamedRecipe("int4-mixed", INT4, "gptq", mixed=True),
        NamedRecipe("int8-rtn", INT8, "rtn"),
        NamedRecipe("int8-gptq", INT8, "gptq"),
        NamedRecipe("int8-dynamic", DYNAMIC_INT8, "rtn"),
        NamedRecipe("int8-a8w8", A8W8, "rtn"),
        NamedRecipe("int8-a16w8", A16W8, "rtn"),
    )
}
assert min(BLOCKS) == SMALLEST_BLOCK


def named_recipe(name: str, block: int | None = None) -> NamedRecipe:
    """Raises BadInput for a name that is not in the table, with the nearest one that is."""
    if name not in RECIPES:
        nearest = nearest_name(name, RECIPES, least_similarity=0)
        raise BadInput(f"--recipe {name}: no such recipe; the nearest is {nearest} (all: {', '.join(RECIPES)})")
    found = RECIPES[name]
    return found if block is None or block == found.format.block else found.with_block(block)
