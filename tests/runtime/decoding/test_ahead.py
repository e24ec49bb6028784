"""Drafting while the target verifies: tokens, proposals and caches are those without it, however the text ends."""

import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pard_onnx import load
from pard_onnx.runtime.decoding.ahead import AheadDrafter, AheadPolicy
from pard_onnx.runtime.decoding.auto import AutoDrafter
from pard_onnx.runtime.decoding.drafter import Drafter, PardDrafter, Proposal
from pard_onnx.runtime.decoding.lookup import Lookup
from pard_onnx.runtime.decoding.loop import Halted, Settings, Step, decode
from pard_onnx.runtime.decoding.policy import Policy
from pard_onnx.runtime.providers.choice import on_separate_devices
from pard_onnx.runtime.providers.table import PROVIDERS, provider_named
from pard_onnx.runtime.tuning.steps import RoundCosts, StepCosts

VOCABULARY = 7
ONE = StepCosts(((1, 1.0),))
COSTS = RoundCosts(ONE, ONE)
CUDA, WEBGPU = PROVIDERS["cuda"].ort, PROVIDERS["webgpu"].ort
TEXT = "the quick brown"


class Whim(AheadPolicy):
    """Goes ahead by chance, so that any decision is tried; odds 1: always."""

    def __init__(self, seed: int, odds: float) -> None:
        super().__init__(COSTS)
        self._rng, self._odds = random.Random(seed), odds

    def length_to_request(self, lag: int, k: int) -> int:
        assert lag >= 0 and k >= 1
        return k + (self._rng.random() < self._odds)

    def pays(self, probabilities: Sequence[float], drafts: int, k: int) -> bool:
        assert len(probabilities) > drafts
        return self._rng.random() < self._odds


class Told:
    """A drafter in front of another one, that writes down what was proposed after which text."""

    def __init__(self, inner: Drafter) -> None:
        self._inner = inner
        self.proposals: list[tuple[int, tuple[int, ...]]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def propose(self, committed: Sequence[int], k: int) -> Proposal:
        proposal = self._inner.propose(committed, k)
        self.proposals.append((len(committed), proposal.first(k).ids))
        return proposal


@st.composite
def cases(draw: st.DrawFn) -> SimpleNamespace:
    seed, skill = draw(st.integers(0, 99)), draw(st.sampled_from([0.0, 0.5, 0.9, 1.0]))
    odds = draw(st.sampled_from([1.0, 1.0, 0.5]))
    prompt = draw(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=9))

    def choose(tokens: Sequence[int]) -> int:
        return random.Random(f"{seed}{list(tokens)}").randrange(VOCABULARY)

    def guess(real: Sequence[int], position: int) -> int:
        ahead = list(real)
        for _ in range(position + 1):
            ahead.append(choose(ahead))
        rng = random.Random(f"{seed}{list(real)}{position}")
        return ahead[-1] if rng.random() < skill else rng.randrange(VOCABULARY)

    return SimpleNamespace(
        prompt=prompt,
        choose=choose,
        guess=guess,
        whim=lambda: Whim(seed, odds),
        settings=Settings(
            max_new_tokens=draw(st.integers(1, 25)),
            draft_length=draw(st.integers(1, 9)),
            capacity=draw(st.integers(len(prompt) + 1, 40)),
            eos_ids=draw(st.sampled_from([frozenset(), frozenset({0}), frozenset({1, 5})])),
        ),
    )


def idle() -> bool:
    """No thread of a draft is left."""
    return not any(thread.name == "pard-onnx draft" for thread in threading.enumerate())


def ahead(case: SimpleNamespace, draft: Any) -> AheadDrafter:
    return AheadDrafter(PardDrafter(draft), case.whim(), case.settings.eos_ids)


def run(target: Any, drafter: Drafter, case: SimpleNamespace) -> tuple[list[int], list[Step], str]:
    """Tokens, steps, and what was raised."""
    committed, steps, problem = list(case.prompt), [], ""
    try:
        steps += decode(target, drafter, committed, case.settings)
    except RuntimeError as error:
        problem = str(error)
    assert idle()
    return committed, steps, problem


@settings(max_examples=250, deadline=None)
@given(cases())
def test_proposals_and_tokens_are_those_without_it(fakes: SimpleNamespace, case: SimpleNamespace) -> None:
    plain, draft = Told(PardDrafter(fakes.Draft(case.guess))), fakes.Draft(case.guess)
    told, target = Told(ahead(case, draft)), fakes.Target(case.choose)
    expected, steps, _ = run(fakes.Target(case.choose), plain, case)
    found, others, _ = run(target, told, case)
    assert (found, told.proposals) == (expected, plain.proposals)
    assert [(s.tokens, s.drafted, s.matched) for s in others] == [(s.tokens, s.drafted, s.matched) for s in steps]
    for before, after in pairwise(others):
        whole = before.ran_ahead and after.ahead
        assert after.ahead == whole and (not whole or before.matched == before.drafted)
    assert target.cache == found[: target.length]
    assert draft.cache == found[: draft.length]
    assert told.length == draft.length


@settings(max_examples=150, deadline=None)
@given(cases(), st.integers(0, 6))
def test_closing_early_leaves_prefixes_of_the_conversation(
    fakes: SimpleNamespace, case: SimpleNamespace, rounds: int
) -> None:
    target, draft, committed = fakes.Target(case.choose), fakes.Draft(case.guess), list(case.prompt)
    drafter = ahead(case, draft)
    with closing(decode(target, drafter, committed, case.settings)) as steps:
        for _, _ in zip(range(rounds), steps, strict=False):
            pass
    assert idle()
    assert (target.cache, draft.cache) == (committed[: target.length], committed[: draft.length])
    # What is cached is good to go on from.
    again = list(committed)
    list(decode(target, drafter, committed, Settings(5, 4, 200)))
    while len(again) < len(committed):
        again.append(case.choose(again))
    assert (committed, draft.cache) == (again, again[: draft.length])


@settings(max_examples=150, deadline=None)
@given(cases(), st.integers(2, 5))
def test_a_draft_that_fails_is_told_where_it_would_have_failed_without_it(
    fakes: SimpleNamespace, case: SimpleNamespace, every: int
) -> None:
    """It fails after some texts; on a guess that is wrong nobody hears of it."""

    def guess(real: Sequence[int], position: int) -> int:
        if random.Random(str(list(real))).randrange(every) == 0:
            raise RuntimeError("the device is gone")
        return case.guess(real, position)

    draft = fakes.Draft(guess)
    expected = run(fakes.Target(case.choose), PardDrafter(fakes.Draft(guess)), case)
    found = run(fakes.Target(case.choose), ahead(case, draft), case)
    assert (found[0], found[2]) == (expected[0], expected[2])
    assert draft.cache == found[0][: draft.length]


@settings(max_examples=100, deadline=None)
@given(cases(), st.integers(0, 8))
def test_a_target_that_fails_leaves_prefixes_of_the_conversation(
    fakes: SimpleNamespace, case: SimpleNamespace, fail_at: int
) -> None:
    target, draft = fakes.Target(case.choose, fail_at=fail_at), fakes.Draft(case.guess)
    found, _, _ = run(target, ahead(case, draft), case)
    assert (target.cache, draft.cache) == (found[: target.length], found[: draft.length])


@settings(max_examples=150, deadline=None)
@given(cases(), st.booleans(), st.booleans())
def test_the_self_tuned_drafter_goes_ahead_too(
    fakes: SimpleNamespace, case: SimpleNamespace, lookup: bool, dear: bool
) -> None:
    verify = StepCosts(((1, 1.0), (32, 20.0))) if dear else ONE
    draft, target = fakes.Draft(case.guess), fakes.Target(case.choose)
    policy = Policy(RoundCosts(StepCosts(((1, 0.1),)), verify))
    drafter = AutoDrafter(policy, ahead(case, draft), Lookup() if lookup else None)
    found, _, _ = run(target, drafter, case)
    assert found == run(fakes.Target(case.choose), PardDrafter(fakes.Draft(case.guess)), case)[0]
    assert (target.cache, draft.cache) == (found[: target.length], found[: draft.length])


def test_a_perfect_draft_is_waited_for_once(fakes: SimpleNamespace) -> None:
    draft = fakes.Draft(lambda real, position: (len(real) + position) % VOCABULARY)
    drafter, choose = AheadDrafter(PardDrafter(draft), Whim(0, 1.0)), lambda tokens: len(tokens) % VOCABULARY
    steps = list(decode(fakes.Target(choose), drafter, [0], Settings(20, 4, 100)))
    assert [len(step.tokens) for step in steps] == [1, 5, 5, 5, 4]
    assert [step.ran_ahead for step in steps] == [False, True, True, True, False]  # nothing is left to draft for
    assert [step.ahead for step in steps] == [False, False, True, True, True]
    assert draft.fed == [2, 5, 5, 5]
    drafter.rollback(0)
    steps = list(decode(fakes.Target(choose), drafter, [0], Settings(17, 4, 100)))
    assert [step.ran_ahead for step in steps] == [False, True, True, False, False]  # one is left, the target's own


def test_nothing_is_drafted_behind_eos(fakes: SimpleNamespace) -> None:
    draft = fakes.Draft(lambda real, position: len(real) + position)
    drafter = AheadDrafter(PardDrafter(draft), Whim(0, 1.0), frozenset({4}))
    steps = list(decode(fakes.Target(len), drafter, [0], Settings(20, 3, 100, frozenset({4}))))
    assert [step.ran_ahead for step in steps] == [False, False] and draft.fed == [2]


def blocked(fakes: SimpleNamespace, on_run: Callable[[], None]) -> tuple[Any, Any, threading.Event]:
    """A perfect draft that calls on_run when it goes ahead, and the target that it is perfect for."""
    begun = threading.Event()

    def guess(real: Sequence[int], position: int) -> int:
        if threading.current_thread() is not threading.main_thread() and not begun.is_set():
            begun.set()
            on_run()
        return len(real) % VOCABULARY

    return fakes.Draft(guess), fakes.Target(lambda tokens: len(tokens) % VOCABULARY), begun


@pytest.mark.parametrize("error", [KeyboardInterrupt, Halted("timeout"), RuntimeError("gone")], ids=str)
def test_an_end_while_the_draft_is_at_work_waits_for_it(fakes: SimpleNamespace, error: BaseException) -> None:
    release, committed = threading.Event(), [0]
    draft, target, begun = blocked(fakes, lambda: release.wait(5) or None)
    step = target.step

    def interrupted(ids: Sequence[int], keep: int) -> Any:
        if len(target.widths) == 1:
            assert begun.wait(5)
            threading.Timer(0.05, release.set).start()
            raise error
        return step(ids, keep)

    target.step = interrupted
    try:
        steps = list(decode(target, AheadDrafter(PardDrafter(draft), Whim(0, 1.0)), committed, Settings(20, 4, 100)))
        assert isinstance(error, Halted) and steps[-1].finish_reason == "timeout"
    except (KeyboardInterrupt, RuntimeError):
        assert not isinstance(error, Halted)
    assert release.is_set() and idle()
    assert draft.cache == committed[: draft.length] and draft.length == 2


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="no signals to threads here")
@pytest.mark.parametrize("fails", [False, True])
def test_ctrl_c_while_the_draft_is_waited_for_comes_after_it(fakes: SimpleNamespace, fails: bool) -> None:
    """In the loop, and in the end that a failure brings: with tokens drafted for that never were."""

    def interrupt() -> None:
        time.sleep(0.02)  # until the target is through, and the loop waits
        for _ in range(2):
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            time.sleep(0.02)

    draft, target, begun = blocked(fakes, interrupt)
    step, committed = target.step, [0]

    def failing(ids: Sequence[int], keep: int) -> Any:
        if len(target.widths) == 1 and fails:
            assert begun.wait(5)
            raise RuntimeError("gone")
        return step(ids, keep)

    target.step = failing
    with pytest.raises(KeyboardInterrupt):
        list(decode(target, AheadDrafter(PardDrafter(draft), Whim(0, 1.0)), committed, Settings(20, 4, 100)))
    assert idle() and draft.cache == committed[: draft.length]


def test_a_verification_is_timed_only_where_it_was_told_of(fakes: SimpleNamespace) -> None:
    """Rounds of lookup do not come by: what passed meanwhile is no step's time."""
    policy, seen = Whim(0, 0.0), []
    policy.observe_verify_step = lambda drafts, seconds: seen.append(drafts)  # type: ignore[method-assign]
    drafter = AheadDrafter(PardDrafter(fakes.Draft(lambda real, position: 0)), policy)
    drafter.run_ahead([1], drafter.propose([1], 2), 2)
    drafter.observe(2, 0)
    drafter.observe(5, 5)
    assert seen == [2]


def test_devices_are_separate_if_the_provider_or_the_device_differs() -> None:
    assert on_separate_devices(provider_named("cuda"), provider_named("cpu"))
    assert on_separate_devices(provider_named("cuda"), provider_named("cuda:1"))
    assert not on_separate_devices(provider_named("cpu"), provider_named("cpu")) and not on_separate_devices(
        provider_named("cuda:0"), provider_named("cuda")
    )


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AheadPolicy, "length_to_request", lambda self, lag, k: k + 1)
    monkeypatch.setattr(AheadPolicy, "pays", lambda *_: True)


@pytest.fixture
def mixed(pair_folders: tuple[Path, Path], device: Callable[..., Any], eager: None) -> Iterator[tuple[Any, Any]]:
    """The toy pair on the CPU, and on two devices."""
    device(CUDA, WEBGPU)
    with load(*pair_folders) as here, load(*pair_folders, provider="cuda", draft_provider="webgpu") as there:
        yield here, there


@pytest.mark.parametrize("k", [1, 2, 5, 32, "auto"])
def test_two_devices_give_the_tokens_of_one(mixed: tuple[Any, Any], k: Any) -> None:
    for _ in range(2):
        expected, found = (pair.generate(TEXT, max_new_tokens=60, draft_length=k) for pair in mixed)
        assert found.tokens == expected.tokens
        assert found.stats.ahead_used <= found.stats.ahead <= found.stats.rounds
        assert (expected.stats.ahead, expected.stats.ahead_used) == (0, 0)
    if k != "auto":  # which may do without the draft
        assert found.stats.ahead and found.stats.accepted == expected.stats.accepted


def test_conversations_go_on_from_what_is_cached(mixed: tuple[Any, Any], tmp_path: Path) -> None:
    here, there = (pair.chat() for pair in mixed)
    for text in ("lazy dog", "fox"):
        stop = ["never"] if text != "fox" else mixed[0].generate(TEXT, max_new_tokens=9).text[3:5]
        expected, found = (chat.send(text, max_new_tokens=11, draft_length=2, stop=stop) for chat in (here, there))
        assert found.tokens == expected.tokens
        assert found.stats.cached_tokens == expected.stats.cached_tokens
        for chat in (here, there):
            stream = chat.stream(text, max_new_tokens=11, draft_length=2)
            next(stream), next(stream)
            stream.close()
            assert idle()
    there.save(tmp_path / "there.chat")
    assert mixed[1].restore(tmp_path / "there.chat").messages == there.messages
