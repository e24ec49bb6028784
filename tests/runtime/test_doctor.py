"""What the doctor reads from the environment: distributions, memory, and the size of caches."""

import sys
from pathlib import Path

import pytest

from pard_onnx.models.manifest import Manifest
from pard_onnx.runtime.providers import environment
from pard_onnx.runtime.providers.environment import Memory, conflict, flavours, memory
from pard_onnx.runtime.providers.table import named
from pard_onnx.runtime.sessions.device_cache import cache_bytes


def distribution(root: Path, name: str) -> None:
    info = root / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "top_level.txt").write_text("onnxruntime\n")


def test_two_flavours_at_once_are_found_and_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = flavours()
    assert len(alone) == 1 and conflict(alone) is None
    distribution(tmp_path, "onnxruntime-webgpu")
    monkeypatch.syspath_prepend(tmp_path)
    both = flavours()
    assert {name for name, _ in both} == {"onnxruntime-webgpu", *(name for name, _ in alone)}
    problem = conflict(both)
    assert problem is not None and "overwrite one another" in problem
    assert f"pip uninstall -y {' '.join(name for name, _ in both)}, then install" in problem


def test_memory_is_told_where_the_system_tells_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = memory()
    assert found.total is None or found.total > 2**28
    monkeypatch.setattr(environment, "MEMINFO", tmp_path / "nowhere")
    assert sys.platform == "win32" or memory() == Memory(found.total, None)
    card = tmp_path / "card0" / "device"
    card.mkdir(parents=True)
    (card / "mem_info_vram_total").write_text(str(8 * 2**30))
    monkeypatch.setattr(environment, "GRAPHICS", tmp_path)
    assert environment.graphics() == ("GPU: card0, 8.0 GiB of its own",)


def test_a_cache_of_two_buffers_counts_twice(pair_folders: tuple[Path, Path]) -> None:
    manifest = Manifest.read(pair_folders[0])
    one = cache_bytes(manifest, named("cpu"))
    assert one == 2 * 2 * 192 * 16 * 4
    assert cache_bytes(manifest, named("cuda")) == one
    assert cache_bytes(manifest, named("directml")) == 2 * one
