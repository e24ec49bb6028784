"""The layout of AMD Quark's checkpoints: words, scales and zero points of a matrix, and what config.json says of them.

The layout is that of Quark's `uint4_wo_128` with the export format `hf_format`: a Hugging Face folder whose matrices
[out, in] are in unsigned levels of 4 bits. 128 columns share a scale and a zero point: weight = scale * (level - zero).

    NAME.weight             int32 [in, out / 8]           the levels of eight outputs a word, in the order of ORDER
    NAME.weight_zero_point  int32 [in / 128, out / 8]     in the same order
    NAME.weight_scale       float16 or bfloat16 [in / 128, out]

The embedding, norms and biases are in floats. A tied LM head is stored as a matrix of its own.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pard_onnx.models.errors import BadInput
from pard_onnx.quantize.packing.pack import Float, PackedRows, nibbles
from pard_onnx.quantize.recipes import INT4_ZERO

GROUP = INT4_ZERO.block  # columns that share a scale
PER_WORD = 8
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the outputs in a word, from its lowest bits: "reorder" in Quark's configs
MIDDLE, HIGHEST = 8, 15  # levels
# Magnitudes of scales. Below the least one a block is zeros; above the largest one the product with a zero point, which
# onnxruntime-genai's model builder computes in half precision, overflows.
SCALES = (2.0**-24, 65504.0 / HIGHEST)


def quark_levels(name: str, packed: PackedRows) -> tuple[NDArray[np.uint8], NDArray[np.uint8], Float]:
    """The levels [n, in], zero points [n, groups] and scales [n, groups] of packed rows, with positive scales.

    A negative scale's levels are counted from the other end. BadInput, naming the matrix, for a scale that is too
    large.
    """
    assert packed.scale is not None
    rows, groups, _ = packed.weight.shape
    levels = nibbles(packed.weight.astype(np.uint8, copy=False), 4).reshape(rows, groups, GROUP)
    scale = packed.scale.astype(np.float32)
    if packed.zero_point is None:
        zero: NDArray[np.uint8] = np.full((rows, groups), MIDDLE, np.uint8)
    else:
        zero = nibbles(packed.zero_point, 4).reshape(rows, -1)[:, :groups].copy()
    negative, tiny = scale < 0, np.abs(scale) < SCALES[0]
    levels = np.where(negative[..., None], HIGHEST - levels, levels)
    zero = np.where(negative, HIGHEST - zero, zero)
    levels = np.where(tiny[..., None], zero[..., None], levels)
    scale = np.where(tiny, np.float32(1), np.abs(scale))
    if scale.max() > SCALES[1]:
        raise BadInput(f"{name} has weights of {float(scale.max()) * HIGHEST:.3g}, too large for scales in float16")
    return levels.reshape(rows, -1), zero, scale


def words_of(levels: NDArray[np.uint8]) -> NDArray[np.uint32]:
    """Levels [n, columns] as words [columns, n / 8]; the last word is filled up with zeros."""
    count, columns = levels.shape
    padded = np.zeros((columns, -(-count // PER_WORD) * PER_WORD), np.uint8)
    padded[:, :count] = levels.T
    places = padded.reshape(columns, -1, PER_WORD)
    words = np.zeros(places.shape[:2], np.uint32)
    for place, output in enumerate(ORDER):
        words |= places[..., output].astype(np.uint32) << np.uint32(4 * place)
    return words


def quantization_config(exclude: list[str]) -> dict[str, Any]:
    """What Quark 0.13 writes for unsigned weights of 4 bits with zero points in groups, but for its version."""
    weight = {
        "dtype": "uint4",
        "is_dynamic": False,
        "qscheme": "per_group",
        "ch_axis": -1,
        "group_size": GROUP,
        "block_size": None,
        "symmetric": False,
        "round_method": "half_even",
        "scale_type": "float",
        "zero_point_type": "int32",
        "scale_format": None,
        "scale_calculation_mode": None,
        "mx_element_dtype": None,
        "observer_cls": "PerGroupMinMaxObserver",
        "is_scale_quant": False,
        "enable_buffer_reuse": False,
        "max_input_numel": 4194304,
    }
    layer = {"input_tensors": None, "output_tensors": None, "weight": weight, "bias": None, "target_device": None}
    export = {
        "kv_cache_group": [],
        "min_kv_scale": 0.0,
        "pack_method": "reorder",
        "weight_format": "real_quantized",
        "weight_merge_groups": None,
    }
    return {
        "quant_method": "quark",
        "quant_mode": "eager_mode",
        "global_quant_config": layer,
        "layer_quant_config": {},
        "layer_type_quant_config": {},
        "kv_cache_quant_config": {},
        "kv_cache_post_rope": False,
        "softmax_quant_spec": None,
        "algo_config": None,
        "exclude": exclude,
        "export": export,
        "version": None,
    }


def older_rotary_keys(values: dict[str, Any]) -> dict[str, Any]:
    """A config whose rotary rules are written as before transformers 5, which reads these too.

    AMD's guide installs transformers 4.57, which knows no `rope_parameters`: it would take the default base instead.
    """
    found = dict(values)
    rules = found.pop("rope_parameters", None)
    if not isinstance(rules, dict):
        return values
    full, window = rules.get("full_attention", rules), rules.get("sliding_attention")
    for key, rule in (("rope_theta", full), ("rope_local_base_freq", window)):
        if isinstance(rule, dict) and rule.get("rope_theta") is not None:
            found[key] = rule["rope_theta"]
    stretched = isinstance(full, dict) and full.get("rope_type", full.get("type", "default")) != "default"
    if stretched and not found.get("rope_scaling"):
        found["rope_scaling"] = {key: value for key, value in full.items() if key != "rope_theta"}
    return found
