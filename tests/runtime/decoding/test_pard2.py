"""A draft that reads its target's features: each token is read with those of the token before it, whatever happens.

The scripted target's features of a token are its position and the token itself. The scripted draft checks what it is
fed, so that a shift by one, a rejected draft's row or a row of an earlier text fails where it is read.
"""

import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripts import VOCABULARY, function

from pard_onnx.models.spec import TargetFeatures
from pard_onnx.runtime.decoding.auto import AutoDrafter, DrafterFactory
from pard_onnx.runtime.decoding.drafter import DraftMemory
from pard_onnx.runtime.decoding.lookup import Lookup
from pard_onnx.runtime.decoding.loop import Halted, Settings, decode
from pard_onnx.runtime.decoding.pard2 import READERS, RECOMPUTED
from pard_onnx.runtime.decoding.policy import Policy
from pard_onnx.runtime.options import Options
from pard_onnx.runtime.sequence import Sequence as Conversation
from pard_onnx.runtime.tuning.steps import ANY, CANDIDATES, RoundCosts, StepCosts
from pard_onnx.testing import MASK, NoDraft, Pard2Drafter, ScriptedDraft, ScriptedTarget

PLAIN, BIAS = TargetFeatures((-1,), 2), TargetFeatures((-1,), 2, bias=True)
EAGLE = TargetFeatures((0, 2), 2, scale=1.0, join="concat")  # of P-EAGLE, which has the same drafter


class Reader(ScriptedDraft):
    """A draft that checks the features of each token, and is right with probability `skill`."""

    def __init__(self, case: SimpleNamespace, *, strict: bool = True) -> None:
        """strict: whether features are known of all tokens; otherwise a row may say that they are not."""
        super().__init__(self._next)
        self.case, self.strict = case, strict
        self.start: Callable[[], int] = lambda: 0  # the position of the cache's first token
        self.unknown: list[int] = []  # positions whose features were not known

    def _next(self, real: Sequence[int], position: int) -> int:
        rng = random.Random(f"{list(real)}{position}")
        ahead = [token for token in real if token != MASK]
        for _ in range(position + 1):
            ahead.append(self.case.choose(ahead))
        return ahead[-1] if rng.random() < self.case.skill else rng.randrange(VOCABULARY)

    def step(self, ids: Sequence[int], draft_length: int, features: Any = None) -> Any:
        tokens, bias = [*self.cache, *ids], self.case.features.bias
        assert features.shape == (len(ids), 2 + bias)
        for index, row in enumerate(features.tolist(), len(self.cache)):
            position = self.start() + index
            before = tokens[index - 1] if index else row[1]
            expected = [position - 1, before, *([1] if bias else [])] if position else [0, 0, *([1] if bias else [])]
            if row != expected and not self.strict and not any(row):
                self.unknown.append(position)
            else:
                assert row == expected
        return super().step(ids, draft_length, features)


@st.composite
def cases(draw: st.DrawFn) -> SimpleNamespace:
    return SimpleNamespace(
        choose=function(draw(st.integers(0, 99))),
        skill=draw(st.sampled_from([0.0, 0.5, 0.9, 1.0])),
        features=draw(st.sampled_from([PLAIN, BIAS, EAGLE])),
        chunk=draw(st.sampled_from([3, 8, 16])),
        settings=Settings(
            max_new_tokens=draw(st.integers(1, 30)),
            draft_length=draw(st.integers(1, 16)),
            capacity=200,
            eos_ids=draw(st.sampled_from([frozenset(), frozenset({0}), frozenset({1, 5})])),
            widths=draw(st.sampled_from(CANDIDATES)),
            chunk=draw(st.sampled_from([8, 16])),
        ),
        prompt=draw(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=60)),
    )


def drafter(case: SimpleNamespace, draft: Reader, memory: DraftMemory, **options: Any) -> Pard2Drafter:
    out = Pard2Drafter(draft, case.features, case.chunk, memory, **options)
    draft.start = lambda: out.start
    return out


def plain(case: SimpleNamespace, prompt: Sequence[int]) -> list[int]:
    committed = list(prompt)
    for _ in decode(ScriptedTarget(case.choose), NoDraft(), committed, case.settings):
        pass
    return committed


@settings(max_examples=200, deadline=None)
@given(cases())
def test_each_token_is_read_with_the_features_of_the_one_before(case: SimpleNamespace) -> None:
    target, draft, memory = ScriptedTarget(case.choose, gives_features=True), Reader(case), DraftMemory()
    committed = list(case.prompt)
    for step in decode(target, drafter(case, draft, memory), committed, case.settings):
        assert MASK not in draft.cache and draft.cache == committed[: len(draft.cache)]
        read = max(0, draft.length - 1)
        assert memory.seen == target.length and memory.first <= read  # what the draft needs next is there
        assert step.source in (READERS[case.features.join], "none")
    assert committed == plain(case, case.prompt)


@settings(max_examples=200, deadline=None)
@given(cases(), st.integers(1, 12), st.sampled_from(["target", "draft"]), st.booleans(), st.booleans(), st.data())
def test_conversations_that_are_cancelled_edited_and_forked(
    case: SimpleNamespace, at: int, who: str, cancelled: bool, exact: bool, data: st.DataObject
) -> None:
    """Where rows may be computed again, the features of every token are known; elsewhere some are not."""
    error: BaseException = Halted("cancelled") if cancelled else KeyboardInterrupt()
    target, draft = ScriptedTarget(case.choose, gives_features=True), Reader(case, strict=exact)
    one = Conversation(Rewindable(target), Rewindable(draft), [])  # type: ignore[arg-type]
    ids = case.prompt
    for turn in range(4):
        one.continue_with(ids)
        model: Any = Failing(target, at, error) if turn == 1 and who == "target" else target
        reader: Any = Failing(draft, at, error) if turn == 1 and who == "draft" else draft
        own = Pard2Drafter(reader, case.features, case.chunk, one.memory, recomputed=RECOMPUTED if exact else 0)
        draft.start = lambda own=own: own.start
        steps_before = len(target.widths)
        with suppress(KeyboardInterrupt):
            for _ in decode(model, own, one.tokens, case.settings):
                pass
            if turn != 1:
                assert one.tokens == plain(case, ids)
        assert steps_before <= len(target.widths)
        assert one.memory.seen <= target.length or not exact
        ids = one.tokens[: data.draw(st.integers(0, len(one.tokens)))]
        ids += data.draw(st.lists(st.integers(0, 6), min_size=1, max_size=9))


class Rewindable:
    """A scripted model as the KV cache of a `Sequence`: the two are one here."""

    def __init__(self, model: Any) -> None:
        self.model = model

    @property
    def length(self) -> int:
        return self.model.length  # type: ignore[no-any-return]

    def rollback(self, length: int) -> None:
        self.model.rollback(length)


class Failing(Rewindable):
    """A model that is interrupted before one of its steps."""

    def __init__(self, model: Any, at: int, error: BaseException) -> None:
        super().__init__(model)
        self.at, self.error, self.steps = at, error, 0

    def step(self, *arguments: Any) -> Any:
        self.steps += 1
        if self.steps == self.at:
            raise self.error
        return self.model.step(*arguments)


@pytest.mark.parametrize("features", [PLAIN, EAGLE])
@pytest.mark.parametrize("shift", [-1, 1])
def test_a_shift_by_one_is_caught(shift: int, features: TargetFeatures) -> None:
    """What these tests are worth: a drafter that pairs tokens with features one off does not pass them."""

    class Shifted(Pard2Drafter):
        def _rows(self, first: int, count: int) -> Any:
            return super()._rows(first + shift, count)

    case = SimpleNamespace(choose=function(1), skill=0.9, features=features)
    target, draft = ScriptedTarget(case.choose, gives_features=True), Reader(case)
    with pytest.raises(AssertionError):
        for _ in decode(target, Shifted(draft, features), [1, 2, 3, 4, 5], Settings(20, 4, 60)):
            pass


@settings(max_examples=100, deadline=None)
@given(cases())
def test_features_that_wait_are_bounded_and_a_long_prompt_is_read_in_time(case: SimpleNamespace) -> None:
    target, draft, memory = ScriptedTarget(case.choose, gives_features=True), Reader(case), DraftMemory()
    most, most_waiting = 0, 30
    own = drafter(case, draft, memory, waiting_bytes=4 * 2 * most_waiting)

    def watch() -> None:
        nonlocal most
        most = max(most, len(memory.features))

    committed = case.prompt * 2
    for _ in decode(target, own, committed, case.settings, between_chunks=watch):
        assert len(memory.features) <= 2 * most_waiting
    assert most <= most_waiting + case.chunk
    assert committed == plain(case, case.prompt * 2)


def test_a_draft_that_is_not_used_keeps_the_latest_features() -> None:
    case = SimpleNamespace(choose=function(1), skill=0.9, features=PLAIN, chunk=4)
    target, draft, memory = ScriptedTarget(case.choose, gives_features=True), Reader(case, strict=False), DraftMemory()
    own = drafter(case, draft, memory, waiting_bytes=4 * 2 * 20)
    own.propose = lambda committed, k, window=None: NoDraft().propose(committed, k)  # type: ignore[method-assign]
    committed = [1, 2, 3]
    for _ in decode(target, own, committed, Settings(150, 4, 200)):
        assert len(memory.features) <= 40
    del own.propose
    for _ in decode(target, own, committed, Settings(20, 4, 200)):
        pass
    assert draft.unknown == list(range(1, draft.unknown[-1] + 1))  # the oldest ones
    assert len(committed) - 20 - draft.unknown[-1] >= 20


@settings(max_examples=60, deadline=None)
@given(cases(), st.sampled_from([1, 20]), st.integers(1, 40))
def test_the_self_tuning_drafter_and_its_windows_keep_them_aligned(
    case: SimpleNamespace, draft_cost: int, start: int
) -> None:
    """A draft that costs much is rarely asked, and then reads a short window of what it lacks."""
    costs = RoundCosts(StepCosts(((1, 1e-3 * draft_cost), (64, 2e-3 * draft_cost))), StepCosts(((1, 1e-3), (64, 8e-3))))
    target, draft, memory = ScriptedTarget(case.choose, gives_features=True), Reader(case, strict=False), DraftMemory()
    own = drafter(case, draft, memory)
    auto = AutoDrafter(Policy(costs), own, Lookup())
    committed = list(case.prompt)
    for _ in decode(target, auto, committed, case.settings):
        assert auto.seen == target.length
    assert committed == plain(case, case.prompt)
    assert all(position <= memory.first for position in draft.unknown)  # only those that were dropped before
    draft.unknown.clear()
    window = min(start, len(committed) - 1)
    own.rollback(len(committed))
    own.propose(committed, 4, window)
    assert draft.unknown == []


def test_a_text_that_another_drafter_began_is_read_without_its_features() -> None:
    """The target does not compute a conversation again for the draft alone: its first token comes as fast."""
    case = SimpleNamespace(choose=function(3), skill=0.9, features=BIAS, chunk=8)
    target, draft, memory = ScriptedTarget(case.choose, gives_features=True), Reader(case, strict=False), DraftMemory()
    committed = [1, 2, 3, 4]
    for _ in decode(target, NoDraft(), committed, Settings(40, 4, 200)):
        pass
    before = len(committed)
    del target.widths[:]
    committed += [5, 6]
    for _ in decode(target, drafter(case, draft, memory), committed, Settings(20, 4, 200)):
        pass
    assert target.widths[0] == 3  # the token whose row was not computed yet, and the new ones
    assert draft.unknown == list(range(1, before))


def test_a_few_tokens_are_computed_again_for_their_features() -> None:
    case = SimpleNamespace(choose=function(3), skill=0.9, features=BIAS, chunk=8)
    target, draft, memory = ScriptedTarget(case.choose, gives_features=True), Reader(case), DraftMemory()
    committed = [1, 2, 3, 4]
    for _ in decode(target, drafter(case, draft, memory), committed, Settings(60, 4, 200)):
        pass
    cut = 20  # far below what the draft has read: the features before it are gone
    sequence = Conversation(Rewindable(target), Rewindable(draft), committed, memory)  # type: ignore[arg-type]
    sequence.continue_with([*committed[:cut], 5])
    del target.widths[:]
    for _ in decode(target, drafter(case, draft, memory), sequence.tokens, Settings(20, 4, 200)):
        pass
    assert target.widths[0] == 2  # the token before the cut, whose features are lacking, and the new one


def test_a_generation_without_drafts_reads_no_features_and_a_draft_elsewhere_never_runs_ahead() -> None:
    costs = StepCosts(((1, 1e-3), (64, 2e-3)))
    own = Pard2Drafter(ScriptedDraft(max), PLAIN)
    factory = DrafterFactory(costs, costs, separate_devices=True, eos_ids=frozenset())
    assert factory.drafter(Options(draft_length=0), ANY, own).seen is None
    assert factory.drafter(Options(draft_length=4), ANY, own) is own
    assert factory.drafter(Options(), ANY, own)._draft is own  # type: ignore[attr-defined]


def test_a_copy_of_a_memory_is_truncated_alone() -> None:
    memory = DraftMemory()
    memory.add(np.full(2, token, np.float32) for token in range(10))
    memory.drop_before(4)
    copy = memory.copy()
    copy.truncate(6)
    assert [copy.feature(t) is not None for t in range(8)] == [False] * 4 + [True] * 2 + [False] * 2
    assert (copy.seen, memory.seen, memory.bytes) == (6, 10, 6 * 8)
    copy.truncate(2)
    assert (copy.seen, copy.first, copy.features) == (2, 2, [])
