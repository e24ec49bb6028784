"""The self-tuned drafter in the loop: whatever it decides, tokens are the target's and caches hold the conversation."""

import random
from collections.abc import Sequence
from types import SimpleNamespace

from hypothesis import given, settings
from hypothesis import strategies as st

from pard_onnx.runtime.decoding.auto import AutoDrafter
from pard_onnx.runtime.decoding.drafter import PardDrafter
from pard_onnx.runtime.decoding.lookup import Lookup
from pard_onnx.runtime.decoding.loop import Settings, decode
from pard_onnx.runtime.decoding.policy import Policy
from pard_onnx.runtime.tuning.steps import CANDIDATES, RoundCosts, StepCosts

VOCABULARY = 7


def curve(draw: st.DrawFn) -> StepCosts:
    first, slope = draw(st.floats(1e-4, 1.0)), draw(st.floats(0.0, 0.5))
    return StepCosts(((1, first), (32, first * (1 + 31 * slope))))


@st.composite
def cases(draw: st.DrawFn) -> SimpleNamespace:
    widths = draw(st.sampled_from(CANDIDATES))
    seed, period = draw(st.integers(0, 99)), draw(st.integers(1, 9))
    skill = draw(st.sampled_from([0.0, 0.5, 1.0]))

    def choose(tokens: Sequence[int]) -> int:
        """Repeats itself with a period, but for an odd one out now and then."""
        odd = random.Random(f"{seed}{len(tokens)}").random() < 0.1
        return (len(tokens) % period + odd) % VOCABULARY

    def guess(real: Sequence[int], position: int) -> int:
        ahead = list(real)
        for _ in range(position + 1):
            ahead.append(choose(ahead))
        return ahead[-1] if random.Random(f"{seed}{len(real)}{position}").random() < skill else 0

    return SimpleNamespace(
        choose=choose,
        guess=guess,
        prompt=draw(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=80)),
        costs=RoundCosts(curve(draw), curve(draw), 1e-4, widths),
        widths=widths,
        has_draft=draw(st.booleans()),
        lookup=draw(st.booleans()),
        rounds_without_draft=draw(st.integers(0, 50)),
    )


@settings(max_examples=150, deadline=None)
@given(cases())
def test_tokens_are_the_targets_own(fakes: SimpleNamespace, case: SimpleNamespace) -> None:
    target, draft = fakes.Target(case.choose), fakes.Draft(case.guess)
    policy = Policy(case.costs, has_draft=case.has_draft)
    for _ in range(case.rounds_without_draft):  # a history that makes the policy distrust the draft
        policy.observe_draft_round(policy.draft_costs(6), [0.5] * 4, 4, 0)
    for _ in range(20 * case.rounds_without_draft):
        policy.observe_plain_round()
    pard = PardDrafter(draft) if case.has_draft else None
    drafter = AutoDrafter(policy, pard, Lookup() if case.lookup else None)
    committed, limit = list(case.prompt), 60
    for step in decode(target, drafter, committed, Settings(limit, 32, 300, widths=case.widths)):
        assert target.cache == committed[: target.length]
        if pard:
            assert draft.cache == committed[pard.start : pard.length]
        assert step.source in ("none", "pard", "lookup")
        assert case.lookup or step.source != "lookup"
    expected = list(case.prompt)
    for _ in range(limit):
        expected.append(case.choose(expected))
    assert committed == expected


def test_a_repetitive_text_is_written_by_lookup_alone(fakes: SimpleNamespace) -> None:
    flat = StepCosts(((1, 1.0), (32, 1.1)))
    drafter = AutoDrafter(Policy(RoundCosts(flat, flat), has_draft=False), None, Lookup())
    target = fakes.Target(lambda tokens: len(tokens) % 5)
    steps = list(decode(target, drafter, list(range(5)) * 4, Settings(100, 32, 200)))
    assert len(steps) < 10
    assert {step.source for step in steps[1:]} == {"lookup"}
