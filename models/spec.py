"""What a checkpoint is, as far as exporting and running it needs to know."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Role = Literal["target", "draft"]


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Llama 3's frequency-dependent stretching of rotary wavelengths."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, slots=True)
class Rope:
    theta: float
    llama3: Llama3Scaling | None = None


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """rows: of the embedding matrix, padding included; size: ids the tokenizer knows (0..size-1)."""

    rows: int
    size: int
    eos_ids: tuple[int, ...]
    bos_id: int | None = None


@dataclass(frozen=True, slots=True)
class Pard:
    """A parallel draft's own facts: the one mask id that all positions share."""

    mask_id: int
    spd_type: str = "pard"


@dataclass(frozen=True, slots=True)
class ModelSpec:
    family: str  # the config's model_type
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float
    rope: Rope
    qk_norm: bool
    qkv_bias: bool
    tied: bool  # lm_head shares the embedding matrix
    max_positions: int
    dtype: str  # of the checkpoint's weights: float32, float16, bfloat16
    vocabulary: Vocabulary
    chat_template: str | None = None
    pard: Pard | None = None

    @property
    def role(self) -> Role:
        return "draft" if self.pard else "target"
