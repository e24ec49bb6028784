"""Replicas compute what the demo models compute: logits at small scale-ups, tokens at a true size."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from pard_onnx.benchmarks.replicas import replica
from pard_onnx.benchmarks.replicas.replica import GEOMETRIES, Geometry, geometry_by_name
from pard_onnx.benchmarks.replicas.widening import obstacles, powers_of_two_shares, used_rows
from pard_onnx.models import demo
from pard_onnx.models.checkpoints.checkpoint import Checkpoint, read_tensor
from pard_onnx.models.checkpoints.vocabulary import FILE as TOKENIZER
from pard_onnx.models.errors import BadInput
from pard_onnx.models.spec import ModelSpec, TargetFeatures

TARGET = Geometry("qwen2", 6, 256, 4, 2, 128, 768, 2176, True, 1e6, 2048)
DRAFT = Geometry("qwen2", 4, 128, 2, 1, 64, 512, 2048, True, 1e6, 2048)
PARD2 = ["--like", "Qwen2.5-0.5B", "--role", "pard2-draft"]
CASES = {
    "as it is": ("target", TARGET),
    "2 copies": ("target", replace(TARGET, hidden=512)),
    "3 copies, untied": ("target", replace(TARGET, hidden=768, tied=False)),
    "dead heads in live groups and dead groups": ("target", replace(TARGET, heads=9, kv_heads=3)),
    "dead neurons": ("target", replace(TARGET, intermediate=1000)),
    "dead layers": ("target", replace(TARGET, layers=11)),
    "more ids": ("target", replace(TARGET, rows=9000)),
    "all of it": ("target", Geometry("qwen2", 8, 1280, 9, 3, 128, 900, 3000, False, 1e6, 4096)),
    "a draft": ("draft", Geometry("qwen2", 7, 896, 14, 2, 64, 700, 6000, True, 1e6, 4096)),
    "an autoregressive draft": ("ar-draft", replace(DRAFT, layers=5, hidden=384, rows=3000)),
}


@pytest.fixture(scope="module")
def text() -> torch.Tensor:
    """A prompt's ids, [1, n]."""
    return torch.tensor([Tokenizer.from_file(str(demo.TARGET / TOKENIZER)).encode(demo.prompts()[0]).ids])


@pytest.fixture(scope="module")
def logits_of_demo() -> Callable[[str, torch.Tensor], torch.Tensor]:
    models = {role: load(path) for role, path in replica.ROLES.items()}
    return lambda role, ids: logits(models[role], ids)


def make(monkeypatch: pytest.MonkeyPatch, output: Path, role: str, like: Geometry, *more: str) -> Checkpoint:
    monkeypatch.setitem(GEOMETRIES, "Small", like)
    assert replica.main(["--like", "Small", "--role", role, *more, "--output", str(output)]) == 0
    return Checkpoint.open(output)


def load(folder: Path) -> torch.nn.Module:
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model


def logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(input_ids=ids).logits
    return found


@pytest.mark.parametrize("case", CASES)
def test_logits_are_the_demo_models(
    case: str,
    tmp_path: Path,
    text: torch.Tensor,
    logits_of_demo: Callable[[str, torch.Tensor], torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    role, like = CASES[case]
    made = make(monkeypatch, tmp_path / "out", role, like)
    small = Checkpoint.open(replica.ROLES[role]).spec
    assert made.spec == replica.widened_spec(small, like)
    ids = torch.cat([text, torch.full((1, 7), small.pard.mask_id if small.pard else 5)], 1)
    expected, found = logits_of_demo(role, ids), logits(load(tmp_path / "out"), ids)
    kept = used_rows(small)
    torch.testing.assert_close(found[..., :kept], expected[..., :kept], rtol=1e-4, atol=1e-4)
    padding = found.softmax(-1)[..., kept:].sum(-1)
    assert padding.max() < 1e-4


def test_a_draft_that_reads_hidden_states_is_the_draft(
    tmp_path: Path,
    text: torch.Tensor,
    logits_of_demo: Callable[[str, torch.Tensor], torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The projection has the true shape, and results that change nothing."""
    like = replace(DRAFT, hidden=256)
    made = make(monkeypatch, tmp_path / "out", "pard2-draft", like, "--reads", "Qwen2.5-7B")
    assert made.spec.pard
    assert made.spec.pard.features == TargetFeatures((-1, -8, -16, -24), 4 * 3584)
    assert made.spec == replica.with_features(
        replica.widened_spec(Checkpoint.open(demo.DRAFT).spec, like), "Qwen2.5-7B"
    )
    expected, found = logits_of_demo("draft", text), logits(load(tmp_path / "out"), text)
    kept = used_rows(made.spec)
    torch.testing.assert_close(found[..., :kept], expected[..., :kept], rtol=1e-4, atol=1e-4)
    matrix = read_tensor(made.tensors["target_proj.weight"])
    assert matrix.shape == (256, 4 * 3584) and (matrix != 0).mean() > 0.99
    assert np.abs(matrix).max() * matrix.shape[1] * 1e6 < 1e-15  # with features of any size


@pytest.mark.parametrize("family", replica.ARCHITECTURES)
def test_random_weights_in_any_family(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    like = Geometry(family, 3, 192, 6, 2, 64, 320, 2200, False, 5e5, 4096)
    monkeypatch.setitem(GEOMETRIES, "Deep", replace(like, layers=23))
    made = make(monkeypatch, tmp_path / "target", "target", like, "--random")
    assert made.spec == replica.random_spec(Checkpoint.open(demo.TARGET).spec, like)
    found = logits(load(tmp_path / "target"), torch.arange(100, 140)[None])
    assert found.isfinite().all() and found.std() > 1e-3
    matrices = [read_tensor(entry).tobytes() for entry in made.tensors.values() if len(entry.shape) == 2]
    assert len(set(matrices)) == len(matrices)
    draft = make(monkeypatch, tmp_path / "draft", "pard2-draft", like, "--random", "--reads", "Deep").spec
    assert draft.pard and draft.pard.features and draft.pard.features.width == 4 * 192


def test_what_contributes_nothing_is_not_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only o_proj and down_proj have zeros; padding rows differ."""
    made = make(monkeypatch, tmp_path / "out", *CASES["all of it"])
    for name, entry in made.tensors.items():
        closing = "o_proj" in name or "down_proj" in name
        weight = read_tensor(entry)
        assert np.isfinite(weight).all()
        assert closing or (weight.reshape(len(weight), -1) != 0).any(axis=1).all(), name
    rows = read_tensor(made.tensors["lm_head.weight"])
    assert len(np.unique(rows, axis=0)) > 0.99 * len(rows)


def test_live_layers_are_spread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make(monkeypatch, tmp_path / "out", "target", replace(TARGET, layers=9))
    outputs = [read_tensor(made.tensors[f"model.layers.{i}.self_attn.o_proj.weight"]) for i in range(9)]
    assert [bool(abs(w).max() > 1e-20) for w in outputs] == [True, False, True, True, False, True, True, False, True]
    assert all(w.any() for w in outputs)


def test_no_two_matrices_are_equal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an inference library finds twice it may keep once, and then costs less than the true model."""
    made = make(monkeypatch, tmp_path / "out", "target", replace(TARGET, layers=9, intermediate=1536))
    matrices = [read_tensor(entry).tobytes() for entry in made.tensors.values() if len(entry.shape) == 2]
    assert len(set(matrices)) == len(matrices)


def test_weights_lie_in_shards_beyond_a_size(
    tmp_path: Path, text: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(monkeypatch, tmp_path / "one", "draft", replace(DRAFT, hidden=256))
    monkeypatch.setattr(replica, "SHARD", 1_000_000)
    made = make(monkeypatch, tmp_path / "many", "draft", replace(DRAFT, hidden=256))
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(entry.nbytes for entry in made.tensors.values())
    assert len(set(index["weight_map"].values())) == len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    assert logits(load(tmp_path / "one"), text).equal(logits(load(tmp_path / "many"), text))


@given(st.integers(1, 64))
def test_shares_are_powers_of_two_that_sum_to_one(copies: int) -> None:
    found = powers_of_two_shares(copies)
    assert len(found) == copies and found.sum() == 1
    assert set(np.frexp(found)[0]) == {0.5}
    assert found.max() <= 2 * found.min()


@pytest.mark.parametrize(
    ("role", "fitting"),
    [
        ("target", ["Qwen2.5-1.5B", "Qwen2.5-3B", "Qwen2.5-7B"]),
        ("draft", ["Qwen2.5-0.5B"]),
        ("pard2-draft", ["Qwen2.5-0.5B"]),
        ("ar-draft", ["Qwen2.5-0.5B"]),
    ],
)
def test_which_geometries_fit(role: str, fitting: list[str]) -> None:
    small = Checkpoint.open(replica.ROLES[role]).spec
    assert [name for name in GEOMETRIES if fits(name, role, small)] == fitting


def fits(name: str, role: str, small: ModelSpec) -> bool:
    try:
        return replica.replica_spec(name, role, small) == replica.widened_spec(small, geometry_by_name(name))
    except BadInput:
        return False


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--like", "qwen2.5-15b"], "--like 'qwen2.5-15b': no such geometry; the nearest known one is 'Qwen2.5-1.5B'"),
        (["--like", "x"], "--like 'x': no such geometry; known: Qwen2.5-0.5B, "),
        (["--like", "Llama-3.2-1B"], "family llama is not qwen2, head_dim 64 is not 128, rope_theta 500000.0 is not"),
        (["--like", "Qwen2.5-0.5B"], "head_dim 64 is not 128, hidden size 896 is no multiple of 256; possible: Qwen"),
        (["--like", "Qwen2.5-3B", "--role", "draft"], "the demo draft cannot be made so: head_dim 128 is not 64"),
        (["--like", "Llama-3.2-1B"], "or any with --random"),
        (["--like", "Qwen2.5-0.5B", "--role", "pard2-draft"], "--role pard2-draft without --reads; name the target"),
        (["--like", "Qwen2.5-0.5B", "--role", "draft", "--reads", "Qwen2.5-7B"], "--role draft with --reads; leave it"),
        (
            [*PARD2, "--reads", "Qwen3-8B"],
            "--reads Qwen3-8B: is a qwen3, and the draft a qwen2; name one of its family",
        ),
        ([*PARD2, "--reads", "Qwen2.5-7b"], "--reads 'Qwen2.5-7b': no such geometry; the nearest known one is"),
        (
            ["--like", "Llama-3.2-1B", "--role", "pard2-draft", "--random", "--reads", "Llama-3.2-1B"],
            "--reads Llama-3.2-1B: has 16 layers, too few for hidden state -24",
        ),
        (["--like", "Qwen2.5-1.5B", "--output", "."], ". exists already; choose another --output"),
    ],
)
def test_bad_input(options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert replica.main(["--output", str(tmp_path / "out"), *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_sizes_that_are_too_small() -> None:
    small = Checkpoint.open(demo.TARGET).spec
    like = replace(TARGET, layers=5, intermediate=767, heads=2, kv_heads=1, rows=2048)
    found = ", ".join(obstacles(small, replica.widened_spec(small, like)))
    assert found == (
        "layers 5 is less than 6, kv_heads 1 is less than 2, intermediate 767 is less than 768, "
        "vocabulary rows 2048 is less than 2176"
    )


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_greedy_tokens_at_true_size(tmp_path: Path, text: torch.Tensor) -> None:
    assert replica.main(["--like", "Qwen2.5-1.5B", "--output", str(tmp_path / "out")]) == 0
    tokens = []
    for folder in (demo.TARGET, tmp_path / "out"):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        tokens.append(model.generate(text, max_new_tokens=48, do_sample=False).tolist())
        del model
    assert tokens[0] == tokens[1]
