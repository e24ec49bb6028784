"""`Sampling`: how a token is chosen from its distribution."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import inf
from numbers import Real
from operator import index
from secrets import randbits
from typing import Any

from pard_onnx.models.errors import BadInput

MOST = 1e30  # of any number: far above what has an effect, and no sum or product of theirs overflows
MOST_SEED = 2**64 - 1
FRESH_BITS = 32  # of a seed that nobody gave: short enough to type again
Biases = tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Sampling:
    """Settings of one generation; the defaults are greedy decoding. BadInput names the value and the fix.

    They apply in the order of transformers' `generate`, each to what the one before has left:

    1. repetition_penalty (CTRL, as in transformers): logits of ids in the prompt or the output are divided by it
       where positive, multiplied where negative. Above 0; 1 is off.
    2. presence_penalty, frequency_penalty (as in OpenAI's API and vLLM): taken from the logits of ids in the
       output, once and once for each occurrence. Negative ones encourage; 0 is off.
    3. logit_bias: added to the logits of these ids; -inf bans one. A mapping, kept as sorted pairs.
    4. temperature: divides the logits. 0 is greedy: the id of the largest logit, the lowest such id; the filters
       and the seed then have nothing to do.
    5. top_k: only so many ids; 0 or more than there are is all.
    6. top_p: the fewest ids whose probabilities sum to at least this, in (0, 1]; 1 is all.
    7. min_p: only ids at least so probable in relation to the most probable, in [0, 1]; 0 is all.

    The filters cut one order: by logit, largest first, equal ones by id, lowest first. So top_k keeps exactly k
    ids, top_k=1 is greedy decoding, and ties never depend on a sort.

    seed: 0..2**64-1; None takes a fresh one for each generation (`chosen_seed`).
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | Biases = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        keep = object.__setattr__
        keep(self, "temperature", number("temperature", self.temperature))
        if self.temperature < 0:
            raise BadInput(f"temperature must be at least 0 (greedy), not {self.temperature}")
        keep(self, "top_k", whole("top_k", self.top_k))
        if self.top_k < 0:
            raise BadInput(f"top_k must be at least 1, or 0 for all ids, not {self.top_k}")
        keep(self, "top_p", number("top_p", self.top_p))
        if not 0 < self.top_p <= 1:
            hint = "; for the most probable id alone take temperature 0" if self.top_p == 0 else ""
            raise BadInput(f"top_p must be above 0 and at most 1 (all ids), not {self.top_p}{hint}")
        keep(self, "min_p", number("min_p", self.min_p))
        if not 0 <= self.min_p <= 1:
            raise BadInput(f"min_p must be from 0 (all ids) to 1, not {self.min_p}")
        keep(self, "repetition_penalty", number("repetition_penalty", self.repetition_penalty))
        if self.repetition_penalty <= 0:
            raise BadInput(f"repetition_penalty must be above 0, where 1 is off, not {self.repetition_penalty}")
        keep(self, "presence_penalty", number("presence_penalty", self.presence_penalty))
        keep(self, "frequency_penalty", number("frequency_penalty", self.frequency_penalty))
        keep(self, "logit_bias", biases(self.logit_bias))
        if self.seed is not None:
            keep(self, "seed", whole("seed", self.seed))
            if not 0 <= self.seed <= MOST_SEED:
                raise BadInput(f"seed must be from 0 to 2**64-1, or None for a fresh one, not {self.seed}")

    @property
    def penalizes(self) -> bool:
        """Whether the logits of a row depend on the tokens before it, or on logit_bias."""
        penalties = (self.repetition_penalty - 1, self.presence_penalty, self.frequency_penalty)
        return any(penalties) or bool(self.logit_bias)

    @property
    def certain(self) -> bool:
        """Whether nothing is drawn: the id of the largest logit, after penalties and bias, is the choice."""
        return self.temperature == 0 or self.top_k == 1

    @property
    def greedy(self) -> bool:
        """Whether the id of the largest of the target's own logits is the choice."""
        return self.certain and not self.penalizes

    def chosen_seed(self) -> int:
        """The seed, or a fresh one: call it once a generation and report it."""
        return randbits(FRESH_BITS) if self.seed is None else self.seed


def number(name: str, value: object) -> float:
    """A number as a float; BadInput for anything else, bool, NaN and what exceeds 1e30 included."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise BadInput(f"{name} must be a number, not {value!r}")
    try:
        out = float(value)
    except OverflowError:
        out = inf
    if not abs(out) <= MOST:
        raise BadInput(f"{name} must be a finite number of at most {MOST:g}, not {value!r}")
    return out


def whole(name: str, value: Any) -> int:
    """A whole number (numpy's too) as an int; BadInput for anything else, bool included."""
    try:
        out = index(value)
    except TypeError:
        out = None
    if out is None or isinstance(value, bool):
        raise BadInput(f"{name} must be a whole number, not {value!r}")
    return out


def biases(value: object) -> Biases:
    """logit_bias as pairs of id and bias, sorted by id; BadInput names the pair that cannot be used."""
    pairs: Any = value.items() if isinstance(value, Mapping) else value
    wanted = "logit_bias must map token ids to numbers"
    if not isinstance(pairs, Iterable) or isinstance(pairs, str | bytes):
        raise BadInput(f"{wanted}, not {value!r}")
    out: dict[int, float] = {}
    for pair in pairs:
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise BadInput(f"{wanted}, not {pair!r}")
        token = whole("an id of logit_bias", pair[0])
        if token < 0 or token in out:
            raise BadInput(f"logit_bias: id {token} {'is negative' if token < 0 else 'is given twice'}")
        out[token] = bias(token, pair[1])
    return tuple(sorted(out.items()))


def bias(token: int, value: object) -> float:
    """One bias: a number, or -inf to ban the id."""
    if isinstance(value, Real) and value == -inf:
        return -inf
    return number(f"logit_bias: the bias of id {token}", value)
