"""Portable graphs: logits are torch's for every family, and every device's graphs are what its entry promises."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest

from pard_onnx.export.graphs.tape import operators, require_operators
from pard_onnx.models.devices import DEVICES
from pard_onnx.models.errors import Failure
from pard_onnx.models.families import FAMILIES as TABLE
from pard_onnx.models.manifest import VITISAI_CONFIG, Manifest

Exported = Callable[..., tuple[Path, Path]]
FAMILIES = tuple(TABLE)
ROLES = ("target", "draft")


def require_parity(artifact: Path) -> None:
    parity = Manifest.read(artifact).parity
    assert parity is not None
    assert parity.max_error < 1e-4 and parity.rollback_error < 1e-4
    assert parity.top1_agreement == 1.0


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_torchs(exported: Exported, family: str, role: str) -> None:
    require_parity(exported(family, role, "fp32", device="cpu", attention="portable")[1])


STATIC = pytest.mark.parametrize(("family", "role"), [("llama", "target"), ("qwen3", "draft")])


@STATIC
def test_static_logits_are_torchs(exported: Exported, family: str, role: str) -> None:
    require_parity(exported(family, role, "fp32", device="npu")[1])


def test_another_opset(exported: Exported) -> None:
    """17 is the devices' own, 21 that of portable graphs on the CPU; reductions changed in between."""
    _, artifact = exported("qwen2", "draft", "fp32", device="webgpu", opset=18)
    model = onnx.load(artifact / "model.onnx", load_external_data=False)
    assert {o.domain: o.version for o in model.opset_import} == {"": 18}
    onnx.checker.check_model(artifact / "model.onnx", full_check=True)
    require_parity(artifact)


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("webgpu", "draft"),
        ("directml", "target"),
        ("rocm", "draft"),
        ("migraphx", "target"),
        ("migraphx", "draft"),
        ("amdgpu", "target"),
        ("npu", "target"),
    ],
)
def test_graphs_keep_what_the_device_promises(exported: Exported, name: str, role: str) -> None:
    device = DEVICES[name]
    precision = device.precision(role)  # type: ignore[arg-type]
    _, artifact = exported("qwen2", role, precision, device=name, verify=False, tied=True)
    manifest = Manifest.read(artifact)
    assert (manifest.device, manifest.attention, manifest.opset) == (name, "portable", device.opset)
    assert manifest.kv_dtype == ("float16" if precision == "fp16" else device.floats)
    files = [graph.file for graph in manifest.graphs] or ["model.onnx"]
    written = {path.name for path in artifact.iterdir()}
    assert {n for n in written if n.endswith(".onnx")} == set(files)
    assert (VITISAI_CONFIG in written) == (name == "npu")
    for file in files:
        onnx.checker.check_model(artifact / file, full_check=True)
        graph = onnx.load(artifact / file, load_external_data=False)
        assert {f"{n.domain}.{n.op_type}".lstrip(".") for n in graph.graph.node} <= device.operators
        assert {o.version for o in graph.opset_import if not o.domain} == {device.opset}
        for tensor in graph.graph.initializer:
            assert all(entry.value == "model.onnx.data" for entry in tensor.external_data if entry.key == "location")


def shape(value: onnx.ValueInfoProto) -> list[int | str]:
    return [d.dim_value or d.dim_param for d in value.type.tensor_type.shape.dim]


@STATIC
def test_static_graphs_have_no_dimension_that_is_not_a_number(exported: Exported, family: str, role: str) -> None:
    _, artifact = exported(family, role, "fp32", device="npu")
    manifest = Manifest.read(artifact)
    rows = manifest.kv_rows
    assert manifest.token_rows == manifest.capacity + 64 == rows - 128
    for static in manifest.graphs:
        model = onnx.shape_inference.infer_shapes(onnx.load(artifact / static.file), strict_mode=True, data_prop=True)
        values = {v.name: shape(v) for v in (*model.graph.input, *model.graph.output, *model.graph.value_info)}
        assert all(isinstance(d, int) and d > 0 for dims in values.values() for d in dims)
        assert values["input_ids"] == values["position_ids"] == [1, static.width]
        assert values["attention_mask"] == [1, rows]
        assert values["past_key_values.1.value"] == values["present.0.key"] == [1, 2, rows, 16]
        assert "logits_to_keep" not in values
        outputs = {v.name for v in model.graph.output}
        assert ("logits" in outputs) == static.logits
        assert ("draft_ids" in outputs) == (static.logits and role == "draft")
    (prefill,) = [graph for graph in manifest.graphs if not graph.logits]
    fill = onnx.load(artifact / prefill.file, load_external_data=False).graph
    assert not any("lm_head" in tensor.name for tensor in fill.initializer)


def test_weights_are_stored_once_for_all_widths(exported: Exported) -> None:
    _, artifact = exported("llama", "target", "fp32", device="npu")
    manifest = Manifest.read(artifact)
    tables = 2 * manifest.kv_rows * manifest.spec.head_dim * 4
    padding = 4096 * (len(manifest.tensors) + 2)
    assert (artifact / "model.onnx.data").stat().st_size < sum(t.bytes for t in manifest.tensors) + tables + padding
    assert len(manifest.graphs) == 3


def test_a_tied_matrix_whose_rows_are_wanted_as_floats_is_there_twice(exported: Exported) -> None:
    _, artifact = exported("qwen2", "target", "int4", device="directml", verify=False, tied=True)  # as above
    formats = [(t.name, t.format) for t in Manifest.read(artifact).tensors if "embed_tokens" in t.name]
    assert formats == [("model.embed_tokens", "float16"), ("model.embed_tokens.int4-b64", "int4-b64")]


def test_an_operator_that_is_not_on_the_list_is_named(exported: Exported) -> None:
    _, artifact = exported("qwen2", "target", "fp32", device="cpu", attention="portable")
    model = ir.load(artifact / "model.onnx")
    assert "ScatterND" in operators(model)
    with pytest.raises(Failure, match="the graph has the operator ScatterND, which npu is not known to run"):
        require_operators(model, DEVICES["npu"])
    require_operators(model, replace(DEVICES["npu"], operators=operators(model)))


def test_genai_is_not_offered_what_it_cannot_run(exported: Exported) -> None:
    _, artifact = exported("qwen2", "target", "fp32", device="cpu", attention="portable")
    assert not (artifact / "genai_config.json").exists()
