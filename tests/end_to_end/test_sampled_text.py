"""The distribution of speculative sampling is plain sampling's: texts of a toy target with adversarial drafts.

The toy's logits are any function of the last two tokens, so that all short texts can be enumerated. Seeds are fixed:
a statistic is the same on every run. Critical values are those of p = 1e-5.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from math import sqrt
from random import Random
from typing import Any

import literal_sampling as literal
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pard_onnx.runtime.sampling.sampler import Sampler, chooser
from pard_onnx.runtime.sampling.settings import Sampling

VOCABULARY, LENGTH = 4, 3
PROMPT = [2, 0, 2]
ROW = np.random.default_rng(5).normal(size=(VOCABULARY + 1, VOCABULARY + 1, VOCABULARY + 1)) * 1.3
ROW[..., VOCABULARY] = -np.inf  # a padding id
LOGITS = ROW.astype(np.float32)
CRITICAL_NORMAL = 4.265  # of p = 1e-5

Text = tuple[int, ...]
Drafter = Callable[[list[int], int, Random], list[int]]  # committed tokens, K and chance to K drafts


def rows(committed: Sequence[int], drafts: Sequence[int]) -> NDArray[np.float32]:
    """The toy's logits after the last committed token and after each draft."""
    tokens = [*committed[-2:], *drafts]
    return LOGITS[tokens[:-1], tokens[1:]]


def extreme(rank: Callable[[int], int]) -> Drafter:
    """Drafts that the target finds the most probable (rank 0) or the least (-1) after those before them."""

    def draft(committed: list[int], k: int, random: Random) -> list[int]:
        tokens = committed[-2:]
        for i in range(k):
            order = np.argsort(-LOGITS[tokens[-2], tokens[-1], :VOCABULARY])
            tokens.append(int(order[rank(len(committed) + i)]))
        return tokens[2:]

    return draft


def at_random(committed: list[int], k: int, random: Random) -> list[int]:
    return random.choices(range(VOCABULARY), k=k)


DRAFTERS: dict[str, Drafter] = {
    "most likely": extreme(lambda position: 0),
    "least likely": extreme(lambda position: -1),
    "alternating": extreme(lambda position: -(position % 2)),
    "random": at_random,
}


def write(sampling: Sampling, seed: int, drafter: Drafter, k: int, length: int = LENGTH) -> Text:
    """A text of the toy, speculated with K drafts a round, even past its end; K = 0 is plain."""
    sampler = chooser(sampling, VOCABULARY, len(PROMPT), seed)
    committed, random = list(PROMPT), Random(seed)
    while len(committed) < len(PROMPT) + length:
        drafts = drafter(committed, k, random) if k else []
        tokens = sampler.choose(rows(committed, drafts), committed, drafts)
        assert tokens[:-1] == drafts[: len(tokens) - 1]
        committed += tokens
    return tuple(committed[len(PROMPT) : len(PROMPT) + length])


def after(sampling: Sampling, text: Sequence[int]) -> list[float]:
    """The literal distribution of the token after `text`."""
    logits = rows([*PROMPT, *text], [])[0, :VOCABULARY].tolist()
    return literal.probabilities(logits, sampling, PROMPT, text)


def texts(sampling: Sampling) -> dict[Text, float]:
    """The probability of every text of LENGTH tokens that can come out."""
    found: dict[Text, float] = {(): 1.0}
    for _ in range(LENGTH):
        longer = ((text, token, p) for text in found for token, p in enumerate(after(sampling, text)))
        found = {(*text, token): found[text] * p for text, token, p in longer if p}
    return found


def critical(freedom: int) -> float:
    """Wilson and Hilferty's approximation of chi-square's critical value."""
    return freedom * (1 - 2 / (9 * freedom) + CRITICAL_NORMAL * sqrt(2 / (9 * freedom))) ** 3


def chi_square(counts: Counter[Text], wanted: dict[Text, float]) -> tuple[float, int]:
    """Pearson's statistic and its degrees of freedom; texts that are expected less than 5 times count as one."""
    assert set(counts) <= set(wanted), set(counts) - set(wanted)
    draws = counts.total()
    cells = [(counts[text], p * draws) for text, p in wanted.items() if p * draws >= 5]
    rare = (draws - sum(seen for seen, _ in cells), draws - sum(mean for _, mean in cells))
    if rare[1] >= 5:
        cells.append(rare)
    return sum((seen - mean) ** 2 / mean for seen, mean in cells), len(cells) - 1


FILTERS: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 1.4}, "top_k": {"top_k": 3}, "top_p": {"top_p": 0.9}, "min_p": {"min_p": 0.12},
}  # fmt: skip
PENALTIES: dict[str, dict[str, Any]] = {
    "repetition": {"repetition_penalty": 1.4}, "presence": {"presence_penalty": 0.5},
    "frequency": {"frequency_penalty": 0.7}, "bias": {"logit_bias": {1: 0.8, 3: -0.6}},
}  # fmt: skip


def combinations(parts: dict[str, dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each subset of the parts, by name, as one dict of settings."""
    for chosen in product([False, True], repeat=len(parts)):
        names = [name for name, wanted in zip(parts, chosen, strict=True) if wanted]
        yield " ".join(names) or "none", {key: value for name in names for key, value in parts[name].items()}


@pytest.mark.parametrize(("name", "filters"), [pytest.param(*one, id=one[0]) for one in combinations(FILTERS)])
def test_every_combination_of_filters_and_penalties(name: str, filters: dict[str, Any]) -> None:
    """Each with K from 1 to 8 and all drafters in turn; then all combinations' statistics as one."""
    plans = list(product(range(1, 9), DRAFTERS.values()))
    statistics, freedoms = 0.0, 0
    for number, (penalties, chosen) in enumerate(combinations(PENALTIES)):
        sampling = Sampling(**{"temperature": 1.0, **filters, **chosen})
        seeds = range(number * 10_000, number * 10_000 + 6 * len(plans))
        drawn = Counter(write(sampling, seed, plan[1], plan[0]) for seed, plan in zip(seeds, plans * 6, strict=True))
        statistic, freedom = chi_square(drawn, texts(sampling))
        assert statistic < critical(freedom), (name, penalties, statistic, freedom)
        statistics, freedoms = statistics + statistic, freedoms + freedom
    assert statistics < critical(freedoms), (name, statistics, freedoms)


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("k", range(1, 9))
def test_every_draft_length_against_every_drafter(k: int, drafter: str) -> None:
    """Many draws of one K and one drafter, once with nothing but a temperature and once with everything."""
    everything = {key: value for part in (*FILTERS.values(), *PENALTIES.values()) for key, value in part.items()}
    for sampling in (Sampling(temperature=1.0), Sampling(**{**everything, "top_p": 0.97})):
        drawn = Counter(write(sampling, 10_000 * k + i, DRAFTERS[drafter], k) for i in range(500))
        statistic, freedom = chi_square(drawn, texts(sampling))
        assert statistic < critical(freedom), (statistic, freedom)


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_the_published_rejection_rule_gives_the_same_distribution(drafter: str) -> None:
    """It shares no code with the sampler: the enumerated texts fit its draws, and its draws the sampler's."""
    sampling = Sampling(temperature=1.2, top_p=0.95, repetition_penalty=1.3, frequency_penalty=0.4)
    published, ours = Counter[Text](), Counter[Text]()
    for seed in range(1500):
        random, text = Random(seed), Text()
        while len(text) < LENGTH:
            drafts = DRAFTERS[drafter]([*PROMPT, *text], 1 + seed % 8, random)
            text += tuple(literal.rejection_round(lambda new, old=text: after(sampling, [*old, *new]), drafts, random))
        published[text[:LENGTH]] += 1
        ours[write(sampling, seed, DRAFTERS[drafter], 1 + seed % 8)] += 1
    for statistic, freedom in (chi_square(published, texts(sampling)), two_samples(published, ours)):
        assert statistic < critical(freedom), (statistic, freedom)


def two_samples(one: Counter[Text], other: Counter[Text]) -> tuple[float, int]:
    """Chi-square of two samples of one size, and its degrees of freedom; rare texts count as one."""
    pairs = [(one[text], other[text]) for text in one | other]
    common = [pair for pair in pairs if sum(pair) >= 10]
    rare = (sum(a for a, b in pairs if a + b < 10), sum(b for a, b in pairs if a + b < 10))
    cells = [*common, rare] if sum(rare) >= 10 else common
    return sum((a - b) ** 2 / (a + b) for a, b in cells), len(cells) - 1


samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.7, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 2, 3]),
    top_p=st.sampled_from([1.0, 0.9, 0.6]),
    min_p=st.sampled_from([0.0, 0.1]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    presence_penalty=st.sampled_from([0.0, 0.4]),
    frequency_penalty=st.sampled_from([0.0, 0.1, -0.1]),
    logit_bias=st.sampled_from([{}, {1: 1.0, 0: -0.5}]),
)


@settings(max_examples=100, deadline=None)
@given(samplings, st.integers(0, 2**64 - 1), st.sampled_from(list(DRAFTERS)))
def test_one_seed_is_one_text_whatever_is_drafted(sampling: Sampling, seed: int, drafter: str) -> None:
    """Token for token: plain, any K, any drafter, drafts that are all right, and right ones with one mistake."""
    length = 12
    plain = write(sampling, seed, DRAFTERS[drafter], 0, length)
    longer = write(sampling, seed, DRAFTERS[drafter], 0, length + 8)
    assert longer[:length] == plain

    def perfect(committed: list[int], k: int, random: Random) -> list[int]:
        return [*longer[len(committed) - len(PROMPT) :]][:k]

    def flawed(committed: list[int], k: int, random: Random) -> list[int]:
        drafts = perfect(committed, k, random)
        drafts[random.randrange(k)] += 1  # may be the padding id
        return drafts

    for k in range(1, 9):
        for by in (DRAFTERS[drafter], perfect, flawed):
            assert write(sampling, seed, by, k, length) == plain


def test_perfect_drafts_are_all_accepted() -> None:
    sampling = Sampling(temperature=1.0, repetition_penalty=1.2)
    text = list(write(sampling, 3, at_random, 0, 9))
    assert Sampler(sampling, VOCABULARY, len(PROMPT), 3).choose(rows(PROMPT, text[:8]), PROMPT, text[:8]) == text


def test_seeds_differ() -> None:
    assert len({write(Sampling(temperature=1.0), seed, at_random, 0, 12) for seed in range(50)}) == 50
