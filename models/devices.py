"""Devices that an export can be for: one entry each, and the form of the graphs that follows from it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Literal

from .errors import BadInput
from .manifest import StaticGraph
from .precision import FLOAT16, FLOAT32, FLOATS, Floats, Precision, Recipe
from .spec import Role

Attention = Literal["gqa", "portable"]
ATTENTIONS: tuple[Attention, ...] = ("gqa", "portable")
Write = Literal["scatter", "one-hot"]  # how new rows come into a portable graph's KV buffers
OPSETS = range(17, 22)  # of portable graphs; every operator in them is in all of these
FUSED_OPSET = 21
DRAFT_LENGTH = 7  # of static graphs, unless told: a verify step then has eight tokens
MOST_DRAFTS = 32
PREFILL_WIDTH = 128  # tokens a call, of static graphs

# What portable graphs are made of. Operators of com.microsoft carry their domain.
PLAIN = frozenset((
    "Add", "ArgMax", "Cast", "Concat", "Constant", "Div", "Expand", "Gather", "LessOrEqual", "MatMul", "Mul", "Neg",
    "Pow", "ReduceMax", "ReduceMean", "Reshape", "ScatterND", "Shape", "Sigmoid", "Slice", "Softmax", "Split", "Sqrt",
    "Sub", "Transpose", "Unsqueeze", "Where",
))  # fmt: skip
STATIC: tuple[Precision, ...] = ("int8-a8w8", "int8-a16w8")  # whose activations have calibrated scales
MATMUL, ROWS, DYNAMIC = (
    f"com.microsoft.{name}" for name in ("MatMulNBits", "GatherBlockQuantized", "DynamicQuantizeMatMul")
)
# Before opset 21 ONNX has them for 8 bits alone, and ONNX Runtime for 16 as well.
QDQ = frozenset(f"{domain}{way}Linear" for domain in ("", "com.microsoft.") for way in ("Quantize", "Dequantize"))
FUSED = PLAIN | {
    "Gelu",
    "ReduceSum",
    "Squeeze",
    "SimplifiedLayerNormalization",
    "com.microsoft.SkipSimplifiedLayerNormalization",
    "com.microsoft.GroupQueryAttention",
}


@dataclass(frozen=True, slots=True)
class Device:
    """attention: the default, and the only one where the fused operator is absent or wrong. floats: of activations
    and KV cache, unless the weights are floats of another type. precisions: that it has kernels for; target, draft:
    the default ones. operators: that its documentation or source lists, as far as exported graphs need them. bytes:
    the type of activations in 8 bits; the levels are the same."""

    name: str
    attention: Attention
    floats: Floats
    opset: int
    static: bool
    target: Precision
    draft: Precision
    precisions: tuple[Precision, ...]
    operators: frozenset[str]
    write: Write = "scatter"
    opsets: range = OPSETS
    bytes: Literal["int8", "uint8"] = "int8"

    def precision(self, role: Role) -> Precision:
        """The default one."""
        return self.target if role == "target" else self.draft

    def fitted(self, recipe: Recipe, floats: Floats | None = None) -> Recipe:
        """The recipe as this device runs it; floats: of activations, None for its own. BadInput for a format that it
        has no kernels for."""
        if recipe.matrices.plain:
            return recipe
        used = recipe if (floats or self.floats) == "float32" else replace(recipe, activations="float16")
        plain = FLOAT16 if used.floats == "float16" else FLOAT32
        # A packed matrix cannot be looked up row by row without an operator for it.
        if ROWS not in self.operators and used.embedding.kind == "nbits":
            used = replace(used, embedding=plain)
        for fmt in (used.matrices, used.head, *(fmt for _, fmt in used.overrides)):
            missing = fmt.bits == 8 and (fmt.name if fmt.kind == "qdq" else "int8") not in self.precisions
            if missing or (fmt.kind == "dynamic" and DYNAMIC not in self.operators):
                raise BadInput(f"{fmt.name} on {self.name}: it has no kernels for it; use {', '.join(self.precisions)}")
        return used


DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        Device("cpu", "gqa", "float32", FUSED_OPSET, False, "int4", "int4", ("fp32", "fp16", "int8", "int4", *STATIC),
               FUSED | QDQ | {MATMUL, ROWS, DYNAMIC}, bytes="uint8"),  # int8's product is 40 times slower on x86
        Device("cuda", "gqa", "float16", FUSED_OPSET, False, "int4", "fp16", ("fp32", "fp16", "int8", "int4"),
               FUSED | {MATMUL, ROWS}),
        # Half precision needs an optional feature of the adapter, so it is not the default.
        Device("webgpu", "portable", "float32", 17, False, "int4", "int4", ("fp32", "fp16", "int8", "int4"),
               PLAIN | {MATMUL, ROWS}),
        # Its ScatterND is that of opset 16, which opset 18 replaced: beyond 17 the CPU would write the KV cache.
        Device("directml", "portable", "float16", 17, False, "int4", "int4", ("fp32", "fp16", "int8", "int4"),
               PLAIN | {MATMUL}, opsets=range(17, 18)),
        Device("rocm", "portable", "float16", 17, False, "fp16", "fp16", ("fp32", "fp16"), PLAIN),
        Device("migraphx", "portable", "float16", 17, True, "int4", "fp16", ("fp32", "fp16", "int4"),
               PLAIN | {MATMUL}, opsets=range(17, 20)),
        # Floats in, computed in bfloat16 by the NPU's compiler, which publishes no list of operators.
        Device("npu", "portable", "float32", 17, True, "fp32", "fp32", ("fp32", *STATIC),
               PLAIN - {"ScatterND"} | {"Equal"} | QDQ, "one-hot"),
    )
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Form:
    """What kind of graphs to export. draft_length: of static graphs, whose widths follow from it; None: dynamic."""

    device: Device = DEVICES["cpu"]
    attention: Attention = "gqa"
    opset: int = FUSED_OPSET
    floats: Floats | None = None  # of activations; None: the device's
    draft_length: int | None = None

    def graphs(self, role: Role) -> tuple[StaticGraph, ...]:
        """The static graphs, narrowest first; none for dynamic shapes. The widest only fills the KV cache."""
        if self.draft_length is None:
            return ()
        # A draft reads up to K + 1 new tokens and K - 1 masks; a verify step has K drafts and the token before them.
        widths = (2 * self.draft_length,) if role == "draft" else (1, self.draft_length + 1)
        steps = tuple(StaticGraph(f"model.{width}.onnx", width, True) for width in widths)
        return (*steps, StaticGraph(f"model.{PREFILL_WIDTH}.prefill.onnx", PREFILL_WIDTH, False))


DEFAULT_FORM = Form()


def named(name: str) -> Device:
    """The device that users call `name`; BadInput names the nearest known one."""
    if name in DEVICES:
        return DEVICES[name]
    near = get_close_matches(name.lower(), DEVICES, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(DEVICES)}"
    raise BadInput(f"unknown device {name!r}; {hint}")


def form(
    device: Device,
    *,
    attention: Attention | None = None,
    floats: Floats | None = None,
    opset: int | None = None,
    static: bool | None = None,
    draft_length: int | None = None,
) -> Form:
    """The device's form with what the user wants otherwise; BadInput for what cannot be, with the fix."""
    chosen = attention or device.attention
    if chosen == "gqa" and device.attention != "gqa":
        raise BadInput(
            f"attention gqa on {device.name}: the fused operator is absent or wrong there; use --attention portable"
        )
    fixed = device.static if static is None else static
    if chosen == "gqa" and fixed:
        raise BadInput("--static with attention gqa: its graphs have dynamic shapes; add --attention portable")
    if device.static and not fixed:
        raise BadInput(f"--no-static on {device.name}: it runs fixed shapes only; leave the option out")
    if draft_length is not None and not fixed:
        raise BadInput(f"--draft-length {draft_length} of graphs with dynamic shapes; they take any: leave it out")
    if draft_length is not None and not 1 <= draft_length <= MOST_DRAFTS:
        raise BadInput(f"--draft-length must be from 1 to {MOST_DRAFTS}, not {draft_length}")
    wanted = opset or (FUSED_OPSET if chosen == "gqa" else device.opset)
    if chosen == "gqa" and wanted != FUSED_OPSET:
        raise BadInput(f"--opset {wanted} with attention gqa: only {FUSED_OPSET}; add --attention portable")
    if wanted not in device.opsets:
        first, last = device.opsets[0], device.opsets[-1]
        raise BadInput(f"--opset {wanted} on {device.name}: it reads {first}{f' to {last}' if last > first else ''}")
    return Form(device, chosen, wanted, floats, (draft_length or DRAFT_LENGTH) if fixed else None)


def require_precision(form: Form, precision: Precision) -> None:
    """BadInput if the device has no kernels for it, or the activations that were asked for contradict it."""
    device = form.device
    if precision in STATIC and form.attention == "gqa":
        raise BadInput(f"{precision} with attention gqa: it needs a graph of plain operators; add --attention portable")
    if precision not in device.precisions:
        raise BadInput(f"{precision} on {device.name}: it has no kernels for it; use {', '.join(device.precisions)}")
    if form.floats and FLOATS.get(precision, form.floats) != form.floats:
        other = "fp16" if precision == "fp32" else "fp32"
        raise BadInput(f"{precision} weights with {other} activations; use --precision {other} or no --io-dtype")
