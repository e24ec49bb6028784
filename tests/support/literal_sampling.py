"""What sampling means, written down slowly: plain Python, one rule after the other, to test the fast path against."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import exp, inf
from random import Random

import numpy as np
from numpy.typing import NDArray

from pard_onnx.runtime.sampling.settings import Sampling

Floats = NDArray[np.float32]


def probabilities(
    logits: Sequence[float], sampling: Sampling, prompt: Sequence[int], output: Sequence[int]
) -> list[float]:
    """The distribution of the token after prompt + output; temperature 0 gives its one id probability 1."""
    z = [float(logit) for logit in logits]
    for token in {*prompt, *output}:
        z[token] = z[token] / sampling.repetition_penalty if z[token] > 0 else z[token] * sampling.repetition_penalty
    for token in set(output):
        z[token] -= sampling.presence_penalty
        z[token] -= sampling.frequency_penalty * list(output).count(token)
    for token, bias in dict(sampling.logit_bias).items():
        z[token] += bias
    order = sorted(range(len(z)), key=lambda token: (-z[token], token))
    if sampling.temperature == 0:
        return [float(token == order[0]) for token in range(len(z))]
    weight = [exp((logit - z[order[0]]) / sampling.temperature) if logit > -inf else 0.0 for logit in z]
    kept = order[: sampling.top_k] if sampling.top_k else order
    if sampling.top_p < 1:
        kept = nucleus(kept, weight, sampling.top_p)
    kept_set = {token for token in kept if weight[token] >= sampling.min_p * weight[order[0]]}
    total = sum(weight[token] for token in kept_set)
    return [weight[token] / total if token in kept_set else 0.0 for token in range(len(z))]


def nucleus(order: Sequence[int], weight: Sequence[float], share: float) -> list[int]:
    """The first ids of `order` whose weights sum to `share` of all."""
    total, mass = sum(weight[token] for token in order), 0.0
    for count, token in enumerate(order, 1):
        mass += weight[token]
        if mass >= share * total:
            return list(order[:count])
    return list(order)


def draw(distribution: Sequence[float], u: float) -> int:
    """The id at u of the cumulative distribution."""
    mass = 0.0
    for token, probability in enumerate(distribution):
        mass += probability
        if mass > u:
            return token
    return max(token for token, probability in enumerate(distribution) if probability)


def rejection_round(
    distribution: Callable[[Sequence[int]], Sequence[float]], drafts: Sequence[int], random: Random
) -> list[int]:
    """The published rule for drafts that are point masses: accept d with p(d), else draw from p without d.

    distribution: of the token after so many new ones.
    """
    tokens: list[int] = []
    for draft in drafts:
        p = distribution(tokens)
        if random.random() < p[draft]:
            tokens.append(draft)
            continue
        residual = [0.0 if token == draft else probability for token, probability in enumerate(p)]
        return [*tokens, random.choices(range(len(p)), residual)[0]]
    p = distribution(tokens)
    return [*tokens, random.choices(range(len(p)), p)[0]]
