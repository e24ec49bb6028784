"""Devices to export for, one entry each, and the form of the graphs for a device."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from .checks import DRAFT_LENGTH, DRAFT_LIMIT, nearest_name
from .errors import BadInput
from .manifest import StaticGraph
from .precision import FLOAT16, FLOAT32, FLOATS, PRECISIONS, Floats, Precision, Recipe
from .spec import Role

Attention = Literal["gqa", "portable"]
ATTENTIONS: tuple[Attention, ...] = ("gqa", "portable")
Write = Literal["scatter", "one-hot"]  # how new rows come into a portable graph's KV buffers
OPSETS = range(17, 22)  # of portable graphs; every operator in them is in all of these
FUSED_OPSET = 21
NPU_OGA = "npu-oga"  # no device that graphs are for: pard-export writes a checkpoint for AMD's own tools
PREFILL_WIDTH = 128  # tokens a call, of static graphs

# Operators of portable graphs. Operators of com.microsoft carry their domain.
PLAIN = frozenset((
    "Add", "ArgMax", "Cast", "Concat", "Constant", "Div", "Expand", "Gather", "LessOrEqual", "MatMul", "Mul", "Neg",
    "Pow", "ReduceMax", "ReduceMean", "ReduceSum", "Reshape", "ScatterND", "Shape", "Sigmoid", "Slice", "Softmax",
    "Split", "Sqrt", "Sub", "Transpose", "Unsqueeze", "Where",
))  # fmt: skip
QDQ_PRECISIONS: tuple[Precision, ...] = ("int8-a8w8", "int8-a16w8")  # activations have scales from calibration text
MATMUL, ROWS, DYNAMIC = (
    f"com.microsoft.{name}" for name in ("MatMulNBits", "GatherBlockQuantized", "DynamicQuantizeMatMul")
)
# Before opset 21 ONNX has these for 8 bits only, and ONNX Runtime's domain for 16 bits as well.
QDQ = frozenset(f"{domain}{way}Linear" for domain in ("", "com.microsoft.") for way in ("Quantize", "Dequantize"))
FUSED = PLAIN | {
    "Gelu",
    "Squeeze",
    "SimplifiedLayerNormalization",
    "com.microsoft.SkipSimplifiedLayerNormalization",
    "com.microsoft.GroupQueryAttention",
}


@dataclass(frozen=True, slots=True)
class Device:
    """A device that an export can be for, and what its execution provider can run."""

    name: str  # as in --device, and the key of its provider
    attention: Attention  # of exports for it; gqa is refused where this is portable
    provider_attention: tuple[Attention, ...]  # the variants of graphs that its provider runs
    floats: Floats  # the type of activations and KV cache, unless the weights are floats of another type
    opset: int  # the default of portable graphs
    static: bool  # whether its provider needs graphs of fixed shapes
    target: Precision  # the default of targets
    draft: Precision  # the default of drafts
    precisions: tuple[Precision, ...]  # those that it has kernels for
    operators: frozenset[str]  # those of its documentation or source, as far as exported graphs need them
    write: Write = "scatter"
    opsets: range = OPSETS  # those that it reads
    bytes: Literal["int8", "uint8"] = "int8"  # the type of activations in 8 bits; the levels are the same

    def precision(self, role: Role) -> Precision:
        """The default precision of a role."""
        return self.target if role == "target" else self.draft

    def runnable_recipe(self, recipe: Recipe, floats: Floats | None = None) -> Recipe:
        """The recipe as this device runs it; floats: the type of activations, None for the device's own.

        Raises BadInput for a format that the device has no kernels for.
        """
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
        Device(
            name="cpu",
            attention="gqa",
            provider_attention=ATTENTIONS,
            floats="float32",
            opset=FUSED_OPSET,
            static=False,
            target="int4",
            draft="int4",
            precisions=(*PRECISIONS, *QDQ_PRECISIONS),
            operators=FUSED | QDQ | {MATMUL, ROWS, DYNAMIC},
            bytes="uint8",  # int8's product is 40 times slower on x86
        ),
        Device(
            name="cuda",
            attention="gqa",
            provider_attention=ATTENTIONS,
            floats="float16",
            opset=FUSED_OPSET,
            static=False,
            target="int4",
            draft="fp16",
            precisions=PRECISIONS,
            operators=FUSED | {MATMUL, ROWS},
        ),
        Device(
            name="webgpu",
            attention="portable",
            provider_attention=ATTENTIONS,
            floats="float32",  # half precision needs an optional feature of the adapter
            opset=17,
            static=False,
            target="int4",
            draft="int4",
            precisions=PRECISIONS,
            operators=PLAIN | {MATMUL, ROWS},
        ),
        Device(
            name="directml",
            attention="portable",
            provider_attention=("portable",),
            floats="float16",
            opset=17,
            # Its ScatterND is that of opset 16, which opset 18 replaced: beyond 17 the CPU would write the KV cache.
            opsets=range(17, 18),
            static=False,
            target="int4",
            draft="int4",
            precisions=PRECISIONS,
            operators=PLAIN | {MATMUL},
        ),
        Device(
            name="rocm",
            attention="portable",
            provider_attention=("portable",),
            floats="float16",
            opset=17,
            static=False,
            target="fp16",
            draft="fp16",
            precisions=("fp32", "fp16"),
            operators=PLAIN,
        ),
        Device(
            name="migraphx",
            attention="portable",
            provider_attention=("portable",),
            floats="float16",
            opset=17,
            opsets=range(17, 20),
            static=True,
            target="int4",
            draft="fp16",
            precisions=("fp32", "fp16", "int4"),
            operators=PLAIN | {MATMUL},
        ),
        Device(  # its provider hands a graph to MIGraphX or to DirectML, so both must be able to run it
            name="amdgpu",
            attention="portable",
            provider_attention=("portable",),
            floats="float16",
            opset=17,
            opsets=range(17, 18),
            static=True,
            target="int4",
            draft="fp16",
            precisions=("fp32", "fp16", "int4"),
            operators=PLAIN | {MATMUL},
        ),
        Device(
            name="npu",
            attention="portable",
            provider_attention=("portable",),
            floats="float32",  # its compiler computes in bfloat16
            opset=17,
            static=True,
            target="fp32",
            draft="fp32",
            precisions=("fp32", *QDQ_PRECISIONS),
            operators=PLAIN - {"ScatterND"} | {"Equal"} | QDQ,  # a choice: its compiler publishes no list of operators
            write="one-hot",
        ),
    )
}


@dataclass(frozen=True, slots=True)
class Form:
    """The form of the graphs of an export."""

    device: Device = DEVICES["cpu"]
    attention: Attention = "gqa"
    opset: int = FUSED_OPSET
    floats: Floats | None = None  # the type of activations; None: the device's
    draft_length: int | None = None  # drafts a round, which set the widths of static graphs; None: dynamic shapes

    def graphs(self, role: Role) -> tuple[StaticGraph, ...]:
        """The static graphs, narrowest first; empty for dynamic shapes. The widest graph only fills the KV cache."""
        if self.draft_length is None:
            return ()
        # A draft reads up to K + 1 new tokens and K - 1 masks; a verify step has K drafts and the token before them.
        widths = (2 * self.draft_length,) if role == "draft" else (1, self.draft_length + 1)
        steps = tuple(StaticGraph(f"model.{width}.onnx", width, True) for width in widths)
        return (*steps, StaticGraph(f"model.{PREFILL_WIDTH}.prefill.onnx", PREFILL_WIDTH, False))


DEFAULT_FORM = Form()


def device_named(name: str) -> Device:
    """The device of this name; BadInput for an unknown one, with the nearest known name."""
    if name in DEVICES:
        return DEVICES[name]
    if name == NPU_OGA:
        raise BadInput(f"--device {NPU_OGA}: is a checkpoint for AMD's tools, which only pard-export writes")
    nearest = nearest_name(name, (*DEVICES, NPU_OGA), least_similarity=0.5)
    hint = f"did you mean {nearest}?" if nearest else f"known are {', '.join(DEVICES)}"
    raise BadInput(f"unknown device {name!r}; {hint}")


def form_for(
    device: Device,
    *,
    attention: Attention | None = None,
    floats: Floats | None = None,
    opset: int | None = None,
    static: bool | None = None,
    draft_length: int | None = None,
) -> Form:
    """The form of graphs for a device. Arguments that are None take the device's own value.

    Raises BadInput, with the fix, for values that the device or one another exclude.
    """
    variant = attention or device.attention
    if variant == "gqa" and device.attention != "gqa":
        raise BadInput(
            f"attention gqa on {device.name}: the fused operator is absent or wrong there; use --attention portable"
        )
    static_shapes = device.static if static is None else static
    if variant == "gqa" and static_shapes:
        raise BadInput("--static with attention gqa: its graphs have dynamic shapes; add --attention portable")
    if device.static and not static_shapes:
        raise BadInput(f"--no-static on {device.name}: it runs fixed shapes only; leave the option out")
    if draft_length is not None and not static_shapes:
        raise BadInput(f"--draft-length {draft_length} of graphs with dynamic shapes; they take any: leave it out")
    if draft_length is not None and not 1 <= draft_length <= DRAFT_LIMIT:
        raise BadInput(f"--draft-length must be from 1 to {DRAFT_LIMIT}, not {draft_length}")
    version = opset or (FUSED_OPSET if variant == "gqa" else device.opset)
    if variant == "gqa" and version != FUSED_OPSET:
        raise BadInput(f"--opset {version} with attention gqa: only {FUSED_OPSET}; add --attention portable")
    if version not in device.opsets:
        first, last = device.opsets[0], device.opsets[-1]
        raise BadInput(f"--opset {version} on {device.name}: it reads {first}{f' to {last}' if last > first else ''}")
    return Form(device, variant, version, floats, (draft_length or DRAFT_LENGTH) if static_shapes else None)


def require_precision(form: Form, precision: Precision) -> None:
    """BadInput if the device has no kernels for the precision, or the form's type of activations excludes it."""
    device = form.device
    if precision in QDQ_PRECISIONS and form.attention == "gqa":
        raise BadInput(f"{precision} with attention gqa: it needs a graph of plain operators; add --attention portable")
    if precision not in device.precisions:
        raise BadInput(f"{precision} on {device.name}: it has no kernels for it; use {', '.join(device.precisions)}")
    if form.floats and FLOATS.get(precision, form.floats) != form.floats:
        other = "fp16" if precision == "fp32" else "fp32"
        raise BadInput(f"{precision} weights with {other} activations; use --precision {other} or no --io-dtype")
