"""The recipe's data: windows, batches and shapes, without training."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

pytest.importorskip("torch")
pytest.importorskip("transformers")

from pard_onnx.models.adapt.packing import IGNORE, Drop
from pard_onnx.models.checkpoints.checkpoint import Checkpoint
from pard_onnx.models.demo import TARGET, recipe, tokenizer


@settings(deadline=None)
@given(st.integers(2, 12), st.integers(2, 60), st.integers(0, 99), st.integers(1, 4), st.integers(0, 20))
def test_windows_are_runs_of_the_tokens(length, count, seed, rows, step):
    tokens = np.arange(length * count + seed % length)
    windows = recipe.TokenWindows(tokens, length, seed)
    batch = windows.batch(step, rows)
    assert batch.shape == (rows, length)
    np.testing.assert_array_equal(batch - batch[:, :1], np.tile(np.arange(length), (rows, 1)))
    one_by_one = [windows.batch(step * rows + i, 1) for i in range(rows)]
    np.testing.assert_array_equal(batch, np.concatenate(one_by_one))


@settings(deadline=None)
@given(st.integers(2, 12), st.integers(2, 40), st.integers(0, 99))
def test_an_epoch_shows_no_token_twice(length, count, seed):
    windows = recipe.TokenWindows(np.arange(length * count), length, seed)
    epoch = windows.batch(0, count - 1)  # all of it but one window: the room of the offset
    assert len(np.unique(epoch)) == epoch.size
    np.testing.assert_array_equal(epoch, np.concatenate([windows.batch(i, 1) for i in range(count - 1)]))


def test_epochs_differ():
    windows = recipe.TokenWindows(np.arange(200), 10)
    first, second = windows.batch(0, 19), windows.batch(1, 19)
    assert not np.array_equal(first, second)


def test_a_packed_batch_is_what_the_model_takes():
    windows = np.arange(60).reshape(3, 20)
    ids, positions, labels, mask = recipe.packed_batch(windows, step=4, drop=Drop(3, 0.5, 0.2))
    size = sum(Drop(3, 0.5, 0.2).counts(20))
    assert ids.shape == positions.shape == labels.shape == (3, size)
    assert mask.shape == (3, 1, size, size) and set(mask.unique().tolist()) == {0.0, -np.inf}
    assert set(ids[:, 20:].unique().tolist()) == {recipe.MASK_ID}
    np.testing.assert_array_equal(ids[:, :20], windows)
    assert (labels == IGNORE).sum() == 3  # the last real token of each
    again = recipe.packed_batch(windows, step=4, drop=Drop(3, 0.5, 0.2))
    assert all(one.equal(two) for one, two in zip((ids, positions, labels, mask), again, strict=True))
    other = recipe.packed_batch(windows, step=5, drop=Drop(3, 0.5, 0.2))
    assert not positions.equal(other[1])


def test_the_mask_id_is_the_first_padding_row():
    assert recipe.MASK_ID == tokenizer.SIZE < min(recipe.TARGET.vocab_size, recipe.DRAFT.vocab_size)


def test_shapes_divide_the_qwen_shapes_they_will_be_scaled_to():
    """Hidden sizes and head sizes of Qwen2.5 1.5B, 7B (target) and 0.5B (draft)."""
    target, draft = recipe.TARGET, recipe.DRAFT
    assert target.head_dim == 128 and 1536 % target.hidden_size == 3584 % target.hidden_size == 0
    assert draft.head_dim == 64 and 896 % draft.hidden_size == 0


def test_the_models_are_published_as_checkpoints(tmp_path, monkeypatch):
    shape = recipe.Shape(2048, 32, 64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=16)
    for stage in ("target", "draft", "ar_draft"):
        monkeypatch.setattr(recipe.TrainingRecipe, stage, lambda self: recipe.model(shape))
    monkeypatch.setattr(
        recipe.TrainingRecipe, "tokenizer", lambda self: Tokenizer.from_file(str(TARGET / "tokenizer.json"))
    )
    recipe.TrainingRecipe(tmp_path).publish(tmp_path / "out")
    specs = {path.name: Checkpoint.open(path).spec for path in (tmp_path / "out").iterdir() if path.is_dir()}
    assert {name: s.role for name, s in specs.items()} == {"target": "target", "draft": "draft", "ar-draft": "target"}
    assert specs["draft"].pard.mask_id == recipe.MASK_ID
    assert {s.dtype for s in specs.values()} == {"bfloat16"}
    assert specs["ar-draft"].vocabulary.eos_ids == (2039, 2037)


def test_replies_go_on_where_they_were_interrupted(tmp_path, monkeypatch):
    made = []

    def continuations(net, prompts, new):
        if len(made) == 2 and net == "first":
            raise KeyboardInterrupt
        made.append(prompts)
        return np.concatenate([prompts, prompts[:, :1].repeat(new, axis=1)], axis=1).flatten()

    monkeypatch.setattr(recipe.TrainingRecipe, "tokens", lambda self: np.arange(100))
    monkeypatch.setattr(recipe, "continuations", continuations)
    stage = recipe.TrainingRecipe(tmp_path, log=lambda _: None)
    sizes = {"total": 60, "rows": 2, "prompt": 4, "new": 3}
    monkeypatch.setattr(recipe.TrainingRecipe, "target", lambda self: "first")
    with pytest.raises(KeyboardInterrupt):
        stage.replies(**sizes)
    monkeypatch.setattr(recipe.TrainingRecipe, "target", lambda self: "second")
    replies = stage.replies(**sizes)
    assert len(made) == 5 and len(replies) == 5 * 2 * 7
    monkeypatch.setattr(recipe.TrainingRecipe, "target", lambda self: pytest.fail("it trains"))
    np.testing.assert_array_equal(stage.replies(**sizes), replies)
