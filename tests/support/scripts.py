"""Texts for scripted models."""

import random
from collections.abc import Callable, Sequence

VOCABULARY = 7


def function(seed: int) -> Callable[[Sequence[int]], int]:
    """An arbitrary deterministic function of all tokens before."""
    return lambda tokens: random.Random(f"{seed}{list(tokens)}").randrange(VOCABULARY)
