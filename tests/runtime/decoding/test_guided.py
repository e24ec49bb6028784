"""Drafts under a grammar: what is proposed, and what the other drafter is told of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from pard_onnx.runtime.decoding.auto import AutoDrafter
from pard_onnx.runtime.decoding.drafter import NOTHING, Drafter, Proposal
from pard_onnx.runtime.decoding.guided import GuidedDrafter
from pard_onnx.runtime.decoding.lookup import Lookup
from pard_onnx.runtime.decoding.policy import Policy
from pard_onnx.runtime.tuning.steps import ANY, RoundCosts, StepCosts

END = 9


class Letters:
    """A grammar of ids: each one is followed by one that is larger; 5 is followed by 6, 7, 8 alone."""

    end_ids = frozenset({END})

    def forced(self, tokens: Sequence[int]) -> tuple[int, ...]:
        return tuple(range(tokens[-1] + 1, 9)) if tokens[-1] >= 5 else ()

    def allowed(self, tokens: Sequence[int], drafts: Sequence[int]) -> int:
        last, count = tokens[-1], 0
        for token in drafts:
            if token <= last or token == END:
                break
            last, count = token, count + 1
        return count


class Recorder(Drafter):
    def __init__(self, *proposals: Sequence[int]) -> None:
        self.proposals, self.calls = list(proposals), []

    calls: list[tuple[Any, ...]]

    def propose(self, committed: Sequence[int], k: int) -> Proposal:
        self.calls.append(("propose", list(committed), k))
        ids = tuple(self.proposals.pop(0))
        return Proposal(ids, tuple(0.5 for _ in ids), "inner")

    def refuse(self, count: int) -> None:
        self.calls.append(("refuse", count))

    def run_ahead(self, committed: Sequence[int], proposal: Proposal, k: int) -> bool:
        self.calls.append(("run_ahead", proposal.ids, k))
        return k > 0

    def observe(self, drafted: int, matched: int) -> None:
        self.calls.append(("observe", drafted, matched))


def guided(inner: Drafter) -> GuidedDrafter:
    return GuidedDrafter(inner, Letters())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("proposed", "kept", "refused"),
    [
        ((2, 3, 4), (2, 3, 4), False),
        ((2, 1, 3), (2,), True),
        ((1, 2), (), True),
        ((2, END, 3), (2,), False),
        ((), (), False),
    ],
)
def test_a_proposal_ends_before_a_forbidden_token(
    proposed: tuple[int, ...], kept: tuple[int, ...], refused: bool
) -> None:
    inner = Recorder(proposed)
    drafter = guided(inner)
    proposal = drafter.propose([1], 5)
    assert proposal == (Proposal(kept, (0.5,) * len(kept), "inner") if kept else NOTHING)
    assert drafter.run_ahead([1], proposal, 5) is not refused
    drafter.observe(len(kept), 0)
    wanted = [("propose", [1], 5), ("run_ahead", kept, 0 if refused else 5), ("observe", len(kept), 0)]
    if refused:
        wanted.insert(1, ("refuse", len(kept)))
    assert inner.calls == wanted


@pytest.mark.parametrize("k", [1, 2, 8])
def test_forced_tokens_are_proposed_without_the_other_drafter(k: int) -> None:
    inner = Recorder((2,))
    drafter = guided(inner)
    proposal = drafter.propose([1, 5], k)
    assert proposal == Proposal((6, 7, 8)[:k], (1.0,) * min(k, 3), "grammar")
    assert drafter.run_ahead([1, 5], proposal, 4) is False
    drafter.observe(3, 3)
    assert inner.calls == []
    drafter.propose([1], k)
    drafter.observe(1, 1)
    assert inner.calls == [("propose", [1], k), ("observe", 1, 1)]


COSTS = RoundCosts(StepCosts(((1, 0.001),)), StepCosts(((1, 0.010), (33, 0.012))), 1e-4, ANY)


class Spy(Policy):
    def __init__(self, *, has_draft: bool) -> None:
        super().__init__(COSTS, has_draft)
        self.steps: list[int] = []

    def observe_step(self, drafts: int, seconds: float) -> None:
        self.steps.append(drafts)


class Proposer:
    """As a `PardDrafter`, whose tokens the grammar refuses from the third on."""

    length, seen = 0, None

    def lag(self, committed: Sequence[int]) -> int:
        return 1

    def propose(self, committed: Sequence[int], k: int, window: int | None = None, whole: bool = False) -> Proposal:
        return Proposal((2, 3, 1, 1, 1, 1)[:k], (0.9,) * min(k, 6), "pard")

    def refuse(self, count: int) -> None: ...

    def run_ahead(self, committed: Sequence[int], proposal: Proposal, k: int) -> bool:
        return False

    def observe(self, drafted: int, matched: int) -> None: ...


def test_the_policy_learns_that_refused_drafts_are_wrong() -> None:
    """Times are those of the tokens that were verified; acceptance counts the refused one."""
    policy = Spy(has_draft=True)
    drafter = guided(AutoDrafter(policy, Proposer(), None))  # type: ignore[arg-type]
    for _ in range(60):
        proposal = drafter.propose([1], 6)
        assert proposal.ids in ((), (2,), (2, 3))
        drafter.run_ahead([1], proposal, 6)
        drafter.observe(len(proposal.ids), len(proposal.ids))
    assert set(policy.steps) <= {0, 1, 2}
    profile = policy.drafts.profile()
    assert profile[1] > 0.8
    assert profile[2] < 0.3
    assert policy.drafts.estimate([0.9] * 3)[2] < 0.3


def test_lookup_learns_that_refused_drafts_are_wrong() -> None:
    policy = Spy(has_draft=False)
    text = [1, 2, 1, 2, 1]  # what follows 1 and 2 would be 1, which the grammar forbids after 2
    drafter = guided(AutoDrafter(policy, None, Lookup()))
    before = policy.lookups.estimate(3, 2)
    for _ in range(30):
        proposal = drafter.propose(text, 4)
        assert proposal.ids in ((), (2,))
        drafter.run_ahead(text, proposal, 4)
        drafter.observe(len(proposal.ids), len(proposal.ids))
    assert policy.lookups.estimate(3, 2)[1] < before[1] or policy.steps[-1] == 0
