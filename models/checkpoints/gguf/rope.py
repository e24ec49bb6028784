"""Rotary scaling of a GGUF file as transformers' `rope_parameters`."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pard_onnx.models.checkpoints.tensors import read_tensor
from pard_onnx.models.errors import BadCheckpoint

from .file import GgufFile
from .metadata import Own
from .types import GgufTensor

FACTORS = "rope_freqs.weight"  # the divisor of each rotary frequency
SUPPORTED = "supported: none, yarn, and Llama 3's factors"
YARN = {"beta_fast": "yarn_beta_fast", "beta_slow": "yarn_beta_slow", "attention_factor": "yarn_attn_factor"}
NEUTRAL = {"rope.scaling.attn_factor": 1, "rope.scaling.yarn_ext_factor": 1, "rope.scaling.yarn_log_multiplier": 0}
ORIGINAL = 8192  # Llama 3's positions before scaling
TOLERANCE = 1e-4  # of a factor, in parts: they are stored as float32


def rope_parameters(file: GgufFile, own: Own, head_dim: int) -> dict[str, Any]:
    """The rule of layers with full attention. Raises BadCheckpoint for scaling that is not supported."""
    theta = own.number("rope.freq_base", 10_000.0)
    kind = own.value("rope.scaling.type")
    if kind not in (None, "none", "linear", "yarn"):
        raise own.fault("rope.scaling.type", f"is {kind!r}; {SUPPORTED}")
    if kind == "yarn":
        return {"rope_type": "yarn", "rope_theta": theta, **_yarn(own)}
    factor = own.number("rope.scaling.factor", own.number("rope.scale_linear", 1.0))
    if kind != "none" and factor != 1:
        raise own.fault("rope.scaling.factor", f"is {factor:g}, of linear scaling; {SUPPORTED}")
    scaled = _llama3(file, theta, head_dim) if FACTORS in file.tensors else {}
    return {"rope_type": "default", "rope_theta": theta} | scaled


def _yarn(own: Own) -> dict[str, Any]:
    own.require_neutral(NEUTRAL)
    named = {name: f"rope.scaling.{key}" for name, key in YARN.items()}
    found = {name: own.number(key) for name, key in named.items() if own.value(key) is not None}
    original = own.integer("rope.scaling.original_context_length", own.integer("context_length"))
    return {"factor": own.number("rope.scaling.factor"), "original_max_position_embeddings": original, **found}


def _llama3(file: GgufFile, theta: float, head_dim: int) -> dict[str, Any]:
    """Llama 3's scaling, from the factors alone: the file has none of its numbers.

    A wavelength w is kept below `short`, multiplied by `factor` above `long`, and between them 1 / its factor is linear
    in 1 / w. transformers has short and long as original positions / high and / low frequency factor.
    """
    described = file.tensors[FACTORS]
    fault = BadCheckpoint(f"{file.path}: the factors in {FACTORS} are not Llama 3's; only its scaling is supported")
    if described.shape != (head_dim // 2,) or described.kind.name != "F32":
        raise fault
    found = read_tensor(GgufTensor(described.file, described.kind, described.shape, described.offset)).astype(
        np.float64
    )
    if not np.isfinite(found).all() or found.min() < 1 - TOLERANCE:
        raise fault
    factor = float(found.max())
    if factor < 1 + TOLERANCE:
        return {}
    wavelengths = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    short, long = _limits(wavelengths, found, factor)
    if not 0 < short < long or not np.allclose(_factors(wavelengths, factor, short, long), found, rtol=TOLERANCE):
        raise fault
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": float(f"{ORIGINAL / long:.6g}"),
        "high_freq_factor": float(f"{ORIGINAL / short:.6g}"),
        "original_max_position_embeddings": ORIGINAL,
    }


def _limits(wavelengths: NDArray[np.float64], found: NDArray[np.float64], factor: float) -> tuple[float, float]:
    """The wavelengths `short` and `long`. Between two of them whose factors are 1 and `factor` any will do."""
    kept, whole = found < 1 + TOLERANCE, found > factor * (1 - TOLERANCE)
    before = wavelengths[kept].max(initial=wavelengths.min() / 2)
    after = wavelengths[whole].min(initial=wavelengths.max() * 2)
    between = ~kept & ~whole
    share = (1 / found[between] - 1 / factor) / (1 - 1 / factor)  # of the frequency itself
    if len(share) > 1:
        slope, at = np.polyfit(1 / wavelengths[between], share, 1)
        return float(slope / (1 - at)), float(slope / -at)
    if len(share) == 1:  # many lines go through its point: the one that is 0 at `after`, or 1 at `before`
        x, part = 1 / wavelengths[between][0], share[0]
        first = min((x - (1 - part) / after) / part, 1 / before)
        last = (x - part * first) / (1 - part)
        return float(1 / first), float(1 / last)
    return float(before * 1.0001), float(after * 0.9999)


def _factors(wavelengths: NDArray[np.float64], factor: float, short: float, long: float) -> NDArray[np.float64]:
    share = np.clip((1 / wavelengths - 1 / long) / (1 / short - 1 / long), 0, 1)
    found: NDArray[np.float64] = 1 / ((1 - share) / factor + share)
    return found
