"""Byte-level BPE of GGUF files: a table of pre-tokenizers by llama.cpp's names, and the parts of tokenizer.json."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pard_onnx.models.checkpoints.config import Config
from pard_onnx.models.checks import nearest_name

from .metadata import texts
from .parts import Parts, bpe

PRE, MERGES = "tokenizer.ggml.pre", "tokenizer.ggml.merges"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CONTRACTION = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
WORD, MARKS, SPACES = r"[^\r\n\p{L}\p{N}]?\p{L}+", r" ?[^\s\p{L}\p{N}]+[\r\n]*", r"\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = rf"{CONTRACTION}|{WORD}|\p{{N}}{{1,3}}|{MARKS}|{SPACES}"
QWEN2 = rf"{CONTRACTION}|{WORD}|\p{{N}}|{MARKS}|{SPACES}"
# Words in which small letters follow capital ones, and words without small letters
_CASED = r"[^\r\n\p{L}\p{N}]?((?=\p{L})[^a-z])*((?=\p{L})[^A-Z])+"
_CAPITAL = r"[^\r\n\p{L}\p{N}]?((?=\p{L})[^a-z])+((?=\p{L})[^A-Z])*"
_SLASHED = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
TEKKEN = rf"{_CASED}|{_CAPITAL}|\p{{N}}|{_SLASHED}|{SPACES}"
GPT4O = rf"{_CASED}{CONTRACTION}?|{_CAPITAL}{CONTRACTION}?|\p{{N}}{{1,3}}|{_SLASHED}|{SPACES}"
DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{SPACES}",
)
FALCON = (r"[\p{P}\$\+<=>\^~\|`]+", GPT2, "[0-9][0-9][0-9]")


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """How text is cut into pieces before merging: by each pattern in turn.

    whole: a piece that is a token itself is taken as it is, without merges. bos: whether texts begin with the first
    token's id, where the file does not say.
    """

    patterns: tuple[str, ...]
    whole: bool = False
    bos: bool = False


_GPT2, _LLAMA3, _QWEN2 = PreTokenizer((GPT2,)), PreTokenizer((LLAMA3,), whole=True, bos=True), PreTokenizer((QWEN2,))
_DIGITS = PreTokenizer((r"\p{N}", GPT2))
# By llama.cpp's names in `tokenizer.ggml.pre`
PRE_TOKENIZERS = {
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "midm-2.0", "lfm2"), _LLAMA3),
    **dict.fromkeys(("smaug-bpe", "dbrx"), PreTokenizer((LLAMA3,))),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez", "stablelm2", "hunyuan", "solar-open"), _QWEN2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), _DIGITS),
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "gigachat", "a.x-4.0", "mellum"), _GPT2),
    "tekken": PreTokenizer((TEKKEN,), whole=True, bos=True),
    **dict.fromkeys(("gpt-4o", "llama4"), PreTokenizer((GPT4O,))),
    "deepseek-v3": PreTokenizer(DEEPSEEK3),
    "falcon": PreTokenizer(FALCON),
}


def byte_level(metadata: Config, tokens: Sequence[str], kinds: Sequence[int]) -> Parts:
    """The parts of a tokenizer whose tokens are written in GPT-2's letters for bytes. Raises BadCheckpoint for a
    pre-tokenizer that is not in the table."""
    name = metadata.values.get(PRE)
    pre = PRE_TOKENIZERS.get(name) if isinstance(name, str) else None
    if pre is None:
        nearest = nearest_name(name, PRE_TOKENIZERS)
        hint = f"; the nearest is {nearest!r}" if nearest else ""
        raise metadata.fault(PRE, f"is {name!r}; supported: {', '.join(PRE_TOKENIZERS)}{hint}")
    pieces = [
        {"type": "Split", "pattern": {"Regex": text}, "behavior": "Isolated", "invert": False} for text in pre.patterns
    ]
    level: dict[str, Any] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    merges = [_pair(metadata, text) for text in texts(metadata, MERGES)]
    return Parts(
        normalizer=None,
        pre_tokenizer={"type": "Sequence", "pretokenizers": [*pieces, level]},
        decoder=level,
        model=bpe(tokens, merges, ignore_merges=pre.whole),
        bos=pre.bos,
    )


def _pair(metadata: Config, text: str) -> tuple[str, str]:
    place = text.find(" ", 1)
    if place < 0:
        raise metadata.fault(MERGES, f"has {text!r}, which is no pair; convert the model again")
    return text[:place], text[place + 1 :]
