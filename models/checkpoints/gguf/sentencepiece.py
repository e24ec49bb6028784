"""SentencePiece's BPE in GGUF files (Llama 2, Gemma): merges from the scores of tokens.

llama.cpp merges the two neighbours whose joined text is the token with the highest score, the leftmost of equals, until
no two neighbours make a token. In BPE with an ordered list of merges that is every way to split a token in two, in
the order of the tokens' scores.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from pard_onnx.models.checkpoints.config import Config

from .parts import NORMAL, UNKNOWN, Parts, bpe

SCORES, SPACE_PREFIX = "tokenizer.ggml.scores", "tokenizer.ggml.add_space_prefix"
SPACE = "▁"
DEFAULT_IDS = {"unknown": 0, "bos": 1, "eos": 2}  # llama.cpp's


def sentencepiece(metadata: Config, tokens: Sequence[str], kinds: Sequence[int]) -> Parts:
    """The parts of a tokenizer whose tokens are text, with a letter for spaces and 256 tokens for bytes."""
    for byte in range(256):
        if f"<0x{byte:02X}>" not in tokens:
            raise metadata.fault("tokenizer.ggml.tokens", f"has no <0x{byte:02X}>; convert the model again")
    prefix = metadata.flag(SPACE_PREFIX, True)
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    back: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    prepend = {"type": "Prepend", "prepend": SPACE}
    unknown = next((token for token, kind in zip(tokens, kinds, strict=True) if kind == UNKNOWN), None)
    scores = _scores(metadata, len(tokens))
    return Parts(
        normalizer={"type": "Sequence", "normalizers": [prepend, replace]} if prefix else replace,
        pre_tokenizer=None,
        decoder={"type": "Sequence", "decoders": [*back, strip] if prefix else back},
        model=bpe(
            tokens, _merges(metadata, tokens, kinds, scores), unk_token=unknown, fuse_unk=True, byte_fallback=True
        ),
        bos=True,
        ids=DEFAULT_IDS,
    )


def _scores(metadata: Config, count: int) -> list[float]:
    found = metadata.values.get(SCORES)
    if not isinstance(found, np.ndarray) or len(found) < count or not np.isfinite(found).all():
        raise metadata.fault(SCORES, f"is no list of {count} finite numbers, one a token; convert the model again")
    scores: list[float] = found[:count].tolist()
    return scores


def _merges(
    metadata: Config, tokens: Sequence[str], kinds: Sequence[int], scores: Sequence[float]
) -> Iterator[tuple[str, str]]:
    known = set(tokens)
    last: tuple[float, str] | None = None
    for index in sorted(range(len(tokens)), key=lambda i: -scores[i]):
        token = tokens[index]
        pairs = [(token[:i], token[i:]) for i in range(len(token) - 1, 0, -1)]
        pairs = [(left, right) for left, right in pairs if left in known and right in known]
        if pairs and kinds[index] == NORMAL:
            if last and last[0] == scores[index]:
                raise metadata.fault(SCORES, f"are equal for {last[1]!r} and {token!r}, so no order of merges is known")
            last = scores[index], token
        yield from pairs
