"""Domains of operators, and which a graph may be made of: those that its device is documented to run."""

from __future__ import annotations

import onnx_ir as ir

from pard_onnx.models.devices import Device
from pard_onnx.models.errors import Failure

MICROSOFT = "com.microsoft"
DOMAIN = "pard"  # of abstract operators


def operators(model: ir.Model) -> frozenset[str]:
    """Their types, with the domain in front where it is not ONNX's own."""
    return frozenset(f"{node.domain}.{node.op_type}".lstrip(".") for node in model.graph)


def require_operators(model: ir.Model, device: Device) -> None:
    """Failure, by name, if the graph has an operator that is not on the device's list: a bug of this package."""
    strange = sorted(operators(model) - device.operators)
    if strange:
        raise Failure(
            f"the graph has the operator {strange[0]}, which {device.name} is not known to run; please report this "
            "model (--device cpu exports it all the same)"
        )
