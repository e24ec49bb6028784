"""Static graphs through the runtime's sessions: the same numbers as the dynamic graph's, whatever the schedule."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pard_onnx import Pair, load
from pard_onnx.models.errors import TooLong
from pard_onnx.models.manifest import Manifest, StaticGraph
from pard_onnx.runtime.model import session_class
from pard_onnx.runtime.providers.table import provider_named
from pard_onnx.runtime.providers.threads import Threads
from pard_onnx.runtime.sessions.dynamic_shapes import PortableDraft, PortableTarget
from pard_onnx.runtime.sessions.fixed_shapes import FixedShapesDraft, FixedShapesTarget, plan_calls

Exported = Callable[..., tuple[Path, Path]]
GRAPHS = (StaticGraph("a", 1, True), StaticGraph("b", 5, True), StaticGraph("c", 16, False))


@given(tokens=st.integers(1, 200), wanted=st.integers(1, 200), fill=st.booleans())
def test_pieces_hold_the_step_and_give_what_is_wanted(tokens: int, wanted: int, fill: bool) -> None:
    wanted = min(tokens, wanted)
    graphs = GRAPHS if fill else GRAPHS[:2]
    plan = plan_calls(graphs, tokens, wanted)
    assert sum(count for _, count in plan) == tokens
    assert all(0 < count <= graph.width for graph, count in plan)
    after = 0
    for graph, count in reversed(plan):
        assert graph.logits or after >= wanted
        after += count
    assert len(plan) <= -(-tokens // 5) + 1


def test_a_step_takes_the_narrowest_graph() -> None:
    assert plan_calls(GRAPHS, 1, 1) == [(GRAPHS[0], 1)]
    assert plan_calls(GRAPHS, 2, 1) == [(GRAPHS[1], 2)]
    assert plan_calls(GRAPHS, 5, 5) == [(GRAPHS[1], 5)]
    assert plan_calls(GRAPHS, 6, 6) == [(GRAPHS[1], 5), (GRAPHS[0], 1)]
    assert plan_calls(GRAPHS, 16, 1) == [(GRAPHS[2], 15), (GRAPHS[0], 1)]


def opened(folder: Path) -> object:
    manifest = Manifest.read(folder)
    return session_class(manifest)(folder, manifest, provider_named("cpu"), Threads(1))


FUSED: dict[str, Any] = {}
DYNAMIC = {"attention": "portable", "device": "cpu"}
FIXED = {
    "target": {**DYNAMIC, "static": True, "draft_length": 4, "verify": False},
    "draft": {"device": "npu", "draft_length": 3, "verify": False},
}


@pytest.fixture(scope="module")
def targets(exported: Exported) -> tuple[PortableTarget, FixedShapesTarget]:
    dynamic, fixed = (opened(exported("qwen2", "target", "fp32", **o)[1]) for o in (DYNAMIC, FIXED["target"]))
    assert isinstance(dynamic, PortableTarget) and isinstance(fixed, FixedShapesTarget)
    return dynamic, fixed


@pytest.fixture(scope="module")
def drafts(exported: Exported) -> tuple[PortableDraft, FixedShapesDraft]:
    dynamic, fixed = (opened(exported("qwen2", "draft", "fp32", **o)[1]) for o in (DYNAMIC, FIXED["draft"]))
    assert isinstance(dynamic, PortableDraft) and isinstance(fixed, FixedShapesDraft)
    return dynamic, fixed


STEPS = st.lists(st.tuples(st.integers(0, 12), st.integers(1, 24), st.integers(1, 9)), min_size=1, max_size=8)
SHARED = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@SHARED
@given(steps=STEPS)
def test_targets_agree(targets: tuple[PortableTarget, FixedShapesTarget], steps: list[tuple[int, int, int]]) -> None:
    dynamic, fixed = targets
    random = np.random.default_rng(0)
    for session in targets:
        session.rollback(0)
    for back, count, keep in steps:
        ids = random.integers(0, 300, count).tolist()
        rows = []
        for session in targets:
            session.rollback(max(0, session.length - back))
            rows.append(session.step(ids, min(keep, count)).logits[:, :300].copy())
        np.testing.assert_allclose(rows[1], rows[0], atol=1e-5)
        assert dynamic.length == fixed.length


@SHARED
@given(steps=STEPS)
def test_drafts_agree(drafts: tuple[PortableDraft, FixedShapesDraft], steps: list[tuple[int, int, int]]) -> None:
    random = np.random.default_rng(1)
    for session in drafts:
        session.rollback(0)
    for back, count, draft_length in steps:
        ids = random.integers(0, 300, count).tolist()
        found = []
        for session in drafts:
            session.rollback(max(0, session.length - back))
            tokens, probabilities = session.step(ids, draft_length)
            found.append((tokens.tolist(), probabilities.copy()))
            session.rollback(session.length - draft_length + 1)
        assert found[1][0] == found[0][0]
        np.testing.assert_allclose(found[1][1], found[0][1], rtol=1e-4)


def test_the_last_row_for_tokens_is_usable_and_no_other(targets: tuple[PortableTarget, FixedShapesTarget]) -> None:
    for session in targets:
        session.rollback(0)
        rows = session.manifest.token_rows
        assert session.cache.rows == rows == session.manifest.capacity + 64
        session.step([7] * (rows - 3), 1)
        with pytest.raises(TooLong, match=f"{rows - 3} tokens and 4 more exceed the {rows} rows"):
            session.step([1] * 4, 1)
        session.step([1, 2, 3], 3)
        assert session.length == rows


def test_empty_and_impossible_steps(
    targets: tuple[PortableTarget, FixedShapesTarget], drafts: tuple[PortableDraft, FixedShapesDraft]
) -> None:
    for target in targets:
        with pytest.raises(ValueError, match="3 rows of a step of 2"):
            target.step([1, 2], 3)
    for draft in drafts:
        with pytest.raises(ValueError, match="a step needs at least one token"):
            draft.step([], 4)
        with pytest.raises(ValueError, match="a draft of 0 tokens"):
            draft.step([1], 0)


def test_before_step_is_called_before_every_step(targets: tuple[PortableTarget, FixedShapesTarget]) -> None:
    for session in targets:
        session.rollback(0)
        calls: list[int] = []
        session.attach(session.cache, lambda calls=calls: calls.append(1))  # type: ignore[misc]
        session.step([1] * 30, 1)
        session.attach(session.cache)
        assert calls == [1]


PROMPT = list(range(20, 45))


@pytest.fixture(scope="module")
def pairs(exported: Exported) -> list[Pair]:
    folders = {
        role: [exported("qwen2", role, "fp32", **form)[1] for form in (FUSED, DYNAMIC, FIXED[role])]
        for role in ("target", "draft")
    }
    chosen = [(0, 0), (1, 1), (2, 2), (0, 1), (0, 2), (2, 0), (1, 2)]
    return [load(folders["target"][t], folders["draft"][d]) for t, d in chosen]


def test_all_pairs_and_mixed_ones_say_the_same(pairs: list[Pair]) -> None:
    expected = pairs[0].generate(PROMPT, max_new_tokens=40, draft_length=0).tokens
    for pair in pairs:
        for options in ({}, {"draft_length": 0}, {"draft_length": 5}, {"draft_length": 12}):
            found = pair.generate(PROMPT, max_new_tokens=40, **options)  # type: ignore[arg-type]
            assert found.tokens == expected
    drawn = {pair.generate(PROMPT, max_new_tokens=30, seed=3, temperature=0.8).tokens for pair in pairs[1:3]}
    assert len(drawn) == 1


def test_conversations_are_kept_and_restored(pairs: list[Pair], tmp_path: Path) -> None:
    for index, pair in enumerate(pairs[1:3]):
        chat = pair.chat()
        chat.send("the quick brown fox", max_new_tokens=8)
        chat.save(tmp_path / f"{index}.chat")
        again = chat.send("jumps over", max_new_tokens=8)
        assert again.stats.cached_tokens > 10
        restored = pair.restore(tmp_path / f"{index}.chat")
        assert restored.send("jumps over", max_new_tokens=8).tokens == again.tokens
