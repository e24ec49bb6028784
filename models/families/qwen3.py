"""Qwen3: norms on the heads of q and k."""

from .family import Family, Norm

QWEN3 = Family(
    "qwen3",
    Norm("Qwen3RMSNorm"),
    "Qwen3RotaryEmbedding",
    qk_norm=True,
    off=("attention_bias",),
    head_dim=128,
    kv_heads=32,
    window=4096,
    window_used=False,
)
