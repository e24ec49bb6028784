"""`TokenBytes`: the bytes that each token stands for by itself. A character may be spread over several tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from pard_onnx.models.checkpoints.tokenizer import GuardedTokenizer

BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # a token of decoders with byte fallback


class TokenBytes:
    """The bytes of a tokenizer's tokens. Each is found out when it is first asked for."""

    def __init__(self, tokenizer: GuardedTokenizer) -> None:
        self._tokenizer = tokenizer
        kinds = set(decoder_kinds(json.loads(tokenizer.decoder.__getstate__()))) if tokenizer.decoder else set()
        self._letters = byte_of_letter() if "ByteLevel" in kinds else None
        self._byte_fallback = "ByteFallback" in kinds
        added = tokenizer.get_added_tokens_decoder()
        self._known: dict[int, bytes] = {id_: token.content.encode() for id_, token in added.items()}

    def __call__(self, id_: int) -> bytes:
        """The bytes of a token; those of an added token's own text; none for an id without a token."""
        found = self._known.get(id_)
        if found is None:
            found = self._known[id_] = self._find(id_)
        return found

    def _find(self, id_: int) -> bytes:
        token: str | None = self._tokenizer.id_to_token(id_)
        if token is None:
            return b""
        if self._letters is not None:
            values = [self._letters.get(letter) for letter in token]
            return token.encode() if None in values else bytes(value for value in values if value is not None)
        if self._byte_fallback and (byte := BYTE.fullmatch(token)):
            return bytes([int(byte[1], 16)])
        # What it adds to a text: decoders treat the first token of a text in another way, so it follows itself
        once, twice = (self._tokenizer.decode([id_] * count, skip_special_tokens=False) for count in (1, 2))
        return twice[len(once) :].encode()


def decoder_kinds(state: Any) -> Iterator[str]:
    """The types of a decoder and of those that it consists of, from its state as the tokenizers library has it."""
    if isinstance(state, dict):
        yield str(state.get("type"))
        for part in state.get("decoders") or ():
            yield from decoder_kinds(part)


def byte_of_letter() -> dict[str, int]:
    """The letters that stand for bytes in the tokens of byte-level BPE, as GPT-2 has them: a byte that Latin-1 shows
    is its own letter, and the others take the letters from U+0100 on, in order."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in set(shown)]
    return {chr(byte): byte for byte in shown} | {chr(0x100 + at): byte for at, byte in enumerate(hidden)}
