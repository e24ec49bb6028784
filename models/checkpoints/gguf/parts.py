"""`Parts`: what kinds of tokenizers differ in, in the form that tokenizer.json has for it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # token types of GGUF files


@dataclass(frozen=True, slots=True)
class Parts:
    normalizer: Mapping[str, Any] | None
    pre_tokenizer: Mapping[str, Any] | None
    decoder: Mapping[str, Any]
    model: Mapping[str, Any]
    bos: bool  # whether texts begin with the id of bos, where the file does not say
    ids: Mapping[str, int] | None = None  # of special tokens, where the file has none, by llama.cpp's names


def bpe(tokens: Sequence[str], merges: Iterable[tuple[str, str]], **options: Any) -> dict[str, Any]:
    """The `model` of tokenizer.json, with merges in order. options: beside or instead of the plain ones."""
    plain = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
    }
    return plain | options | {"vocab": {token: i for i, token in enumerate(tokens)}, "merges": list(merges)}
