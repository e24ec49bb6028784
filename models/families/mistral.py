"""Mistral from v0.2 on: Llama's layer. v0.1 has a window in every layer, which is refused."""

from .family import Family, Norm

MISTRAL = Family(
    "mistral",
    Norm("MistralRMSNorm"),
    "MistralRotaryEmbedding",
    kv_heads=8,
    null_kv_heads=False,
    window=4096,
    bos_id=1,
    eos_ids=(2,),
)
