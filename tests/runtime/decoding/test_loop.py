"""The loop, driven by scripted models: whatever drafts say and however it ends, the tokens are the target's own."""

import random
from collections.abc import Callable, Sequence
from contextlib import closing
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripts import VOCABULARY, function

from pard_onnx.models.checks import DRAFT_LIMIT
from pard_onnx.models.errors import BadInput, TooLong
from pard_onnx.models.manifest import KV_MARGIN
from pard_onnx.runtime.decoding.drafter import NoDraft, PardDrafter
from pard_onnx.runtime.decoding.loop import Settings, decode
from pard_onnx.runtime.tuning.steps import CANDIDATES

Next = Callable[[Sequence[int]], int]


def reference(choose: Next, prompt: list[int], limit: int, eos_ids: frozenset[int]) -> tuple[list[int], str]:
    """Plain greedy decoding, written down."""
    out: list[int] = []
    while len(out) < limit:
        token = choose(prompt + out)
        if token in eos_ids:
            return out, "stop"
        out.append(token)
    return out, "length"


@st.composite
def cases(draw: st.DrawFn) -> SimpleNamespace:
    prompt = draw(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=12))
    return SimpleNamespace(
        prompt=prompt,
        choose=function(draw(st.integers(0, 99))),
        skill=draw(st.sampled_from([0.0, 0.5, 0.9, 1.0])),
        seed=draw(st.integers(0, 99)),
        settings=Settings(
            max_new_tokens=draw(st.integers(1, 25)),
            draft_length=draw(st.integers(1, 9)),
            capacity=draw(st.integers(len(prompt) + 1, 40)),
            eos_ids=draw(st.sampled_from([frozenset(), frozenset({0}), frozenset({1, 5})])),
            widths=draw(st.sampled_from(CANDIDATES)),
            chunk=draw(st.sampled_from([8, 16, 256])),
        ),
    )


def guesses(case: SimpleNamespace) -> Callable[[Sequence[int], int], int]:
    """A draft that is right with probability `skill` at each position, and noise otherwise."""

    def guess(real: Sequence[int], position: int) -> int:
        ahead = list(real)
        for _ in range(position + 1):
            ahead.append(case.choose(ahead))
        rng = random.Random(f"{case.seed}{list(real)}{position}")
        return ahead[-1] if rng.random() < case.skill else rng.randrange(VOCABULARY)

    return guess


def expected(case: SimpleNamespace) -> tuple[list[int], str]:
    limit = min(case.settings.max_new_tokens, case.settings.capacity - len(case.prompt))
    return reference(case.choose, case.prompt, limit, case.settings.eos_ids)


def check_caches(committed: list[int], target: SimpleNamespace, draft: SimpleNamespace) -> None:
    assert target.cache == committed[: target.length]
    assert draft.cache == committed[: draft.length]


@settings(max_examples=300, deadline=None)
@given(cases())
def test_pard_gives_plain_greedy_tokens(fakes: SimpleNamespace, case: SimpleNamespace) -> None:
    target, draft = fakes.Target(case.choose), fakes.Draft(guesses(case))
    committed = list(case.prompt)
    tokens: list[int] = []
    for step in decode(target, PardDrafter(draft, case.settings.chunk), committed, case.settings):
        tokens += step.tokens
        assert committed == case.prompt + tokens
        assert fakes.MASK not in draft.cache
        check_caches(committed, target, draft)
        assert step.matched <= step.drafted <= case.settings.draft_length
        assert len(step.tokens) <= step.accepted <= step.drafted + 1
        last = step
    assert (tokens, last.finish_reason) == expected(case)
    assert all(width in case.settings.widths for width in target.widths)
    read = [keep for keep, width in zip(target.kept, target.widths, strict=True) if width != case.settings.chunk]
    assert all(keep in case.settings.widths for keep in read)


@settings(max_examples=200, deadline=None)
@given(cases(), st.data())
def test_an_adversarial_drafter_changes_nothing(
    fakes: SimpleNamespace, case: SimpleNamespace, data: st.DataObject
) -> None:
    """It may propose nothing, nonsense, or more than asked for."""
    anything = st.lists(st.integers(0, VOCABULARY - 1), max_size=12)
    drafter = fakes.Drafter(lambda committed, k: data.draw(anything))
    target = fakes.Target(case.choose)
    committed = list(case.prompt)
    steps = list(decode(target, drafter, committed, case.settings))
    assert (committed[len(case.prompt) :], steps[-1].finish_reason) == expected(case)


@settings(max_examples=100, deadline=None)
@given(cases())
def test_plain_decoding_is_the_same_loop(fakes: SimpleNamespace, case: SimpleNamespace) -> None:
    target, committed = fakes.Target(case.choose), list(case.prompt)
    steps = list(decode(target, NoDraft(), committed, case.settings))
    assert (committed[len(case.prompt) :], steps[-1].finish_reason) == expected(case)
    assert all(step.drafted == 0 for step in steps)
    assert target.widths[-1] == case.settings.widths.width_for(1) or len(steps) == 1


@settings(max_examples=200, deadline=None)
@given(cases(), st.integers(0, 6))
def test_closing_early_leaves_prefixes_of_the_conversation(
    fakes: SimpleNamespace, case: SimpleNamespace, rounds: int
) -> None:
    target, draft = fakes.Target(case.choose), fakes.Draft(guesses(case))
    drafter = PardDrafter(draft, case.settings.chunk)
    committed = list(case.prompt)
    with closing(decode(target, drafter, committed, case.settings)) as steps:
        for _, _ in zip(range(rounds), steps, strict=False):
            pass
    check_caches(committed, target, draft)
    assert target.length < len(committed)  # the next token is chosen from a row yet to be computed
    # What is cached is good to go on from: the same conversation, continued, ends where it would have.
    list(decode(target, drafter, committed, Settings(5, 4, 200)))
    assert (
        committed
        == case.prompt + reference(case.choose, case.prompt, len(committed) - len(case.prompt), frozenset())[0]
    )


@settings(max_examples=100, deadline=None)
@given(cases(), st.integers(0, 8))
def test_a_step_that_fails_leaves_prefixes_of_the_conversation(
    fakes: SimpleNamespace, case: SimpleNamespace, fail_at: int
) -> None:
    target, draft = fakes.Target(case.choose, fail_at=fail_at), fakes.Draft(guesses(case))
    committed = list(case.prompt)
    try:
        list(decode(target, PardDrafter(draft), committed, case.settings))
    except RuntimeError as error:
        assert str(error) == "the device is gone"
    check_caches(committed, target, draft)


def test_an_interrupt_between_a_draft_and_its_rollback_leaves_no_masks(fakes: SimpleNamespace) -> None:
    draft, committed = fakes.Draft(lambda real, position: 0, interrupt_at=2), [1, 2]
    with pytest.raises(KeyboardInterrupt):
        list(decode(fakes.Target(lambda tokens: 1), PardDrafter(draft), committed, Settings(20, 5, 100)))
    assert draft.cache == committed


def test_a_perfect_draft_commits_k_and_a_bonus_each_round(fakes: SimpleNamespace) -> None:
    choose = lambda tokens: len(tokens) % VOCABULARY  # noqa: E731
    draft = fakes.Draft(lambda real, position: (len(real) + position) % VOCABULARY)
    steps = list(decode(fakes.Target(choose), PardDrafter(draft), [0], Settings(20, 4, 100)))
    assert [len(step.tokens) for step in steps] == [1, 5, 5, 5, 4]
    assert [step.drafted for step in steps] == [0, 4, 4, 4, 3]
    assert draft.fed == [2, 5, 5, 5]


def test_the_drafts_prefill_is_chunked_and_the_last_chunk_carries_the_masks(fakes: SimpleNamespace) -> None:
    draft = fakes.Draft(lambda real, position: 0)
    drafter = PardDrafter(draft, chunk=4)
    proposal = drafter.propose(list(range(11)), 3)
    assert draft.fed == [4, 4, 3]
    assert draft.cache == list(range(11))
    assert proposal.ids == (0, 0, 0)


def test_a_draft_cache_that_has_it_all_is_fed_the_last_token_again(fakes: SimpleNamespace) -> None:
    draft = fakes.Draft(lambda real, position: 0, cache=[1, 2, 3])
    PardDrafter(draft).propose([1, 2, 3], 2)
    assert (draft.fed, draft.cache) == ([1], [1, 2, 3])


def test_a_prompt_that_is_cached_already_is_computed_from_its_last_token(fakes: SimpleNamespace) -> None:
    target = fakes.Target(function(1), cache=[1, 2, 3])
    next(decode(target, NoDraft(), [1, 2, 3], Settings(3, 1, 100)))
    assert target.widths == [1]


def test_nothing_follows_eos_within_a_round(fakes: SimpleNamespace) -> None:
    choose = lambda tokens: len(tokens)  # noqa: E731
    draft = fakes.Draft(lambda real, position: len(real) + position)
    target, committed = fakes.Target(choose), [0]
    steps = list(decode(target, PardDrafter(draft), committed, Settings(6, 5, 100, frozenset({4}))))
    assert committed == [0, 1, 2, 3]
    assert (steps[-1].tokens, steps[-1].accepted, steps[-1].matched) == ((2, 3), 3, 3)
    assert steps[-1].finish_reason == "stop"


def test_eos_first_gives_no_token(fakes: SimpleNamespace) -> None:
    steps = list(decode(fakes.Target(lambda tokens: 4), NoDraft(), [0], Settings(6, 5, 100, frozenset({4}))))
    assert [(step.tokens, step.finish_reason) for step in steps] == [((), "stop")]


@pytest.mark.parametrize("k", [-1, DRAFT_LIMIT + 1])
def test_draft_lengths_out_of_range_are_refused(k: int) -> None:
    with pytest.raises(BadInput, match=f"draft_length must be from 0 to 32, not {k}"):
        Settings(8, k, 100)


def test_no_new_tokens_is_refused() -> None:
    with pytest.raises(BadInput, match="max_new_tokens must be at least 1, not 0"):
        Settings(0, 8, 100)


def test_a_prompt_without_room_for_one_token_is_refused() -> None:
    with pytest.raises(TooLong, match="the prompt has 10 tokens, but the capacity is 10"):
        Settings(8, 8, 10).room(10)
    assert Settings(8, 8, 10).room(9) == 1


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(BadInput, match="the prompt is empty"):
        Settings(8, 8, 10).room(0)


def test_masks_and_padding_fit_the_margin_of_the_buffers() -> None:
    assert DRAFT_LIMIT + 2 <= KV_MARGIN


@pytest.mark.parametrize("most", [5, 30])
@pytest.mark.parametrize("k", [0, 1, 3, 4, 5, 9])
def test_a_complete_text_ends_the_generation(fakes: SimpleNamespace, k: int, most: int) -> None:
    """Without a step for EOS, and without naming EOS where a draft's row has chosen it."""
    prompt, text, eos = [3], [1, 2, 3, 4, 5], 0

    def following(real: Sequence[int]) -> int:
        return [*text, eos][min(len(real) - len(prompt), len(text))]

    def right(real: Sequence[int], wanted: int) -> list[int]:
        return text[len(real) - len(prompt) :][:wanted]

    target, committed = fakes.Target(following), list(prompt)
    limits = Settings(max_new_tokens=most, draft_length=k, capacity=40, eos_ids=frozenset({eos}))
    steps = list(decode(target, fakes.Drafter(right), committed, limits, None, lambda tokens: tokens[1:] == text))
    assert committed == prompt + text
    assert (steps[-1].finish_reason, steps[-1].end) == ("stop", None)
    assert sum(len(step.tokens) for step in steps) == len(text)
    if k == 0:
        assert len(target.widths) == len(text), "a step for EOS"
