"""The fewest tokens that a long text can have, known without encoding it, which takes seconds for megabytes.

It holds for byte pair encodings that have a token for every byte, so that no part of a text is dropped, and whose
normalizer and pre-tokenizer delete nothing: those of GPT-2, Llama, Qwen, Mistral, Gemma and their like. Each token then
stands for a bounded number of bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .tokenizer_check import parts

# Unicode's forms and lower case change each character outside of ASCII on its own (four bytes to one at most), or join
# up to four characters (three times fewer bytes at most). An ASCII character stays, or begins a joined one.
UNICODE_FORMS = ("NFC", "NFD", "NFKC", "NFKD", "Lowercase")
SHORTER = 16  # times that the bytes outside of ASCII may become fewer
# Pre-tokenizers that keep all of a text; `Split` and `Punctuation` do if their behaviour is not to remove
KEEPING = ("ByteLevel", "Metaspace", "Digits", "UnicodeScripts", "Split", "Punctuation")
BYTE_FALLBACK = {f"<0x{byte:02X}>" for byte in range(256)}


@dataclass(frozen=True, slots=True)
class FewestTokens:
    """How many tokens a tokenizer needs at least."""

    longest: int  # bytes of a text that one token stands for, at most
    shortens: bool  # whether the normalizer may make characters outside of ASCII shorter
    trims: bool  # whether some tokens take the whitespace beside them, of any length

    def of(self, text: str) -> int:
        if self.trims:
            text = "".join(text.split())
        size = len(text.encode("utf-8", "replace"))
        if self.shortens:
            size = max(len(text.encode("ascii", "ignore")), size // SHORTER)
        return -(-size // self.longest)


def fewest_tokens(tokenizer: Any) -> FewestTokens | None:
    """What is known of a tokenizer of the tokenizers library; None if any text may have few tokens."""
    normalizers, splitters = parts(tokenizer.normalizer), parts(tokenizer.pre_tokenizer)
    kept = all(map(keeps, normalizers)) and all(map(keeps_split, splitters))
    if type(tokenizer.model).__name__ != "BPE" or not kept:
        return None
    model, vocabulary = tokenizer.model, tokenizer.get_vocab(with_added_tokens=False)
    if model.continuing_subword_prefix or model.end_of_word_suffix:
        return None
    if any(part["type"] == "ByteLevel" for part in (*normalizers, *splitters)):
        from tokenizers.pre_tokenizers import ByteLevel

        if not vocabulary.keys() >= set(ByteLevel.alphabet()):
            return None
        longest = max(map(len, vocabulary))  # a character for each byte
    elif model.byte_fallback and vocabulary.keys() >= BYTE_FALLBACK:
        longest = max(len(token.encode()) for token in vocabulary)
    else:
        return None
    added = list(tokenizer.get_added_tokens_decoder().values())
    texts = [form for token in added for form in (token.content, normalized(tokenizer, token.content))]
    return FewestTokens(
        longest=max([longest, *(len(text.encode()) for text in texts)]),
        shortens=any(part["type"] in UNICODE_FORMS for part in normalizers),
        trims=any(token.lstrip or token.rstrip for token in added),
    )


def normalized(tokenizer: Any, text: str) -> str:
    out: str = tokenizer.normalizer.normalize_str(text) if tokenizer.normalizer else text
    return out


def keeps(normalizer: dict[str, Any]) -> bool:
    """Whether a normalizer deletes nothing."""
    if normalizer["type"] == "Replace":
        old, new = normalizer["pattern"].get("String"), normalizer["content"]
        return isinstance(old, str) and len(new.encode()) >= len(old.encode()) > 0
    return normalizer["type"] in (*UNICODE_FORMS, "ByteLevel", "Prepend")


def keeps_split(splitter: dict[str, Any]) -> bool:
    """Whether a pre-tokenizer deletes nothing."""
    return splitter["type"] in KEEPING and splitter.get("behavior") != "Removed"
