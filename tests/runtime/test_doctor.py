"""What the doctor reads from the environment: distributions, memory, and the size of caches."""

import sys
from pathlib import Path

import pytest

from pard_onnx.models.manifest import Manifest
from pard_onnx.runtime import doctor
from pard_onnx.runtime.doctor import HostMemory, conflict, graphics_memory, host_memory, onnxruntime_distributions
from pard_onnx.runtime.providers.table import provider_named
from pard_onnx.runtime.sessions.device_cache import cache_bytes


def distribution(root: Path, name: str) -> None:
    info = root / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "top_level.txt").write_text("onnxruntime\n")


def test_two_flavours_at_once_are_found_and_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = onnxruntime_distributions()
    assert len(alone) == 1 and conflict(alone) is None
    distribution(tmp_path, "onnxruntime-webgpu")
    monkeypatch.syspath_prepend(tmp_path)
    both = onnxruntime_distributions()
    assert {name for name, _ in both} == {"onnxruntime-webgpu", *(name for name, _ in alone)}
    problem = conflict(both)
    assert problem is not None and "overwrite one another" in problem
    assert f"pip uninstall -y {' '.join(name for name, _ in both)}, then install" in problem


def test_memory_is_reported_where_the_system_reports_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = host_memory()
    assert found.total is None or found.total > 2**28
    monkeypatch.setattr(doctor, "MEMINFO", tmp_path / "nowhere")
    assert sys.platform == "win32" or host_memory() == HostMemory(found.total, None)
    card = tmp_path / "card0" / "device"
    card.mkdir(parents=True)
    (card / "mem_info_vram_total").write_text(str(8 * 2**30))
    monkeypatch.setattr(doctor, "GRAPHICS", tmp_path)
    assert graphics_memory() == ("GPU: card0, 8.0 GiB of its own",)


def test_a_cache_of_two_buffers_counts_twice(pair_folders: tuple[Path, Path]) -> None:
    manifest = Manifest.read(pair_folders[0])
    one = cache_bytes(manifest, provider_named("cpu"))
    assert one == 2 * 2 * 192 * 16 * 4
    assert cache_bytes(manifest, provider_named("cuda")) == one
    assert cache_bytes(manifest, provider_named("directml")) == 2 * one
