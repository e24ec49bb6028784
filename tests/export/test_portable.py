"""Portable graphs of every family and device: operators, opsets and shapes; logits are torch's."""

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from pard_onnx.models.devices import DEVICES, OPSETS
from pard_onnx.models.manifest import Manifest

Exported = Callable[..., tuple[Path, Path]]
FAMILIES = ("llama", "qwen2", "qwen3")
ROLES = ("target", "draft")


@pytest.mark.parametrize("write", ("scatter", "one-hot"))
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_torchs(exported: Exported, family: str, role: str, write: str) -> None:
    device = "npu" if write == "one-hot" else "rocm"
    _, artifact = exported(family, role, "fp32", device=device)
    manifest = Manifest.read(artifact)
    assert DEVICES[device].write == write
    assert manifest.parity is not None
    assert manifest.parity.max_error < 1e-4
    assert manifest.parity.rollback_error < 1e-4
    assert manifest.parity.top1_agreement == 1.0


@pytest.mark.parametrize("opset", OPSETS)
def test_opsets(exported: Exported, opset: int) -> None:
    _, artifact = exported("qwen2", "draft", "fp32", device="webgpu", opset=opset)
    model = onnx.load(artifact / "model.onnx", load_external_data=False)
    assert {o.domain: o.version for o in model.opset_import} == {"": opset}
    onnx.checker.check_model(artifact / "model.onnx", full_check=True)
    parity = Manifest.read(artifact).parity
    assert parity is not None and parity.max_error < 1e-4
