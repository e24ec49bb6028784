"""SmolLM3: Llama's layer, every fourth without rotary embedding."""

from .family import Family, Norm, Unrotated

SMOLLM3 = Family(
    "smollm3",
    Norm("SmolLM3RMSNorm"),
    "SmolLM3RotaryEmbedding",
    off=("attention_bias", "mlp_bias"),
    kv_heads=4,
    tied=True,
    theta=2_000_000.0,
    window_used=False,
    unrotated=Unrotated("no_rope_layers", "no_rope_layer_interval", 4),
    bos_id=128_000,
    eos_ids=(128_001,),
)
