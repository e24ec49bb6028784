"""Quantized checkpoints: how other tools store integer weights. Two tables: quantization methods, and packings.

A matrix [out, in] is stored as levels of `bits` bits, several in a word of 32 bits. Groups of its input columns share a
scale and a zero point: weight = scale * (level - zero). Bits and groups are read from the shapes of each matrix'
tensors, since many tools give some layers other bits or groups than config.json names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from pard_onnx.models.checks import nearest_name
from pard_onnx.models.errors import BadCheckpoint
from pard_onnx.models.folder_files import has_file
from pard_onnx.models.json_files import read_json

from .config import Config
from .tensors import DTYPES, TensorEntry

KEY = "quantization_config"
OLD_KEY = "compression_config"  # what compressed-tensors called it at first
OLD_FILE = "quantize_config.json"  # GPTQ's, beside config.json, where this has neither key
PACKED_FORM, MIXED_FORM = "pack-quantized", "mixed-precision"  # of compressed-tensors; mixed: each group has its own
BITS = (4, 8)  # of MatMulNBits with integer activations
WORD = 32
Shape = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Packing:
    """The tensors of one matrix [out, in], by the endings of their names."""

    weight: str  # the ending of the levels
    scale: str  # of the scales
    zero: str  # of the zero points
    order: str | None  # of each column's group, if the tool sorted columns
    shapes: Mapping[str, Shape]  # by ending, in terms of out, in and groups; "/word": packed, the lowest bits first


PACKINGS = {
    "awq": Packing(
        "qweight",
        "scales",
        "qzeros",
        None,
        {"qweight": ("in", "out/word"), "scales": ("groups", "out"), "qzeros": ("groups", "out/word")},
    ),
    "gptq": Packing(
        "qweight",
        "scales",
        "qzeros",
        "g_idx",
        {
            "qweight": ("in/word", "out"),
            "scales": ("groups", "out"),
            "qzeros": ("groups", "out/word"),
            "g_idx": ("in",),
        },
    ),
    "compressed-tensors": Packing(
        "weight_packed",
        "weight_scale",
        "weight_zero_point",
        "weight_g_idx",
        {
            "weight_packed": ("out", "in/word"),
            "weight_scale": ("out", "groups"),
            "weight_zero_point": ("out/word", "groups"),
            "weight_g_idx": ("in",),
        },
    ),
    "quark": Packing(
        "weight",
        "weight_scale",
        "weight_zero_point",
        None,
        {"weight": ("in", "out/word"), "weight_scale": ("groups", "out"), "weight_zero_point": ("groups", "out/word")},
    ),
}


@dataclass(frozen=True, slots=True)
class QuantizationConfig:
    """The `quantization_config` of config.json, as far as it says how integers are stored."""

    method: str  # as in config.json
    packing: str  # a key of PACKINGS
    bits: int | None  # of every matrix; None: they differ from layer to layer
    group: int | None  # input columns that share a scale, -1 for a whole row; None as for bits
    zeros: bool = True  # zero points are stored; without them the middle level stands for 0
    interleaved: bool = False  # the levels of a word are those of outputs 0, 2, 4, 6, 1, 3, 5, 7
    less: int = 0  # subtracted from the true zero points before they were stored
    signed: bool = False  # levels and zero points are stored in two's complement


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """One matrix [out, in] of a quantized checkpoint."""

    shape: tuple[int, int]
    bits: int
    groups: int  # of input columns that share a scale
    parts: Mapping[str, TensorEntry]  # by the endings of their names; dtypes and shapes are checked

    @property
    def group(self) -> int:
        """Input columns that share a scale."""
        return self.shape[1] // self.groups


def quantization_of(config: Config) -> QuantizationConfig | None:
    """How the checkpoint is quantized; None if it is not. Raises BadCheckpoint for an unsupported method or layout."""
    part, default = _described(config)
    if not part.values:
        return None
    method = part.values.get("quant_method", default)
    reader = METHODS.get(method) if isinstance(method, str) else None
    if reader is None:
        nearest = nearest_name(method, METHODS)
        hint = f"; the nearest is {nearest!r}" if nearest else ""
        raise part.fault("quant_method", f"is {method!r}; supported: {', '.join(METHODS)}{hint}")
    found = reader(part)
    if found.bits is not None and found.bits not in BITS:
        raise part.fault("bits", f"is {found.bits}; integer weights of {' and '.join(map(str, BITS))} bits are taken")
    return found


def _described(config: Config) -> tuple[Config, str | None]:
    """Where the quantization is described, and the method where the description names none."""
    if config.inside(KEY).values:
        return config.inside(KEY), None
    if config.inside(OLD_KEY).values:
        return config.inside(OLD_KEY), "compressed-tensors"
    path = config.path.with_name(OLD_FILE)
    return Config(path, read_json(path, BadCheckpoint) if has_file(path, BadCheckpoint) else {}), "gptq"


def is_required(config: Config) -> bool:
    """Whether config.json itself says that matrices are in integers; a file beside it may be a leftover."""
    return bool(config.inside(KEY).values or config.inside(OLD_KEY).values)


def _awq(part: Config) -> QuantizationConfig:
    if (version := str(part.values.get("version") or "gemm").lower()) != "gemm":
        raise part.fault("version", f"is {version!r}; only 'gemm' is supported")
    bits, group = _bits_and_group(part)
    if bits != 4:
        raise part.fault("bits", f"is {bits}; the gemm layout has 4")
    return QuantizationConfig("awq", "awq", bits, group, interleaved=True)


def _gptq(part: Config) -> QuantizationConfig:
    key = "checkpoint_format" if part.values.get("checkpoint_format") else "format"
    form = part.values.get(key) or "gptq"
    if form not in ("gptq", "gptq_v2"):
        raise part.fault(key, f"is {form!r}; supported: 'gptq', 'gptq_v2'")
    mixed = bool(part.values.get("dynamic"))
    return QuantizationConfig("gptq", "gptq", *_bits_and_group(part, mixed), less=int(form == "gptq"))


def _auto_round(part: Config) -> QuantizationConfig:
    """auto-round's own packing is GPTQ's, with the true zero points and without sorted columns."""
    form = str(part.values.get("packing_format") or part.values.get("backend") or "auto_round:auto_gptq")
    if (kind := str(part.values.get("data_type") or "int")) != "int":
        raise part.fault("data_type", f"is {kind!r}; only 'int' is supported")
    numbers = _bits_and_group(part, mixed=bool(part.values.get("extra_config")))
    if "awq" in form:
        return QuantizationConfig("auto-round", "awq", *numbers, interleaved=True)
    if "gptq" in form and "gptqmodel" not in form:
        return QuantizationConfig("auto-round", "gptq", *numbers, less=1)
    if form.startswith("auto_round") and "llm_compressor" not in form and "fp8" not in form:
        return QuantizationConfig("auto-round", "gptq", *numbers)
    supported = "auto_round, auto_round:auto_gptq, auto_round:auto_awq"
    raise part.fault("packing_format", f"is {form!r}; supported: {supported}")


def _compressed_tensors(part: Config) -> QuantizationConfig:
    form, named = part.values.get("format"), part.inside("config_groups")
    if form not in (PACKED_FORM, MIXED_FORM):
        raise part.fault("format", f"is {form!r}; only {PACKED_FORM!r} is supported")
    groups = [named.inside(key).inside("weights") for key in named.values]
    if not groups:
        raise part.fault("config_groups", "has no group; one says how weights are quantized")
    for key in named.values:
        own = named.inside(key).values.get("format") or form
        if own != PACKED_FORM:
            raise named.inside(key).fault("format", f"is {own!r}; only {PACKED_FORM!r} is supported")
    for weights in groups:
        if (kind := weights.values.get("type", "int")) != "int":
            raise weights.fault("type", f"is {kind!r}; only 'int' is supported")
        if (strategy := weights.values.get("strategy")) not in ("group", "channel"):
            raise weights.fault("strategy", f"is {strategy!r}; supported: 'group', 'channel'")
    first = groups[0]
    zeros = not all(weights.flag("symmetric", True) for weights in groups)
    if len(groups) > 1:
        return QuantizationConfig("compressed-tensors", "compressed-tensors", None, None, zeros)
    group = first.integer("group_size") if first.values["strategy"] == "group" else -1
    return QuantizationConfig("compressed-tensors", "compressed-tensors", first.integer("num_bits"), group, zeros)


def _quark(part: Config) -> QuantizationConfig:
    weight = part.inside("global_quant_config").inside("weight")
    dtype, scheme = weight.values.get("dtype"), weight.values.get("qscheme")
    if dtype not in ("uint4", "int4"):
        raise weight.fault("dtype", f"is {dtype!r}; supported: 'uint4', 'int4'")
    if scheme != "per_group":
        raise weight.fault("qscheme", f"is {scheme!r}; only 'per_group' is supported")
    export = part.inside("export")
    method = export.values.get("pack_method") or "reorder"
    if method not in ("reorder", "order"):
        raise export.fault("pack_method", f"is {method!r}; supported: 'reorder', 'order'")
    mixed = bool(part.values.get("layer_quant_config"))
    group = None if mixed else weight.integer("group_size")
    return QuantizationConfig("quark", "quark", 4, group, interleaved=method == "reorder", signed=dtype == "int4")


def _bits_and_group(part: Config, mixed: bool = False) -> tuple[int | None, int | None]:
    bits = part.integer("w_bit" if "w_bit" in part.values else "bits")
    group = part.integer("q_group_size" if "q_group_size" in part.values else "group_size", -1, least=-1)
    if group == 0:
        raise part.fault("group_size", "is 0; it must be a number of columns, or -1 for whole rows")
    return (None, None) if mixed else (bits, group)


METHODS: dict[str, Callable[[Config], QuantizationConfig]] = {
    "awq": _awq,
    "gptq": _gptq,
    "auto-round": _auto_round,
    "intel/auto-round": _auto_round,
    "compressed-tensors": _compressed_tensors,
    "quark": _quark,
}


def packed_matrix(
    quantization: QuantizationConfig, name: str, shape: tuple[int, int], found: Mapping[str, TensorEntry]
) -> PackedMatrix | None:
    """The matrix `name` [out, in] among the tensors `found`; None if it is not stored in integers.

    Raises BadCheckpoint where parts are missing, or contradict one another or config.json.
    """
    packing = PACKINGS[quantization.packing]
    parts = {end: found[f"{name}.{end}"] for end in packing.shapes if f"{name}.{end}" in found}
    weight = parts.get(packing.weight)
    if weight is None or weight.dtype != "I32":
        return None
    wanted = {packing.weight, packing.scale, *([packing.zero] if quantization.zeros else [])}
    for end in sorted(wanted - set(parts)):
        raise BadCheckpoint(f"{weight.file}: no tensor {name}.{end} beside {name}.{packing.weight}; download it again")
    if not quantization.zeros:
        parts.pop(packing.zero, None)
    bits = _bits(packing, weight, shape)
    axis = packing.shapes[packing.scale].index("groups")
    scale = parts[packing.scale]
    groups = scale.shape[axis] if len(scale.shape) == 2 else 0
    _require_numbers(quantization, name, weight, (shape[1], bits, groups))
    sizes = {"out": shape[0], "in": shape[1], "groups": groups}
    for end, entry in parts.items():
        expected = tuple(_extent(extent, sizes, WORD // bits) for extent in packing.shapes[end])
        if entry.shape != expected:
            raise BadCheckpoint(
                f"{entry.file}: tensor {name}.{end} is {list(entry.shape)}; "
                f"a matrix {list(shape)} of {bits} bits in {groups} groups needs {list(expected)}"
            )
        kinds = tuple(DTYPES) if end == packing.scale else ("I32",)
        if entry.dtype not in kinds:
            raise BadCheckpoint(
                f"{entry.file}: tensor {name}.{end} is stored as {entry.dtype}, not {' or '.join(kinds)}"
            )
    return PackedMatrix(shape, bits, groups, parts)


def _bits(packing: Packing, weight: TensorEntry, shape: tuple[int, int]) -> int:
    """Bits of a level, from the number of words along the packed axis."""
    extents = packing.shapes[packing.weight]
    axis = next(i for i, extent in enumerate(extents) if str(extent).endswith("/word"))
    levels = shape[0] if extents[axis] == "out/word" else shape[1]
    words = weight.shape[axis] if len(weight.shape) == 2 else 0
    # Rounded down: the last word may be filled in part
    return words * WORD // levels


def _require_numbers(
    quantization: QuantizationConfig, name: str, weight: TensorEntry, numbers: tuple[int, int, int]
) -> None:
    """BadCheckpoint for bits or groups that are not supported, or that config.json contradicts."""
    width, bits, groups = numbers
    if bits not in BITS or (quantization.bits or bits) != bits:
        said = f"{KEY} says {quantization.bits}" if quantization.bits else f"{' and '.join(map(str, BITS))} are taken"
        raise BadCheckpoint(f"{weight.file}: {name} is {list(weight.shape)}, which is {bits} bits a weight; {said}")
    if not groups or width % groups:
        raise BadCheckpoint(f"{weight.file}: {name}: its {width} columns do not divide into {groups} groups")
    group = quantization.group
    if group is not None and width // groups != (width if group == -1 else group):
        raise BadCheckpoint(
            f"{weight.file}: {name}: {groups} groups of {width} columns; {KEY} says groups of {group}, which "
            f"{'do not divide them' if width % group else 'would be ' + str(width // group)}"
        )


def _extent(extent: str | int, sizes: Mapping[str, int], per_word: int) -> int:
    name, packed, _ = str(extent).partition("/")
    return -(-sizes[name] // per_word) if packed else sizes[name]
