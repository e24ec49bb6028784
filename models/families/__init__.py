"""Model families: a table by the config's `model_type`. A new family is a file here and a line below."""

from __future__ import annotations

from .family import Family, Norm, ScaledEmbedding, Unrotated, Windows, shapes
from .gemma3_text import GEMMA3_TEXT
from .llama import LLAMA
from .mistral import MISTRAL
from .qwen2 import QWEN2
from .qwen3 import QWEN3
from .smollm3 import SMOLLM3

__all__ = ["FAMILIES", "Family", "Norm", "ScaledEmbedding", "Unrotated", "Windows", "shapes"]

FAMILIES = {family.name: family for family in (LLAMA, QWEN2, QWEN3, MISTRAL, SMOLLM3, GEMMA3_TEXT)}
