"""Execution providers: what users call them, what ONNX Runtime calls them, and which extra brings them."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from typing import Any

from pard_onnx.models.errors import BadProvider


@dataclass(frozen=True, slots=True)
class Provider:
    """key: as in `--provider`; ort: ONNX Runtime's name; extra: of this package."""

    key: str
    ort: str
    extra: str


PROVIDERS = {
    provider.key: provider
    for provider in (
        Provider("cpu", "CPUExecutionProvider", "cpu"),
        Provider("cuda", "CUDAExecutionProvider", "cuda"),
        Provider("directml", "DmlExecutionProvider", "directml"),
        Provider("rocm", "ROCMExecutionProvider", "rocm"),
        Provider("migraphx", "MIGraphXExecutionProvider", "migraphx"),
        Provider("webgpu", "WebGpuExecutionProvider", "webgpu"),
    )
}


def named(key: str) -> Provider:
    """The provider that users call `key`; BadProvider names the nearest known one."""
    if not isinstance(key, str):
        raise BadProvider(f"a provider is one of {', '.join(PROVIDERS)}, not {key!r}")
    if key in PROVIDERS:
        return PROVIDERS[key]
    near = get_close_matches(key.lower(), PROVIDERS, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(PROVIDERS)}"
    raise BadProvider(f"unknown provider {key!r}; {hint}")


def onnxruntime(extra: str = "cpu") -> Any:
    """The onnxruntime module, imported on first use; BadProvider names the extra where there is none."""
    try:
        return import_module("onnxruntime")
    except ImportError as error:
        raise BadProvider(f'onnxruntime cannot be imported ({error}); pip install "pard-onnx[{extra}]"') from error


def installed(key: str) -> Provider:
    """As `named`, but BadProvider also if the installed onnxruntime lacks it."""
    provider = named(key)
    if provider.ort not in onnxruntime(provider.extra).get_available_providers():
        raise BadProvider(
            f"provider {key!r} is not in the installed onnxruntime; flavours overwrite one another, so "
            f'uninstall the present one, then pip install "pard-onnx[{provider.extra}]"'
        )
    return provider
