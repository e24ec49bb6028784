"""The self-tuned draft length in simulated worlds: near the best fixed length, and never far below plain decoding."""

import random
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pard_onnx.runtime.decoding.policy import Policy
from pard_onnx.runtime.tuning.steps import ANY, EVEN, RoundCosts, StepCosts

World = Callable[[random.Random], tuple[list[float], list[float]]]  # the draft's probabilities, and the true ones
LENGTH = 16


def costs(**points: float) -> StepCosts:
    """w4=20: a step of 4 tokens takes 20 ms."""
    return StepCosts(tuple((int(name[1:]), ms / 1000) for name, ms in points.items()))


DRAFT = costs(w1=12, w2=12.2, w4=12.8, w8=13.6, w12=14.5, w16=16, w24=20, w48=45)
MACHINES = {
    "rows are dear": RoundCosts(DRAFT, costs(w1=11.5, w2=15, w4=20, w6=28, w8=36, w12=53, w16=73, w32=140), 1e-4, ANY),
    "rows are cheap": RoundCosts(
        DRAFT, costs(w1=11.5, w2=11.8, w4=12.5, w6=14, w8=17, w12=22, w16=28, w32=55), 1e-4, EVEN
    ),
    "a large target": RoundCosts(DRAFT, costs(w1=62, w2=75, w4=110, w6=150, w8=190, w12=280, w16=380), 1e-4, EVEN),
}


def bounded(values: Sequence[float]) -> list[float]:
    return [min(0.99, max(0.01, value)) for value in values]


def mixed(rng: random.Random) -> tuple[list[float], list[float]]:
    """Easy and hard places in one text, and a draft that knows which is which."""
    base = rng.choice([0.97, 0.75, 0.75, 0.45, 0.45])
    chances = bounded([rng.gauss(base, 0.15) for _ in range(LENGTH)])
    return chances, chances


def good(rng: random.Random) -> tuple[list[float], list[float]]:
    chances = bounded([rng.gauss(0.85, 0.15) for _ in range(LENGTH)])
    return chances, chances


def humble(rng: random.Random) -> tuple[list[float], list[float]]:
    """As good, from a draft that trusts itself half as much."""
    _, chances = good(rng)
    return [chance / 2 for chance in chances], chances


def hopeless(rng: random.Random) -> tuple[list[float], list[float]]:
    return bounded([rng.expovariate(8) for _ in range(LENGTH)]), [0.0] * LENGTH


def liar(rng: random.Random) -> tuple[list[float], list[float]]:
    return bounded([rng.gauss(0.7, 0.2) for _ in range(LENGTH)]), [0.0] * LENGTH


def matching(chances: Sequence[float], rng: random.Random) -> int:
    return next((i for i, chance in enumerate(chances) if rng.random() >= chance), len(chances))


def fixed(k: int, world: World, machine: RoundCosts, tokens: int) -> float:
    """Tokens a second with k drafts a round."""
    rng, done, seconds = random.Random(1), 0, 0.0
    while done < tokens:
        matched = min(k, matching(world(rng)[1], rng)) if k else 0
        done += matched + 1
        seconds += machine.seconds(k, 3)
    return done / seconds


def tuned(policy: Policy, world: World, machine: RoundCosts, tokens: int, seed: int = 1, prompt: int = 1) -> float:
    """Tokens a second; prompt: the tokens before them, which the draft has not read yet."""
    rng, done, seconds, lag = random.Random(seed), 0, 0.0, prompt
    while done < tokens:
        request = policy.request([], lag, 32)
        matched = count = 0
        if request:
            said, true = (chances[: request.length] for chances in world(rng))
            _, count = policy.best_prefix(policy.drafts.estimate(said))
            matched = min(count, matching(true, rng))
            policy.observe_draft_round(policy.draft_costs(request.length + 2), said, count, matched)
            read = prompt + done if request.whole else min(lag, request.window or lag)
            seconds += machine.draft(read + request.length - 1)
        else:
            policy.observe_plain_round()
        lag = matched + 1 if request else lag + 1
        done += matched + 1
        seconds += machine.verify(machine.widths.width_for(count + 1)) + machine.overhead
    return done / seconds


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
@pytest.mark.parametrize("world", [mixed, good, humble])
def test_near_the_best_fixed_length(world: World, machine: RoundCosts) -> None:
    best = max(fixed(k, world, machine, 3000) for k in range(LENGTH + 1))
    rates = [tuned(Policy(machine), world, machine, 3000, seed) for seed in range(3)]
    assert sum(rates) / 3 > 0.86 * best


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
@pytest.mark.parametrize("world", [hopeless, liar])
def test_never_a_loss_where_nothing_is_accepted(world: World, machine: RoundCosts) -> None:
    plain = fixed(0, world, machine, 100)
    assert tuned(Policy(machine), world, machine, 3000) > (0.98 if world is hopeless else 0.95) * plain
    short = [tuned(Policy(machine), world, machine, 128, seed) for seed in range(10)]
    assert sum(short) / 10 > (0.96 if world is hopeless else 0.92) * plain


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
def test_it_comes_back_when_the_text_becomes_easy(machine: RoundCosts) -> None:
    policy = Policy(machine)
    tuned(policy, liar, machine, 1000)
    best = max(fixed(k, good, machine, 3000) for k in range(LENGTH + 1))
    assert tuned(policy, good, machine, 6000) > 0.75 * best


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
def test_a_new_text_gets_a_new_chance_that_costs_less_after_each_hopeless_one(machine: RoundCosts) -> None:
    policy, plain = Policy(machine), fixed(0, hopeless, machine, 100)
    rates = []
    for seed in range(8):
        policy.new_text()
        if not seed:  # "rows are dear": too little to hope for
            assert policy.request([], 3, 32) is not None or machine is MACHINES["rows are dear"]
        rates.append(tuned(policy, hopeless, machine, 128, seed))
    assert sum(rates) / len(rates) > 0.955 * plain
    assert sum(rates[4:]) / 4 > 0.97 * plain
    policy.new_text()
    tuned(policy, good, machine, 2000)
    policy.new_text()
    assert policy.request([], 3, 32) is not None


def nothing_accepted(policy: Policy, machine: RoundCosts, said: float, matches: float, rng: random.Random) -> float:
    """Seconds of 8 texts of 77 tokens, each after a prompt of 30, by the counted costs of their steps.

    said: the mean of the probabilities that the draft gives; matches: the share of the rounds with a lookup proposal.
    """
    seconds = 0.0
    for _ in range(8):
        policy.new_text()
        lag = 30
        for _ in range(77):
            match, length = (rng.choice([1, 2, 3, 5, 9]), rng.randrange(1, 17)) if rng.random() < matches else (0, 0)
            chances = policy.lookups.estimate(match, length)
            request = policy.request(chances, lag, 32)
            gain, count = policy.best_prefix(chances)
            looked_up = True
            if request:
                drafted = policy.draft_costs(request.length + 2)
                probabilities = bounded([rng.gauss(said, 0.15) for _ in range(request.length)])
                draft_chances = policy.drafts.estimate(probabilities)
                draft_gain, draft_count = policy.best_prefix(draft_chances)
                seconds += machine.draft(min(lag, request.window or lag) + request.length - 1)
                looked_up, lag = draft_gain < gain, 0
                if looked_up:
                    policy.observe_unused_draft(drafted, draft_chances[:draft_count])
                else:
                    count = draft_count
                    policy.observe_draft_round(drafted, probabilities, count, 0)
            if looked_up and count:
                policy.observe_lookup_round(match, count, 0)
            elif not request:
                policy.observe_plain_round()
            seconds += machine.verify(machine.widths.width_for(count + 1)) + machine.overhead
            lag += 1
    return seconds


@st.composite
def machines(draw: st.DrawFn) -> RoundCosts:
    """From a draft that costs nothing to one that costs as much as its target, from free rows to dear ones."""
    one = draw(st.floats(2e-3, 0.1))  # seconds of the target's step of one token
    row = draw(st.floats(0.005, 0.5)) * one
    drafting = draw(st.floats(0.02, 1.0)) * one
    verify = StepCosts(((1, one), (2, one + row), (64, one + 63 * row)))
    draft = StepCosts(((1, drafting), (64, drafting * draw(st.floats(1.0, 4.0)))))
    return RoundCosts(draft, verify, 1e-4, draw(st.sampled_from([ANY, EVEN])))


def share_of_plain(
    machine: RoundCosts, seed: int, said: float = 0.0, matches: float = 0.0, draft: bool = True
) -> float:
    taken = nothing_accepted(Policy(machine, draft), machine, said, matches, random.Random(seed))
    return 8 * 77 * (machine.verify(machine.widths.width_for(1)) + machine.overhead) / taken


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
@pytest.mark.parametrize("said", [0.1, 0.4, 0.7])
def test_where_nothing_is_accepted_a_session_is_at_plain_decodings_rate(machine: RoundCosts, said: float) -> None:
    """As at temperature 2: no draft of the model is accepted, whatever it says of its drafts."""
    assert sum(share_of_plain(machine, seed, said) for seed in range(5)) / 5 > 0.97


@settings(max_examples=40, deadline=None)
@given(machines(), st.floats(0.05, 0.95), st.integers(0, 99))
def test_on_any_machine_a_draft_that_is_never_right_costs_little(machine: RoundCosts, said: float, seed: int) -> None:
    assert share_of_plain(machine, seed, said) > 0.95


@settings(max_examples=40, deadline=None)
@given(machines(), st.sampled_from([0.1, 0.5]), st.integers(0, 99))
def test_on_any_machine_lookups_that_are_never_right_cost_little(
    machine: RoundCosts, matches: float, seed: int
) -> None:
    assert share_of_plain(machine, seed, matches=matches, draft=False) > 0.95
    assert share_of_plain(machine, seed, 0.5, matches) > 0.92  # beside a draft that is never right


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
@pytest.mark.parametrize("world", [hopeless, liar])
def test_after_a_hopeless_text_no_prompt_is_read_in_vain(world: World, machine: RoundCosts) -> None:
    policy, plain, rates = Policy(machine), fixed(0, hopeless, machine, 100), []
    for seed in range(12):
        policy.new_text()
        rates.append(tuned(policy, world, machine, 128, seed, prompt=300))
    assert sum(rates[1:]) / 11 > 0.97 * plain


def test_a_draft_that_pays_after_a_window_reads_the_whole_text_once() -> None:
    policy, machine = Policy(MACHINES["a large target"]), MACHINES["a large target"]
    policy.new_text()
    tuned(policy, hopeless, machine, 500)
    policy.new_text()
    requests, lag = [], 500
    for _ in range(60):
        request = policy.request([], lag, 32)
        lag = 4 if request else lag + 1
        if request is None:
            policy.observe_plain_round()
            continue
        requests.append(request)
        chances = [0.9] * request.length
        policy.observe_draft_round(policy.draft_costs(request.length + 2), chances, len(chances), len(chances))
    assert requests[0].window and not requests[0].whole
    assert [request.whole for request in requests].count(True) == 1
    assert not any(request.window for request in requests[1:])
    policy.new_text()
    request = policy.request([], 500, 32)  # the next text is read from its beginning again
    assert request and request.window is None and not request.whole


def test_a_draft_that_has_much_to_catch_up_is_tried_after_a_window() -> None:
    machine = MACHINES["rows are dear"]
    policy = Policy(machine)
    for _ in range(20):
        policy.observe_draft_round(policy.draft_costs(10), [0.1] * 8, 1, 0)
    assert policy.request([], 1000, 32) is None
    for _ in range(2000):
        policy.observe_plain_round()
    request = policy.request([], 1000, 32)
    assert request and request.window and request.window < 100


def test_a_likely_lookup_proposal_replaces_the_draft() -> None:
    policy = Policy(MACHINES["rows are cheap"])
    assert policy.request([], 3, 32) is not None
    assert policy.request([0.99**i for i in range(1, 33)], 3, 32) is None
    assert policy.request([0.01] * 8, 3, 32) is not None


def test_a_padded_step_is_filled_with_drafts() -> None:
    """Even widths: a step of one token is padded to two, so verifying one draft costs nothing."""
    policy = Policy(MACHINES["a large target"])
    assert policy.best_prefix([1e-6])[1] == 1
    assert policy.best_prefix([1e-6, 1e-7, 1e-8])[1] == 1
    assert policy.best_prefix([])[1] == 0


def test_without_a_draft_model_it_is_never_asked() -> None:
    assert Policy(MACHINES["rows are cheap"], has_draft=False).request([], 3, 32) is None
