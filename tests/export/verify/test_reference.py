"""The reference of the parity check is transformers' own loading: what this package misreads, the export shows."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf_files
import numpy as np
import pytest
import quantized
import tiny as checkpoints
import torch
from tiny import edit_json, save_safetensors, weights
from transformers import AutoModelForCausalLM

from pard_onnx.export.exporter import Job, export
from pard_onnx.export.verify import reference
from pard_onnx.export.verify.reference import reference_logits
from pard_onnx.export_command import main
from pard_onnx.models.checkpoints import checkpoint as reading
from pard_onnx.models.checkpoints.checkpoint import EMBEDDING, Checkpoint
from pard_onnx.models.checkpoints.gguf.types import GgufTensor
from pard_onnx.models.checkpoints.tensors import HEAD, Tensor
from pard_onnx.models.errors import BadCheckpoint, Failure
from pard_onnx.models.families import FAMILIES
from pard_onnx.models.manifest import Source

Tiny = Callable[..., Path]
Tensors = Mapping[str, Tensor]
IDS = torch.arange(20, 60)[None]


def swapped(one: str, other: str) -> Callable[[Tensors], Tensors]:
    """Exchange two tensors of each layer."""

    def read(found: Tensors) -> Tensors:
        names = {name: name.replace(one, "?").replace(other, one).replace("?", other) for name in found}
        return {name: found[source] for name, source in names.items()}

    return read


def headless(found: Tensors) -> Tensors:
    return {name: entry for name, entry in found.items() if name != HEAD}


# What the reader makes of the tensors that it has found, and the family whose checkpoint shows it
MISREADINGS: dict[str, tuple[str, Callable[[Tensors], Tensors]]] = {
    "a dropped head": ("llama", headless),
    "q and k exchanged": ("qwen3", swapped("q_proj", "k_proj")),
    "k and v exchanged": ("mistral", swapped("k_proj", "v_proj")),
    "gate and up exchanged": ("smollm3", swapped("gate_proj", "up_proj")),
    "norms exchanged": ("gemma3_text", swapped("input_layernorm", "post_feedforward_layernorm")),
    "layers exchanged": ("qwen2", swapped("layers.0", "layers.1")),
}


def misread(monkeypatch: pytest.MonkeyPatch, read: Callable[[Tensors], Tensors]) -> None:
    right = reading.find_tensors
    monkeypatch.setattr(reading, "find_tensors", lambda folder: dict(read(right(folder))))


@pytest.mark.parametrize("role", ("target", "draft"))
@pytest.mark.parametrize("fault", MISREADINGS)
def test_misread_tensors_are_caught(
    fault: str,
    role: str,
    tiny: Tiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    family, read = MISREADINGS[fault]
    folder = tiny(tmp_path / "model", family, role, kv_heads=4)
    edit_json(folder / "config.json", tie_word_embeddings=fault == "a dropped head")
    misread(monkeypatch, read)
    code = main(["--model", str(folder), "--precision", "fp32", "--output", str(tmp_path / "out")])
    line = capsys.readouterr().err.splitlines()[-1]
    assert (code, "is not the model that transformers loads" in line) == (1, True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("precision", ("int8", "int4"))
def test_another_model_is_caught_in_every_precision(
    precision: Any, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny(tmp_path / "model")
    edit_json(folder / "config.json", tie_word_embeddings=True)
    assert export(Job(Checkpoint.open(folder), Source("tiny"), tmp_path / "right", precision)).parity
    misread(monkeypatch, headless)
    with pytest.raises(Failure, match=rf"{precision} graph is not the model"):
        export(Job(Checkpoint.open(folder), Source("tiny"), tmp_path / "out", precision))


FACTS: dict[str, tuple[str, dict[str, Any]]] = {
    "no offset of norms": ("gemma3_text", {"norm_offset": 0.0}),
    "an offset of norms": ("llama", {"norm_offset": 1.0}),
    "an unscaled embedding": ("gemma3_text", {"embedding_scale": 1.0}),
}


@pytest.mark.parametrize("fault", FACTS)
def test_misread_facts_are_caught(fault: str, tiny: Tiny, tmp_path: Path) -> None:
    family, wrong = FACTS[fault]
    checkpoint = Checkpoint.open(tiny(tmp_path / "model", family))
    checkpoint = replace(checkpoint, spec=replace(checkpoint.spec, **wrong))
    with pytest.raises(Failure, match="is not the model that transformers loads"):
        export(Job(checkpoint, Source("tiny"), tmp_path / "out", "fp32"))


def transformers_logits(folder: Path) -> torch.Tensor:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        logits: torch.Tensor = model(IDS).logits
    return logits


@pytest.mark.parametrize("dtype", ("float32", "bfloat16", "float16"))
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers_in_float32(family: str, dtype: str, tiny: Tiny, tmp_path: Path) -> None:
    folder = tiny(tmp_path, family, dtype=dtype, shards=2)
    found = reference_logits(Checkpoint.open(folder), IDS)
    # Gemma's factor is rounded in the checkpoint's type, as transformers rounds it where it computes in that
    rounding = 2e-2 if family == "gemma3_text" and dtype != "float32" else 1e-5
    torch.testing.assert_close(found, transformers_logits(folder), atol=rounding * float(found.std()), rtol=0)


def test_a_head_that_the_index_leaves_out_is_read_as_transformers_reads_it(tiny: Tiny, tmp_path: Path) -> None:
    folder = tiny(tmp_path, shards=2)
    edit_json(folder / "config.json", tie_word_embeddings=True)
    index = folder / "model.safetensors.index.json"
    shard_of = json.loads(index.read_text())["weight_map"]
    edit_json(index, weight_map={name: shard for name, shard in shard_of.items() if name != HEAD})
    checkpoint = Checkpoint.open(folder)
    assert not checkpoint.spec.tied
    torch.testing.assert_close(reference_logits(checkpoint, IDS), transformers_logits(folder))


def test_a_misread_norm_of_a_quantized_checkpoint_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its integers are this package's to read; everything else is transformers'."""
    folder, _ = quantized.write(tmp_path / "model", "gptq", std=1.0)
    misread(monkeypatch, swapped("input_layernorm", "post_attention_layernorm"))
    wrong = Checkpoint.open(folder)
    monkeypatch.undo()
    assert torch.equal(reference_logits(wrong, IDS), reference_logits(Checkpoint.open(folder), IDS))


def test_a_missing_tensor_is_not_made_up(tiny: Tiny, tmp_path: Path) -> None:
    folder = tiny(tmp_path)
    checkpoint = Checkpoint.open(folder)
    held = weights(json.loads((folder / "config.json").read_text()))
    del held["model.layers.1.mlp.up_proj.weight"]
    save_safetensors(folder / "model.safetensors", held)
    with pytest.raises(BadCheckpoint, match=r"finds no tensor model\.layers\.1\.mlp\.up_proj\.weight"):
        reference_logits(checkpoint, IDS)


def test_nothing_is_said_while_transformers_loads(
    tiny: Tiny, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tiny(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    held = weights(config) | {"model.layers.0.mlp.up_proj.bias": np.zeros(config["intermediate_size"], np.float32)}
    save_safetensors(folder / "model.safetensors", held)
    checkpoint = Checkpoint.open(folder)
    capfd.readouterr()
    reference_logits(checkpoint, IDS)
    assert capfd.readouterr() == ("", "")


def test_weights_stay_on_the_disk(tiny: Tiny, tmp_path: Path) -> None:
    from pard_onnx.export.verify.reference import _loaded_model

    model = _loaded_model(Checkpoint.open(tiny(tmp_path, dtype="bfloat16", tied=True)))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert checkpoints.STORED["bfloat16"] == "BF16" and EMBEDDING.startswith("model.")


WIDE = {"layers": 2, "hidden": 256, "heads": 4, "kv_heads": 2, "head_dim": 64, "intermediate": 256}
# What the metadata cannot say otherwise
AS_IN_GGUF: dict[str, dict[str, Any]] = {
    "gemma3_text": {"layer_types": ["sliding_attention"] * 2, "query_pre_attn_scalar": 64},
    "smollm3": {"no_rope_layers": None, "layers": 4},
}
OF_TRANSFORMERS = {"llama": "Q4_0", "qwen2": "Q8_0", "qwen3": "Q6_K", "mistral": "Q4_1", "gemma3_text": "F16"}


def written_gguf(
    tiny: Tiny,
    folder: Path,
    family: str,
    kind: str,
    shape: Mapping[str, Any] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> tuple[Path, Path]:
    """A GGUF file, and a folder of the floats that it stands for."""
    path = folder / "model.gguf"
    shape = {"vocab_rows": 300, **WIDE, **AS_IN_GGUF.get(family, {}), **(shape or {})}
    return path, gguf_files.write(path, tiny(folder / "tiny", family, **shape), kind, metadata=metadata)


@pytest.mark.parametrize("family", sorted(OF_TRANSFORMERS))
def test_transformers_reads_gguf_files(
    tiny: Tiny, tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its integers included, without a progress bar. Nothing that this package reads of tensors has a part in it."""
    path, floats = written_gguf(tiny, tmp_path, family, OF_TRANSFORMERS[family])
    checkpoint = Checkpoint.open(path)
    monkeypatch.setattr(GgufTensor, "read", None)
    monkeypatch.setattr(GgufTensor, "blocks", None)
    capfd.readouterr()
    found = reference_logits(checkpoint, IDS)
    assert capfd.readouterr().err == ""
    with torch.inference_mode():
        model = AutoModelForCausalLM.from_pretrained(floats, dtype=torch.float32, attn_implementation="eager")
        torch.testing.assert_close(found, model(IDS).logits, atol=1e-4, rtol=1e-4)


def test_a_misread_gguf_file_is_no_export(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of q and k in llama.cpp's order."""
    path, _ = written_gguf(tiny, tmp_path, "llama", "F16")
    checkpoint = Checkpoint.open(path)
    tensors = {name: replace(tensor, heads=0) for name, tensor in checkpoint.tensors.items()}  # type: ignore[type-var]
    with pytest.raises(Failure, match="not the model that transformers loads"):
        export(Job(replace(checkpoint, tensors=tensors), Source("model"), tmp_path / "out", "fp32"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("reason", ("architecture", "no number of kv heads", "too large", "no accelerate"))
def test_gguf_files_that_transformers_does_not_read(
    tiny: Tiny, tmp_path: Path, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their reference is computed from what this package reads; equal heads, so that the number may be left out."""
    family = "smollm3" if reason == "architecture" else "llama"
    metadata = {"llama.attention.head_count_kv": None} if reason == "no number of kv heads" else None
    path, floats = written_gguf(tiny, tmp_path, family, "Q4_0", {"kv_heads": 4}, metadata)
    if reason == "too large":
        monkeypatch.setattr(reference, "MOST_WIDENED", 1000)
    if reason == "no accelerate":
        monkeypatch.setattr(reference, "is_accelerate_available", lambda: False)
    checkpoint = Checkpoint.open(path)
    assert all(parameter.is_meta for parameter in reference._loaded_model(checkpoint).parameters())
    with torch.inference_mode():
        model = AutoModelForCausalLM.from_pretrained(floats, dtype=torch.float32, attn_implementation="eager")
        torch.testing.assert_close(reference_logits(checkpoint, IDS), model(IDS).logits, atol=1e-4, rtol=1e-4)
