"""Whether drafting ahead pays, in simulated worlds: near the better of always and never."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pard_onnx.runtime.decoding.ahead import AheadPolicy, saved_seconds
from pard_onnx.runtime.tuning.steps import RoundCosts, StepCosts

Seconds = st.floats(1e-4, 10.0)


def pace(draft: float, verify: float) -> RoundCosts:
    """A device whose draft takes 1 % longer for each token, and one that verifies."""
    return RoundCosts(StepCosts(((1, draft), (101, 2 * draft))), StepCosts(((1, verify), (33, verify))))


@given(st.floats(0, 1), st.floats(0, 1), Seconds, Seconds, st.floats(0, 1))
def test_the_gain_grows_with_the_chance_and_is_what_can_be_hidden_at_most(
    chance: float, other: float, draft: float, verify: float, guess: float
) -> None:
    assert saved_seconds(chance, draft, verify, guess) <= min(draft, verify) + 1e-9
    low, high = sorted((chance, other))
    assert saved_seconds(low, draft, verify) <= saved_seconds(high, draft, verify)
    assert saved_seconds(1.0, draft, verify) == pytest.approx(min(draft, verify))
    assert saved_seconds(0.0, draft, verify) <= 0


def simulated(decide: str, agreement: float, draft: float, verify: float, k: int, rounds: int = 1500) -> float:
    """Seconds a token. Drafts agree with the target one by one; decide: always, never, or as an AheadPolicy does."""
    costs, rng = pace(draft, verify), random.Random(1)
    policy, seconds, tokens, lag, ready = AheadPolicy(costs), 0.0, 0, 1, 0
    for _ in range(rounds):
        asked = ready or {"always": k + 1, "never": k}.get(decide) or policy.length_to_request(lag, k)
        seconds += 0.0 if ready else costs.draft(lag + asked - 1)
        matched = next((i for i in range(k + 1) if rng.random() >= agreement), k + 1)  # the guess is the last of them
        says = [agreement] * asked
        ahead = asked > k and (decide == "always" or policy.pays(says, k, k))
        wanted = policy.length_to_request(k + 1, k) if decide == "policy" else k + 1
        ready = wanted if ahead and matched == k + 1 else 0
        seconds += max(verify, costs.draft(k + wanted)) if ahead else verify
        tokens += min(matched, k) + 1
        policy.observe_proposal(says, min(asked, matched + 1), min(asked, matched))
        lag = 1 if ahead else min(matched, k) + 1
    return seconds / tokens


@pytest.mark.parametrize("agreement", [0.3, 0.6, 0.8, 0.9, 0.97])
@pytest.mark.parametrize("draft", [0.2, 0.8, 1.0, 1.3, 2.5])
@pytest.mark.parametrize("k", [1, 4, 8])
def test_near_the_better_of_always_and_never(agreement: float, draft: float, k: int) -> None:
    best = min(simulated(decide, agreement, draft, 1.0, k) for decide in ("always", "never"))
    assert simulated("policy", agreement, draft, 1.0, k) < 1.035 * best


def test_a_guess_that_costs_a_step_of_its_own_is_not_asked_for() -> None:
    """Static graphs: what does not fit their width takes a second call."""
    steps = StepCosts(((1, 1.0), (14, 1.0), (15, 2.0)))
    policy = AheadPolicy(RoundCosts(steps, StepCosts(((1, 1.0),))))
    assert policy.length_to_request(7, 7) == 8  # hardly more rows than before
    assert policy.length_to_request(8, 7) == 7


def test_a_guess_that_the_draft_doubts_is_not_waited_for() -> None:
    policy = AheadPolicy(pace(1.5, 1.0))
    assert policy.pays([0.99] * 3, 2, 2)
    assert not policy.pays([0.99, 0.99, 0.2], 2, 2)
