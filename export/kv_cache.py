"""KV cache formats, a table. An int8 cache takes a quarter of float32's memory; a row is rounded when it is written.

GroupQueryAttention divides rotated keys and values by constant scales, and rounds; it multiplies by the scales when it
reads. The scales come from the largest magnitudes in the float graph's cache while it reads some text; larger values
are clipped later. A scale is for one channel (kv head and dimension), or for a layer's keys or values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from pard_onnx.export.graphs.tape import constant
from pard_onnx.export.verify.drive import FusedDriver, empty, open_session
from pard_onnx.models.checkpoints.checkpoint import Checkpoint
from pard_onnx.models.system_errors import naming
from pard_onnx.quantize.calibration.text import TextFile

OPERATOR = "GroupQueryAttention"
INPUTS = {"key": (3, 12), "value": (4, 13)}  # of the operator: the past, and its scale
LEVELS, HEADROOM = 127, 1.25
WINDOWS, WINDOW, CHUNK, MASKS = 8, 256, 64, 8  # of the calibration text
Float = NDArray[np.float32]
Largest = dict[str, Float]  # by cache name, as `0.key`: [kv_heads, head_dim]


@dataclass(frozen=True, slots=True)
class KvFormat:
    """How the KV cache is rounded to int8."""

    kind: str  # the operator's quantization type
    scales: Callable[[Float], Float]  # from largest magnitudes [kv_heads, head_dim]; broadcastable to the cache


def _per_channel(largest: Float) -> Float:
    """One scale a channel; a channel without values gets the layer's scale.

    The headroom is for values larger than the few of one channel that the text shows: on the shipped target it cuts
    the divergence to a third.
    """
    used = np.where(largest > 0, largest, largest.max())
    scales: Float = used * np.float32(HEADROOM / LEVELS)
    return scales[None, :, None, :]


def _per_tensor(largest: Float) -> Float:
    """One scale for all keys, or all values, of a layer."""
    return np.array([largest.max()], np.float32) / np.float32(LEVELS)


INT8_FORMATS = {
    "int8": KvFormat("PER_CHANNEL", _per_channel),
    "int8-tensor": KvFormat("PER_TENSOR", _per_tensor),
}


def quantize_cache(checkpoint: Checkpoint, path: Path, floats: str, name: str, text: TextFile) -> None:
    """Rewrite the graph at `path`, whose cache is of the type `floats`, to the KV cache format `name`."""
    ids = windows(checkpoint, text)
    caches = empty(checkpoint.spec, floats, ids.shape[1] + MASKS)
    driver = FusedDriver(open_session(path, floats), checkpoint.spec, caches)
    rewrite(path, INT8_FORMATS[name], largest_magnitudes(driver, ids))


def windows(checkpoint: Checkpoint, text: TextFile) -> NDArray[np.int64]:
    """Windows of tokens from all parts of the text: [windows, tokens]."""
    ids = text.tokens(checkpoint.tokenizer())
    length = min(WINDOW, checkpoint.spec.max_positions - MASKS)
    count = min(WINDOWS, len(ids) // length)
    if not count:
        return np.resize(ids, (1, length))
    starts = np.linspace(0, len(ids) - length, count).astype(int)
    return np.stack([ids[start : start + length] for start in starts])


def largest_magnitudes(driver: FusedDriver, text: NDArray[np.int64]) -> Largest:
    """The largest magnitudes of keys and values, those of masks included, that the graph writes over the text."""
    found: Largest = {}
    masks = 0 if driver.spec.pard is None else MASKS - 1
    for ids in text:
        driver.length = 0
        for first in range(0, len(ids), CHUNK):
            driver.step(ids[first : first + CHUNK], masks + 1)
            for name, rows in driver.caches.items():
                written = np.abs(rows[0, :, : driver.length + masks].astype(np.float32)).max(axis=1)
                found[name] = np.maximum(found.get(name, written), written)
    return {name.removeprefix("past_key_values."): largest for name, largest in found.items()}


def rewrite(path: Path, fmt: KvFormat, largest: Largest) -> None:
    """Rewrite a graph whose cache is float: attention gets scales, and the caches become int8."""
    model = ir.load(path)
    graph = model.graph
    for node in [node for node in graph if node.op_type == OPERATOR]:
        count = max(scale for _, scale in INPUTS.values()) + 1
        node.resize_inputs(count)
        for part, (past, place) in INPUTS.items():
            cache = node.inputs[past]
            assert cache is not None and cache.name is not None
            name = cache.name.removeprefix("past_key_values.")
            scale = constant(f"{name}_scale", np.ascontiguousarray(fmt.scales(largest[name]), np.float32))
            graph.register_initializer(scale)
            node.replace_input_with(place, scale)
            for value in (cache, node.outputs[1 if part == "key" else 2]):
                value.type = ir.TensorType(ir.DataType.INT8)
        node.attributes.update(
            {
                "k_quant_type": ir.AttrString("k_quant_type", fmt.kind),
                "v_quant_type": ir.AttrString("v_quant_type", fmt.kind),
                "kv_cache_bit_width": ir.AttrInt64("kv_cache_bit_width", 8),
            }
        )
    with naming(path):
        ir.save(model, path)
