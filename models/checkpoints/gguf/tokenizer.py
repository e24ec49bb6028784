"""The tokenizer of a GGUF file as tokenizer.json: the same ids as llama.cpp's."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pard_onnx.models.checkpoints.config import Config
from pard_onnx.models.checks import nearest_name

MODEL, PRE = "tokenizer.ggml.model", "tokenizer.ggml.pre"
TOKENS, KINDS, MERGES = "tokenizer.ggml.tokens", "tokenizer.ggml.token_type", "tokenizer.ggml.merges"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # token types
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CONTRACTION = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
WORD, MARKS, SPACES = r"[^\r\n\p{L}\p{N}]?\p{L}+", r" ?[^\s\p{L}\p{N}]+[\r\n]*", r"\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = rf"{CONTRACTION}|{WORD}|\p{{N}}{{1,3}}|{MARKS}|{SPACES}"
QWEN2 = rf"{CONTRACTION}|{WORD}|\p{{N}}|{MARKS}|{SPACES}"
# Texts that end a generation in llama.cpp, and are control tokens to it, whatever their type in the file is
ENDS = frozenset(
    {
        *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>"),
        *("<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<eos>"),
        *("<end_of_utterance>", "<turn|>", "<|tool_response>", "<｜end▁of▁sentence｜>", "[e~["),
        # Of code models: padding, a repository's name, a file's end
        *("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]", "<|fim_repo|>", "<|repo_name|>", "<fim-repo>"),
        *("<REPO>", "<reponame>", "<|file_sep|>"),
    }
)


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
}


@dataclass(frozen=True, slots=True)
class GgufTokenizer:
    """The tokens of a GGUF file and how texts become them."""

    metadata: Config
    tokens: Sequence[str]  # without padding at the end
    kinds: Sequence[int]  # a token type each
    pre: PreTokenizer
    merges: Sequence[tuple[str, str]]

    @classmethod
    def read(cls, metadata: Config) -> GgufTokenizer:
        """Raises BadCheckpoint for a kind of tokenizer, or a pre-tokenizer, that is not supported."""
        model = metadata.values.get(MODEL)
        if model != "gpt2":
            raise metadata.fault(MODEL, f"is {model!r}; only 'gpt2' (byte-level BPE) is supported")
        name = metadata.values.get(PRE)
        pre = PRE_TOKENIZERS.get(name) if isinstance(name, str) else None
        if pre is None:
            nearest = nearest_name(name, PRE_TOKENIZERS)
            hint = f"; the nearest is {nearest!r}" if nearest else ""
            raise metadata.fault(PRE, f"is {name!r}; supported: {', '.join(PRE_TOKENIZERS)}{hint}")
        tokens = _texts(metadata, TOKENS)
        kinds = _kinds(metadata, tokens)
        size = len(tokens)
        while size and kinds[size - 1] == UNUSED:  # rows that only fill the embedding up
            size -= 1
        if not size:
            raise metadata.fault(TOKENS, "has no token that is used")
        tokens = [token or f"[EMPTY_{index}]" for index, token in enumerate(tokens[:size])]
        if len(set(tokens)) != size:
            twice = next(token for index, token in enumerate(tokens) if token in tokens[:index])
            raise metadata.fault(TOKENS, f"has {twice!r} twice; convert the model again")
        return cls(metadata, tokens, kinds[:size], pre, [_pair(metadata, text) for text in _texts(metadata, MERGES)])

    def json(self) -> str:
        """The text of tokenizer.json."""
        pieces = [
            {"type": "Split", "pattern": {"Regex": text}, "behavior": "Isolated", "invert": False}
            for text in self.pre.patterns
        ]
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        value = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [_added(i, self.tokens[i], self.kinds[i]) for i in self.added],
            "normalizer": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*pieces, level]},
            "post_processor": self._template(level),
            "decoder": level,
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": self.pre.whole,
                "vocab": {token: index for index, token in enumerate(self.tokens)},
                "merges": self.merges,
            },
        }
        return json.dumps(value, ensure_ascii=False)

    @property
    def added(self) -> list[int]:
        """The ids of tokens that are found in a text before it is cut into pieces."""
        return [index for index, kind in enumerate(self.kinds) if kind in (UNKNOWN, CONTROL, USER_DEFINED)]

    def _template(self, level: dict[str, Any]) -> dict[str, Any]:
        """Texts with special tokens begin with the id of bos, or end with that of eos, where the file says so."""
        pieces: list[dict[str, Any]] = [{"Sequence": {"id": "A", "type_id": 0}}]
        used = {}
        for key, default, place in (("bos", self.pre.bos, 0), ("eos", False, 1)):
            index = self.special(key)
            if self.metadata.flag(f"tokenizer.ggml.add_{key}_token", default) and index is not None:
                token = self.tokens[index]
                pieces.insert(place * len(pieces), {"SpecialToken": {"id": token, "type_id": 0}})
                used[token] = {"id": token, "ids": [index], "tokens": [token]}
        if not used:
            return level
        pair = [*pieces, {"Sequence": {"id": "B", "type_id": 1}}]
        template = {"type": "TemplateProcessing", "single": pieces, "pair": pair, "special_tokens": used}
        return {"type": "Sequence", "processors": [level, template]}

    def special(self, name: str) -> int | None:
        """The id of a special token by llama.cpp's name (bos, eos, eot, eom, padding, unknown); None: there is none."""
        found = self.metadata.ids(f"tokenizer.ggml.{name}_token_id", len(self.tokens))
        return found[0] if found else None

    def ends(self) -> list[int]:
        """The ids that end a generation: those that the file names first, then those that llama.cpp knows by text."""
        named = [self.special(name) for name in ("eos", "eot", "eom")]
        known = [index for index, token in enumerate(self.tokens) if token in ENDS]
        return list(dict.fromkeys([index for index in named if index is not None] + known))

    def config(self, template: str | None) -> dict[str, Any]:
        """The values of tokenizer_config.json."""
        named = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
        ids = {f"{name}_token": self.special(key) for name, key in named.items()}
        found = {key: None if index is None else self.tokens[index] for key, index in ids.items()}
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            **found,
            **({} if template is None else {"chat_template": template}),
        }


def _added(index: int, token: str, kind: int) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": index, "content": token, **flags, "special": kind != USER_DEFINED}


def _texts(metadata: Config, key: str) -> list[str]:
    found = metadata.values.get(key)
    if found is None:
        raise metadata.fault(key, "is missing; convert the model again")
    if not isinstance(found, list):
        raise metadata.fault(key, "is no list of texts; convert the model again")
    for index, item in enumerate(found):
        if isinstance(item, bytes):
            raise metadata.fault(key, f"has {item!r} at {index}, which is not UTF-8; convert the model again")
    return found


def _kinds(metadata: Config, tokens: list[str]) -> list[int]:
    found = metadata.values.get(KINDS)
    if found is None:
        return [CONTROL if token in ENDS else NORMAL for token in tokens]
    if not isinstance(found, np.ndarray) or found.dtype.kind not in "iu" or len(found) != len(tokens):
        raise metadata.fault(KINDS, f"is no list of {len(tokens)} numbers, one a token; convert the model again")
    return [CONTROL if token in ENDS else kind for token, kind in zip(tokens, found.tolist(), strict=True)]


def _pair(metadata: Config, text: str) -> tuple[str, str]:
    place = text.find(" ", 1)
    if place < 0:
        raise metadata.fault(MERGES, f"has {text!r}, which is no pair; convert the model again")
    return text[:place], text[place + 1 :]
