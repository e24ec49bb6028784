"""`PairEmbedding`: `Pair.embed`, texts as vectors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, overload

from pard_onnx.models.errors import BadInput, shown

from .embedding import POOLINGS, Pooling, Vector
from .engine import Engine
from .text.control_tokens import TEXT
from .text.prompt import as_list, known_ids, naming, require_ids, token_id

WANTED = "what is embedded is a text, a list of token ids, or a list of such texts"


class PairEmbedding(ABC):
    """The part of a pair that embeds. It needs the engine alone."""

    @property
    @abstractmethod
    def engine(self) -> Engine:
        """The models and their generations."""

    @overload
    def embed(self, text: str | Sequence[int], *, pooling: Pooling = "mean") -> Vector: ...

    @overload
    def embed(self, text: list[str] | list[list[int]], *, pooling: Pooling = "mean") -> list[Vector]: ...

    def embed(self, text: Any, *, pooling: Pooling = "mean") -> Vector | list[Vector]:
        """A text as a vector, [hidden] in float32 and of length 1, to be compared with others by dot products.

        text: a text or its token ids, or a list of several; the result is then a list. Special tokens in a text stay
        text. pooling: "mean" takes the mean of the tokens' hidden states after the target's last norm, "last" those of
        the last token. A model that was not trained for embeddings gives rough ones.

        Raises BadInput for a target that was exported without `--features=-1`, and for what is no text (TooLong: for
        more tokens than the capacity), with the index in a list, before anything is computed; Busy if as many
        generations run and wait as the pair was loaded for.
        """
        if pooling not in POOLINGS:
            raise BadInput(f"pooling must be one of {', '.join(POOLINGS)}, not {shown(pooling)}")
        engine = self.engine
        engine.require_last_layer()
        given = as_list(text, "what is embedded")
        if not isinstance(given, list) or (given and not isinstance(given[0], str | list | tuple)):
            return engine.embed(engine.new_sequence(), self.text_ids(given), pooling)
        if not given:
            raise BadInput(f"{WANTED}, not an empty list")
        texts: list[list[int]] = []
        for number, one in enumerate(given):
            with naming("text", number):
                texts.append(self.text_ids(one))
        sequence = engine.new_sequence()
        return [engine.embed(sequence, ids, pooling) for ids in texts]

    def text_ids(self, text: Any, *, bounded: bool = True) -> list[int]:
        """The token ids of one text for `embed`, which may be such ids. Raises as it.

        bounded: whether more tokens than the capacity are an error.
        """
        engine = self.engine
        size = engine.target_manifest.spec.vocabulary.size
        if isinstance(text, str):
            ids = known_ids(engine.text.tokenize(text, add_special_tokens=True, special_tokens=TEXT), engine.text, size)
        elif isinstance(text, list | tuple):
            ids = [token_id(item, WANTED) for item in text]
            require_ids(ids, size, "text")
        else:
            raise BadInput(f"{WANTED}, not {shown(text)}")
        if not ids:
            raise BadInput(f"{WANTED}, not an empty one")
        if bounded:
            engine.require_room(ids)
        return ids
