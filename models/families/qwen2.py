"""Qwen2 and Qwen2.5: biases on q, k and v."""

from .family import Family, Norm

QWEN2 = Family(
    "qwen2",
    Norm("Qwen2RMSNorm"),
    "Qwen2RotaryEmbedding",
    qkv_bias=True,
    kv_heads=32,
    window=4096,
    window_used=False,
)
