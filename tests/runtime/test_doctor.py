"""What the doctor reads from the environment: distributions, memory, and the size of caches."""

import sys
from pathlib import Path

import pytest

from pard_onnx.models.manifest import Manifest
from pard_onnx.runtime import doctor
from pard_onnx.runtime.doctor import (
    HostMemory,
    cgroup_limits,
    conflict,
    graphics_memory,
    host_memory,
    memory_limit,
    onnxruntime_distributions,
)
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
    assert problem.endswith(f"; run: pip uninstall -y {' '.join(name for name, _ in both)}")


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


def test_the_limits_of_control_groups_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    groups, mounted = tmp_path / "cgroup", tmp_path / "mounted"
    service = mounted / "system.slice" / "some.service"
    service.mkdir(parents=True)
    assert list(cgroup_limits(groups, mounted)) == []  # no such file: not Linux
    groups.write_text("0::/system.slice/some.service\n")
    (service / "memory.max").write_text("max\n")
    (service.parent / "memory.max").write_text("5000\n")
    assert list(cgroup_limits(groups, mounted)) == [5000]
    (service / "memory.max").write_text("4000\n")
    (tmp_path / "memory.max").write_text("1\n")  # outside
    assert list(cgroup_limits(groups, mounted)) == [4000, 5000]
    first = mounted / "memory" / "memory.limit_in_bytes"  # version 1, as a container sees it
    first.parent.mkdir()
    first.write_text("3000\n")
    groups.write_text("9:name=systemd:/\n5:memory:/docker/abc\n3:cpu,cpuacct:/\n")
    assert list(cgroup_limits(groups, mounted)) == [3000]
    monkeypatch.setattr(doctor, "cgroup_limits", lambda: [3000, 10**18])
    assert memory_limit() == 3000
    monkeypatch.setattr(doctor, "cgroup_limits", lambda: [10**18])
    assert memory_limit() == host_memory().total
