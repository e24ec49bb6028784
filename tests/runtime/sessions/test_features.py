"""Hidden states out of a target's graph and into a draft's, against attention written down in numpy."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import save

from pard_onnx.models.manifest import File, Manifest, StaticGraph
from pard_onnx.runtime.model import session_class
from pard_onnx.runtime.providers.table import provider_named
from pard_onnx.runtime.providers.threads import Threads
from pard_onnx.runtime.sessions.dynamic_shapes import FusedDraft, FusedTarget
from pard_onnx.runtime.sessions.single_step import SingleStepDraft, SingleStepTarget

CPU = provider_named("cpu")
LAYERS = (-1, -2)
IDS = [5, 17, 200, 3, 99, 42, 7, 7, 250, 1, 63, 128]
CLOSE = {"float32": 1e-4, "float16": 0.06}


@pytest.fixture(scope="module", params=["float32", "float16"])
def folders(
    request: pytest.FixtureRequest, write_artifact: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    root, dtype = tmp_path_factory.mktemp("features"), request.param
    more = {"precision": {"float32": "fp32", "float16": "fp16"}[dtype], "dtype": dtype, "features": LAYERS}
    return write_artifact(root / "target", "target", **more), write_artifact(root / "draft", "draft", bias=True, **more)


def open_target(folder: Path) -> FusedTarget:
    return FusedTarget(folder, Manifest.read(folder), CPU, Threads(1))


def open_draft(folder: Path) -> FusedDraft:
    return FusedDraft(folder, Manifest.read(folder), CPU, Threads(1))


def literal(toy: ModuleType, ids: list[int], added: NDArray[Any] | None = None) -> list[NDArray[Any]]:
    """The rows before each layer and after the last, in numpy; added: to the embedding's."""
    shape = toy.Shape(features=LAYERS, bias=True)
    w, n, d = toy.weights(shape, 1), len(ids), shape.head_dim
    cos, sin = (table[:n] for table in toy.rotary_tables(shape.kv_rows, d))

    def rotate(x: NDArray[Any]) -> NDArray[Any]:
        a, b = np.split(x, 2, axis=-1)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    states = [w["embed"][ids] if added is None else w["embed"][ids] + added @ w["projection"]]
    for i in range(shape.layers):
        heads = (states[-1] @ w[f"qkv{i}"]).reshape(n, -1, d).transpose(1, 0, 2)
        q, k, v = heads[: shape.heads], heads[shape.heads : -shape.kv_heads], heads[-shape.kv_heads :]
        scores = rotate(q) @ rotate(k).transpose(0, 2, 1) / d**0.5
        scores = np.exp(np.where(np.tri(n, dtype=bool), scores, -np.inf))
        attention = scores / scores.sum(-1, keepdims=True) @ v
        states.append(states[-1] + attention.transpose(1, 0, 2).reshape(n, -1) @ w[f"o{i}"])
    return states


def literal_features(toy: ModuleType, ids: list[int]) -> NDArray[Any]:
    states = literal(toy, ids)
    return np.concatenate([states[layer] for layer in LAYERS], axis=1)


def close(actual: NDArray[Any], expected: NDArray[Any], folder: Path) -> None:
    limit = CLOSE[Manifest.read(folder).recipe.floats]
    assert np.abs(actual - expected).max() <= limit * np.abs(expected).max()


def test_a_step_gives_the_features_of_all_its_tokens(folders: tuple[Path, Path], toy: ModuleType) -> None:
    target, expected = open_target(folders[0]), literal_features(toy, IDS)
    logits = open_target(folders[0])
    for first, last, keep in ((0, 5, 1), (5, 6, 1), (6, 12, 3)):
        rows, plain = target.step(IDS[first:last], keep, True), logits.step(IDS[first:last], keep)
        assert rows.features is not None and plain.features is None
        assert rows.features.dtype == Manifest.read(folders[0]).recipe.floats
        close(rows.features, expected[first:last], folders[0])
        assert rows.logits.shape == plain.logits.shape
        np.testing.assert_allclose(rows.logits[:, :280], plain.logits[:, :280], rtol=1e-3, atol=1e-3)
        target.step([1, 2], 1)  # nobody reads its features
        target.rollback(last)


def test_a_chunk_of_a_prompt_costs_no_logits(folders: tuple[Path, Path], toy: ModuleType) -> None:
    """All tokens' features are wanted, but only the last one's logits, which a large LM head computes."""
    target, ids = open_target(folders[0]), IDS * 7
    rows = target.step(ids, 2, True)
    assert len(target._logits) == 2
    expected = literal(toy, ids)[-1][-2:] @ toy.weights(toy.Shape(), 1)["head"]
    close(rows.logits[:, :280], expected[:, :280], folders[0])
    assert rows.features is not None
    close(rows.features, literal_features(toy, ids), folders[0])


def test_an_output_that_nobody_reads_is_not_bound(folders: tuple[Path, Path]) -> None:
    """It would be copied in each step."""
    target = open_target(folders[0])
    target.step(IDS, 1)
    before = len(target._binding.get_outputs())
    target.step([1], 1, True)
    assert len(target._binding.get_outputs()) == before + 1
    target.step([1], 1)
    assert len(target._binding.get_outputs()) == before


def draft_rows(toy: ModuleType, ids: list[int], features: NDArray[Any] | None, k: int) -> NDArray[Any]:
    """The draft's logits of the last k rows, masks included."""
    masked = [*ids, *[toy.Shape().mask_id] * (k - 1)]
    added = None if features is None else np.concatenate([features, *[features[-1:]] * (k - 1)])
    states = literal(toy, masked, added)
    return states[-1][-k:] @ toy.weights(toy.Shape(features=LAYERS, bias=True), 1)["head"][:, :280]


def test_a_draft_adds_the_features_to_its_tokens_and_repeats_the_last_row_for_masks(
    folders: tuple[Path, Path], toy: ModuleType
) -> None:
    draft = open_draft(folders[1])
    shifted = np.concatenate([np.zeros((1, 64)), literal_features(toy, IDS)[:-1]])
    features = np.concatenate([shifted, np.ones((len(IDS), 1))], axis=1)
    for model in (draft, SingleStepDraft(draft)):
        for first, last, k in ((0, 4, 3), (4, 9, 1), (9, 12, 5)):
            drafts, probabilities = model.step(IDS[first:last], k, features[first:last])
            model.rollback(last)
            expected = draft_rows(toy, IDS[:last], features[:last], k)
            softmax = np.exp(expected - expected.max(-1, keepdims=True))
            softmax /= softmax.sum(-1, keepdims=True)
            np.testing.assert_allclose(probabilities, softmax.max(-1), rtol=0.15)
            if Manifest.read(folders[1]).recipe.floats == "float32":
                assert drafts.tolist() == expected.argmax(-1).tolist()
                np.testing.assert_allclose(probabilities, softmax.max(-1), rtol=1e-3)
        model.rollback(0)


def test_features_that_are_left_out_leave_nothing_behind(folders: tuple[Path, Path], toy: ModuleType) -> None:
    """Target-independent mode is the model without the projection, and without its bias, in any order of steps."""
    draft, fresh = open_draft(folders[1]), open_draft(folders[1])
    draft.step(IDS, 4, np.ones((len(IDS), 65), np.float32))
    draft.rollback(0)
    for found, alone in zip(draft.step(IDS, 4), fresh.step(IDS, 4), strict=True):
        np.testing.assert_array_equal(found, alone)
    if Manifest.read(folders[1]).recipe.floats == "float32":
        assert fresh._outputs[4][0][0].tolist() == draft_rows(toy, IDS, None, 4).argmax(-1).tolist()
    fresh.rollback(0)
    blank = np.zeros((len(IDS), 65), np.float32)  # a row of zeros says the same of one token
    for found, alone in zip(fresh.step(IDS, 4, blank), draft._outputs[4][:2], strict=True):
        np.testing.assert_array_equal(found, alone[0])


def test_a_target_that_runs_token_by_token_gives_them_too(folders: tuple[Path, Path], toy: ModuleType) -> None:
    target = SingleStepTarget(open_target(folders[0]))
    rows = target.step(IDS, 2, True)
    assert rows.features is not None and rows.logits.shape == (2, 288)
    close(rows.features, literal_features(toy, IDS), folders[0])
    assert target.step([1], 1).features is None


def test_features_of_other_tokens_and_of_a_graph_that_has_none_are_refused(
    folders: tuple[Path, Path], pair_folders: tuple[Path, Path]
) -> None:
    with pytest.raises(ValueError, match="2 rows of features for a step of 3 tokens"):
        open_draft(folders[1]).step([1, 2, 3], 4, np.zeros((2, 65), np.float32))
    with pytest.raises(ValueError, match="gives no hidden states"):
        open_target(pair_folders[0]).step([1, 2], 1, True)


# Graphs without attention, of the portable variant: what sessions do with features does not depend on it.
WIDTHS = ((4, True), (8, True), (16, False))  # of static graphs, and whether they give outputs of the role


@pytest.fixture(scope="module", params=[False, True], ids=["dynamic", "static"])
def portable(
    request: pytest.FixtureRequest, write_artifact: Callable[..., Path], toy: ModuleType,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, Path]:  # fmt: skip
    root = tmp_path_factory.mktemp("portable")
    out = []
    for role in ("target", "draft"):
        folder = write_artifact(root / role, role, features=LAYERS, bias=True)
        graphs = ()
        if request.param:
            graphs = tuple(StaticGraph(f"{width}.onnx", width, outputs) for width, outputs in WIDTHS)
            for graph in graphs:
                save(
                    toy.tokenwise(toy.Shape(features=LAYERS, bias=True), role, graph.width, graph.logits),
                    folder / graph.file,
                )
        else:
            save(toy.tokenwise(toy.Shape(features=LAYERS, bias=True), role), folder / "model.onnx")
        files = tuple(File.of(path) for path in sorted(folder.iterdir()) if path.name != "pard_onnx.json")
        replace(Manifest.read(folder), attention="portable", graphs=graphs, files=files).write(folder)
        out.append(folder)
    return out[0], out[1]


def open_portable(folder: Path) -> Any:
    manifest = Manifest.read(folder)
    return session_class(manifest)(folder, manifest, CPU, Threads(1))


def tokenwise_features(toy: ModuleType, ids: list[int]) -> NDArray[Any]:
    embed = toy.weights(toy.Shape(), 1)["embed"][ids]
    return np.concatenate([embed, -embed], axis=1)


def test_portable_targets_give_the_features_of_all_tokens(portable: tuple[Path, Path], toy: ModuleType) -> None:
    """In static graphs, those of prefill too, which give no logits."""
    target, ids = open_portable(portable[0]), (IDS * 5)[:47]
    for first, last, keep in ((0, 40, 1), (40, 43, 3), (43, 44, 1), (44, 47, 2)):
        rows = target.step(ids[first:last], keep, True)
        np.testing.assert_allclose(rows.features, tokenwise_features(toy, ids[first:last]))
        assert rows.logits.shape[0] == keep
        assert target.step(ids[:2], 1).features is None
        target.rollback(last)


@pytest.mark.parametrize("k", [1, 3, 6, 16])
def test_portable_drafts_read_them(portable: tuple[Path, Path], toy: ModuleType, k: int) -> None:
    draft, w = open_portable(portable[1]), toy.weights(toy.Shape(features=LAYERS, bias=True), 1)
    random = np.random.default_rng(k)
    for first, last in ((0, 29), (29, 30), (30, 33)):
        ids = (IDS * 3)[first:last]
        features = random.normal(size=(len(ids), 65)).astype(np.float32) * 20
        masked = [*ids, *[toy.Shape().mask_id] * (k - 1)]
        for rows in (features, None, features):
            drafts, _ = draft.step(ids, k) if rows is None else draft.step(ids, k, rows)
            draft.rollback(last)
            draft.rollback(first)
            x = w["embed"][masked]
            if rows is not None:
                x = x + np.concatenate([rows, *[rows[-1:]] * (k - 1)]) @ w["projection"]
            assert drafts.tolist() == (x @ w["head"])[-k:, :280].argmax(-1).tolist()
        draft.step(ids, 1)
