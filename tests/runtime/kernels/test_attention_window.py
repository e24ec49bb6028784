"""Attention with a window, and without rotary embedding: literal, the same bits for every number of rows, as ORT's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import literal_attention as literal
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from one_node import of_one_node, session
from onnx import ModelProto, TensorProto, helper

from pard_onnx.runtime import kernels

pytestmark = pytest.mark.skipif(kernels.load() is None, reason="the kernels are not built")
ROUNDING = 1e-5  # of the weighted magnitudes
OURS, THEIRS = "pard_onnx", "com.microsoft"
Results = tuple[literal.Floats, literal.Floats, literal.Floats]


def same(a: Results, b: Results) -> bool:
    return all(x.tobytes() == y.tobytes() for x, y in zip(a, b, strict=True))


def require_literal(step: literal.Step, results: Results) -> None:
    out, magnitude, keys, values = literal.attention(step)
    assert (np.abs(results[0] - out) <= ROUNDING * magnitude).all()
    np.testing.assert_allclose(results[1], keys, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(results[2], values.astype(np.float32))


def unturned(step: literal.Step) -> literal.Step:
    """Without rotary tables."""
    none = np.zeros((len(step.cosines), 0), np.float32)
    return replace(step, cosines=none, sines=none)


CASES = st.tuples(st.integers(1, 80), st.integers(0, 300), st.integers(1, 8), st.integers(1, 3), st.integers(1, 4))
WINDOWS = st.one_of(st.integers(0, 12), st.integers(50, 140), st.integers(200, 400))


@given(case=CASES, window=WINDOWS, seed=st.integers(0, 2**32 - 1), threads=st.integers(1, 4), turned=st.booleans())
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_fuzz(
    native: Any, isas: list[str], case: tuple[int, ...], window: int, seed: int, threads: int, turned: bool
) -> None:
    rows, past, group, kv_heads, sixteens = case
    rng = np.random.default_rng(seed)
    step = literal.random_step(rng, rows, past, group * kv_heads, kv_heads, 16 * sixteens, spare=3)
    step = replace(step if turned else unturned(step), window=window)
    results = native.attention(isas[0], step, threads)
    require_literal(step, results)
    for isa in isas[1:]:
        assert same(native.attention(isa, step), results), isa


@pytest.mark.parametrize("window", [1, 5, 63, 64, 65, 130])
def test_a_row_does_not_depend_on_its_neighbours_nor_on_threads(native: Any, isas: list[str], window: int) -> None:
    """Nor on what lies before its window, which may be NaN."""
    step = replace(literal.random_step(np.random.default_rng(window), 150, 100, 6, 2, 32), window=window)
    for isa in isas:
        rows = 20 if isa == "reference" else step.rows
        whole = step.part(0, rows, step.key_cache, step.value_cache)
        outs, keys, values = [], step.key_cache, step.value_cache
        for row in range(rows):
            first = max(0, step.past + row + 1 - window)
            spoiled = keys.copy(), values.copy()
            for cache in spoiled:
                cache[:, :first] = np.nan
            outs.append(native.attention(isa, step.part(row, row + 1, *spoiled))[0])
            _, keys, values = native.attention(isa, step.part(row, row + 1, keys, values))
        alone = np.concatenate(outs), keys, values
        for threads in range(1, 9):
            assert same(native.attention(isa, whole, threads), alone), (isa, threads)


def test_a_window_that_holds_everything_changes_no_bit(native: Any, isas: list[str]) -> None:
    step = literal.random_step(np.random.default_rng(1), 40, 200, 6, 2, 64)
    for isa in isas:
        expected = native.attention(isa, step)
        assert same(native.attention(isa, replace(step, window=240)), expected)
        assert not same(native.attention(isa, replace(step, window=239)), expected)


def model(step: literal.Step, domain: str, turned: bool) -> ModelProto:
    caches, lengths, tables = ["past_key", "past_value"], ["seqlens_k", "total"], ["cos", "sin"] if turned else []
    outputs = ["output", "present_key", "present_value"]
    counts = {"num_heads": step.queries.shape[1], "kv_num_heads": step.keys.shape[1]}
    window = {"local_window_size": step.window} if step.window else {}
    node = helper.make_node(
        "GroupQueryAttention",
        ["query", "", "", *caches, *lengths, *tables],
        outputs,
        domain=domain,
        **counts,
        scale=step.scale,
        do_rotary=int(turned),
        **window,
    )
    tensor = helper.make_tensor_value_info
    return of_one_node(
        node,
        [
            tensor("query", TensorProto.FLOAT, ["batch", "rows", None]),
            *(tensor(name, TensorProto.FLOAT, ["batch", None, None, None]) for name in caches),
            tensor("seqlens_k", TensorProto.INT32, [None]),
            tensor("total", TensorProto.INT32, []),
        ],
        [tensor(name, TensorProto.FLOAT, None) for name in outputs],
        {"cos": step.cosines, "sin": step.sines} if turned else {},
    )


def run(step: literal.Step, domain: str, turned: bool) -> Results:
    feeds = {
        "query": step.packed(),
        "past_key": np.nan_to_num(step.key_cache)[None],
        "past_value": np.nan_to_num(step.value_cache)[None],
        "seqlens_k": np.array([step.past + step.rows - 1], np.int32),
        "total": np.array(step.past + step.rows, np.int32),
    }
    out, keys, values = session(model(step, domain, turned)).run(None, feeds)
    return out.reshape(step.queries.shape), keys[0], values[0]


@pytest.mark.parametrize("turned", [True, False])
@pytest.mark.parametrize(("rows", "past", "window"), [(1, 100, 8), (9, 256, 64), (40, 0, 8), (33, 50, 1), (9, 90, 0)])
def test_the_operator_equals_onnxruntimes(rows: int, past: int, window: int, turned: bool) -> None:
    """Whose window is that of transformers: the token itself and window - 1 before it."""
    step = replace(literal.random_step(np.random.default_rng(rows), rows, past, 6, 2, 32, spare=9), window=window)
    step = step if turned else unturned(step)
    out, magnitude, _, _ = literal.attention(step)
    ours, theirs = (run(step, domain, turned) for domain in (OURS, THEIRS))
    for found in (ours, theirs):
        assert (np.abs(found[0] - out) <= ROUNDING * magnitude).all()
    for cache, expected in zip(ours[1:], theirs[1:], strict=True):
        np.testing.assert_allclose(cache[:, : past + rows], expected[:, : past + rows], rtol=0, atol=1e-6)


def test_tables_and_do_rotary_must_agree() -> None:
    step = literal.random_step(np.random.default_rng(0), 1, 4, 4, 2, 16)
    proto = model(step, OURS, turned=False)
    (attribute,) = [a for a in proto.graph.node[0].attribute if a.name == "do_rotary"]
    attribute.i = 1
    with pytest.raises(Exception, match="do_rotary is 1, and there are no rotary tables"):
        session(proto)
