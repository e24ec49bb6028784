"""The tokenizer of a GGUF file as tokenizer.json: the same ids as llama.cpp's."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pard_onnx.models.checkpoints.config import Config

from .byte_level import byte_level
from .metadata import texts
from .parts import CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, Parts
from .sentencepiece import sentencepiece

MODEL, TOKENS, KINDS = "tokenizer.ggml.model", "tokenizer.ggml.tokens", "tokenizer.ggml.token_type"
NO_TOKEN = (1 << 32) - 1
MODELS: dict[str, Callable[[Config, Sequence[str], Sequence[int]], Parts]] = {
    "gpt2": byte_level,
    "llama": sentencepiece,
}
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
class GgufTokenizer:
    """The tokens of a GGUF file and how texts become them."""

    metadata: Config
    tokens: Sequence[str]  # without padding at the end
    kinds: Sequence[int]  # a token type each
    parts: Parts

    @classmethod
    def read(cls, metadata: Config) -> GgufTokenizer:
        """Raises BadCheckpoint for a kind of tokenizer, or a pre-tokenizer, that is not supported."""
        model = metadata.values.get(MODEL)
        if not isinstance(model, str) or model not in MODELS:
            raise metadata.fault(MODEL, f"is {model!r}; supported: {', '.join(MODELS)}")
        tokens = texts(metadata, TOKENS)
        kinds = _kinds(metadata, tokens)
        size = len(tokens)
        while size and kinds[size - 1] == UNUSED:  # rows that only fill the embedding up
            size -= 1
        if not size:
            raise metadata.fault(TOKENS, "has no token that is used; convert the model again")
        tokens, kinds = [token or f"[EMPTY_{index}]" for index, token in enumerate(tokens[:size])], kinds[:size]
        seen: set[str] = set()
        for token in tokens:
            if token in seen:
                raise metadata.fault(TOKENS, f"has {token!r} twice; convert the model again")
            seen.add(token)
        return cls(metadata, tokens, kinds, MODELS[model](metadata, tokens, kinds))

    def json(self) -> str:
        """The text of tokenizer.json."""
        value = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [_added(i, self.tokens[i], self.kinds[i]) for i in self.added],
            "normalizer": self.parts.normalizer,
            "pre_tokenizer": self.parts.pre_tokenizer,
            "post_processor": self._template(),
            "decoder": self.parts.decoder,
            "model": self.parts.model,
        }
        return json.dumps(value, ensure_ascii=False)

    @property
    def added(self) -> list[int]:
        """The ids of tokens that are found in a text before it is cut into pieces."""
        return [index for index, kind in enumerate(self.kinds) if kind in (UNKNOWN, CONTROL, USER_DEFINED)]

    def _template(self) -> dict[str, Any] | None:
        """Texts with special tokens begin with the id of bos, or end with that of eos, where the file says so."""
        pieces: list[dict[str, Any]] = [{"Sequence": {"id": "A", "type_id": 0}}]
        used = {}
        for key, default, place in (("bos", self.parts.bos, 0), ("eos", False, 1)):
            index = self.special(key)
            if self.metadata.flag(f"tokenizer.ggml.add_{key}_token", default) and index is not None:
                token = self.tokens[index]
                pieces.insert(place * len(pieces), {"SpecialToken": {"id": token, "type_id": 0}})
                used[token] = {"id": token, "ids": [index], "tokens": [token]}
        pair = [*pieces, {"Sequence": {"id": "B", "type_id": 1}}]
        template = {"type": "TemplateProcessing", "single": pieces, "pair": pair, "special_tokens": used}
        return template if used else None

    def special(self, name: str) -> int | None:
        """The id of a special token by llama.cpp's name (bos, eos, eot, eom, padding, unknown); None: there is none."""
        found = self.metadata.ids(f"tokenizer.ggml.{name}_token_id", len(texts(self.metadata, TOKENS)), NO_TOKEN)
        index = found[0] if found else (self.parts.ids or {}).get(name)
        return index if index is not None and index < len(self.tokens) else None

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


def _kinds(metadata: Config, tokens: list[str]) -> list[int]:
    found = metadata.values.get(KINDS)
    if found is None:
        return [CONTROL if token in ENDS else NORMAL for token in tokens]
    if not isinstance(found, np.ndarray) or found.dtype.kind not in "iu" or len(found) != len(tokens):
        raise metadata.fault(KINDS, f"is no list of {len(tokens)} numbers, one a token; convert the model again")
    return [CONTROL if token in ENDS else kind for token, kind in zip(tokens, found.tolist(), strict=True)]
