"""The target's own tokens from its logits: greedy, or drawn.

Why drawing row by row is speculative sampling. A draft here is one id d for a position, not a distribution: its q is
a point mass. Rejection sampling (Leviathan et al. 2023, Chen et al. 2023) then accepts d with probability
min(1, p(d) / q(d)) = p(d), and otherwise draws from p without d, renormalised. Drawing t from p and keeping the draft
if t = d is the same: t = d has probability p(d), and given t != d, t is distributed as p without d. So no residual is
formed and no row behind the first mismatch is looked at.

The draw does not depend on the draft either. The random number of a token is a function of the seed and its position
alone, and the row of logits one of the tokens before it, so each token is a function of the tokens before it, the
settings and the seed: by induction the text is the one that plain sampling writes, token for token, whatever is
drafted. (As far as the target's logits do not depend on the step's width: see exactness, docs/architecture.md.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from math import isfinite, isnan
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pard_onnx.models.errors import BadInput, Failure

from .filters import candidates
from .penalties import Penalties
from .settings import Sampling

Rows = NDArray[np.float32]


class Chooser(Protocol):
    """What the loop asks of a way to choose tokens."""

    def choose(self, rows: Rows, committed: Sequence[int], drafts: Sequence[int]) -> list[int]:
        """The target's tokens after `committed`: the drafts that they match, and one more.

        rows: logits after the last committed token and after each draft, [len(drafts) + 1, vocabulary rows].
        Failure if a row that is needed has no finite maximum.
        """
        ...


def chooser(sampling: Sampling, vocabulary: int, prompt_length: int, seed: int) -> Chooser:
    """`Greedy` where it says the same, else a `Sampler`; arguments and errors as there."""
    return Greedy() if sampling.greedy else Sampler(sampling, vocabulary, prompt_length, seed)


class Greedy:
    """The id of each row's largest logit, the lowest such id; one pass over all rows."""

    def choose(self, rows: Rows, committed: Sequence[int], drafts: Sequence[int]) -> list[int]:
        """See `Chooser`. Ids that the tokenizer does not have must be -inf."""
        ids = rows.argmax(axis=-1).tolist()
        tokens = list(accept(drafts, ids).tokens)
        for i, token in enumerate(tokens):
            require_finite(float(rows[i, token]), len(committed) + i)
        return tokens


class Sampler:
    """One generation's draws.

    vocabulary: ids that may come out, 0..vocabulary-1; rows may be longer. prompt_length: of the committed tokens,
    those that are not output. seed: 0..2**64-1, `Sampling.chosen_seed`. BadInput if logit_bias names another id or
    bans all.

    A token depends on its row, the settings, the seed, its position and the tokens before it; not on the other
    rows, nor on how many there are. Costs a few passes over a row of the vocabulary per token chosen.
    """

    def __init__(self, sampling: Sampling, vocabulary: int, prompt_length: int, seed: int) -> None:
        require_known(sampling, vocabulary)
        self._sampling, self._vocabulary, self._seed = sampling, vocabulary, seed
        self._penalties = Penalties(sampling, vocabulary, prompt_length)
        self._penalized = np.empty(vocabulary if sampling.penalizes else 0, np.float32)
        self._weights = np.empty(vocabulary, np.float32)

    def choose(self, rows: Rows, committed: Sequence[int], drafts: Sequence[int]) -> list[int]:
        """See `Chooser`. `committed` may only grow from call to call; what is not committed is forgotten."""
        if len(rows) != len(drafts) + 1:
            raise ValueError(f"{len(drafts)} drafts need {len(drafts) + 1} rows, not {len(rows)}")
        self._penalties.follow(committed)
        tokens: list[int] = []
        matched = 0
        try:
            for row in rows:
                tokens.append(self._token(row[: self._vocabulary], len(committed) + matched))
                if matched == len(drafts) or tokens[-1] != drafts[matched]:
                    break
                self._penalties.lead(tokens[-1])
                matched += 1
        finally:
            self._penalties.back(tokens[:matched])
        return tokens

    def _token(self, logits: Rows, position: int) -> int:
        """The token at `position`, logits [vocabulary]."""
        require_finite(float(logits.max()), position)
        logits = self._penalties.apply(logits, self._penalized)
        best = int(logits.argmax())
        if logits[best] == -np.inf:
            raise Failure(f"no id is left for position {position}: logit_bias bans all that the target allows")
        if self._sampling.certain:
            return best
        return candidates(logits, self._sampling, self._weights).draw(uniform(self._seed, position))


def uniform(seed: int, position: int) -> float:
    """The random number of a position, uniform in [0, 1): 53 bits of a keyed hash, the same everywhere."""
    key, counter = seed.to_bytes(8, "little"), position.to_bytes(8, "little")
    digest = blake2b(counter, key=key, digest_size=8, usedforsecurity=False).digest()
    return (int.from_bytes(digest, "little") >> 11) / 2**53


def require_finite(largest: float, position: int) -> None:
    """Failure unless a row's largest logit is a number: NaN anywhere in a row is its maximum."""
    if not isfinite(largest):
        kind = "NaN" if isnan(largest) else str(largest)
        raise Failure(
            f"the target's largest logit for position {position} is {kind}; the model's weights or its provider are "
            "broken (try provider cpu)"
        )


def require_known(sampling: Sampling, vocabulary: int) -> None:
    """BadInput if logit_bias names an id that does not exist, or bans every id."""
    banned = 0
    for token, bias in dict(sampling.logit_bias).items():
        if token >= vocabulary:
            raise BadInput(f"logit_bias: id {token} does not exist; the tokenizer's ids are 0 to {vocabulary - 1}")
        banned += bias == -np.inf
    if banned == vocabulary:
        raise BadInput(f"logit_bias bans all {vocabulary} ids; leave at least one")


@dataclass(frozen=True, slots=True)
class Accepted:
    """tokens: the matching drafts and the target's own next token (correction or bonus); matched: of the drafts."""

    tokens: tuple[int, ...]
    matched: int


def accept(drafts: Sequence[int], target_ids: Sequence[int]) -> Accepted:
    """The longest matching prefix and one more.

    target_ids: the target's choice after the last committed token and after each draft, [len(drafts) + 1].
    """
    if len(target_ids) != len(drafts) + 1:
        raise ValueError(f"{len(drafts)} drafts need {len(drafts) + 1} target ids, not {len(target_ids)}")
    matched = 0
    while matched < len(drafts) and drafts[matched] == target_ids[matched]:
        matched += 1
    return Accepted(tuple(target_ids[: matched + 1]), matched)
