"""What providers that compile graphs are told of themselves: where compiled graphs are kept, and by which key."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from pard_onnx.models.manifest import DATA, VITISAI_CONFIG, Manifest
from pard_onnx.models.stamps import cache_folder

from .providers import Provider


def of_vitisai(path: Path) -> dict[str, str]:
    """Its cache is named by the graph and its weights, so that another export is compiled anew."""
    files = [file.sha256 for file in Manifest.read(path.parent).files if file.name in (path.name, DATA)]
    key = hashlib.sha256("".join(files).encode()).hexdigest()
    out = {"cache_dir": str(cache_folder() / "vitisai"), "cache_key": key}
    config = path.parent / VITISAI_CONFIG
    return out | ({"config_file": str(config)} if config.is_file() else {})


def of_migraphx(path: Path) -> dict[str, str]:
    return {"migraphx_model_cache_dir": str(cache_folder() / "migraphx")}


OPTIONS: dict[str, Callable[[Path], dict[str, str]]] = {"npu": of_vitisai, "migraphx": of_migraphx}


def options(provider: Provider, path: Path) -> dict[str, str]:
    """The provider's own options for this graph; what the user chose comes first."""
    defaults = OPTIONS[provider.key](path) if provider.key in OPTIONS else {}
    return defaults | dict(provider.options)
