"""Gemma 3's text models: scaled embedding, norms of 1 + weight before and after attention and MLP, window layers beside
full ones with a rotary base each."""

from .family import Family, Norm, ScaledEmbedding, Windows

GEMMA3_TEXT = Family(
    "gemma3_text",
    Norm("Gemma3RMSNorm", epsilon="eps", offset=1.0),
    "Gemma3RotaryEmbedding",
    embedding=ScaledEmbedding("Gemma3TextScaledWordEmbedding", buffer="embed_scale"),
    norms=("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    mlp_norm="pre_feedforward_layernorm",
    qk_norm=True,
    off=("attention_bias", "use_bidirectional_attention"),
    null=("attn_logit_softcapping", "final_logit_softcapping"),
    activation="gelu_pytorch_tanh",
    activation_key="hidden_activation",
    head_dim=256,
    kv_heads=4,
    null_kv_heads=False,
    tied=True,
    theta=1_000_000.0,
    windows=Windows(4096, "sliding_window_pattern", 6, "rope_local_base_freq", 10_000.0),
    bos_id=2,
    eos_ids=(1,),
)
