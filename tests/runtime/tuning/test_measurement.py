"""What is found out on a live session: exact widths by bitwise comparison, costs that never fall, and their cache."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pard_onnx import load
from pard_onnx.models.manifest import Manifest
from pard_onnx.runtime.model import open_artifact, open_model
from pard_onnx.runtime.providers.discovery import require_installed
from pard_onnx.runtime.providers.threads import Threads
from pard_onnx.runtime.sessions.dynamic_shapes import FusedDraft, FusedTarget
from pard_onnx.runtime.tuning.measurement import (
    CHUNKS,
    SPLITS,
    WIDTH,
    cheapest,
    fastest_chunk,
    measure_draft,
    measure_prefill_chunk,
    measure_target,
)
from pard_onnx.runtime.tuning.steps import ANY, CANDIDATES, EVEN, PREFILL_CHUNK, Widths


def opened(kind: Any, folder: Path) -> Any:
    return kind(folder, Manifest.read(folder), require_installed("cpu"), Threads(1))


def odd_one_out(session: FusedTarget, wrong: Callable[[int], bool], where: str) -> None:
    """Make steps of some widths differ in the last bit, of a logit or of a KV row."""
    step = session.step

    def other(ids: list[int], keep: int) -> Any:
        start = session.length
        rows = step(ids, keep)
        if wrong(len(ids)):
            array = rows.logits if where == "logits" else session.cache._arrays[-1]
            spot = (0, 0) if where == "logits" else (0, 0, start, 0)
            array[spot] = np.nextafter(array[spot], np.float32(np.inf))
        return rows

    session.step = other  # type: ignore[method-assign]


@pytest.mark.parametrize("where", ["logits", "rows"])
@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        (lambda width: False, ANY),
        (lambda width: width == 1, Widths(1, 2)),
        (lambda width: width % 2 == 1, EVEN),
        (lambda width: width == 3, EVEN),
        (lambda width: width in (2, 6), Widths(4, 4)),
        (lambda width: width < WIDTH, None),
    ],
)
def test_a_width_whose_rows_differ_by_one_bit_is_found_out(
    pair_folders: tuple[Path, Path], wrong: Callable[[int], bool], expected: Widths | None, where: str
) -> None:
    session = opened(FusedTarget, pair_folders[0])
    session.step([1] * 64, 64)  # the largest buffer, before its step is replaced
    session.rollback(0)
    true = measure_target(session).widths
    odd_one_out(session, wrong, where)
    found = measure_target(session)
    # What the machine itself cannot do is not to be found either.
    assert true in (ANY, Widths(1, 2))
    assert found.widths == (true if expected == ANY else expected)
    assert session.length == 0


def test_the_splits_cover_every_small_width_and_fit_the_reference() -> None:
    assert {width for split in SPLITS for width in split} >= set(range(1, 9))
    assert all(sum(split) <= WIDTH for split in SPLITS)


def test_a_draft_is_measured_and_left_empty(pair_folders: tuple[Path, Path]) -> None:
    session = opened(FusedDraft, pair_folders[1])
    costs = measure_draft(session).costs
    assert session.length == 0
    assert all(seconds > 0 for _, seconds in costs.points)


def test_costs_never_fall() -> None:
    assert cheapest({1: [5.0, 2.0], 2: [9.0], 4: [3.0], 8: [4.0]}).points == ((1, 2.0), (2, 3.0), (4, 3.0), (8, 4.0))


@pytest.mark.parametrize(
    ("seconds", "chunk"),
    [
        ({64: 1.0, 128: 1.0, 256: 1.0}, 64),
        ({64: 1.3, 128: 1.01, 256: 1.0}, 128),  # nearly as fast is fast enough
        ({64: 1.3, 128: 1.2, 256: 1.1, 512: 1.0}, 512),
        ({}, PREFILL_CHUNK),
    ],
)
def test_the_smallest_chunk_that_is_nearly_the_fastest(seconds: dict[int, float], chunk: int) -> None:
    assert fastest_chunk(seconds) == chunk


def test_the_chunk_of_prefill_is_measured_on_request_and_used(
    pair_folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PARD_ONNX_CACHE", str(tmp_path))
    artifact = open_artifact(pair_folders[0])
    opened_anew = open_model(artifact, require_installed("cpu"), Threads(1), measure_again=True)
    assert measure_prefill_chunk(opened_anew.session) in CHUNKS
    assert opened_anew.session.length == 0
    widths: list[int] = []
    monkeypatch.setattr("pard_onnx.runtime.model.measure_prefill_chunk", lambda _: 64)
    open_model(artifact, require_installed("cpu"), Threads(1), measure_again=True)
    with load(pair_folders[0], threads=1) as pair:
        step = pair.engine.models[0].session.step

        def counted(ids: list[int], keep: int) -> Any:
            widths.append(len(ids))
            return step(ids, keep)

        monkeypatch.setattr(pair.engine.models[0].session, "step", counted)
        pair.generate([5] * 100, max_new_tokens=1)
    assert widths[:2] == [64, 36]


def test_what_is_known_is_not_found_out_again(
    pair_folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PARD_ONNX_CACHE", str(tmp_path))
    load(*pair_folders, threads=1).close()
    files = sorted((tmp_path / "machine").iterdir())
    assert len(files) == 2
    monkeypatch.setattr("pard_onnx.runtime.model.measure_target", lambda _: pytest.fail("measured again"))
    monkeypatch.setattr("pard_onnx.runtime.model.measure_draft", lambda _: pytest.fail("measured again"))
    with load(*pair_folders, threads=1) as pair:
        assert pair.exact_widths in CANDIDATES


@pytest.mark.parametrize("damage", ["{", "[]", json.dumps({"widths": 3}), "[" * 100_000, "9" * 5000])
def test_a_damaged_cache_is_found_out_again(
    pair_folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    monkeypatch.setenv("PARD_ONNX_CACHE", str(tmp_path))
    load(*pair_folders, threads=1).close()
    for file in (tmp_path / "machine").iterdir():
        file.write_text(damage, encoding="utf-8")
    load(*pair_folders, threads=1).close()
    assert all(file.read_text(encoding="utf-8") != damage for file in (tmp_path / "machine").iterdir())


def test_a_cache_that_cannot_be_written_is_no_error(
    pair_folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way", encoding="utf-8")
    monkeypatch.setenv("PARD_ONNX_CACHE", str(blocked))
    load(*pair_folders, threads=1).close()
