"""KV caches on a device, by a fake one: what crosses the bus, whose buffers are whose, and what does not fit."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy

from pard_onnx import BadArtifact, load
from pard_onnx.models.manifest import KV_MARGIN, Manifest
from pard_onnx.runtime.providers.memory import make_buffers
from pard_onnx.runtime.providers.table import provider_named
from pard_onnx.runtime.providers.threads import Threads
from pard_onnx.runtime.sessions.device_cache import USABLE_SHARE, possible_capacity
from pard_onnx.runtime.sessions.dynamic_shapes import FusedTarget

CUDA, NPU = "CUDAExecutionProvider", "VitisAIExecutionProvider"
TEXT = "the quick brown"
MOVED = {"input_ids", "attention_mask", "logits_to_keep", "draft_length", "logits", "draft_ids", "draft_probabilities"}
Device = Callable[..., Any]


def opened(folder: Path, **changes: Any) -> FusedTarget:
    return FusedTarget(folder, Manifest.read(folder), replace(provider_named("cuda"), **changes), Threads(1))


def test_a_round_moves_ids_and_rows_and_no_kv(pair_folders: tuple[Path, Path], device: Device) -> None:
    expected = load(*pair_folders, threads=1).generate(TEXT, max_new_tokens=40, draft_length=5).tokens
    fake = device(CUDA)
    with load(*pair_folders, provider="cuda", threads=1) as pair:
        fake.crossed.clear()
        result = pair.generate(TEXT, max_new_tokens=40, draft_length=5)
        moved = fake.crossed.copy()
    assert result.tokens == expected
    assert {name for name, _ in moved} == MOVED
    rows = 6 + 1  # K + 1 and padding at most
    most = 4 * toy.Shape().rows * rows + 2 * 8 * (toy.Shape().kv_rows + 2 * rows + 1) + 12 * 5
    assert sum(size for _, size in moved) <= most * (result.stats.rounds + 1)


def test_a_steps_bytes_are_counted_one_by_one(pair_folders: tuple[Path, Path], device: Device) -> None:
    fake = device(CUDA)
    session = opened(pair_folders[0])
    session.step([1] * 10, 1)
    fake.crossed.clear()
    session.step([1, 2, 3], 2)
    rows = 2 * toy.Shape().rows * 4
    assert sorted(fake.crossed) == [("attention_mask", 13 * 8), ("input_ids", 3 * 8), ("logits", rows),
                                    ("logits_to_keep", 8)]  # fmt: skip


@pytest.mark.parametrize("in_place", [("gqa",), ()])
@pytest.mark.parametrize("memory", ["cuda", "cpu"])
def test_rows_are_right_wherever_the_cache_lives(
    pair_folders: tuple[Path, Path],
    device: Device,
    in_place: tuple[str, ...],
    memory: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PARD_ONNX_KERNEL", "off")  # the stand-in's kernels are ONNX Runtime's
    host = FusedTarget(pair_folders[0], Manifest.read(pair_folders[0]), provider_named("cpu"), Threads(1))
    fake = device(CUDA)
    session = opened(pair_folders[0], in_place=in_place, memory=memory)
    for model in (host, session):
        model.step([5, 17, 200, 3], 1)
        model.step([9, 9, 9], 2)
        model.rollback(4)
    np.testing.assert_array_equal(session.step([42, 7], 2).logits, host.step([42, 7], 2).logits)
    np.testing.assert_array_equal(session.cache.read(0, 6), host.cache.read(0, 6))
    assert bool(fake.in_place) == (memory == "cuda" and bool(in_place))
    again = session.new_cache()
    again.write(host.cache.read(0, 5))
    session.attach(again)
    host.rollback(5)
    np.testing.assert_array_equal(session.step([7], 1).logits, host.step([7], 1).logits)


def test_conversations_are_saved_and_restored(pair_folders: tuple[Path, Path], device: Device, tmp_path: Path) -> None:
    device(CUDA)
    with load(*pair_folders, provider="cuda", threads=1) as pair:
        chat = pair.chat(messages=[{"role": "user", "content": "fox"}])
        chat.send("the dog", max_new_tokens=8)
        chat.save(tmp_path / "saved")
        again = pair.restore(tmp_path / "saved")
        said = [one.send("and", max_new_tokens=8) for one in (chat, again)]
        assert said[0].tokens == said[1].tokens and said[1].stats.cached_tokens > 8


def test_a_cache_that_does_not_fit_names_the_capacity_that_would(
    pair_folders: tuple[Path, Path], device: Device
) -> None:
    manifest = Manifest.read(pair_folders[0])
    shape = toy.Shape()
    buffer = 4 * shape.kv_heads * shape.kv_rows * shape.head_dim
    device(CUDA, room=3 * buffer)
    capacity = int(USABLE_SHARE * shape.kv_rows * 3 / 4) - KV_MARGIN
    fix = f"{capacity} tokens would fit: export it with --context-length {capacity}"
    with pytest.raises(BadArtifact, match=rf"128 tokens takes .* MiB fit on cuda; {fix}"):
        FusedTarget(pair_folders[0], manifest, provider_named("cuda"), Threads(1))


@pytest.mark.parametrize("kind", [np.float32, np.float16, np.int8])
def test_every_type_of_cache_has_a_graph_that_makes_its_buffers(device: Device, kind: type[np.generic]) -> None:
    device(CUDA)
    array = np.arange(24).astype(kind).reshape(1, 2, 3, 4)
    (buffer,) = make_buffers(provider_named("cuda"), [array])
    np.testing.assert_array_equal(buffer.read(), array)


@pytest.mark.parametrize(("made", "capacity"), [(0, 0), (1, 161), (4, 836), (8, 1736)])
def test_the_capacity_that_would_fit_leaves_room(made: int, capacity: int) -> None:
    assert possible_capacity(2000, made, 8) == capacity
    assert USABLE_SHARE == 0.9 and KV_MARGIN == 64
