"""Quantized checkpoints exported whole: torch's logits of the same floats, through the command and the runtime."""

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import quantized
import torch
from onnx import numpy_helper
from tiny import edit_json

from pard_onnx import load
from pard_onnx.export.exporter import Job, export
from pard_onnx.export.verify.reference import reference_logits
from pard_onnx.export_command import main
from pard_onnx.models.checkpoints.checkpoint import Checkpoint
from pard_onnx.models.errors import BadInput
from pard_onnx.models.manifest import Manifest, Source
from pard_onnx.quantize_command import main as quantize_main
from pard_onnx.runtime import kernels
from pard_onnx.runtime.kernels import graph

IDS = torch.tensor([[5, 17, 250, 3, 99, 99, 41, 8, 120, 7, 64, 200]])
CASES = {
    "awq": ("awq", "qwen2", {}),
    "gptq with sorted columns": ("gptq", "llama", {"sorted_columns": True}),
    "gptq of 8 bits, symmetric": ("gptq", "qwen3", {"bits": 8, "symmetric": True}),
    "compressed-tensors by channel": ("compressed-tensors", "qwen2", {"group": -1}),
    "quark": ("quark", "llama", {}),
    "auto-round with a quantized head": ("auto-round", "qwen2", {"quantized_head": True}),
}


def exact(folder: Path) -> ort.InferenceSession:
    """The graph with its matmuls in floats: accuracy level 0 rounds no activations."""
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 0
    path = folder / "exact.onnx"
    onnx.save(model, path)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def logits(session: ort.InferenceSession, manifest: Manifest) -> np.ndarray:
    spec = manifest.spec
    shape = (1, spec.kv_heads, 64, spec.head_dim)
    names = [i.name for i in session.get_inputs() if i.name.startswith("past")]
    caches = {name: np.zeros(shape, np.float32) for name in names}
    feeds = {"input_ids": IDS.numpy(), "attention_mask": np.ones(IDS.shape, np.int64)}
    return session.run(["logits"], feeds | caches)[0]


@pytest.mark.parametrize("case", CASES)
def test_an_imported_model_computes_what_its_floats_do(tmp_path: Path, case: str) -> None:
    layout, family, options = CASES[case]
    shape = {"family": family, "layers": 1, "hidden": 128, "intermediate": 192}
    folder, truth = quantized.write(tmp_path / "model", layout, **options, **shape)
    floats = Checkpoint.open(quantized.write_dequantized(tmp_path / "floats", truth, **shape))
    checkpoint = Checkpoint.open(folder)
    wanted = reference_logits(floats, IDS)
    torch.testing.assert_close(reference_logits(checkpoint, IDS), wanted, atol=1e-5, rtol=1e-5)
    manifest = export(Job(checkpoint, Source("tiny"), tmp_path / "out", "fp32"))
    assert manifest.source.quantization == checkpoint.quantization.method  # type: ignore[union-attr]
    size = manifest.spec.vocabulary.size
    np.testing.assert_allclose(logits(exact(tmp_path / "out"), manifest)[..., :size], wanted[..., :size], atol=2e-4)
    # What is left is the rounding of activations to 8 bits
    assert manifest.parity is not None and manifest.parity.mean_error < 0.04 * float(wanted[..., :size].std())
    assert {t.error for t in manifest.tensors} == {0.0}


def test_the_graph_holds_the_integers(tmp_path: Path) -> None:
    """q, k and v in one matmul, and the input gathered where columns are sorted."""
    folder, truth = quantized.write(tmp_path / "model", "gptq", sorted_columns=True, layers=1)
    assert main(["--model", str(folder), "--output", str(tmp_path / "out"), "--no-verify"]) == 0
    model = onnx.load(tmp_path / "out" / "model.onnx").graph
    found = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.initializer}
    packed = found["model.layers.0.self_attn.q_proj+k_proj+v_proj.weight"]
    levels = np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1)
    parts = [truth[f"model.layers.0.self_attn.{name}_proj"] for name in "qkv"]
    order = np.argsort(parts[0].group_of, kind="stable")
    np.testing.assert_array_equal(levels, np.concatenate([part.levels[:, order] for part in parts]))
    gathers = [node for node in model.node if node.op_type == "Gather" and node.input[1].endswith(".order")]
    assert len(gathers) == 4  # qkv, o, gate and up, down


def test_different_orders_keep_q_k_and_v_apart(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    folder, _ = quantized.write(tmp_path / "model", "gptq", sorted_columns=True, layers=1)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.k_proj.g_idx"] = tensors["model.layers.0.self_attn.k_proj.g_idx"][::-1].copy()
    save_file(tensors, folder / "model.safetensors")
    manifest = export(Job(Checkpoint.open(folder), Source("tiny"), tmp_path / "out", "fp32"))
    assert "model.layers.0.self_attn.k_proj" in {tensor.name for tensor in manifest.tensors}
    assert manifest.parity is not None and manifest.parity.mean_error < 0.05


@pytest.mark.parametrize("role", ("target", "draft"))
def test_the_command_needs_nothing_but_the_checkpoint(
    tmp_path: Path, role: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = quantized.write(tmp_path / "model", "awq", role=role)
    assert main(["--model", str(folder), "--output", str(tmp_path / "out"), "--json"]) == 0
    out = json.loads(capsys.readouterr().out)
    assert (out["role"], out["precision"], out["source"]["quantization"]) == (role, "int4", "awq")
    formats = {tensor["name"]: tensor["format"] for tensor in out["tensors"]}
    assert formats.pop("lm_head") == formats.pop("model.embed_tokens") == "int8-b64"
    assert set(formats.values()) == {"int4-b32-zp"}
    assert out["parity"]["top1_agreement"] > 0.8
    assert Manifest.read(tmp_path / "out").source.quantization == "awq"


def test_the_runtime_takes_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the kernels, where they are built, as with ONNX Runtime's own matmuls: zero points, sorted columns."""
    options = {"sorted_columns": True, "hidden": 128, "intermediate": 192, "layers": 1}
    target, _ = quantized.write(tmp_path / "target", "gptq", **options)
    draft, _ = quantized.write(tmp_path / "draft", "gptq", role="draft", **options)
    for folder in (target, draft):
        assert main(["--model", str(folder), "--no-verify", "--output", str(folder.with_suffix(".onnx"))]) == 0
    model = graph.rewritten((target.with_suffix(".onnx") / "model.onnx").read_bytes(), target)
    assert model is not None
    theirs = [node.op_type for node in onnx.load_from_string(model).graph.node if node.domain == graph.DOMAIN]
    theirs.remove("GroupQueryAttention")
    assert theirs == ["MatMulNBits", "MatMulNBits", "GatedMatMulNBits", "MatMulNBits", "MatMulNBits"]
    texts = []
    for kernel in ("", kernels.OFF):
        monkeypatch.setenv(kernels.VARIABLE, kernel)
        with load(target.with_suffix(".onnx"), draft.with_suffix(".onnx")) as pair:
            plain = pair.generate(list(range(20, 40)), max_new_tokens=24, draft_length=0)
            drafted = pair.generate(list(range(20, 40)), max_new_tokens=24, draft_length=4)
        assert drafted.tokens == plain.tokens or not drafted.stats.exact
        texts.append(plain.tokens[:4])
    assert texts[0] == texts[1]


def test_half_precision_beside_integers_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = quantized.write(tmp_path / "model", "awq", layers=1)
    out = str(tmp_path / "out")
    assert main(["--model", str(folder), "--precision", "fp16", "--output", out]) == 2
    err = capsys.readouterr().err
    assert "fp16: the checkpoint's integer weights (quantization_config: awq) are taken as they are" in err
    assert len(err.splitlines()) == 1 and not Path(out).exists()


def test_integers_are_not_quantized_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = quantized.write(tmp_path / "model", "awq", layers=1)
    assert quantize_main([str(folder), "--recipe", "int4-rtn", "--output", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert "is quantized already (awq); pard-export takes its integers" in err and len(err.splitlines()) == 1


def test_an_unknown_method_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = quantized.write(tmp_path / "model", "awq", layers=1)
    edit_json(folder / "config.json", quantization_config={"quant_method": "bitsandbytes"})
    assert main(["--model", str(folder)]) == 2
    err = capsys.readouterr().err
    assert "quant_method is 'bitsandbytes'; supported: awq, gptq" in err and len(err.splitlines()) == 1


def test_a_checkpoint_is_refused_whose_groups_are_too_small(tmp_path: Path) -> None:
    folder, _ = quantized.write(tmp_path / "model", "awq", layers=1, group=8)
    with pytest.raises(BadInput, match="groups of 8 weights"):
        export(Job(Checkpoint.open(folder), Source("tiny"), tmp_path / "out", "fp32", verify=False))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("layout", ("gptq", "awq", "compressed-tensors"))
def test_a_quantized_head_beside_a_tied_config_is_exported(tmp_path: Path, layout: str) -> None:
    """Its integers, as in the checkpoint that says untied; the names may lack their prefix."""
    from safetensors.numpy import load_file, save_file

    folder, _ = quantized.write(tmp_path / "model", layout, quantized_head=True, layers=1)
    wanted = reference_logits(Checkpoint.open(folder), IDS)
    edit_json(folder / "config.json", tie_word_embeddings=True)
    tensors = {name.removeprefix("model."): array for name, array in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors")
    checkpoint = Checkpoint.open(folder)
    assert torch.equal(reference_logits(checkpoint, IDS), wanted)
    manifest = export(Job(checkpoint, Source("tiny"), tmp_path / "out", "int4"))
    assert {tensor.name: tensor.format for tensor in manifest.tensors}["lm_head"].startswith("int4")
    assert manifest.parity is not None and manifest.parity.top1_agreement > 0.7
