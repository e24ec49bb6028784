"""What a generation can be told: `Options`, checked where they are given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from math import isfinite
from typing import Any, Literal, TypedDict

from pard_onnx.models.checks import require_whole
from pard_onnx.models.errors import BadInput
from pard_onnx.runtime.decoding.loop import DRAFT_LIMIT
from pard_onnx.runtime.sampling.settings import Sampling

AUTO: Literal["auto"] = "auto"
DRAFT_LENGTH = 7  # where a fixed one is wanted: odd, so that a verify step of K + 1 tokens is even without padding


class Given(TypedDict, total=False):
    """The keyword arguments of `Pair.generate` and its kin; see `Options`."""

    max_new_tokens: int
    draft_length: int | Literal["auto"]
    lookup: bool
    stop: str | Sequence[str]
    exact: bool
    chat: bool
    timeout: float | None
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    seed: int | None


GREEDY = Sampling()
SAMPLING = tuple(field.name for field in fields(Sampling))


@dataclass(frozen=True, slots=True)
class Options:
    """max_new_tokens: at most so many.

    draft_length: tokens proposed a round, 1 to 32; 0 is plain decoding; "auto" lets measured step costs and
    acceptance decide each round anew. lookup: with "auto", earlier text proposes too.
    stop: strings that end the text, themselves left out. exact: plain decoding gives the same tokens as any draft,
    bit for bit on quantized targets. chat: a text prompt is a user's message. timeout: seconds after which the text
    ends as it is. sampling: see `Sampling`; the default is greedy.
    """

    max_new_tokens: int = 128
    draft_length: int | Literal["auto"] = AUTO
    lookup: bool = True
    stop: str | Sequence[str] = ()
    exact: bool = True
    chat: bool = False
    timeout: float | None = None
    sampling: Sampling = GREEDY

    def __post_init__(self) -> None:
        require_whole("max_new_tokens", self.max_new_tokens, 1)
        if self.draft_length != AUTO:
            if isinstance(self.draft_length, str):
                raise BadInput(f"draft_length must be 'auto' or from 0 to {DRAFT_LIMIT}, not {self.draft_length!r}")
            require_whole("draft_length", self.draft_length, 0, DRAFT_LIMIT)
        if self.timeout is not None and not seconds(self.timeout):
            raise BadInput(f"timeout must be a number of seconds above 0, or None, not {self.timeout!r}")

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Options:
        """From keyword arguments; BadInput names the nearest known one for one that is not."""
        known = [field.name for field in fields(cls) if field.name != "sampling"] + list(SAMPLING)
        for name in given:
            if name not in known:
                near = get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
                raise BadInput(f"unknown option {name}; {hint}")
        sampling = {name: given[name] for name in SAMPLING if name in given}
        own = {name: value for name, value in given.items() if name not in sampling}
        return cls(**own, sampling=Sampling(**sampling))


def seconds(value: object) -> bool:
    """Whether it is a finite number above 0."""
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value) and value > 0
