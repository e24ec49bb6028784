"""Features of targets in exported graphs, against the hidden states and the draft that transformers computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from pard_onnx.export.verify.drive import FusedDriver, empty
from pard_onnx.models.families import FAMILIES
from pard_onnx.models.manifest import Manifest
from pard_onnx.quantize_command import main as quantize
from pard_onnx.runtime import kernels
from pard_onnx.runtime.kernels.graph import with_kernel

Exported = Callable[..., tuple[Path, Path]]
Arrays = dict[str, NDArray[Any]]
LAYERS = (-1, -3, -2)  # of tiny targets, whose 2 layers have 3 hidden states; in another order than theirs
IDS = np.arange(20, 44)
MASK, K = 300, 4
DRAFTS = ("llama", "qwen2", "qwen3")
slow = pytest.mark.slow
KEPT = (("qwen3", False, True), ("llama", True, False))  # family, portable, bias: in every run
PORTABLE = {"device": "webgpu"}
STATIC = {"device": "npu", "draft_length": K}


class Graphs:
    """An artifact's graphs on one empty KV cache, run without this package's runtime."""

    def __init__(self, folder: Path) -> None:
        self.manifest = Manifest.read(folder)
        self.sessions = {
            name: ort.InferenceSession(folder / name, providers=["CPUExecutionProvider"])
            for name in self.manifest.graph_files
        }

    def run(self, ids: NDArray[np.int64], name: str | None = None, **feeds: NDArray[Any]) -> Arrays:
        """The outputs of one step of an empty cache, but for the cache's."""
        session = self.sessions[name or next(iter(self.sessions))]
        spec, static = self.manifest.spec, self.manifest.graphs
        rows = self.manifest.kv_rows if static else 96
        given: Arrays = {"input_ids": ids[None], "attention_mask": np.ones((1, rows if static else len(ids)), np.int64)}
        if self.manifest.attention == "portable":
            given["position_ids"] = np.arange(len(ids))[None]
        cache = np.zeros((1, spec.kv_heads, rows, spec.head_dim), self.manifest.kv_dtype)
        given |= {f"past_key_values.{i}.{part}": cache for i in range(spec.layers) for part in ("key", "value")}
        names = [output.name for output in session.get_outputs() if not output.name.startswith("present.")]
        return dict(zip(names, session.run(names, given | feeds), strict=True)) if names else {}


def hidden_states(folder: Path, layers: tuple[int, ...] = LAYERS) -> NDArray[np.float32]:
    """The features of IDS, from the list that transformers gives: [tokens, columns]."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        states = model(torch.from_numpy(IDS)[None], output_hidden_states=True).hidden_states
    return torch.cat([states[layer] for layer in layers], dim=-1)[0].numpy()


@pytest.mark.parametrize("family", [name if name == "qwen3" else pytest.param(name, marks=slow) for name in FAMILIES])
def test_a_target_gives_the_hidden_states_of_transformers(exported: Exported, family: str) -> None:
    checkpoint, folder = exported(family, "target", "fp32", feature_layers=LAYERS)
    graphs = Graphs(folder)
    assert graphs.manifest.feature_layers == LAYERS
    wanted = hidden_states(checkpoint)
    np.testing.assert_allclose(graphs.run(IDS)["hidden_states"][0], wanted, atol=1e-3)


@pytest.mark.parametrize("form", (pytest.param(PORTABLE, marks=slow), STATIC), ids=("portable", "static"))
def test_every_form_of_graph_gives_them(exported: Exported, form: dict[str, Any]) -> None:
    checkpoint, folder = exported("qwen3", "target", "fp32", feature_layers=LAYERS, verify=False, **form)
    graphs, wanted = Graphs(folder), hidden_states(checkpoint)
    for name in graphs.sessions:
        width = next((graph.width for graph in graphs.manifest.graphs if graph.file == name), len(IDS))
        ids = np.resize(IDS, width) if width > len(IDS) else IDS[:width]
        found = graphs.run(ids, name)["hidden_states"][0]
        shared = min(width, len(IDS))
        np.testing.assert_allclose(found[:shared], wanted[:shared], atol=1e-3)


@slow
@pytest.mark.parametrize("layers", ((-1,), (-2,), (-3,)))
@pytest.mark.parametrize("form", ({}, STATIC), ids=("fused", "static"))
def test_one_layer_is_a_feature_too(exported: Exported, layers: tuple[int, ...], form: dict[str, Any]) -> None:
    checkpoint, folder = exported("llama", "target", "fp32", feature_layers=layers, verify=False, **form)
    graphs = Graphs(folder)
    width = graphs.manifest.graphs[1].width if form else len(IDS)
    outputs = graphs.run(IDS[:width], list(graphs.sessions)[-2 if form else 0])
    np.testing.assert_allclose(outputs["hidden_states"][0], hidden_states(checkpoint, layers)[:width], atol=1e-3)
    assert outputs["logits"].shape[1] == width


@pytest.mark.parametrize("form", ({}, pytest.param(PORTABLE, marks=slow)), ids=("fused", "portable"))
@pytest.mark.parametrize("precision", (*(pytest.param(name, marks=slow) for name in ("fp32", "int8")), "int4"))
def test_rows_are_those_of_logits_or_as_many_as_asked_for(
    exported: Exported, form: dict[str, Any], precision: str
) -> None:
    graphs = Graphs(exported("qwen2", "target", precision, feature_layers=LAYERS, verify=False, **form)[1])
    whole = graphs.run(IDS)["hidden_states"]
    for kept, asked, rows in ((0, -1, 24), (1, -1, 1), (5, -1, 5), (1, 0, 24), (1, 7, 7), (0, 3, 3)):
        feeds = {"logits_to_keep": np.array([kept]), "hidden_states_to_keep": np.array([asked])}
        outputs = graphs.run(IDS, **feeds)
        assert outputs["logits"].shape[1] == (kept or 24)
        assert np.array_equal(outputs["hidden_states"], whole[:, -rows:])


def test_features_change_nothing_else(exported: Exported) -> None:
    plain = exported("qwen2", "target", "int4", verify=False)[1]
    folder = exported("qwen2", "target", "int4", feature_layers=LAYERS, verify=False)[1]
    assert np.array_equal(Graphs(plain).run(IDS)["logits"], Graphs(folder).run(IDS)["logits"])
    assert (plain / "model.onnx.data").read_bytes() == (folder / "model.onnx.data").read_bytes()
    assert (plain / "genai_config.json").read_bytes() == (folder / "genai_config.json").read_bytes()


# Drafts


def features_of(width: int, columns: int, seed: int = 3) -> NDArray[np.float32]:
    """The features of a prompt's tokens, the first of which has none; with a bias the last column is 1."""
    found = np.random.default_rng(seed).normal(0, 1, (len(IDS), columns)).astype(np.float32)
    found[0] = 0
    found[:, width:] = 1
    return found


def torch_draft(folder: Path, features: NDArray[np.float32] | None) -> NDArray[np.float32]:
    """The logits of the K drafts after IDS by the published rule, without this package's reader."""
    config = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.from_numpy(np.append(IDS, [MASK] * (K - 1)))[None]
    embeddings = config.get_input_embeddings()(ids)
    if features is not None:
        held = torch.load(folder / "warp_model.bin", weights_only=True)
        weight = held["target_proj.weight"].float()
        states = torch.from_numpy(features[:, : weight.shape[1]])
        states = torch.cat([states, states[-1:].expand(K - 1, -1)])
        projected = torch.nn.functional.linear(states, weight, held.get("target_proj.bias"))
        embeddings = embeddings + config.config.pard2_scale * projected
    with torch.inference_mode():
        return config(inputs_embeds=embeddings).logits[0, -K:].numpy()


def drafted(graphs: Graphs, features: NDArray[np.float32] | None) -> NDArray[np.float32]:
    """The logits of the K drafts after IDS in the exported graph, whatever its form."""
    manifest = graphs.manifest
    columns = manifest.spec.vocabulary.size
    given: Arrays = {}
    if manifest.attention == "gqa":
        if features is not None:
            given["target_features"] = features[None]
        return graphs.run(IDS, draft_length=np.array([K]), **given)["logits"][0, :, :columns]
    masks = np.full(K - 1, MASK)
    if features is not None:
        given["target_features"] = np.concatenate([features, np.repeat(features[-1:], K - 1, axis=0)])[None]
    return graphs.run(np.append(IDS, masks), logits_to_keep=np.array([K]), **given)["logits"][0, :, :columns]


@pytest.mark.parametrize(
    ("family", "form", "bias"),
    [
        pytest.param(family, form, bias, marks=() if (family, bool(form), bias) in KEPT else slow)
        for family in DRAFTS
        for form in ({}, PORTABLE)
        for bias in (False, True)
    ],
)
def test_both_modes_are_the_published_rule(exported: Exported, family: str, form: dict[str, Any], bias: bool) -> None:
    checkpoint, folder = exported(family, "draft", "fp32", pard2={"bias": bias}, **form)
    graphs = Graphs(folder)
    features = graphs.manifest.spec.pard.features
    assert features is not None and features.bias == bias and features.width == 192
    given = features_of(features.width, features.columns)
    wanted, found = torch_draft(checkpoint, given), drafted(graphs, given)
    assert np.abs(found - wanted[:, : found.shape[1]]).max() < 1e-3
    alone = drafted(graphs, None)
    assert np.abs(alone - torch_draft(checkpoint, None)[:, : found.shape[1]]).max() < 1e-3
    assert np.abs(alone - found).max() > 0.1


@pytest.mark.parametrize("form", ({}, pytest.param(PORTABLE, marks=slow)), ids=("fused", "portable"))
@pytest.mark.parametrize("precision", (*(pytest.param(name, marks=slow) for name in ("fp32", "fp16", "int8")), "int4"))
def test_without_features_it_is_the_plain_draft(exported: Exported, precision: str, form: dict[str, Any]) -> None:
    """Left out, zeros and the export of the same weights without a projection: one text."""
    plain = Graphs(exported("qwen2", "draft", precision, verify=False, **form)[1])
    graphs = Graphs(exported("qwen2", "draft", precision, pard2={"bias": True}, verify=False, **form)[1])
    zeros = np.zeros((len(IDS), 193), graphs.manifest.kv_dtype)
    alone = drafted(graphs, None)
    assert np.array_equal(drafted(graphs, zeros), alone)
    # ONNX Runtime rounds sums in float16 at other places where one more is in the graph
    np.testing.assert_allclose(alone, drafted(plain, None), rtol=0, atol=0.02 if precision == "fp16" else 0)


def test_fixed_shapes(exported: Exported) -> None:
    checkpoint, folder = exported("qwen3", "draft", "fp32", pard2={"bias": True}, verify=False, **STATIC)
    graphs = Graphs(folder)
    step, prefill = graphs.manifest.graphs
    for graph in (step, prefill):
        (given,) = graphs.sessions[graph.file].get_overridable_initializers()
        assert (given.name, given.shape) == ("target_features", [1, graph.width, 193])
    tokens = step.width - K + 1
    features = features_of(192, 193)[:tokens]
    rows = np.concatenate([features, np.repeat(features[-1:], K - 1, axis=0)])
    ids = np.append(IDS[:tokens], [MASK] * (K - 1))
    found = graphs.run(ids, step.file, target_features=rows[None])["logits"][0, -K:, :300]
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    held = torch.load(checkpoint / "warp_model.bin", weights_only=True)
    projected = torch.nn.functional.linear(torch.from_numpy(rows[:, :192]), *held.values())
    with torch.inference_mode():
        embeddings = model.get_input_embeddings()(torch.from_numpy(ids))[None] + 0.5 * projected
        wanted = model(inputs_embeds=embeddings).logits[0, -K:, :300].numpy()
    assert np.abs(found - wanted).max() < 1e-3


@pytest.mark.skipif(kernels.isa() is None, reason="the kernels are not built")
@pytest.mark.parametrize("precision", (pytest.param("int8", marks=slow), "int4"))
def test_the_kernels_give_the_same_features_at_every_width(exported: Exported, precision: str) -> None:
    """The graph that is rewritten in memory: bit for bit the same rows, whatever the width of the steps."""
    folder = exported(
        "qwen2", "target", precision, feature_layers=LAYERS, verify=False, hidden=128, heads=4, head_dim=32, layers=2,
        intermediate=256,
    )[1]  # fmt: skip
    manifest, options = Manifest.read(folder), ort.SessionOptions()
    options.log_severity_level = 4
    graph = with_kernel(folder / "model.onnx", options)
    assert isinstance(graph, bytes)
    ours = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    theirs = FusedDriver(
        ort.InferenceSession(folder / "model.onnx"), manifest.spec, empty(manifest.spec, "float32", 96)
    )
    seen = []
    for widths in ([24], [1] * 24, [7, 1, 16]):
        driver, rows, start = FusedDriver(ours, manifest.spec, empty(manifest.spec, "float32", 96)), [], 0
        for width in widths:
            driver.step(IDS[start : start + width])
            rows.append(driver.hidden_states)
            start += width
        seen.append(np.concatenate(rows))
    assert np.array_equal(seen[0], seen[1]) and np.array_equal(seen[0], seen[2])
    theirs.step(IDS)
    assert np.abs(seen[0] - theirs.hidden_states).max() < 0.1 * theirs.hidden_states.std()


@slow
@pytest.mark.parametrize("form", ({}, PORTABLE, STATIC), ids=("fused", "portable", "static"))
@pytest.mark.parametrize("role", ("target", "draft"))
def test_a_float_export_is_quantized_as_its_checkpoint_is(
    exported: Exported, tmp_path: Path, role: str, form: dict[str, Any]
) -> None:
    """pard-quantize on an export in floats keeps features, and gives what the same recipe gives of the checkpoint."""
    options: dict[str, Any] = {"feature_layers": LAYERS} if role == "target" else {"pard2": {"bias": True}}
    device = form.get("device", "cpu")
    recipe = "int8-a16w8" if device == "npu" else "int4-rtn"
    checkpoint, folder = exported("llama", role, "fp32", verify=False, **options, **form)
    assert quantize([str(folder), "--recipe", recipe, "--output", str(tmp_path / "again"), "--no-verify"]) == 0
    flags = ["--device", device, *(["--draft-length", str(K)] if device == "npu" else [])]
    flags += ["--features=" + ",".join(map(str, LAYERS))] if role == "target" else []
    direct = [str(checkpoint), "--recipe", recipe, "--output", str(tmp_path / "direct"), "--no-verify", *flags]
    assert quantize(direct) == 0
    again, wanted = Graphs(tmp_path / "again"), Graphs(tmp_path / "direct")
    assert again.manifest.feature_layers == wanted.manifest.feature_layers
    assert again.manifest.spec == wanted.manifest.spec
    for name in wanted.sessions:
        width = next((graph.width for graph in wanted.manifest.graphs if graph.file == name), 16)
        ids = np.resize(IDS, width)
        feeds: Arrays = {}
        if role == "draft":
            feeds["target_features"] = np.random.default_rng(0).normal(size=(1, width, 193)).astype(np.float32)
            if wanted.manifest.attention == "gqa":
                feeds["draft_length"] = np.array([1])
        one, other = again.run(ids, name, **feeds), wanted.run(ids, name, **feeds)
        assert one.keys() == other.keys()
        assert all(np.array_equal(one[key], other[key]) for key in one)
    formats = [tensor.format for tensor in again.manifest.tensors if tensor.name == "target_proj"]
    assert formats == ([] if role == "target" else ["float32"] if device == "npu" else ["int4-b64"])
