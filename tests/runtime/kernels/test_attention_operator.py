"""pard_onnx::GroupQueryAttention in ONNX Runtime: as com.microsoft's, but the same bits for every number of rows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import literal_attention as literal
import numpy as np
import onnxruntime as ort
import pytest
from one_node import attention_feeds as feeds
from one_node import attention_model as model
from one_node import session

from pard_onnx.runtime import kernels

pytestmark = pytest.mark.skipif(kernels.load() is None, reason="the kernels are not built")
OURS, THEIRS = "pard_onnx", "com.microsoft"
ROUNDING = 1e-5
Results = tuple[literal.Floats, literal.Floats, literal.Floats]


def run(opened: Any, step: literal.Step, packed: bool = True) -> Results:
    """[rows, heads, dim], and the caches in buffers of their own."""
    out, keys, values = opened.run(None, feeds(step, packed))
    return out.reshape(step.queries.shape), keys[0], values[0]


def finite(step: literal.Step) -> literal.Step:
    """ONNX Runtime multiplies what is not seen by zero."""
    return replace(step, key_cache=np.nan_to_num(step.key_cache), value_cache=np.nan_to_num(step.value_cache))


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(12, 2, 128), (14, 2, 64), (4, 4, 32), (3, 1, 16)])
def test_equals_onnxruntimes(heads: int, kv_heads: int, dim: int, packed: bool) -> None:
    rng = np.random.default_rng(dim)
    for rows, past in [(1, 0), (1, 100), (2, 62), (9, 256), (40, 0), (33, 50)]:
        step = finite(literal.random_step(rng, rows, past, heads, kv_heads, dim, spare=20))
        _, magnitude, _, _ = literal.attention(step)
        ours, theirs = (run(session(model(step, domain, packed)), step, packed) for domain in (OURS, THEIRS))
        assert (np.abs(ours[0] - theirs[0]) <= ROUNDING * magnitude).all(), (rows, past)
        end = past + rows
        for cache, expected in zip(ours[1:], theirs[1:], strict=True):
            np.testing.assert_allclose(cache[:, :end], expected[:, :end], rtol=0, atol=1e-6)


def test_the_scale_has_a_default() -> None:
    step = finite(literal.random_step(np.random.default_rng(0), 3, 20, 4, 2, 64))
    ours, theirs = (run(session(model(step, domain, scale=None)), step) for domain in (OURS, THEIRS))
    np.testing.assert_allclose(ours[0], theirs[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("rows", "pasts"), [(1, (5, 20, 0)), (6, (0, 0, 0))])
def test_batches(rows: int, pasts: tuple[int, ...]) -> None:
    """One row behind pasts of different lengths, or first steps, of which some are padded behind."""
    rng = np.random.default_rng(1)
    capacity, valid = 30, [rows, max(1, rows - 2), rows]
    steps = [finite(literal.random_step(rng, rows, past, 4, 2, 32, capacity - rows - past)) for past in pasts]
    parts = [feeds(step) for step in steps]
    joined = {name: np.concatenate([part[name] for part in parts]) for name in ("query", "past_key", "past_value")}
    lasts = [past + count - 1 for past, count in zip(pasts, valid, strict=True)]
    joined |= {"seqlens_k": np.array(lasts, np.int32), "total": np.array(max(lasts) + 1, np.int32)}
    ours = session(model(steps[0], OURS, scale=0.2)).run(None, joined)
    theirs = session(model(steps[0], THEIRS, scale=0.2)).run(None, joined)
    for b, count in enumerate(valid):
        np.testing.assert_allclose(ours[0][b, :count], theirs[0][b, :count], rtol=0, atol=1e-5)
        for mine, other in zip(ours[1:], theirs[1:], strict=True):
            np.testing.assert_allclose(mine[b, :, : lasts[b] + 1], other[b, :, : lasts[b] + 1], rtol=0, atol=1e-6)


class Bound:
    """Past and present in one buffer, as the runtime has them."""

    def __init__(self, opened: Any, step: literal.Step) -> None:
        self.opened = opened
        self.caches = np.stack([step.key_cache, step.value_cache])[:, None].copy()

    def run(self, step: literal.Step) -> literal.Floats:
        binding = self.opened.io_binding()
        for name, array in feeds(step).items():
            binding.bind_cpu_input(name, np.asarray(array))
        for name, cache in zip(("key", "value"), self.caches, strict=True):
            wrapped = ort.OrtValue.ortvalue_from_numpy(cache)
            binding.bind_ortvalue_input(f"past_{name}", wrapped)
            binding.bind_ortvalue_output(f"present_{name}", wrapped)
        out = np.empty((1, step.rows, step.queries[0].size), np.float32)
        binding.bind_ortvalue_output("output", ort.OrtValue.ortvalue_from_numpy(out))
        self.opened.run_with_iobinding(binding)
        return out.reshape(step.queries.shape)


def test_rows_are_the_same_for_every_number_of_rows_and_threads_in_a_shared_buffer() -> None:
    """With rollbacks: each split runs over what the one before it left behind."""
    step = literal.random_step(np.random.default_rng(2), 40, 100, 12, 2, 64, spare=5)
    expected = run(session(model(step, OURS), 1), step)
    for threads in range(1, 9):
        bound = Bound(session(model(step, OURS), threads), step)
        for widths in ([1] * 40, [2, 3, 5, 9, 16, 5], [40], [33, 1, 6]):
            first = 0
            for width in widths:
                out = bound.run(step.part(first, first + width, step.key_cache, step.value_cache))
                assert out.tobytes() == expected[0][first : first + width].tobytes(), (threads, widths, first)
                first += width
            for cache, whole in zip(bound.caches, expected[1:], strict=True):
                assert cache.tobytes() == whole.tobytes()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kv_num_heads": 3}, "num_heads is no multiple of kv_num_heads"),
        ({"num_heads": -4}, "GroupQueryAttention: num_heads -4"),
        ({"do_rotary": 0}, "do_rotary is not 1"),
    ],
)
def test_refused(changes: dict[str, Any], words: str) -> None:
    step = literal.random_step(np.random.default_rng(0), 1, 4, 4, 2, 16)
    with pytest.raises(Exception, match=words):
        session(model(step, OURS, **changes))


ROWS = np.zeros((1, 3, 128), np.float32)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"seqlens_k": np.array([30], np.int32), "total": np.array(31, np.int32)},
            "seqlens_k 30, .* the cache has 25 rows",
        ),
        ({"seqlens_k": np.array([23], np.int32)}, "seqlens_k 23, total_sequence_length 23"),
        ({"seqlens_k": np.array([-1], np.int32)}, "seqlens_k -1"),
        ({"seqlens_k": np.array([1], np.int32)}, "fewer than the step's 3 rows"),
        ({"seqlens_k": np.array([1, 2], np.int32)}, "seqlens_k is not .batch."),
        ({"query": ROWS[:, :, 1:]}, "query is not .num_heads"),
        ({"query": np.zeros((2, 3, 128), np.float32)}, "query is not .batch"),
        ({"past_value": np.zeros((1, 2, 24, 16), np.float32)}, "the past not .batch"),
        ({name: np.zeros((1, 2, 25, 8), np.float32) for name in ("past_key", "past_value")}, "head_dim 8 is no"),
        (
            {name: np.zeros((1, 2, 99, 16), np.float32) for name in ("past_key", "past_value")}
            | {"total": np.array(60, np.int32), "seqlens_k": np.array([59], np.int32)},
            "cos_cache has 25 rows for 60 tokens",
        ),
    ],
)
def test_refused_steps(changes: dict[str, Any], words: str) -> None:
    step = literal.random_step(np.random.default_rng(0), 3, 20, 4, 2, 16, spare=2)
    opened = session(model(step, OURS))
    with pytest.raises(Exception, match=words):
        opened.run(None, feeds(step, **changes))


def test_refused_batch_and_parts() -> None:
    step = literal.random_step(np.random.default_rng(0), 3, 20, 4, 2, 16)
    given = feeds(step)
    twice = {name: np.concatenate([given[name]] * 2) for name in ("query", "past_key", "past_value", "seqlens_k")}
    with pytest.raises(Exception, match="take a batch of 1"):
        session(model(step, OURS)).run(None, given | twice)
    with pytest.raises(Exception, match="key or value not"):
        session(model(step, OURS, packed=False)).run(None, feeds(step, False, key=ROWS[:, :, :16]))


def test_an_empty_step() -> None:
    step = literal.random_step(np.random.default_rng(0), 1, 20, 4, 2, 16, spare=2)
    out, keys, _ = session(model(step, OURS)).run(None, feeds(step, query=ROWS[:, :0]))
    assert out.shape == (1, 0, 64) and keys.tobytes() == step.key_cache.tobytes()
