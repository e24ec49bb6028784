"""`Sampling`: how a token is chosen from its distribution."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from math import inf
from numbers import Real
from secrets import randbits
from typing import Any

from pard_onnx.models.checks import finite_number, listed, whole_number
from pard_onnx.models.errors import BadInput, shown

MOST_SEED = 2**64 - 1
FRESH_BITS = 32  # bits of a seed that the user did not give: short enough to type again
DRAWING = ("temperature", "top_k", "top_p", "min_p", "seed")  # of no effect where the most probable id is taken
STARTS = ("greedy", "model")  # where the settings of a generation start from
Biases = tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen in one generation; the defaults are greedy decoding. BadInput names the value and the fix.

    The settings apply in the order of transformers' `generate`: repetition_penalty, presence_penalty and
    frequency_penalty, logit_bias, temperature, top_k, top_p, min_p. Each filter (the last three) keeps some of the ids
    that the filters before it have kept.

    The filters rank ids by logit, the largest first, and ids of equal logits by id, the lowest first. So top_k keeps
    exactly k ids, top_k=1 is greedy decoding, and equal logits never depend on how a sort orders them.
    """

    # Divides the logits; at least 0. 0 is greedy: the id of the largest logit is chosen, the lowest of several such
    # ids, and the filters and the seed have no effect.
    temperature: float = 0.0
    top_k: int = 0  # keeps the first k ids; 0, or more than there are, keeps all
    top_p: float = 1.0  # keeps the fewest first ids whose probabilities sum to at least this, in (0, 1]; 1 keeps all
    # Keeps the ids whose probability is at least this share of the most probable id's, in [0, 1]; 0 keeps all.
    min_p: float = 0.0
    # Divides the positive logits of ids in the prompt or the output, and multiplies the negative ones (CTRL, as in
    # transformers); above 0; 1 is off.
    repetition_penalty: float = 1.0
    # Subtracted once from the logits of ids in the output (as in OpenAI's API and vLLM); 0 is off, a negative one
    # encourages repetition.
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0  # the same, but subtracted once for each occurrence in the output
    # Added to the logits of these ids; -inf bans an id. Given as a mapping, kept as pairs that are sorted by id.
    logit_bias: Mapping[int, float] | Biases = ()
    seed: int | None = None  # 0 to 2**64-1; None takes a fresh one for each generation (`chosen_seed`)

    def __post_init__(self) -> None:
        keep = object.__setattr__
        keep(self, "temperature", finite_number("temperature", self.temperature))
        if self.temperature < 0:
            raise BadInput(f"temperature must be at least 0 (greedy), not {self.temperature}")
        keep(self, "top_k", whole_number("top_k", self.top_k))
        if self.top_k < 0:
            raise BadInput(f"top_k must be at least 1, or 0 for all ids, not {self.top_k}")
        keep(self, "top_p", finite_number("top_p", self.top_p))
        if not 0 < self.top_p <= 1:
            hint = "; for the most probable id alone take temperature 0" if self.top_p == 0 else ""
            raise BadInput(f"top_p must be above 0 and at most 1 (all ids), not {self.top_p}{hint}")
        keep(self, "min_p", finite_number("min_p", self.min_p))
        if not 0 <= self.min_p <= 1:
            raise BadInput(f"min_p must be from 0 (all ids) to 1, not {self.min_p}")
        keep(self, "repetition_penalty", finite_number("repetition_penalty", self.repetition_penalty))
        if self.repetition_penalty <= 0:
            raise BadInput(f"repetition_penalty must be above 0, where 1 is off, not {self.repetition_penalty}")
        keep(self, "presence_penalty", finite_number("presence_penalty", self.presence_penalty))
        keep(self, "frequency_penalty", finite_number("frequency_penalty", self.frequency_penalty))
        keep(self, "logit_bias", biases(self.logit_bias))
        if self.seed is not None:
            keep(self, "seed", whole_number("seed", self.seed))
            if not 0 <= self.seed <= MOST_SEED:
                raise BadInput(f"seed must be from 0 to 2**64-1, or None for a fresh one, not {self.seed}")

    @property
    def penalizes(self) -> bool:
        """Whether logits are changed before a token is chosen, by a penalty or by logit_bias."""
        penalties = (self.repetition_penalty - 1, self.presence_penalty, self.frequency_penalty)
        return any(penalties) or bool(self.logit_bias)

    @property
    def certain(self) -> bool:
        """Whether no random numbers are needed: the id of the largest logit, after penalties and bias, is chosen."""
        return self.temperature == 0 or self.top_k == 1

    @property
    def greedy(self) -> bool:
        """Whether the id of the largest logit is chosen, and no penalty or bias changes the logits."""
        return self.certain and not self.penalizes

    def __str__(self) -> str:
        """In words, without what has no effect: "temperature 0.7, top_k 20", "greedy, repetition_penalty 1.1"."""
        values = {one.name: getattr(self, one.name) for one in fields(self) if getattr(self, one.name) != one.default}
        if self.certain:
            values = {name: value for name, value in values.items() if name not in DRAWING}
        words = [f"{name} {value}" for name, value in values.items()]
        return ", ".join(["greedy", *words] if self.certain else words)

    def chosen_seed(self) -> int:
        """The seed, or a fresh random one if there is none. Call this once per generation, and report the seed."""
        return randbits(FRESH_BITS) if self.seed is None else self.seed


def biases(value: object) -> Biases:
    """logit_bias as pairs of id and bias, sorted by id; BadInput names the first pair that is not valid."""
    pairs: Any = value.items() if isinstance(value, Mapping) else value
    wanted = "logit_bias must map token ids to numbers"
    if not isinstance(pairs, Iterable) or isinstance(pairs, str | bytes | bytearray):
        raise BadInput(f"{wanted}, not {shown(value)}")
    out: dict[int, float] = {}
    for pair in listed(pairs, "logit_bias"):
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise BadInput(f"{wanted}, not {shown(pair)}")
        token = whole_number("an id of logit_bias", pair[0])
        if token < 0 or token in out:
            raise BadInput(f"logit_bias: id {token} {'is negative' if token < 0 else 'is given twice'}")
        out[token] = bias(token, pair[1])
    return tuple(sorted(out.items()))


def bias(token: int, value: object) -> float:
    """The bias of one id: a number, or -inf, which bans the id."""
    if isinstance(value, Real) and value == -inf:
        return -inf
    return finite_number(f"logit_bias: the bias of id {token}", value)
