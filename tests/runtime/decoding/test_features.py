"""What a drafter is told of the target's steps: accepted tokens only, in order, once, with the features of each.

The scripted target's feature of a token is its position and the token itself, so that a shift by one, a rejected draft
or a token that is missing shows in what the drafter holds.
"""

import random
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripts import VOCABULARY, function

from pard_onnx.runtime.decoding.drafter import DraftMemory
from pard_onnx.runtime.decoding.loop import Halted, Settings, decode
from pard_onnx.runtime.sequence import Sequence as Conversation
from pard_onnx.runtime.tuning.steps import CANDIDATES
from pard_onnx.testing import NoDraft, ScriptedDraft, ScriptedDrafter, ScriptedTarget, continuation


def script(choose: Callable[[Sequence[int]], int], skill: float) -> Callable[[Sequence[int], int], list[int]]:
    """Proposals that are right with probability `skill` at each position."""

    def propose(committed: Sequence[int], k: int) -> list[int]:
        text, out = list(committed), []
        for position in range(k):
            text.append(choose(text))
            rng = random.Random(f"{list(committed)}{position}")
            out.append(text[-1] if rng.random() < skill else rng.randrange(VOCABULARY))
        return out

    return propose


class Interrupted:
    """A target that is cancelled, or fails, before one of its steps."""

    def __init__(self, target: ScriptedTarget, at: int, error: BaseException) -> None:
        self.target, self.at, self.error, self.steps = target, at, error, 0

    @property
    def length(self) -> int:
        return self.target.length

    def step(self, ids: Sequence[int], keep: int) -> object:
        self.steps += 1
        if self.steps == self.at:
            raise self.error
        return self.target.step(ids, keep)

    def rollback(self, length: int) -> None:
        self.target.rollback(length)


def check(memory: DraftMemory, tokens: Sequence[int], length: int) -> None:
    """The features of exactly the tokens whose rows the target's cache holds."""
    expected = [[position, tokens[position]] for position in range(length)]
    assert [row.tolist() for row in memory.features] == expected


@st.composite
def cases(draw: st.DrawFn) -> SimpleNamespace:
    return SimpleNamespace(
        choose=function(draw(st.integers(0, 99))),
        skill=draw(st.sampled_from([0.0, 0.5, 0.9, 1.0])),
        settings=Settings(
            max_new_tokens=draw(st.integers(1, 20)),
            draft_length=draw(st.integers(1, 9)),
            capacity=120,
            eos_ids=draw(st.sampled_from([frozenset(), frozenset({0}), frozenset({1, 5})])),
            widths=draw(st.sampled_from(CANDIDATES)),
            chunk=draw(st.sampled_from([8, 16])),
        ),
        prompt=draw(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=40)),
    )


@settings(max_examples=200, deadline=None)
@given(cases())
def test_a_drafter_is_told_of_accepted_tokens_only_in_order(case: SimpleNamespace) -> None:
    target = ScriptedTarget(case.choose, gives_features=True)
    drafter = ScriptedDrafter(script(case.choose, case.skill), reads_features=True)
    committed = list(case.prompt)
    for _ in decode(target, drafter, committed, case.settings):
        check(drafter.memory, committed, target.length)
    check(drafter.memory, committed, target.length)
    assert drafter.seen_tokens == committed[: target.length]
    assert target.length == len(committed) - 1  # nothing was computed twice, nothing is missing


@settings(max_examples=100, deadline=None)
@given(cases())
def test_features_change_no_token(case: SimpleNamespace) -> None:
    reader = ScriptedDrafter(script(case.choose, case.skill), reads_features=True)
    target = ScriptedTarget(case.choose, gives_features=True)
    plain = continuation(ScriptedTarget(case.choose), NoDraft(), case.prompt, case.settings.max_new_tokens)
    assert continuation(target, reader, case.prompt, case.settings.max_new_tokens) == plain


@settings(max_examples=100, deadline=None)
@given(cases())
def test_a_drafter_that_reads_no_features_costs_no_row_and_is_told_the_same_tokens(case: SimpleNamespace) -> None:
    kept = []
    for gives in (False, True):
        target = ScriptedTarget(case.choose, gives_features=gives)
        drafter = ScriptedDrafter(script(case.choose, case.skill))
        committed = list(case.prompt)
        for _ in decode(target, drafter, committed, case.settings):
            pass
        assert drafter.seen_tokens == committed[: target.length] and drafter.memory.features == []
        kept.append(target.kept)
    assert kept[0] == kept[1]


@settings(max_examples=200, deadline=None)
@given(cases(), st.integers(1, 12), st.booleans(), st.data())
def test_conversations_go_on_after_cancellations_failures_and_edits(
    case: SimpleNamespace, at: int, cancelled: bool, data: st.DataObject
) -> None:
    target = ScriptedTarget(case.choose, gives_features=True)
    sequence = Conversation(target, ScriptedDraft(max), [])  # type: ignore[arg-type]
    error = Halted("cancelled") if cancelled else RuntimeError("the device is gone")
    ids = case.prompt
    for turn in range(3):
        sequence.continue_with(ids)
        check(sequence.memory, sequence.tokens, len(sequence.memory.features))
        drafter = ScriptedDrafter(script(case.choose, case.skill), reads_features=True, memory=sequence.memory)
        model = Interrupted(target, at, error) if turn == 1 else target
        try:
            for _ in decode(model, drafter, sequence.tokens, case.settings):  # type: ignore[arg-type]
                pass
        except RuntimeError:
            assert not cancelled
        check(sequence.memory, sequence.tokens, target.length)
        kept = data.draw(st.integers(0, len(sequence.tokens)))  # the user edits what was said from here on
        ids = sequence.tokens[:kept] + data.draw(st.lists(st.integers(0, 6), min_size=1, max_size=9))


@settings(max_examples=100, deadline=None)
@given(cases())
def test_an_interrupt_before_the_drafter_is_told_makes_the_target_compute_those_tokens_again(
    case: SimpleNamespace,
) -> None:
    target = ScriptedTarget(case.choose, gives_features=True)
    memory = DraftMemory()

    class Deaf(ScriptedDrafter):
        def saw(self, ids: Sequence[int], features: object) -> None:
            if len(self.seen_tokens) > len(case.prompt) // 2:
                raise KeyboardInterrupt
            super().saw(ids, features)  # type: ignore[arg-type]

    committed = list(case.prompt)
    with pytest.raises(KeyboardInterrupt):
        for _ in range(3):
            for _ in decode(target, Deaf(script(case.choose, 1.0), reads_features=True, memory=memory), committed,
                            Settings(30, 4, 120)):  # fmt: skip
                pass
    check(memory, committed, target.length)
    drafter = ScriptedDrafter(script(case.choose, 1.0), reads_features=True, memory=memory)
    for _ in decode(target, drafter, committed, Settings(3, 4, 120)):
        pass
    check(memory, committed, target.length)


def test_features_that_a_restored_conversation_lacks_are_computed() -> None:
    """The rows of its KV cache alone are no use to such a drafter."""
    target = ScriptedTarget(function(3), gives_features=True)
    continuation(target, NoDraft(), [1, 2, 3, 4], 10)
    committed = [*target.cache, 5]
    drafter = ScriptedDrafter(lambda tokens, k: [], reads_features=True)
    for _ in decode(target, drafter, committed, Settings(4, 4, 120)):
        pass
    check(drafter.memory, committed, target.length)


def test_a_shift_by_one_is_caught() -> None:
    """What these tests are worth: a drafter that files each feature one token late does not pass the check."""
    target = ScriptedTarget(function(1), gives_features=True)

    class Late(ScriptedDrafter):
        def saw(self, ids: Sequence[int], features: object) -> None:
            assert isinstance(features, np.ndarray)
            super().saw(ids, np.roll(features, 1, axis=0))

    drafter, committed = Late(script(function(1), 0.9), reads_features=True), [1, 2, 3]
    for _ in decode(target, drafter, committed, Settings(10, 4, 60)):
        pass
    with pytest.raises(AssertionError):
        check(drafter.memory, committed, target.length)


def test_a_target_without_features_is_refused_by_name() -> None:
    drafter = ScriptedDrafter(lambda tokens, k: [], reads_features=True)
    with pytest.raises(ValueError, match="the drafter reads the target's hidden states, which this target does not"):
        continuation(ScriptedTarget(function(1)), drafter, [1, 2], 4)
