"""Tiny quantized checkpoints in the public layouts, packed level by level: the slow literal side of imports.

`folder, truth = write(tmp_path / "model", "gptq", bits=4, group=32)`; truth holds, by matrix, the integers and floats.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file
from tiny import save_json, save_safetensors, weights
from tiny import write as write_floats

INTERLEAVE = (0, 2, 4, 6, 1, 3, 5, 7)
IN_ORDER = (0, 1, 2, 3, 4, 5, 6, 7)
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Truth:
    """levels [out, in]; zeros, scales [out, groups]; group_of [in]: each column's group."""

    bits: int
    levels: Ints
    zeros: Ints
    scales: NDArray[np.float16]
    group_of: Ints

    @property
    def floats(self) -> NDArray[np.float32]:
        out = np.empty(self.levels.shape, np.float32)
        for row, column in np.ndindex(*out.shape):
            group = self.group_of[column]
            level, zero = self.levels[row, column], self.zeros[row, group]
            out[row, column] = np.float32(self.scales[row, group]) * np.float32(level - zero)
        return out


def words(levels: Ints, bits: int, order: tuple[int, ...] = IN_ORDER, minus: int = 0) -> NDArray[np.int32]:
    """The last axis packed into words of 32 bits, the last word filled up with zeros. `minus`: of each level, as the
    whole word's subtraction."""
    per_word = 32 // bits
    rows, count = levels.shape
    out = np.zeros((rows, -(-count // per_word)), np.int64)
    for row, word in np.ndindex(*out.shape):
        for place in range(per_word):
            column = word * per_word + order[place % len(order)]
            if column < count:
                out[row, word] |= int(levels[row, column]) << (bits * place)
        for place in range(per_word):
            out[row, word] -= minus << (bits * place)
    return out.astype(np.uint32).view(np.int32)


def awq(truth: Truth) -> dict[str, NDArray[Any]]:
    return {
        "qweight": words(truth.levels.T, 4, INTERLEAVE),
        "qzeros": words(truth.zeros.T, 4, INTERLEAVE),
        "scales": truth.scales.T,
    }


def gptq(truth: Truth, minus: int = 1) -> dict[str, NDArray[Any]]:
    return {
        "qweight": words(truth.levels, truth.bits).T,
        "qzeros": words(truth.zeros.T, truth.bits, minus=minus),
        "scales": truth.scales.T,
        "g_idx": truth.group_of.astype(np.int32),
    }


def auto_round(truth: Truth) -> dict[str, NDArray[Any]]:
    parts = gptq(truth, minus=0)
    del parts["g_idx"]
    return parts


def compressed_tensors(truth: Truth) -> dict[str, NDArray[Any]]:
    parts = {
        "weight_packed": words(truth.levels, truth.bits),
        "weight_scale": truth.scales,
        "weight_shape": np.array(truth.levels.shape),
    }
    if (truth.zeros != 1 << (truth.bits - 1)).any():
        parts["weight_zero_point"] = words(truth.zeros.T, truth.bits).T
    if (np.diff(truth.group_of) < 0).any():
        parts["weight_g_idx"] = truth.group_of.astype(np.int32)
    return parts


def quark(truth: Truth, order: tuple[int, ...] = INTERLEAVE, signed: bool = False) -> dict[str, NDArray[Any]]:
    shift = 8 if signed else 0  # levels -8 .. 7 in two's complement
    levels, zeros = ((values - shift) & 15 for values in (truth.levels, truth.zeros))
    return {
        "weight": words(levels.T, 4, order),
        "weight_zero_point": words(zeros.T, 4, order),
        "weight_scale": truth.scales.T,
    }


def _compressed_config(bits: int, group: int, symmetric: bool) -> dict[str, Any]:
    strategy = (
        {"strategy": "channel", "group_size": None} if group == -1 else {"strategy": "group", "group_size": group}
    )
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, **strategy}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": groups,
        "ignore": ["lm_head"],
    }


def _quark_config(dtype: str, method: str, group: int) -> dict[str, Any]:
    weight = {"dtype": dtype, "qscheme": "per_group", "group_size": group, "ch_axis": -1, "symmetric": dtype == "int4"}
    return {
        "quant_method": "quark",
        "global_quant_config": {"weight": weight, "input_tensors": None},
        "layer_quant_config": {},
        "exclude": ["lm_head"],
        "export": {"pack_method": method, "weight_format": "real_quantized"},
    }


def _numbers(bits: int, group: int, symmetric: bool) -> dict[str, Any]:
    return {"bits": bits, "group_size": group, "sym": symmetric}


Pack = Callable[[Truth], dict[str, NDArray[Any]]]
# By name: the packer, and config.json's entry of (bits, group, symmetric)
LAYOUTS: dict[str, tuple[Pack, Callable[[int, int, bool], dict[str, Any]]]] = {
    "awq": (awq, lambda b, g, s: {"quant_method": "awq", "version": "gemm", **_numbers(b, g, s)}),
    "gptq": (gptq, lambda b, g, s: {"quant_method": "gptq", "desc_act": True, **_numbers(b, g, s)}),
    "gptq_v2": (
        lambda truth: gptq(truth, minus=0),
        lambda b, g, s: {"quant_method": "gptq", "checkpoint_format": "gptq_v2", **_numbers(b, g, s)},
    ),
    "compressed-tensors": (compressed_tensors, _compressed_config),
    "quark": (quark, lambda b, g, s: _quark_config("uint4", "reorder", g)),
    "quark in order": (lambda truth: quark(truth, IN_ORDER), lambda b, g, s: _quark_config("uint4", "order", g)),
    "quark int4": (lambda truth: quark(truth, signed=True), lambda b, g, s: _quark_config("int4", "reorder", g)),
    "auto-round": (
        auto_round,
        lambda b, g, s: {"quant_method": "auto-round", "packing_format": "auto_round", **_numbers(b, g, s)},
    ),
    "auto-round gptq": (
        gptq,
        lambda b, g, s: {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq", **_numbers(b, g, s)},
    ),
    "auto-round awq": (
        awq,
        lambda b, g, s: {"quant_method": "intel/auto-round", "backend": "auto_round:awq", **_numbers(b, g, s)},
    ),
}  # fmt: skip


def truth_of(shape: tuple[int, int], bits: int, group: int, symmetric: bool, sorted_columns: bool, seed: Any) -> Truth:
    rng = np.random.default_rng(seed)
    rows, width = shape
    groups = 1 if group == -1 else width // group
    group_of = np.repeat(np.arange(groups), width // groups)
    if sorted_columns:
        rng.shuffle(group_of)
    size = (rows, groups)
    zeros = np.full(size, 1 << (bits - 1)) if symmetric else rng.integers(0, 1 << bits, size)
    scales = (rng.uniform(0.5, 1.5, size) * 0.5 / (1 << bits)).astype(np.float16)
    return Truth(bits, rng.integers(0, 1 << bits, shape), zeros, scales, group_of)


def write(
    folder: Path,
    layout: str,
    *,
    bits: int = 4,
    group: int = 32,
    symmetric: bool = False,
    sorted_columns: bool = False,
    quantized_head: bool = False,
    **options: Any,
) -> tuple[Path, dict[str, Truth]]:
    """A checkpoint whose matrices, embedding and (unless asked for) head aside, are quantized; and what they hold.

    sorted_columns: by importance, each input its own order. options: of tiny.write.
    """
    write_floats(folder, **options)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    pack, entry = LAYOUTS[layout]
    tensors: dict[str, NDArray[Any]] = {}
    truth: dict[str, Truth] = {}
    for name, array in weights(config).items():
        matrix = name.removesuffix(".weight")
        if array.ndim == 1 or "embed" in name or (matrix == "lm_head" and not quantized_head):
            tensors[name] = array.astype(np.float16)
            continue
        # What reads the same input is sorted in the same way
        key = matrix.replace("k_proj", "q_proj").replace("v_proj", "q_proj").replace("up_proj", "gate_proj")
        order = truth_of(array.shape, bits, group, symmetric, sorted_columns, [*key.encode()]).group_of
        made = truth_of(array.shape, bits, group, symmetric, False, [*matrix.encode(), 1])
        truth[matrix] = Truth(bits, made.levels, made.zeros, made.scales, order)
        tensors |= {f"{matrix}.{end}": np.ascontiguousarray(part) for end, part in pack(truth[matrix]).items()}
    save_file(tensors, folder / "model.safetensors")
    save_json(
        folder / "config.json", config | {"quantization_config": entry(bits, group, symmetric), "dtype": "float16"}
    )
    return folder, truth


def write_dequantized(folder: Path, truth: Mapping[str, Truth], **options: Any) -> Path:
    """The same model in float32."""
    write_floats(folder, **options)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tensors = {name: array.astype(np.float16).astype(np.float32) for name, array in weights(config).items()}
    tensors |= {f"{matrix}.weight": held.floats for matrix, held in truth.items()}
    save_safetensors(folder / "model.safetensors", tensors)
    return folder
