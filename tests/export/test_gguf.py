"""GGUF files exported whole: transformers' logits and greedy text of the same floats, through command and runtime."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import gguf_files
import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from transformers import AutoModelForCausalLM

from pard_onnx import load
from pard_onnx.export.verify.drive import drive
from pard_onnx.export_command import main
from pard_onnx.models.checkpoints.checkpoint import Checkpoint
from pard_onnx.models.manifest import Manifest
from pard_onnx.quantize_command import main as quantize_main
from pard_onnx.runtime import kernels

Tiny = Callable[..., Path]
FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "smollm3", "gemma3_text")
IDS = [5, 17, 250, 3, 99, 99, 41, 8, 120, 7, 64, 200]
WIDE = {"layers": 1, "hidden": 256, "heads": 4, "kv_heads": 2, "head_dim": 64, "intermediate": 256}


def reference(folder: Path) -> tuple[np.ndarray, list[int]]:
    """Logits of IDS and the greedy tokens after them."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor([IDS])
    with torch.inference_mode():
        logits = model(ids).logits[0].numpy()
        text = model.generate(ids, max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0)
    return logits, text[0, len(IDS) :].tolist()


def agree(artifact: Path, floats: Path, atol: float = 2e-4) -> None:
    manifest = Manifest.read(artifact)
    size = manifest.spec.vocabulary.size
    logits, text = reference(floats)
    np.testing.assert_allclose(drive(artifact, manifest).step(np.array(IDS))[:, :size], logits[:, :size], atol=atol)
    with load(artifact) as pair:
        found = list(pair.generate(IDS, max_new_tokens=24).tokens)
    ends = manifest.spec.vocabulary.eos_ids
    wanted = text[: next((i for i, token in enumerate(text) if token in ends), len(text))]
    if all(token < size for token in wanted):  # transformers may choose padding rows
        assert wanted == found


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_in_floats(tiny: Tiny, tmp_path: Path, family: str) -> None:
    path = tmp_path / "model-F16.gguf"
    options = {"no_rope_layers": None, "layers": 4} if family == "smollm3" else {}
    if family == "gemma3_text":
        options = {"layer_types": ["sliding_attention"] * 2, "query_pre_attn_scalar": 16}
    floats = gguf_files.write(path, tiny(tmp_path / "tiny", family, vocab_rows=300, **options), "F16")
    assert main(["--model", str(path), "--precision", "fp32", "--output", str(tmp_path / "out")]) == 0
    agree(tmp_path / "out", floats)


@pytest.mark.parametrize("kind", ("Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K", "BF16"))
def test_types_that_are_read_as_floats(tiny: Tiny, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "model.gguf"
    floats = gguf_files.write(path, tiny(tmp_path / "tiny", "llama", tied=True, vocab_rows=300, **WIDE), kind)
    assert main(["--model", str(path), "--precision", "fp32", "--output", str(tmp_path / "out")]) == 0
    assert Manifest.read(tmp_path / "out").source.quantization is None
    agree(tmp_path / "out", floats)


@pytest.mark.parametrize(
    ("kind", "precision", "stored"),
    [("Q4_0", "int4", "int4-b32"), ("Q4_1", "int4", "int4-b32-min"), ("Q8_0", "int8", "int8-b32")],
)
def test_a_default_export_keeps_integers(
    tiny: Tiny, tmp_path: Path, kind: str, precision: str, stored: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / f"model.{kind}.gguf"
    kinds = {"token_embd": "Q8_0", "output.": "Q6_K"}
    floats = gguf_files.write(path, tiny(tmp_path / "tiny", "llama", vocab_rows=300, **WIDE), kind, kinds=kinds)
    assert main(["--model", str(path), "--output", str(tmp_path / "out"), "--json"]) == 0
    out = json.loads(capsys.readouterr().out)
    source = {"model": f"model.{kind}", "revision": None, "quantization": "gguf", "export": None, "adapter": None}
    assert (out["precision"], out["source"]) == (precision, source)
    formats = {tensor["name"]: tensor["format"] for tensor in out["tensors"]}
    assert formats.pop("lm_head") == "int8-b128"  # Q6_K is read as floats
    assert formats.pop("model.embed_tokens") == "int8-b32"
    assert set(formats.values()) == {stored}
    assert out["parity"]["top1_agreement"] > 0.8
    logits, _ = reference(floats)
    manifest = Manifest.read(tmp_path / "out")
    found = drive(tmp_path / "out", manifest).step(np.array(IDS))
    assert np.abs(found - logits).mean() < 0.05 * logits.std()  # activations are rounded to 8 bits


def test_the_graph_holds_the_integers(tiny: Tiny, tmp_path: Path) -> None:
    """q, k and v in one matmul, with their rows in transformers' order."""
    path = tmp_path / "model.gguf"
    gguf_files.write(path, tiny(tmp_path / "tiny", "llama", **WIDE), "Q4_0")
    assert main(["--model", str(path), "--output", str(tmp_path / "out"), "--no-verify"]) == 0
    graph = onnx.load(tmp_path / "out" / "model.onnx").graph
    found = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    packed = Checkpoint.open(path).packed
    name = "model.layers.0.self_attn"
    weight, scale = (found[f"{name}.q_proj+k_proj+v_proj.{part}"] for part in ("weight", "scale"))
    levels = np.stack([weight & 15, weight >> 4], axis=-1).reshape(len(weight), -1)
    parts = [packed[f"{name}.{part}_proj"] for part in "qkv"]
    every = slice(None)
    np.testing.assert_array_equal(levels, np.concatenate([part.levels(every) for part in parts]))  # type: ignore[union-attr]
    np.testing.assert_array_equal(scale, np.concatenate([part.scales(every) for part in parts]))  # type: ignore[union-attr]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ("Q4_0", "Q4_1", "Q8_0"))
def test_the_runtime_takes_integers(
    tiny: Tiny, tmp_path: Path, kind: str, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the kernels, where they are built, as with ONNX Runtime's own matmuls; scales of Q4_0 may be negative."""
    path = tmp_path / "model.gguf"
    folder = tiny(tmp_path / "tiny", "qwen2", tied=tied, vocab_rows=300, **WIDE)
    floats = gguf_files.write(path, folder, kind)
    assert main(["--model", str(path), "--no-verify", "--output", str(tmp_path / "out")]) == 0
    assert all(tensor.format.startswith("int") for tensor in Manifest.read(tmp_path / "out").tensors)
    logits, _ = reference(floats)
    for kernel in ("", kernels.OFF):
        monkeypatch.setenv(kernels.VARIABLE, kernel)
        with load(tmp_path / "out") as pair:
            first = pair.generate(IDS, max_new_tokens=1).tokens[0]
        assert logits[-1].max() - logits[-1][first] < 0.1 * logits.std()  # activations are rounded to 8 bits
    model = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False)
    for attribute in (attribute for node in model.graph.node for attribute in node.attribute):
        if attribute.name == "accuracy_level":
            attribute.i = 0  # activations in floats
    onnx.save(model, tmp_path / "out" / "model.onnx")
    exact = drive(tmp_path / "out", Manifest.read(tmp_path / "out")).step(np.array(IDS))
    np.testing.assert_allclose(exact, logits, atol=2e-4)


@pytest.mark.parametrize("device", ["cuda", "webgpu", "directml"])
def test_minimums_on_other_devices(tiny: Tiny, tmp_path: Path, device: str) -> None:
    """Their graphs compute the same on the CPU, in operators of the device's list; without one that looks up packed
    rows the embedding is in floats."""
    path, wide = tmp_path / "model.gguf", WIDE
    floats = gguf_files.write(path, tiny(tmp_path / "tiny", "llama", vocab_rows=300, tied=True, **wide), "Q4_1")
    logits, _ = reference(floats)
    for precision in ("fp32", "fp16"):  # of activations
        out = tmp_path / precision
        assert main(["--model", str(path), "--device", device, "--io-dtype", precision, "--output", str(out)]) == 0
        manifest = Manifest.read(out)
        assert manifest.parity is not None and manifest.parity.top1_agreement > 0.8
        found = drive(out, manifest).step(np.array(IDS))
        assert np.abs(found[-1] - logits[-1]).mean() < 0.05 * logits.std()
        if device == "cuda":
            with load(out) as pair:  # on the CPU
                first = pair.generate(IDS, max_new_tokens=1).tokens[0]
            assert logits[-1].max() - logits[-1][first] < 0.1 * logits.std()


@pytest.mark.parametrize(
    ("kinds", "kept"), [({"ffn_": "F16"}, False), ({"attn_v": "Q6_K", "attn_output": "Q6_K"}, True)]
)
def test_a_file_is_quantized_where_most_of_its_layers_are(
    tiny: Tiny, tmp_path: Path, kinds: dict[str, str], kept: bool
) -> None:
    """As llama.cpp's K-quants, which have a few matrices in Q8_0; what is not in integers gets 8 bits beside them."""
    path = tmp_path / "model.gguf"
    gguf_files.write(path, tiny(tmp_path / "tiny", "llama", **WIDE), "Q4_0", kinds=kinds)
    assert main(["--model", str(path), "--no-verify", "--output", str(tmp_path / "out")]) == 0
    manifest = Manifest.read(tmp_path / "out")
    assert (manifest.source.quantization == "gguf", manifest.quantization is None) == (kept, kept)
    formats = {tensor.name: tensor.format for tensor in manifest.tensors}
    if kept:
        assert {formats[name] for name in formats if "o_proj" in name or "v_proj" in name} == {"int8-b128"}


def test_integers_and_options_that_exclude_one_another(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "model.gguf", str(tmp_path / "out")
    gguf_files.write(path, tiny(tmp_path / "tiny", "qwen2"), "Q4_0")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for command, options, message in (
        (main, ("--role", "draft"), f"{path}: a draft without a mask id"),
        (
            main,
            ("--adapter", str(adapter)),
            f"{path}: is a GGUF file, and {adapter} can be merged into safetensors only",
        ),
        (main, ("--revision", "v1"), f"revision 'v1': {path} is a local path, which has no revisions"),
    ):
        name = [str(path)] if command is quantize_main else ["--model", str(path)]
        assert command([*name, "--output", out, *options]) == 2
        err = capsys.readouterr().err
        assert message in err and len(err.splitlines()) == 1 and not Path(out).exists()
    assert main(["--model", str(path), "--output", str(tmp_path), "--force"]) == 2
    assert f"{tmp_path}: holds the checkpoint itself; choose another --output" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["Q6_K", "Q4_0", "Q4_1"])
def test_a_recipe_rounds_the_floats_that_a_file_stands_for(tiny: Tiny, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "model.gguf"
    gguf_files.write(path, tiny(tmp_path / "tiny", "llama", **WIDE), kind)
    recipe = ["--recipe", "int4-gptq", "--no-verify"]
    assert quantize_main([str(path), "--output", str(tmp_path / "out"), *recipe]) == 0
    manifest = Manifest.read(tmp_path / "out")
    assert (manifest.recipe.matrices.bits, manifest.source.quantization) == (4, None)
    assert manifest.quantization is not None and manifest.quantization.recipe == "int4-gptq"


@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0"])
def test_another_precision_reads_integers_as_floats(tiny: Tiny, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "model.gguf"
    floats = gguf_files.write(path, tiny(tmp_path / "tiny", "llama", vocab_rows=300, **WIDE), kind)
    assert main(["--model", str(path), "--precision", "fp32", "--output", str(tmp_path / "out")]) == 0
    agree(tmp_path / "out", floats)
    other = "int8" if kind == "Q4_1" else "int4"
    assert main(["--model", str(path), "--precision", other, "--no-verify", "--output", str(tmp_path / other)]) == 0
    manifest = Manifest.read(tmp_path / other)
    assert manifest.quantization is not None and manifest.source.quantization is None


def test_a_draft(tiny: Tiny, tmp_path: Path) -> None:
    path = tmp_path / "draft.gguf"
    gguf_files.write(path, tiny(tmp_path / "tiny", "qwen3", "draft"), metadata={"qwen3.pard_token": 300})
    assert main(["--model", str(path), "--output", str(tmp_path / "draft.onnx"), "--no-verify"]) == 0
    target = tmp_path / "target.gguf"
    gguf_files.write(target, tiny(tmp_path / "tiny.target", "qwen3"))
    assert main(["--model", str(target), "--output", str(tmp_path / "target.onnx"), "--no-verify"]) == 0
    with load(tmp_path / "target.onnx", tmp_path / "draft.onnx") as pair:
        plain = pair.generate(IDS, max_new_tokens=16, draft_length=0)
        drafted = pair.generate(IDS, max_new_tokens=16, draft_length=4)
        chat = pair.chat().send("the fox", max_new_tokens=8)
    assert drafted.tokens == plain.tokens or not drafted.stats.exact
    assert chat.tokens
