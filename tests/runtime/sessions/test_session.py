"""Sessions on toy graphs with real kernels, against attention written down in numpy."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from numpy.typing import NDArray

from pard_onnx.models.errors import BadArtifact, TooLong
from pard_onnx.models.manifest import Manifest
from pard_onnx.runtime.providers.table import provider_named
from pard_onnx.runtime.providers.threads import Threads
from pard_onnx.runtime.sessions.dynamic_shapes import FusedDraft, FusedTarget

CPU = provider_named("cpu")
IDS = [5, 17, 200, 3, 99, 42, 7, 7, 250, 1, 63, 128]


def rotate(x: NDArray[np.float32], cos: NDArray[np.float32], sin: NDArray[np.float32]) -> NDArray[np.float32]:
    a, b = np.split(x, 2, axis=-1)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def literal_logits(toy: ModuleType, ids: list[int], seed: int = 1) -> NDArray[np.float32]:
    """The toy target in numpy, no cache: [len(ids), rows]."""
    shape = toy.Shape()
    w, n, d = toy.weights(shape, seed), len(ids), shape.head_dim
    cos, sin = (table[:n] for table in toy.rotary_tables(shape.kv_rows, d))
    x = w["embed"][ids]
    for i in range(shape.layers):
        heads = (x @ w[f"qkv{i}"]).reshape(n, -1, d).transpose(1, 0, 2)
        q, k, v = heads[: shape.heads], heads[shape.heads : -shape.kv_heads], heads[-shape.kv_heads :]
        scores = rotate(q, cos, sin) @ rotate(k, cos, sin).transpose(0, 2, 1) / d**0.5
        scores = np.where(np.tri(n, dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        attention = weights / weights.sum(-1, keepdims=True) @ v
        x = x + attention.transpose(1, 0, 2).reshape(n, -1) @ w[f"o{i}"]
    logits = x @ w["head"]
    logits[:, shape.size :] = -np.inf
    return logits.astype(np.float32)


def open_target(folder: Path) -> FusedTarget:
    return FusedTarget(folder, Manifest.read(folder), CPU, Threads(1))


@pytest.fixture
def target(pair_folders: tuple[Path, Path]) -> FusedTarget:
    return open_target(pair_folders[0])


@pytest.fixture
def draft(pair_folders: tuple[Path, Path]) -> FusedDraft:
    return FusedDraft(pair_folders[1], Manifest.read(pair_folders[1]), CPU, Threads(1))


def test_steps_of_any_width_and_rollbacks_give_the_literal_logits(target: FusedTarget, toy: ModuleType) -> None:
    expected = literal_logits(toy, IDS)
    np.testing.assert_allclose(target.step(IDS[:5], 5).logits, expected[:5], rtol=1e-3, atol=1e-4)
    target.step([9, 9, 9, 9], 2)  # rejected
    target.rollback(5)
    np.testing.assert_allclose(target.step(IDS[5:6], 1).logits, expected[5:6], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(target.step(IDS[6:], 3).logits, expected[-3:], rtol=1e-3, atol=1e-4)
    assert target.length == len(IDS)
    target.rollback(0)
    np.testing.assert_allclose(target.step(IDS, 1).logits, expected[-1:], rtol=1e-3, atol=1e-4)


def test_the_buffers_last_row_is_usable(target: FusedTarget, toy: ModuleType) -> None:
    ids = (IDS * 20)[: toy.Shape().kv_rows]
    target.step(ids[:-3], 1)
    np.testing.assert_allclose(target.step(ids[-3:], 3).logits, literal_logits(toy, ids)[-3:], rtol=1e-3, atol=1e-4)


def test_a_step_past_the_buffers_is_refused_and_changes_nothing(target: FusedTarget, toy: ModuleType) -> None:
    rows = toy.Shape().kv_rows
    target.step([1] * (rows - 1), 1)
    with pytest.raises(TooLong, match=f"{rows - 1} tokens and 2 more exceed the {rows} rows of the KV cache"):
        target.step([1, 2], 1)
    assert target.length == rows - 1


def test_a_drafts_masks_count_against_the_bounds(draft: FusedDraft, toy: ModuleType) -> None:
    rows = toy.Shape().kv_rows
    draft.step([1] * (rows - 8), 1)
    with pytest.raises(TooLong):
        draft.step([1, 2], 8)
    draft.step([1], 8)
    assert draft.length == rows


@pytest.mark.parametrize("keep", [0, 3, -1])
def test_rows_that_the_step_does_not_have_are_refused(target: FusedTarget, keep: int) -> None:
    with pytest.raises(ValueError, match=f"{keep} rows of a step of 2"):
        target.step([1, 2], keep)


def test_empty_steps_are_refused(draft: FusedDraft) -> None:
    with pytest.raises(ValueError, match="a step needs at least one token"):
        draft.step([], 4)
    with pytest.raises(ValueError, match="a draft of 0 tokens"):
        draft.step([1], 0)


@pytest.mark.parametrize("length", [-1, 3])
def test_a_rollback_only_goes_back(target: FusedTarget, length: int) -> None:
    target.step([1, 2], 1)
    with pytest.raises(ValueError, match=f"a cache of 2 tokens cannot be rolled back to {length}"):
        target.rollback(length)


def test_decode_steps_reuse_their_buffers(target: FusedTarget) -> None:
    wide = target.step([1, 2, 3], 3).logits
    address = wide.ctypes.data
    assert target.step([1], 1).logits.ctypes.data == address
    assert target.step([1, 2, 3], 2).logits.ctypes.data == address


def test_drafts_are_the_last_rows_argmax_and_its_probability(draft: FusedDraft, toy: ModuleType) -> None:
    """The draft shares the target's weights, so its rows are the target's over the real tokens and the masks."""
    draft.step(IDS[:4], 3)
    draft.rollback(4)  # K may change from call to call
    drafts, probabilities = draft.step(IDS[4:6], 5)
    logits = literal_logits(toy, IDS[:6] + [toy.Shape().mask_id] * 4)[-5:, : toy.Shape().size]
    softmax = np.exp(logits - logits.max(-1, keepdims=True))
    softmax /= softmax.sum(-1, keepdims=True)
    assert drafts.tolist() == logits.argmax(-1).tolist()
    np.testing.assert_allclose(probabilities, softmax.max(-1), rtol=1e-3)
    assert draft.length == 6 + 4


def test_a_half_precision_cache(write_artifact: Callable[..., Path], toy: ModuleType, tmp_path: Path) -> None:
    half = open_target(write_artifact(tmp_path / "half", "target", precision="fp16", dtype="float16"))
    logits = half.step(IDS, 2).logits
    assert logits.dtype == np.float32
    size = toy.Shape().size
    np.testing.assert_allclose(logits[:, :size], literal_logits(toy, IDS)[-2:, :size], atol=0.5)


def test_a_graph_that_cannot_be_loaded_is_refused_in_one_line(
    pair_folders: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model.onnx").write_bytes(b"not a graph")
    with pytest.raises(BadArtifact, match=r"model\.onnx: is not a graph that pard-export writes") as caught:
        FusedTarget(tmp_path, Manifest.read(pair_folders[0]), CPU, Threads())
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().out == ""
