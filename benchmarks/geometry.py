"""Shapes of public models, as their config.json gives them."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches

from pard_onnx.models.errors import BadInput


@dataclass(frozen=True, slots=True)
class Geometry:
    family: str  # the config's model_type
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    rows: int  # of the embedding matrix, padding included
    tied: bool
    theta: float
    max_positions: int
    norm_eps: float = 1e-6


GEOMETRIES = {
    "Qwen2.5-0.5B": Geometry("qwen2", 24, 896, 14, 2, 64, 4864, 151936, True, 1e6, 32768),
    "Qwen2.5-1.5B": Geometry("qwen2", 28, 1536, 12, 2, 128, 8960, 151936, True, 1e6, 32768),
    "Qwen2.5-3B": Geometry("qwen2", 36, 2048, 16, 2, 128, 11008, 151936, True, 1e6, 32768),
    "Qwen2.5-7B": Geometry("qwen2", 28, 3584, 28, 4, 128, 18944, 152064, False, 1e6, 32768),
    "DeepSeek-R1-Distill-Qwen-1.5B": Geometry("qwen2", 28, 1536, 12, 2, 128, 8960, 151936, False, 1e4, 131072),
    "Llama-3.2-1B": Geometry("llama", 16, 2048, 32, 8, 64, 8192, 128256, True, 5e5, 131072, 1e-5),
    "Llama-3.1-8B": Geometry("llama", 32, 4096, 32, 8, 128, 14336, 128256, False, 5e5, 131072, 1e-5),
    "Qwen3-0.6B": Geometry("qwen3", 28, 1024, 16, 8, 128, 3072, 151936, True, 1e6, 40960),
    "Qwen3-8B": Geometry("qwen3", 36, 4096, 32, 8, 128, 12288, 151936, False, 1e6, 40960),
}


def geometry(name: str) -> Geometry:
    """The geometry called `name`; BadInput names the nearest known one."""
    if name not in GEOMETRIES:
        known = {key.lower(): key for key in GEOMETRIES}
        near = get_close_matches(name.lower(), known, n=1, cutoff=0.5)
        hint = f"the nearest known one is {known[near[0]]!r}" if near else f"known: {', '.join(GEOMETRIES)}"
        raise BadInput(f"--like {name!r}: no such geometry; {hint}")
    return GEOMETRIES[name]
