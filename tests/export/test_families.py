"""What a family's file says is what transformers' modules do; int4 and YaRN in every family; what is refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np
import onnx
import pytest
import quantized
import torch
from tiny import ARCHITECTURES, WINDOW, YARN, save_safetensors
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from pard_onnx import load
from pard_onnx.export.exporter import Job, export
from pard_onnx.export.graphs.trace import swap
from pard_onnx.export.verify.parity import check
from pard_onnx.export.verify.reference import reference_logits
from pard_onnx.models.checkpoints.checkpoint import Checkpoint
from pard_onnx.models.checkpoints.layer_attention import KINDS
from pard_onnx.models.checkpoints.tensors import read_tensor
from pard_onnx.models.devices import DEVICES, form_for
from pard_onnx.models.errors import BadCheckpoint
from pard_onnx.models.families import FAMILIES, Family, Norm, shapes
from pard_onnx.models.manifest import Manifest, Source
from pard_onnx.models.precision import INT4
from pard_onnx.quantize.algorithms.column_scales import awq_scale, fold_scales
from pard_onnx.quantize.calibration.layers import Layers
from pard_onnx.quantize.calibration.text import CalibrationRow
from pard_onnx.quantize.packing.pack import format_for_width, pack, unpack
from pard_onnx.quantize.packing.prepared import Formats, Spool
from pard_onnx.runtime import kernels
from pard_onnx.runtime.kernels.graph import rewritten

NEW = ("mistral", "smollm3", "gemma3_text")
ROLES = ("target", "draft")
WIDE = {"hidden": 128, "head_dim": 32, "intermediate": 128}  # whole blocks of 128
PROMPT = list(range(20, 45))
Exported = Callable[..., tuple[Path, Path]]
Tiny = Callable[..., Path]


def transformers_greedy(checkpoint: Path, prompt: list[int], count: int) -> list[int]:
    """Greedy tokens of the ids that the tokenizer has, without the EOS that may end them."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    ids = torch.tensor([prompt])
    settings = {"do_sample": False, "max_new_tokens": count, "suppress_tokens": list(range(300, 320))}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    tokens: list[int] = out[0, len(prompt) :].tolist()
    return tokens[:-1] if tokens and tokens[-1] == 299 else tokens


def modelled(folder: Path) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))


@pytest.mark.parametrize("tied", (False, True))
@pytest.mark.parametrize("family", FAMILIES)
def test_the_tensors_are_those_of_transformers(tiny: Tiny, tmp_path: Path, family: str, tied: bool) -> None:
    folder = tiny(tmp_path, family, tied=tied, layers=3)
    found = {name: tuple(tensor.shape) for name, tensor in modelled(folder).state_dict().items()}
    if tied:
        found.pop("lm_head.weight")
    assert dict(shapes(Checkpoint.open(folder).spec)) == found


@pytest.mark.parametrize("family", FAMILIES)
def test_the_facts_are_those_of_transformers(tiny: Tiny, tmp_path: Path, family: str) -> None:
    """Norms, rotary rules, windows, the embedding's factor, and which class is what."""
    folder = tiny(tmp_path, family, layers=4)
    spec, own = Checkpoint.open(folder).spec, FAMILIES[family]
    model = AutoModelForCausalLM.from_pretrained(folder)
    trunk = model.model
    assert {type(module).__name__ for module in model.modules() if module._parameters or module._buffers} == {
        "Linear",
        own.norm.class_name,
        own.rotary,
        own.embedding.class_name if own.embedding else "Embedding",
    }
    # What the norm computes: x / rms(x) * (offset + weight)
    x = torch.randn(5, spec.hidden)
    expected = x / (x.pow(2).mean(-1, keepdim=True) + spec.norm_eps).sqrt() * (spec.norm_offset + trunk.norm.weight)
    torch.testing.assert_close(trunk.norm(x), expected)
    assert getattr(trunk.norm, own.norm.epsilon) == spec.norm_eps
    ids = torch.arange(7)
    factor = np.float32(1 if spec.embedding_scale is None else spec.embedding_scale)
    torch.testing.assert_close(trunk.embed_tokens(ids), trunk.embed_tokens.weight[ids] * factor, rtol=0, atol=0)
    for index, layer in enumerate(trunk.layers):
        attention = spec.attention_of(index)
        assert attention.window == getattr(layer.self_attn, "sliding_window", None)
        assert (attention.rotary is not None) == bool(getattr(layer.self_attn, "use_rope", True))
        norms = [name for name, module in layer.named_children() if type(module).__name__ == own.norm.class_name]
        assert list(spec.norms) == norms
    assert type(trunk.layers[0].mlp.act_fn).__name__ == {"silu": "SiLUActivation"}.get(own.activation, "GELUTanh")


def test_window_layers_have_a_rotary_rule_of_their_own(tiny: Tiny, tmp_path: Path) -> None:
    folder = tiny(tmp_path, "gemma3_text")
    spec, rotary = Checkpoint.open(folder).spec, AutoModelForCausalLM.from_pretrained(folder).model.rotary_emb
    assert [layer.rotary for layer in spec.attention] == ["window_rope", "rope"]
    for rope, kind in zip((spec.rope, spec.window_rope), KINDS, strict=True):
        assert rope is not None
        inverse = rope.theta ** -(np.arange(0, spec.head_dim, 2) / spec.head_dim)
        np.testing.assert_allclose(getattr(rotary, f"{kind}_inv_freq"), inverse, rtol=1e-6)


def dequantized(checkpoint: Checkpoint, manifest: Manifest, folder: Path, tiny: Tiny, **options: Any) -> Checkpoint:
    """The checkpoint with the floats that the export's integers stand for."""
    formats = Formats(manifest.recipe, checkpoint.spec.tied)
    tensors = {name: read_tensor(entry) for name, entry in checkpoint.tensors.items()}
    for name, weight in tensors.items():
        if weight.ndim == 2:
            fmt = format_for_width(formats.of(name.removesuffix(".weight")), weight.shape[1], name)
            tensors[name] = unpack(pack(weight, fmt), fmt)
    tiny(folder, checkpoint.spec.family, checkpoint.spec.role, **options)
    save_safetensors(folder / "model.safetensors", tensors)
    return Checkpoint.open(folder)


@pytest.mark.parametrize("attention", ("gqa", "portable"))
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("family", NEW)
def test_int4_is_torch_on_the_floats_that_its_integers_stand_for(
    exported: Exported, tiny: Tiny, tmp_path: Path, family: str, role: str, attention: str
) -> None:
    """With rollbacks, and past gemma3_text's window; both with activations in 8 bits and without."""
    folder, artifact = exported(family, role, "int4", device="cpu", attention=attention, **WIDE)
    manifest = Manifest.read(artifact)
    floats = dequantized(Checkpoint.open(folder), manifest, tmp_path / "floats", tiny, **WIDE)
    rounded = check(floats, artifact, manifest)
    assert rounded.mean_error < 0.1 and rounded.top1_agreement > 0.7
    for path in artifact.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    model = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 0
    onnx.save(model, tmp_path / "model.onnx")
    exact = check(floats, tmp_path, manifest)
    assert exact.max_error < 1e-4 and exact.rollback_error < 1e-4 and exact.top1_agreement == 1.0


@pytest.mark.parametrize("family", NEW)
def test_quantized_checkpoints(tmp_path: Path, family: str) -> None:
    """torch is given the floats that the integers stand for; what is left is the rounding of activations."""
    folder, _ = quantized.write(tmp_path / "model", "gptq", family=family)
    manifest = export(Job(Checkpoint.open(folder), Source("tiny"), tmp_path / "out", "int4"))
    assert manifest.parity is not None
    assert manifest.parity.mean_error < 0.1 and manifest.parity.top1_agreement > 0.7


@pytest.mark.parametrize("attention", ("gqa", "portable"))
@pytest.mark.parametrize("family", FAMILIES)
def test_yarn_past_the_original_length(exported: Exported, family: str, attention: str) -> None:
    """The check runs over 48 positions, and the original length is 16."""
    rope = YARN | {"original_max_position_embeddings": 16, "factor": 8.0}
    _, artifact = exported(family, "target", "fp32", rope=rope, device="cpu", attention=attention)
    manifest = Manifest.read(artifact)
    assert manifest.spec.rope.yarn is not None and manifest.spec.rope.yarn.positions == 128
    assert manifest.parity is not None
    assert manifest.parity.max_error < 1e-4 and manifest.parity.top1_agreement == 1.0


@pytest.mark.parametrize("family", ("qwen2", "llama"))
def test_yarn_gives_the_tokens_of_transformers_past_the_original_length(
    tmp_path: Path, tiny: Tiny, family: str
) -> None:
    """As Qwen2.5's card has it: max_position_embeddings is the original length, the factor comes beside it."""
    rope = YARN | {"original_max_position_embeddings": 1024}
    folder = tiny(tmp_path / "model", family, rope=rope, max_positions=1024)
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.spec.max_positions == 4096
    export(Job(checkpoint, Source("tiny"), tmp_path / "out", "fp32", capacity=3000))
    prompt = [(i * 37 + i // 7) % 290 for i in range(2500)]
    with load(tmp_path / "out") as pair:
        assert list(pair.generate(prompt, max_new_tokens=8).tokens) == transformers_greedy(folder, prompt, 8)


@pytest.mark.parametrize("kernel", ("on", "off"))
@pytest.mark.parametrize("precision", ("fp32", "int4"))
@pytest.mark.parametrize("family", ("smollm3", "gemma3_text"))
def test_pard_is_lossless(
    exported: Exported, monkeypatch: pytest.MonkeyPatch, family: str, precision: str, kernel: str
) -> None:
    """A text that is far longer than gemma3_text's window; drafts are accepted and rejected in it."""
    if kernel == "off":
        monkeypatch.setenv(kernels.VARIABLE, kernels.OFF)
    _, target = exported(family, "target", precision, **WIDE)
    _, draft = exported(family, "draft", "fp32", **WIDE)
    with load(target, draft) as pair:
        plain = pair.generate(PROMPT, max_new_tokens=60, draft_length=0)
        assert plain.stats.exact
        for length in (1, 3, 8):
            result = pair.generate(PROMPT, max_new_tokens=60, draft_length=length)
            assert result.tokens == plain.tokens
            assert result.stats.mean_accepted > 1
    assert len(plain.tokens) > 2 * WINDOW


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("family", NEW)
def test_calibration_text_goes_through_the_layers_as_through_the_model(
    tiny: Tiny, tmp_path: Path, family: str, role: str
) -> None:
    """Also a draft's rows, whose positions and masks are their own."""
    checkpoint = Checkpoint.open(tiny(tmp_path, family, role, layers=3))
    count = 3 * WINDOW
    ids, positions, mask = np.arange(30, 30 + count), np.arange(count), np.tril(np.ones((count, count), bool))
    inputs: dict[str, torch.Tensor] = {}
    row = CalibrationRow(ids, positions)
    if role == "draft":  # the last third stands beside the second, and does not see it
        positions = np.concatenate([positions[: 2 * WINDOW], positions[WINDOW : 2 * WINDOW]])
        mask[2 * WINDOW :, WINDOW : 2 * WINDOW] = False
        row = CalibrationRow(ids, positions, mask)
        added = torch.zeros(mask.shape).masked_fill(torch.from_numpy(~mask), torch.finfo(torch.float32).min)
        inputs = {"position_ids": torch.from_numpy(positions)[None], "attention_mask": added[None, None]}
    with torch.inference_mode():
        layers = Layers(checkpoint, [row])
        for index in range(3):
            with layers.loaded(index) as layer:
                layers.advance(layer)
        head = torch.from_numpy(read_tensor(checkpoint.tensors["lm_head.weight"]))
        found = layers.head_inputs(layers.hidden[0]) @ head.T
    expected = reference_logits(checkpoint, torch.from_numpy(ids)[None], **inputs)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_awq_moves_scales_and_changes_no_output(tiny: Tiny, tmp_path: Path, family: str) -> None:
    """Out of the norms that really come before attention and MLP, and out of what these multiply by."""
    checkpoint = Checkpoint.open(tiny(tmp_path, family, **WIDE))
    ids = np.arange(30, 60)
    with torch.inference_mode(), TemporaryFile() as file:
        layers, spool = Layers(checkpoint, [CalibrationRow(ids, np.arange(len(ids)))]), Spool(file)
        with layers.loaded(0) as layer:
            (before,) = layers.run(layer)
            weight = layer.get_parameter("mlp.gate_proj.weight").clone()
            fold_scales(layer, "model.layers.0", checkpoint.spec, awq_scale(INT4), layers.grams(layer), spool)
            (after,) = layers.run(layer)
            assert not torch.allclose(weight, layer.get_parameter("mlp.gate_proj.weight"), rtol=0.01)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    for name in (checkpoint.spec.norms[0], checkpoint.spec.mlp_norm):
        assert spool.vector(f"model.layers.0.{name}.weight") is not None


class Scaled(nn.Embedding):
    """Ends as a known leaf does, and does something else."""


def test_a_module_that_no_leaf_is_made_for_is_refused() -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.known, self.embed_tokens = nn.Linear(2, 2), Scaled(2, 2)

    model = nn.Module()
    model.inner = Inner()
    with pytest.raises(BadCheckpoint, match=r"inner\.embed_tokens is a Scaled, which holds weights"):
        swap(model, {nn.Linear: lambda *_: nn.Identity(), nn.Embedding: lambda *_: nn.Identity()})
    assert isinstance(model.inner.known, nn.Identity)


def test_an_unknown_module_is_refused_by_the_export(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gemma3_text whose family forgets that its embedding is scaled."""
    checkpoint = Checkpoint.open(tiny(tmp_path / "model", "gemma3_text"))
    monkeypatch.setitem(FAMILIES, "gemma3_text", replace(FAMILIES["gemma3_text"], embedding=None))
    with pytest.raises(BadCheckpoint, match=r"config\.json: model\.embed_tokens is a Gemma3TextScaledWordEmbedding"):
        export(Job(checkpoint, Source("tiny"), tmp_path / "out", "fp32"))


def test_a_window_that_transformers_has_otherwise_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    """The check that ends an export reads fewer tokens than most windows have."""
    checkpoint = Checkpoint.open(tiny(tmp_path / "model", "gemma3_text"))
    attention = tuple(replace(layer, window=layer.window and 99) for layer in checkpoint.spec.attention)
    wrong = replace(checkpoint, spec=replace(checkpoint.spec, attention=attention))
    with pytest.raises(Exception, match="layer 0 has a window of 8 tokens in transformers, 99 here"):
        export(Job(wrong, Source("tiny"), tmp_path / "out", "fp32"))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_the_graph_is_made_of(exported: Exported, family: str) -> None:
    """Each sum of the residual stream is in the norm behind it; nothing is left of views and copies around attention
    but what q's and k's norms need; the kernels take every attention, and gated MLPs of SiLU alone."""
    _, artifact = exported(family, "target", "int4", **WIDE)
    spec, path = Manifest.read(artifact).spec, artifact / "model.onnx"
    nodes = onnx.load(path, load_external_data=False).graph.node
    count = Counter(node.op_type for node in nodes)
    sums = 2 * spec.layers
    norms = len(spec.norms) * spec.layers + (2 * spec.layers if spec.qk_norm else 0) + 1
    assert count["SkipSimplifiedLayerNormalization"] == sums
    assert count["SimplifiedLayerNormalization"] == norms - sums
    assert count["Transpose"] == count["Identity"] == 0
    assert count["Reshape"] == (4 * spec.layers if spec.qk_norm else 0)
    for node, layer in zip((n for n in nodes if n.op_type == "GroupQueryAttention"), range(spec.layers), strict=True):
        given = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
        attention = spec.attention_of(layer)
        assert given.get("local_window_size") == attention.window
        tables = [name for name in node.input if "_cache" in name]
        prefix = {"rope": "rotary.", "window_rope": "rotary.window_rope."}.get(attention.rotary or "")
        assert given["do_rotary"] == int(attention.rotary is not None)
        assert tables == ([] if prefix is None else [f"{prefix}cos_cache", f"{prefix}sin_cache"])
    if kernels.load() is not None:
        rewritten_graph = rewritten(path.read_bytes(), artifact)
        assert rewritten_graph is not None
        kinds = Counter((n.domain, n.op_type) for n in onnx.load_from_string(rewritten_graph).graph.node)
        assert kinds["pard_onnx", "GroupQueryAttention"] == spec.layers
        gated = spec.layers if FAMILIES[family].activation == "silu" else 0
        assert kinds["pard_onnx", "GatedMatMulNBits"] == gated


def test_a_new_family_is_one_entry(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that this package does not have, whose modules in transformers are its own."""
    entry = Family("seed_oss", Norm("SeedOssRMSNorm"), "SeedOssRotaryEmbedding", off=("attention_bias", "mlp_bias"))
    monkeypatch.setitem(FAMILIES, "seed_oss", entry)
    monkeypatch.setitem(ARCHITECTURES, "seed_oss", "SeedOssForCausalLM")
    for role in ROLES:
        folder = tiny(tmp_path / role, "seed_oss", role, attention_bias=False, attention_out_bias=False)
        manifest = export(Job(Checkpoint.open(folder), Source("tiny"), tmp_path / f"{role}.out", "fp32"))
        assert manifest.parity is not None
        assert manifest.parity.max_error < 1e-4 and manifest.parity.top1_agreement == 1.0


def test_graphs_of_other_devices_have_no_gelu(exported: Exported) -> None:
    _, artifact = exported("gemma3_text", "target", "fp32", device="webgpu")
    nodes = onnx.load(artifact / "model.onnx", load_external_data=False).graph.node
    assert {node.op_type for node in nodes} <= DEVICES["webgpu"].operators
    assert form_for(DEVICES["webgpu"]).opset == 17
