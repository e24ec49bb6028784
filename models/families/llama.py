"""Llama 2 and 3, and what has their layer."""

from .family import Family, Norm

LLAMA = Family(
    "llama",
    Norm("LlamaRMSNorm"),
    "LlamaRotaryEmbedding",
    off=("attention_bias", "mlp_bias"),
    bos_id=1,
    eos_ids=(2,),
)
