"""The mask token of a draft: an id that no text has, found in its vocabulary or added to it."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from tokenizers import AddedToken

from pard_onnx.models.errors import BadInput, shown

MULTIPLE = 64  # of the rows of a larger embedding, which GPUs multiply faster; transformers' pad_to_multiple_of
# How tokenizers name tokens that they keep for later: <|reserved_special_token_3|>, <unused3>, [control_3], <SPECIAL_3>
SPARE = re.compile(r"\W*(reserved|unused|dummy|placeholder|extra[_-]?id|extra|control|special)\w*?[_-]?\d+\W*", re.I)


@dataclass(frozen=True, slots=True)
class MaskToken:
    """The id of the masks, and what it takes to have it."""

    id: int
    rows: int  # of the embedding: more than the draft has where rows are added
    note: str  # where the id comes from, for people
    is_new: bool = True  # False: the draft was trained with it


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What is known of a draft's ids."""

    rows: int  # of its embedding
    tokens: Mapping[str, int]  # of the tokenizer: every text and its id
    added: Mapping[int, AddedToken]  # tokens that are no part of ordinary text
    used: Collection[int]  # ids with a meaning: those that end or begin texts, named ones, and those of the template
    template: str  # the chat template; empty for none

    @property
    def size(self) -> int:
        """One more than the highest id of the tokenizer."""
        return max([*self.tokens.values(), *self.added, -1]) + 1

    def spare(self) -> list[int]:
        """Ids of special tokens whose names say that they have no use, and which nothing uses, ascending."""
        return sorted(
            id_
            for id_, token in self.added.items()
            if id_ < self.rows
            and id_ not in self.used
            and token.content not in self.template
            and SPARE.fullmatch(token.content)
        )


def find_mask(vocabulary: Vocabulary, given: int | None = None) -> MaskToken:
    """The mask token: `given`, or the first row past the tokenizer, or the last spare token, or a new row.

    Raises BadInput for a given id that text may have.
    """
    found = _unused(vocabulary)
    if given is None:
        return found
    advice = f"leave --mask-token out: id {found.id} is free ({found.note})"
    texts = {id_: text for text, id_ in vocabulary.tokens.items()}
    if not 0 <= given < max(vocabulary.rows, found.rows):
        raise BadInput(f"--mask-token {shown(given)}: the draft has ids 0 to {vocabulary.rows - 1}; {advice}")
    if given in vocabulary.used:
        token = shown(texts.get(given, ""))
        raise BadInput(f"--mask-token {given}: is {token}, which the model uses, so it is no mask; {advice}")
    if given in vocabulary.added:
        content = vocabulary.added[given].content
        if content in vocabulary.template or not vocabulary.added[given].special:
            raise BadInput(f"--mask-token {given}: is {shown(content)}, which texts have, so it is no mask; {advice}")
        return MaskToken(given, vocabulary.rows, f"the special token {content}")
    if given in texts:
        raise BadInput(f"--mask-token {given}: is {shown(texts[given])}, which texts have, so it is no mask; {advice}")
    return MaskToken(
        given,
        max(vocabulary.rows, _padded(given + 1)) if given >= vocabulary.rows else vocabulary.rows,
        "a row past the tokenizer's ids",
    )


def _unused(vocabulary: Vocabulary) -> MaskToken:
    free = next((id_ for id_ in range(vocabulary.size, vocabulary.rows) if id_ not in vocabulary.used), None)
    if free is not None:
        return MaskToken(free, vocabulary.rows, "a row past the tokenizer's ids")
    if spare := vocabulary.spare():
        # Other fine-tunes take the first ones
        token = vocabulary.added[spare[-1]].content
        return MaskToken(spare[-1], vocabulary.rows, f"the unused token {token}")
    new = max(vocabulary.size, vocabulary.rows)
    rows = _padded(new + 1)
    return MaskToken(new, rows, f"a new row: the embedding grows from {vocabulary.rows} rows to {rows}")


def _padded(rows: int) -> int:
    return -(-rows // MULTIPLE) * MULTIPLE
