"""The rewriting of an artifact's graph, on the exported demo target."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from pard_onnx.export.exporter import Job, export
from pard_onnx.models.checkpoints.checkpoint import Checkpoint
from pard_onnx.models.demo import TARGET
from pard_onnx.models.errors import BadInput
from pard_onnx.models.manifest import Manifest, Source
from pard_onnx.models.protobuf import fields, message
from pard_onnx.runtime import kernels
from pard_onnx.runtime.kernels.graph import with_kernel
from pard_onnx.runtime.providers.discovery import require_installed
from pard_onnx.runtime.providers.threads import Threads
from pard_onnx.runtime.sessions.dynamic_shapes import FusedTarget

needs_kernels = pytest.mark.skipif(kernels.isa() is None, reason="the kernels are not built")
SetVariable = Callable[[str | None], None]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exporté") / "target"
    export(Job(Checkpoint.open(TARGET), Source("demo"), folder, "int4", verify=False))
    return folder


def options() -> Any:
    out = ort.SessionOptions()
    out.log_severity_level = 4
    out.intra_op_num_threads = 2
    return out


def logits(graph: bytes | Path, settings: Any, manifest: Manifest, ids: list[int]) -> Any:
    source = graph if isinstance(graph, bytes) else str(graph)
    session = ort.InferenceSession(source, settings, providers=["CPUExecutionProvider"])
    shape = (1, manifest.spec.kv_heads, manifest.kv_rows, manifest.spec.head_dim)
    feeds: dict[str, Any] = {"input_ids": np.array([ids]), "attention_mask": np.ones((1, len(ids)), np.int64)}
    for layer in range(manifest.spec.layers):
        for part in ("key", "value"):
            feeds[f"past_key_values.{layer}.{part}"] = np.zeros(shape, np.float32)
    return session.run(["logits"], feeds)[0]


@needs_kernels
def test_the_graph_computes_the_same(artifact: Path) -> None:
    manifest, settings = Manifest.read(artifact), options()
    graph = with_kernel(artifact / "model.onnx", settings)
    assert isinstance(graph, bytes)
    parsed = onnx.load_from_string(graph)
    assert {n.domain for n in parsed.graph.node if n.op_type == "MatMulNBits"} == {"pard_onnx"}
    assert {n.domain for n in parsed.graph.node if n.op_type == "GroupQueryAttention"} == {"pard_onnx"}
    gated = [n for n in parsed.graph.node if n.op_type == "GatedMatMulNBits"]
    assert len(gated) == manifest.spec.layers
    ids = list(range(20, 31))
    ours = logits(graph, settings, manifest, ids)
    theirs = logits(artifact / "model.onnx", options(), manifest, ids)
    known = np.isfinite(theirs)
    assert (np.isfinite(ours) == known).all()
    # 1e-7 differences cross int8 activation roundings: about what ONNX Runtime's own odd and even widths differ by
    assert np.abs(ours[known] - theirs[known]).max() < 0.1 * theirs[known].std()


@needs_kernels
def test_a_text_read_in_chunks_leaves_the_rows_that_single_tokens_leave(artifact: Path) -> None:
    """The whole model, bit for bit: a prefill is a wide step, and nothing in it depends on the width."""
    session = FusedTarget(artifact, Manifest.read(artifact), require_installed("cpu"), Threads(2))
    ids = np.random.default_rng(0).integers(300, size=150).tolist()
    seen = []
    for widths in ([1] * 150, [128, 22], [150], [7] * 21 + [3]):
        session.rollback(0)
        logits = []
        for width in widths:
            logits.append(session.step(ids[session.length : session.length + width], width).logits.copy())
        seen.append(np.concatenate(logits).tobytes() + session.cache.read(0, 150).tobytes())
    assert seen[1:] == seen[:1] * 3


@needs_kernels
def test_weights_are_no_longer_constants_but_shared_ones_stay(artifact: Path) -> None:
    before = onnx.load(artifact / "model.onnx", load_external_data=False)
    graph = with_kernel(artifact / "model.onnx", options())
    assert isinstance(graph, bytes)
    after = onnx.load_from_string(graph)
    used = {name for node in after.graph.node for name in node.input}
    kept = {tensor.name for tensor in after.graph.initializer}
    assert kept <= used | {"logits_to_keep"}
    assert len(kept) < len(before.graph.initializer)
    # the tied embedding is looked up by ONNX Runtime
    assert any("embed_tokens" in name for name in kept)
    assert [o.domain for o in after.opset_import] == [*(o.domain for o in before.opset_import), "pard_onnx"]


def test_off(artifact: Path, kernel_variable: SetVariable) -> None:
    kernel_variable("off")
    assert kernels.isa() is None and kernels.library() is None
    assert with_kernel(artifact / "model.onnx", options()) == artifact / "model.onnx"


@needs_kernels
def test_the_variable(kernel_variable: SetVariable, isas: list[str]) -> None:
    for name in isas:
        kernel_variable(name)
        assert kernels.isa() == name
    kernel_variable("sse2")
    with pytest.raises(BadInput, match="PARD_ONNX_KERNEL=sse2: takes off, avx512-vnni"):
        kernels.library()
    kernel_variable(None)
    assert kernels.isa() == isas[0]
    assert kernels.library() == kernels.LIBRARY


@pytest.mark.skipif(
    shutil.which("c++") is None or platform.machine().lower() not in kernels.MACHINES, reason="nothing to build with"
)
def test_built() -> None:
    """Or else all tests of the kernels would be skipped without a word."""
    assert kernels.load() is not None


def test_no_library(monkeypatch: pytest.MonkeyPatch, artifact: Path, kernel_variable: SetVariable) -> None:
    kernel_variable(None)
    monkeypatch.setattr(kernels, "LIBRARY", Path("/nowhere/_cpu.so"))
    kernels.load.cache_clear()
    try:
        assert kernels.library() is None
        assert with_kernel(artifact / "model.onnx", options()) == artifact / "model.onnx"
    finally:
        monkeypatch.undo()
        kernels.load.cache_clear()


Edit = Callable[[onnx.NodeProto], None]


def edited(artifact: Path, folder: Path, operators: dict[str, Edit]) -> tuple[bytes | Path, list[str]]:
    """What becomes of the graph after edits of its nodes, and the operators in it that are the kernels'."""
    model = onnx.load(artifact / "model.onnx", load_external_data=False)
    for node in model.graph.node:
        operators.get(node.op_type, lambda _: None)(node)
    onnx.save(model, folder / "model.onnx")
    graph = with_kernel(folder / "model.onnx", options())
    if isinstance(graph, Path):
        return graph, []
    taken = {node.op_type for node in onnx.load_from_string(graph).graph.node if node.domain == "pard_onnx"}
    return graph, sorted(taken)


def attribute(name: str, value: float) -> Edit:
    def edit(node: onnx.NodeProto) -> None:
        kept = [a for a in node.attribute if a.name != name]
        del node.attribute[:]
        node.attribute.extend([*kept, onnx.helper.make_attribute(name, value)])

    return edit


@needs_kernels
def test_other_graphs_stay(tmp_path: Path, artifact: Path) -> None:
    """Formats and variants that the kernels do not have stay ONNX Runtime's, one by one."""
    inexact, capped = attribute("accuracy_level", 0), attribute("softcap", 30.0)
    assert edited(artifact, tmp_path, {"MatMulNBits": inexact})[1] == ["GroupQueryAttention"]
    variants = [capped, attribute("smooth_softmax", 1), attribute("do_rotary", 0), attribute("kv_num_heads", 3)]
    for variant in [*variants, lambda node: node.input.append("position_ids")]:
        found = edited(artifact, tmp_path, {"GroupQueryAttention": variant})[1]
        assert found == ["GatedMatMulNBits", "MatMulNBits"]
    both = {"MatMulNBits": inexact, "GroupQueryAttention": capped}
    assert edited(artifact, tmp_path, both)[0] == tmp_path / "model.onnx"


@needs_kernels
def test_windows_and_layers_without_rotary_embedding_are_taken(tmp_path: Path, artifact: Path) -> None:
    def unturned(node: onnx.NodeProto) -> None:
        attribute("do_rotary", 0)(node)
        del node.input[-2:]  # the tables

    for variant in (attribute("local_window_size", 64), unturned):
        taken = edited(artifact, tmp_path, {"GroupQueryAttention": variant})[1]
        assert taken == ["GatedMatMulNBits", "GroupQueryAttention", "MatMulNBits"]


@needs_kernels
@pytest.mark.parametrize("change", ["float16", "head_dim 8", "rank 3", "computed"])
def test_other_caches_stay(tmp_path: Path, artifact: Path, change: str) -> None:
    model = onnx.load(artifact / "model.onnx", load_external_data=False)
    for value in model.graph.input:
        tensor = value.type.tensor_type
        if not value.name.startswith("past_key_values."):
            continue
        if change == "float16":
            tensor.elem_type = onnx.TensorProto.FLOAT16
        elif change == "head_dim 8":
            tensor.shape.dim[3].dim_value = 8
        elif change == "rank 3":
            del tensor.shape.dim[3]
        else:
            value.name += ".other"
    onnx.save(model, tmp_path / "model.onnx")
    graph = with_kernel(tmp_path / "model.onnx", options())
    assert isinstance(graph, bytes)
    parsed = onnx.load_from_string(graph)
    assert {n.domain for n in parsed.graph.node if n.op_type == "GroupQueryAttention"} == {"com.microsoft"}


@needs_kernels
def test_not_a_graph(tmp_path: Path) -> None:
    for data in (b"\xff" * 40, b"\x3a\x50abc", b"\x0b"):
        (tmp_path / "model.onnx").write_bytes(data)
        with pytest.raises(ValueError):
            with_kernel(tmp_path / "model.onnx", options())


def test_protobuf_round_trip(artifact: Path) -> None:
    data = (artifact / "model.onnx").read_bytes()
    assert message(fields(data)) == data
    every_type = bytes([0x08, 0xFF, 0x01, 0x11, *range(8), 0x1D, *range(4), 0x22, 2, 65, 66])
    assert message(fields(every_type)) == every_type
