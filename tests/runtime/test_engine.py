"""Several sequences in one engine: their runs take turns round by round, and each writes what it would write alone."""

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pard_onnx import Failure, Options, Pair, Sampling, load
from pard_onnx.runtime.engine import Engine
from pard_onnx.runtime.sequence import Sequence
from pard_onnx.runtime.sessions.session import Rows
from pard_onnx.testing import ScriptedDrafter, Step

PROMPTS = ([1, 2, 3], [4, 5], [6, 7, 8, 9] * 5, list(range(40, 60)))
OPTIONS = (
    Options(max_new_tokens=20, draft_length=5),
    Options(max_new_tokens=24),
    Options(max_new_tokens=15, draft_length=0),
    Options(max_new_tokens=18, draft_length=3, sampling=Sampling(temperature=1.3, seed=7)),
)


@pytest.fixture(scope="module")
def pair(pair_folders: tuple[Path, Path]) -> Iterator[Pair]:
    with load(*pair_folders, threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def engine(pair: Pair) -> Engine:
    return pair.engine


@pytest.fixture(scope="module")
def alone(engine: Engine) -> list[list[int]]:
    """What each prompt's run writes if it runs by itself."""
    out = []
    for ids, options in zip(PROMPTS, OPTIONS, strict=True):
        sequence = started(engine, ids)
        out.append(tokens_of(engine.run(sequence, options, seed=7)))
    return out


def started(engine: Engine, ids: list[int]) -> Sequence:
    sequence = engine.new_sequence()
    sequence.continue_with(ids)
    return sequence


def tokens_of(run: Iterator[Step]) -> list[int]:
    return [token for step in run for token in step.tokens]


@settings(max_examples=25, deadline=None)
@given(order=st.lists(st.integers(0, 3), min_size=1, max_size=60))
def test_runs_take_turns_in_any_order(engine: Engine, alone: list[list[int]], order: list[int]) -> None:
    sequences = [started(engine, ids) for ids in PROMPTS]
    runs = [engine.run(one, options, seed=7) for one, options in zip(sequences, OPTIONS, strict=True)]
    found: list[list[int]] = [[] for _ in runs]
    for turn in order:
        step = next(runs[turn], None)
        found[turn] += step.tokens if step else ()
    for turn, run in enumerate(runs):
        found[turn] += tokens_of(run)
    assert found == alone
    for sequence, ids, tokens in zip(sequences, PROMPTS, found, strict=True):
        assert sequence.tokens == [*ids, *tokens]


def test_runs_in_threads_of_their_own(engine: Engine, alone: list[list[int]]) -> None:
    found: list[list[int]] = [[] for _ in PROMPTS]

    def write(turn: int) -> None:
        found[turn] = tokens_of(engine.run(started(engine, PROMPTS[turn]), OPTIONS[turn], seed=7))

    threads = [threading.Thread(target=write, args=(turn,)) for turn in range(len(PROMPTS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == alone


def test_a_draft_on_a_device_of_its_own_serves_several(
    pair_folders: tuple[Path, Path], device: Callable[..., Any], alone: list[list[int]]
) -> None:
    device("WebGpuExecutionProvider")
    with load(*pair_folders, draft_provider="webgpu", threads=1) as pair:
        runs = [pair.engine.run(started(pair.engine, ids), options, seed=7)
                for ids, options in zip(PROMPTS, OPTIONS, strict=True)]  # fmt: skip
        rounds = list(zip_longest(*runs))
    found = [[token for steps in rounds if steps[turn] for token in steps[turn].tokens] for turn in range(len(runs))]
    assert found == alone


def test_a_stream_is_read_while_another_sequence_runs(pair: Pair, alone: list[list[int]]) -> None:
    expected = pair.generate("the quick", max_new_tokens=20).tokens
    run = pair.engine.run(started(pair.engine, PROMPTS[0]), OPTIONS[0])
    other, tokens = [], []
    with pair.stream("the quick", max_new_tokens=20) as stream:
        for chunk in stream:
            tokens += chunk.tokens
            other += [token for step in [next(run, None)] if step for token in step.tokens]
    assert tuple(tokens) == expected
    assert other + tokens_of(run) == alone[0]


def test_a_fork_goes_on_by_itself(engine: Engine, alone: list[list[int]]) -> None:
    sequence = started(engine, PROMPTS[0])
    run = engine.run(sequence, OPTIONS[0])
    first = [*next(run).tokens, *next(run).tokens]
    run.close()
    copy = sequence.fork(engine.new_sequence)
    assert copy.tokens == sequence.tokens and copy.target.length == sequence.target.length > 0
    for one in (copy, sequence):
        rest = Options(max_new_tokens=OPTIONS[0].max_new_tokens - len(first), draft_length=2)
        assert first + tokens_of(engine.run(one, rest)) == alone[0]
    before = copy.target.read(0, copy.target.length)
    sequence.truncate(1)
    tokens_of(engine.run(sequence, Options(max_new_tokens=9)))
    np.testing.assert_array_equal(copy.target.read(0, copy.target.length), before)


def test_a_sequence_that_was_cut_off_goes_on(engine: Engine, alone: list[list[int]]) -> None:
    """A run that is closed in the middle leaves a sequence that another run continues to the same text."""
    for rounds in range(5):
        sequence = started(engine, PROMPTS[2])
        with closing(engine.run(sequence, OPTIONS[2])) as run:
            for _ in range(rounds):
                next(run)
        done = len(sequence.tokens) - len(PROMPTS[2])
        if left := OPTIONS[2].max_new_tokens - done:
            tokens_of(engine.run(sequence, Options(max_new_tokens=left, draft_length=4)))
        assert sequence.tokens[len(PROMPTS[2]) :] == alone[2]


def test_a_run_that_garbage_collection_closes_in_the_middle_of_another_round_blocks_nothing(
    engine: Engine, alone: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    session = engine.models[0].session
    step = session.step
    cycle: list[object] = [engine.run(started(engine, PROMPTS[1]), OPTIONS[2])]
    cycle.append(cycle)
    next(cycle[0])  # type: ignore[call-overload]

    def collected(ids: list[int], keep: int) -> Rows:
        gc.collect()
        return step(ids, keep)

    monkeypatch.setattr(session, "step", collected)
    run = engine.run(started(engine, PROMPTS[0]), OPTIONS[0])
    del cycle
    assert tokens_of(run) == alone[0]


def test_an_ended_sequence_leaves_no_memory_behind(engine: Engine) -> None:
    sequence = started(engine, PROMPTS[0])
    tokens_of(engine.run(sequence, OPTIONS[0]))
    memory = weakref.ref(sequence.target._arrays[0])
    del sequence
    assert memory() is None


def test_a_drafter_of_ones_own_reads_what_the_graph_gives(
    engine: Engine, alone: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two sequences in turns, on a target whose features are made up here: of token t at position p, [p, t]."""
    session = engine.models[0].session
    step = session.step

    def with_features(ids: list[int], keep: int, wanted: bool = False) -> Rows:
        first = session.length
        rows = step(ids, keep)
        features = np.array([[first + index, token] for index, token in enumerate(ids)], np.float32)
        return Rows(rows.logits, features)

    monkeypatch.setattr(session, "step", with_features)
    sequences = [started(engine, PROMPTS[turn]) for turn in (2, 3)]

    def drafter(sequence: Sequence, options: Options, _: object) -> ScriptedDrafter:
        return ScriptedDrafter(lambda tokens, k: tokens[-k:], reads_features=True, memory=sequence.memory)

    options = Options(max_new_tokens=15, draft_length=4)
    runs = [engine.run(one, options, make_drafter=drafter) for one in sequences]
    for _ in zip_longest(*runs):
        pass
    assert sequences[0].tokens[len(PROMPTS[2]) :] == alone[2]
    for one in sequences:
        assert len(one.memory.features) == one.target.length == len(one.tokens) - 1
        assert [row.tolist() for row in one.memory.features] == [[p, t] for p, t in enumerate(one.tokens[:-1])]


def test_a_closed_engine_says_so(pair_folders: tuple[Path, Path]) -> None:
    with load(*pair_folders, threads=1) as pair:
        sequence = started(pair.engine, PROMPTS[0])
    with pytest.raises(Failure, match="this pair is closed"):
        next(pair.engine.run(sequence, OPTIONS[0]))
    with pytest.raises(Failure, match="this pair is closed"):
        pair.engine.new_sequence()
