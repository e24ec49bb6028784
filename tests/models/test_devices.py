"""The table of devices, and what cannot be asked of them."""

import pytest

from pard_onnx.models.checks import DRAFT_LIMIT
from pard_onnx.models.devices import DEVICES, OPSETS, PLAIN, device_named, form_for, require_precision
from pard_onnx.models.errors import BadInput
from pard_onnx.models.precision import recipe

CPU = DEVICES["cpu"]


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
def test_entries_agree_with_themselves(device):
    default = form_for(device)
    assert device.attention == default.attention
    assert device.opset == default.opset and default.opset in device.opsets
    for role in ("target", "draft"):
        require_precision(default, device.precision(role))
        device.runnable_recipe(recipe(device.precision(role))).require(role)
        widths = [graph.width for graph in default.graphs(role)]
        assert bool(widths) == device.static and widths == sorted(widths)
    for precision in device.precisions:
        device.runnable_recipe(recipe(precision)).require("target")
    written = {"scatter": "ScatterND", "one-hot": "Equal"}[device.write]
    assert PLAIN - {"ScatterND"} | {written} <= device.operators


def test_widths_follow_from_the_draft_length():
    fixed = form_for(DEVICES["npu"], draft_length=5)
    assert [(g.width, g.logits) for g in fixed.graphs("target")] == [(1, True), (6, True), (128, False)]
    assert [(g.width, g.logits) for g in fixed.graphs("draft")] == [(10, True), (128, False)]
    longest = form_for(DEVICES["npu"], draft_length=DRAFT_LIMIT)
    assert len({g.file for role in ("target", "draft") for g in longest.graphs(role)}) == 4


def test_overrides():
    assert form_for(CPU, attention="portable", opset=18).opset == 18
    assert form_for(CPU, attention="portable", static=True).graphs("draft")
    assert form_for(DEVICES["webgpu"], floats="float16").floats == "float16"
    assert DEVICES["webgpu"].runnable_recipe(recipe("int4"), "float16").floats == "float16"
    assert DEVICES["directml"].runnable_recipe(recipe("int4")).embedding.kind == "float16"
    assert DEVICES["directml"].runnable_recipe(recipe("int4"), "float32").embedding.kind == "float32"


BAD = {
    "fused where it is wrong": ("directml", {"attention": "gqa"}, "use --attention portable"),
    "fused and static": ("cpu", {"static": True}, "add --attention portable"),
    "fused and old": ("cuda", {"opset": 17}, "--opset 17 with attention gqa: only 21; add --attention portable"),
    "dynamic where shapes are fixed": ("migraphx", {"static": False}, "--no-static on migraphx"),
    "opset too new": ("webgpu", {"opset": 22}, f"--opset 22 on webgpu: it reads {OPSETS[0]} to {OPSETS[-1]}"),
    "opset too new for one": ("migraphx", {"opset": 20}, "--opset 20 on migraphx: it reads 17 to 19"),
    "opset without a kernel": ("directml", {"opset": 18}, "--opset 18 on directml: it reads 17"),
    "opset too old": ("npu", {"opset": 16}, "--opset 16 on npu"),
    "draft length of any graph": ("webgpu", {"draft_length": 4}, "--draft-length 4 of graphs with dynamic shapes"),
    "no draft": ("npu", {"draft_length": 0}, "--draft-length must be from 1 to 32, not 0"),
    "too long a draft": ("npu", {"draft_length": 33}, "--draft-length must be from 1 to 32, not 33"),
}


@pytest.mark.parametrize("case", BAD)
def test_contradictions_are_refused_with_the_fix(case):
    device, options, expected = BAD[case]
    with pytest.raises(BadInput) as caught:
        form_for(DEVICES[device], **options)
    assert expected in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("device", "floats", "precision", "expected"),
    [
        ("npu", None, "int4", "int4 on npu: it has no kernels for it; use fp32"),
        ("migraphx", None, "int8", "use fp32, fp16, int4"),
        ("rocm", "float32", "fp16", "fp16 weights with fp32 activations; use --precision fp32"),
        ("cpu", "float16", "fp32", "fp32 weights with fp16 activations; use --precision fp16"),
    ],
)
def test_precisions_that_do_not_fit(device, floats, precision, expected):
    with pytest.raises(BadInput, match=expected.replace("(", r"\(")):
        require_precision(form_for(DEVICES[device], floats=floats), precision)


@pytest.mark.parametrize(("name", "hint"), [("NPU", "npu"), ("webgp", "webgpu"), ("quantum", "known are cpu, cuda")])
def test_unknown_devices(name, hint):
    with pytest.raises(BadInput, match=hint):
        device_named(name)
