"""Chooses the target's tokens from its logits: greedily, or by random draws.

Why drawing row by row is speculative sampling: a draft here is one id d for a position, not a distribution, so its
distribution q is a point mass. Rejection sampling (Leviathan et al. 2023, Chen et al. 2023) then accepts d with
probability min(1, p(d) / q(d)) = p(d), and otherwise draws from p without d, renormalised. Drawing t from p and
accepting the draft if t = d is the same: t = d has probability p(d), and given t != d, t is distributed as p without
d. So no residual distribution is needed, and no row after the first mismatch is used.

The draw does not depend on the draft either. The random number of a token is a function of the seed and the token's
position, and the row of logits is a function of the tokens before it. So each token is a function of the tokens before
it, the settings and the seed: by induction, the text is the one that plain sampling writes, token for token, whatever
is drafted. (This requires that the target's logits do not depend on the step's width: see exactness in
docs/architecture.md.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from math import isfinite, isnan
from typing import Protocol

import numpy as np

from pard_onnx.models.errors import BadInput, Failure

from .edits import Logits, RowEdit
from .filters import candidates
from .penalties import Penalties
from .settings import Sampling


class Chooser(Protocol):
    """What the decoding loop needs to choose tokens."""

    def choose(self, rows: Logits, committed: Sequence[int], drafts: Sequence[int]) -> list[int]:
        """The target's tokens after `committed`: the drafts that it accepts, and one more token of its own.

        rows: logits after the last committed token and after each draft, [len(drafts) + 1, vocabulary rows].
        Raises Failure if a row that is needed has no finite maximum.
        """
        ...


def chooser(
    sampling: Sampling, vocabulary: int, prompt_length: int, seed: int, edits: Sequence[RowEdit] = ()
) -> Chooser:
    """A `Greedy` chooser for greedy settings without edits, otherwise a `Sampler`; arguments and errors as of
    `Sampler`."""
    if sampling.greedy and not edits:
        return Greedy()
    return Sampler(sampling, vocabulary, prompt_length, seed, edits)


class Greedy:
    """Chooses the id of each row's largest logit, the lowest of several such ids."""

    def choose(self, rows: Logits, committed: Sequence[int], drafts: Sequence[int]) -> list[int]:
        """See `Chooser`. The logits of ids that the tokenizer does not have must be -inf."""
        ids = rows.argmax(axis=-1).tolist()
        tokens = list(accept(drafts, ids).tokens)
        for i, token in enumerate(tokens):
            require_finite(float(rows[i, token]), len(committed) + i)
        return tokens


class Sampler:
    """Chooses the tokens of one generation by random draws, with penalties and bias, and edits of rows.

    A token depends on its row, the settings, the seed, its position and the tokens before it; not on other rows, nor on
    their number. A token costs a few passes over its row.
    """

    def __init__(
        self, sampling: Sampling, vocabulary: int, prompt_length: int, seed: int, edits: Sequence[RowEdit] = ()
    ) -> None:
        """vocabulary: ids 0..vocabulary-1 can be chosen; rows may be longer. prompt_length: the number of committed
        tokens that are not output. seed: 0..2**64-1, see `Sampling.chosen_seed`. edits: are applied in this order to
        rows after penalties and bias, before temperature and filters.

        Raises BadInput if logit_bias names another id or bans all ids.
        """
        require_known(sampling, vocabulary)
        self._sampling, self._vocabulary, self._seed = sampling, vocabulary, seed
        self._penalties = Penalties(sampling, vocabulary, prompt_length)
        self._edits = tuple(edits)
        self._tokens: list[int] = []  # for the edits: the tokens before the present row
        self._changed = np.empty(vocabulary if sampling.penalizes or edits else 0, np.float32)
        self._weights = np.empty(vocabulary, np.float32)

    def choose(self, rows: Logits, committed: Sequence[int], drafts: Sequence[int]) -> list[int]:
        """See `Chooser`. `committed` may only grow from call to call."""
        if len(rows) != len(drafts) + 1:
            raise ValueError(f"{len(drafts)} drafts need {len(drafts) + 1} rows, not {len(rows)}")
        self._penalties.count_committed(committed)
        if self._edits:
            self._tokens.extend(committed[len(self._tokens) :])
        tokens: list[int] = []
        matched = 0
        try:
            for row in rows:
                tokens.append(self._token(row[: self._vocabulary], len(committed) + matched))
                if matched == len(drafts) or tokens[-1] != drafts[matched]:
                    break
                self._penalties.count_draft(tokens[-1])
                if self._edits:
                    self._tokens.append(tokens[-1])  # stays: the loop commits it, or EOS before it ends the generation
                matched += 1
        finally:
            self._penalties.uncount_drafts(tokens[:matched])
        return tokens

    def _token(self, logits: Logits, position: int) -> int:
        """The token at `position`; logits: [vocabulary]."""
        require_finite(float(logits.max()), position)
        logits = self._edited(self._penalties.apply(logits, self._changed))
        best = int(logits.argmax())
        if logits[best] == -np.inf:
            who = "logit_bias, a grammar or another edit of logits forbids" if self._edits else "logit_bias bans"
            raise Failure(f"no id is left for position {position}: {who} all that the target allows")
        if self._sampling.certain:
            return best
        return candidates(logits, self._sampling, self._weights).draw(uniform(self._seed, position))

    def _edited(self, logits: Logits) -> Logits:
        """The row after all edits. They get a copy, since the target's rows may be read by others."""
        if self._edits and logits is not self._changed:
            np.copyto(self._changed, logits)
            logits = self._changed
        for edit in self._edits:
            logits = edit.edit(logits, self._tokens)
        return logits


def uniform(seed: int, position: int) -> float:
    """The random number of a position, uniform in [0, 1): 53 bits of a keyed hash, the same on every machine."""
    key, counter = seed.to_bytes(8, "little"), position.to_bytes(8, "little")
    digest = blake2b(counter, key=key, digest_size=8, usedforsecurity=False).digest()
    return (int.from_bytes(digest, "little") >> 11) / 2**53


def require_finite(largest: float, position: int) -> None:
    """Raise Failure if a row's largest logit is not finite. If a row has a NaN, its maximum is NaN."""
    if not isfinite(largest):
        kind = "NaN" if isnan(largest) else str(largest)
        raise Failure(
            f"the target's largest logit for position {position} is {kind}; the model's weights or its provider are "
            "broken (try provider cpu)"
        )


def require_known(sampling: Sampling, vocabulary: int) -> None:
    """Raise BadInput if logit_bias names an id that does not exist, or bans every id."""
    banned = 0
    for token, bias in dict(sampling.logit_bias).items():
        if token >= vocabulary:
            raise BadInput(f"logit_bias: id {token} does not exist; the tokenizer's ids are 0 to {vocabulary - 1}")
        banned += bias == -np.inf
    if banned == vocabulary:
        raise BadInput(f"logit_bias bans all {vocabulary} ids; leave at least one")


@dataclass(frozen=True, slots=True)
class Accepted:
    """The tokens that a round commits."""

    tokens: tuple[int, ...]  # the accepted drafts, and the target's own next token (the correction or bonus token)
    matched: int  # the number of accepted drafts


def accept(drafts: Sequence[int], target_ids: Sequence[int]) -> Accepted:
    """Accept the drafts up to the first that differs from the target's own token.

    target_ids: the target's tokens after the last committed token and after each draft, [len(drafts) + 1].
    """
    if len(target_ids) != len(drafts) + 1:
        raise ValueError(f"{len(drafts)} drafts need {len(drafts) + 1} target ids, not {len(target_ids)}")
    matched = 0
    while matched < len(drafts) and drafts[matched] == target_ids[matched]:
        matched += 1
    return Accepted(tuple(target_ids[: matched + 1]), matched)
