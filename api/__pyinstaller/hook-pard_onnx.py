"""What PyInstaller does not find in this package by itself: names that are imported when they are first used, the CPU
kernels, which are no Python module, the versions of distributions, and data files (without the demo pair, 7 MB)."""

from importlib.util import find_spec
from pathlib import Path

from PyInstaller.utils.hooks import copy_metadata

import pard_onnx

# Providers that are packages of their own.
PLUGINS = ("onnxruntime_ep_amdgpu", "onnxruntime_ep_migraphx", "onnxruntime_ep_webgpu", "windowsml")
DATA = {"quantize.calibration": "*.jsonl", "export.verify": "*.txt", "models.demo": "*.json"}


def folder(package: str) -> Path:
    """The folder of one of this package's packages."""
    spec = find_spec(f"pard_onnx.{package}")
    assert spec and spec.submodule_search_locations
    return Path(next(iter(spec.submodule_search_locations)))


def beside(package: str, pattern: str) -> list[tuple[str, str]]:
    """The files of a package, and the folder that they get in the application."""
    return [(str(file), f"pard_onnx/{package.replace('.', '/')}") for file in folder(package).glob(pattern)]


hiddenimports = sorted({f"pard_onnx.{module}" for module in pard_onnx._MODULES.values()})
hiddenimports += ["onnxruntime", *(name for name in PLUGINS if find_spec(name))]
binaries = beside("runtime.kernels", "_cpu.*")
datas = [file for package, pattern in DATA.items() for file in beside(package, pattern)] + copy_metadata("pard-onnx")
