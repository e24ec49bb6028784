"""How weights are stored: `Format` of one matrix, and `Recipe`, which gives each matrix a format."""

from __future__ import annotations

from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal

from .errors import BadInput
from .spec import Role

Precision = Literal["fp32", "fp16", "int8", "int4", "int8-a8w8", "int8-a16w8"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "int8", "int4")  # those that need no calibration text
Floats = Literal["float32", "float16"]
FLOATS: dict[str, Floats] = {"fp32": "float32", "fp16": "float16"}  # by the names that options have
Kind = Literal["float32", "float16", "nbits", "dynamic", "qdq"]


@dataclass(frozen=True, slots=True)
class Format:
    """How one matrix is stored and multiplied. The kinds are

    float32, float16: MatMul.
    nbits: MatMulNBits, with blocks along the input and accuracy level 4.
    dynamic: DynamicQuantizeMatMul, with int8 weights, a scale for each output channel, and one for all activations.
    qdq: MatMul between QuantizeLinear and DequantizeLinear, with int8 weights, a scale for each output channel, and
    scales from calibration text for the product's input and output.
    """

    kind: Kind
    bits: int = 0  # of a weight; 0: floats
    block: int = 0  # weights that share a scale, of nbits
    symmetric: bool = True  # no zero points are stored
    activations: int = 0  # bits of a product's input and output, of qdq
    minimums: bool = False  # of nbits: a block has a minimum beside its scale; weight = scale * level + minimum

    @property
    def plain(self) -> bool:
        """Whether the weights are stored as floats."""
        return self.kind in FLOATS.values()

    @property
    def name(self) -> str:
        if self.kind == "nbits":
            zero = "-min" if self.minimums else "" if self.symmetric else "-zp"
            return f"int{self.bits}-b{self.block}{zero}"
        if self.kind == "qdq":
            return f"int{self.bits}-a{self.activations}w{self.bits}"
        return "int8-dynamic" if self.kind == "dynamic" else self.kind


FLOAT32 = Format("float32")
FLOAT16 = Format("float16")
INT4 = Format("nbits", 4, 128)
INT8 = Format("nbits", 8, 128)
DYNAMIC_INT8 = Format("dynamic", 8)
A8W8 = Format("qdq", 8, activations=8)
A16W8 = Format("qdq", 8, activations=16)


@dataclass(frozen=True, slots=True)
class Recipe:
    """The format of every matrix: the first override whose pattern matches its name, else `matrices`.

    Names are the checkpoint's (`model.layers.0.self_attn.q_proj`, `lm_head`, `model.embed_tokens`);
    patterns are fnmatch's. Norms, biases and rotary tables are always floats.
    """

    matrices: Format
    head: Format
    embedding: Format
    overrides: tuple[tuple[str, Format], ...] = field(default=())  # (pattern, format)
    activations: Floats | None = None  # the type of activations and KV cache; None: float16 with float16 matrices

    def of(self, name: str) -> Format:
        """The format of the matrix `name`."""
        for pattern, fmt in self.overrides:
            if fnmatchcase(name, pattern):
                return fmt
        if name == "lm_head":
            return self.head
        return self.embedding if name.endswith("embed_tokens") else self.matrices

    def require(self, role: Role) -> None:
        """BadInput if a model of this role cannot be stored in these formats, or would not be exact."""
        named = [("matrices", self.matrices), ("head", self.head), ("embedding", self.embedding), *self.overrides]
        for name, fmt in named:
            if fmt.kind == "dynamic" and role == "target":
                raise BadInput(
                    f"{name}: {fmt.name} in a target: a row's result would depend on its neighbours; use int8"
                )
            if fmt.kind in ("dynamic", "qdq") and self.floats == "float16":
                raise BadInput(f"{name}: {fmt.name} beside activations in float16; use int8, or float32 activations")
            if fmt.kind == "dynamic" and name in ("head", "embedding"):
                raise BadInput(f"{name}: {fmt.name} has no embedding lookup; use int8")
            if fmt.plain and fmt.kind != self.floats:
                raise BadInput(f"{name}: {fmt.name} beside activations in {self.floats}; use {self.floats}")

    @property
    def half_minimums(self) -> bool:
        """Whether matrices with minimums are multiplied beside activations in float16.

        ONNX Runtime's CPU provider has no Add in float16. It makes a MatMulNBits before one compute in float32, whose
        packed scales it then reads wrongly; without packing ahead (NO_PREPACKING) the result is right.
        """
        formats = (self.matrices, self.head, self.embedding, *(fmt for _, fmt in self.overrides))
        return self.floats == "float16" and any(fmt.minimums for fmt in formats)

    @property
    def floats(self) -> Floats:
        """The type of activations and KV cache."""
        return self.activations or ("float16" if self.matrices.kind == "float16" else "float32")


NO_PREPACKING = ("session.disable_prepacking", "1")  # an entry of SessionOptions, see Recipe.half_minimums
DEFAULT_PRECISION: Precision = "int4"  # the fastest on CPUs, for steps of one to sixteen tokens


def default_precision(bits: int | None) -> Precision:
    """The precision of an export without --precision. bits: of a quantized checkpoint, None for one in floats."""
    return "int8" if bits == 8 else DEFAULT_PRECISION


_FORMATS: dict[Precision, Format] = {
    "fp32": FLOAT32,
    "fp16": FLOAT16,
    "int8": INT8,
    "int4": INT4,
    "int8-a8w8": A8W8,
    "int8-a16w8": A16W8,
}


def recipe(precision: Precision, *, imported: bool = False) -> Recipe:
    """The recipe that gives every matrix the format of this precision.

    imported: the checkpoint is quantized already. What its maker left in floats, mostly head and embedding, loses most
    by rounding; it gets 8 bits at least.
    """
    fmt = INT8 if imported and precision == "int4" else _FORMATS[precision]
    return Recipe(fmt, fmt, fmt)
