"""The self-check: what rounding may do, which steps are right, and what becomes of a provider that is wrong."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pard_onnx import BadProvider, Failure, Pair, PardWarning, load
from pard_onnx.models.manifest import Manifest
from pard_onnx.models.precision import PRECISIONS
from pard_onnx.runtime.providers.table import provider_named
from pard_onnx.runtime.providers.threads import Threads
from pard_onnx.runtime.sessions import dynamic_shapes as sessions
from pard_onnx.runtime.sessions.dynamic_shapes import FusedDraft, FusedTarget
from pard_onnx.runtime.tuning.remembered import save_record
from pard_onnx.runtime.tuning.self_check import (  # fmt: skip
    ACROSS,
    CACHE,
    NOT_FINITE,
    TOLERANCE,
    Verdict,
    check_draft,
    check_target,
    difference,
    require_right,
)

CUDA = "CUDAExecutionProvider"
TEXT = "the quick brown"
Device = Callable[..., Any]


def opened(kind: Any, folder: Path) -> Any:
    return kind(folder, Manifest.read(folder), provider_named("cpu"), Threads(1))


def test_right_steps_pass(pair_folders: tuple[Path, Path]) -> None:
    for kind, check, folder in zip((FusedTarget, FusedDraft), (check_target, check_draft), pair_folders, strict=True):
        session = opened(kind, folder)
        verdict = check(session, lambda kind=kind, folder=folder: opened(kind, folder))  # type: ignore[misc]
        assert verdict.steps == "any" and verdict.several < 1e-4 and (verdict.single or 0) < 1e-4
        assert session.length == 0
        assert verdict.cpu_seconds is not None and "ms on the CPU" in verdict.pace()


def test_where_the_cpu_runs_no_such_graph_nothing_is_compared(pair_folders: tuple[Path, Path]) -> None:
    verdict = check_target(opened(FusedTarget, pair_folders[0]), lambda: None)
    assert verdict.single is None and verdict.steps == "any" and "not compared" in verdict.describe()
    assert not verdict.slow and "CPU" not in verdict.pace()


@pytest.mark.parametrize(("seconds", "slow"), [(0.05, False), (0.29, False), (0.31, True)])
def test_a_device_that_takes_several_times_as_long_as_the_cpu_is_slow(seconds: float, slow: bool) -> None:
    assert Verdict(0.0, 0.0, 0.005, seconds, 0.1).slow is slow


@pytest.mark.parametrize(
    ("several", "single", "steps"),
    [
        (0.005, 0.01, "any"),
        (0.0051, 0.01, "single"),
        (0.0, 0.0101, "none"),
        (1.0, 0.0101, "none"),
        (1.0, None, "single"),
        (NOT_FINITE, NOT_FINITE, "none"),
    ],
)
def test_which_steps_are_right(several: float, single: float | None, steps: str) -> None:
    assert Verdict(several, single, TOLERANCE["fp32"], 0.1, 0.1).steps == steps
    assert ACROSS * TOLERANCE["fp32"] == 0.01


def test_every_precision_has_a_tolerance() -> None:
    assert set(TOLERANCE) >= set(PRECISIONS)
    assert set(CACHE) == set(get_args(get_type_hints(Manifest)["kv_dtype"]))


@given(st.integers(1, 5), st.floats(0.1, 100), st.floats(-5, 5))
def test_the_difference_knows_neither_scale_nor_offset(rows: int, scale: float, offset: float) -> None:
    random = np.random.default_rng(rows)
    expected = random.normal(size=(rows, 50))
    other = expected + 0.01 * random.normal(size=expected.shape)
    plain = difference(other, expected, 50)
    moved = difference(scale * other + offset, scale * expected + offset, 50)
    assert moved == pytest.approx(plain, rel=1e-6)
    assert plain >= difference(other[:1], expected[:1], 50)


def test_rows_with_nan_or_infinity_differ_unless_they_are_padding() -> None:
    rows = np.ones((2, 4)) * np.arange(4)
    rows[:, 3] = -np.inf
    assert difference(rows, rows, 3) == 0
    assert difference(rows, rows, 4) == NOT_FINITE


def wrong_steps(monkeypatch: pytest.MonkeyPatch, fake: Any, wrong: Callable[[int], bool]) -> None:
    """Make the fake device's steps of some widths see a mask that is a token short, as if a row were overlooked."""
    run = sessions.GraphSession._run

    def other(self: Any, ids: Any, written: int, name: str, count: int) -> None:
        if self.provider.key == "cpu" or not wrong(written) or not self.length:
            return run(self, ids, written, name, count)
        self.cache.length -= 1
        run(self, ids, written, name, count)
        self.cache.length += 1

    monkeypatch.setattr(sessions.GraphSession, "_run", other)


def several(written: int) -> bool:
    return written > 1


def test_wrong_steps_of_several_tokens_are_run_one_by_one_with_one_warning_each(
    pair_folders: tuple[Path, Path], device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [load(*pair_folders, threads=1).generate(TEXT, max_new_tokens=20, draft_length=k) for k in (0, 5)]
    wrong_steps(monkeypatch, device(CUDA), several)
    with pytest.warns(PardWarning, match="cuda computes steps of several tokens of .* wrongly") as told:
        pair = load(*pair_folders, provider="cuda", threads=1)
    assert len(told) == 2 and "target" in str(told[0].message) and "draft" in str(told[1].message)
    for k, wanted in zip((0, 5), expected, strict=True):
        found = pair.generate(TEXT, max_new_tokens=20, draft_length=k)
        assert (found.tokens, found.stats.accepted) == (wanted.tokens, wanted.stats.accepted)
        assert (found.stats.widths, found.stats.exact, found.stats.provider) == ((1,), True, "cuda")
    assert pair.generate(TEXT, max_new_tokens=20).tokens == expected[0].tokens
    chat = pair.chat(messages=[])
    assert chat.send("fox", max_new_tokens=4).stats.widths == (1,)


def test_where_single_steps_are_wrong_the_numbers_are_told(
    pair_folders: tuple[Path, Path], device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong_steps(monkeypatch, device(CUDA), lambda written: True)
    numbers = r"differ by .* from single steps, single steps by .* from the CPU, where 0\.005 and 0\.01 are rounding"
    with pytest.raises(BadProvider, match=rf"'cuda' computes .*target wrongly: .*{numbers}; export it"):
        load(*pair_folders, provider="cuda", threads=1)


def test_a_verdict_is_kept_and_a_wrong_one_refused_again(
    pair_folders: tuple[Path, Path], device: Device, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    device(CUDA)
    load(pair_folders[0], provider="cuda", threads=1).close()
    monkeypatch.setattr("pard_onnx.runtime.model.check_target", lambda *_: pytest.fail("checked again"))
    load(pair_folders[0], provider="cuda", threads=1).close()
    bad = Verdict(1.0, 1.0, 0.005, 0.1, None)
    for file in (tmp_path / "cache" / "machine").iterdir():
        if "several" in json.loads(file.read_text())["record"]:
            save_record(file, bad)
    with pytest.raises(BadProvider, match=r"computes .* wrongly"):
        load(pair_folders[0], provider="cuda", threads=1)
    with pytest.raises(BadProvider):
        require_right(bad, "a model", provider_named("cuda"))


def test_a_provider_that_fails_in_a_step_is_refused_with_what_it_said(
    pair_folders: tuple[Path, Path], device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    device(CUDA)
    run = sessions.GraphSession._run

    def lacking(self: Any, *step: Any) -> None:
        if self.provider.key != "cpu":
            raise Failure("model.onnx: ONNX Runtime failed in a step: it needs f16\nat line 5")
        run(self, *step)

    monkeypatch.setattr(sessions.GraphSession, "_run", lacking)
    with pytest.raises(BadProvider, match=r"'cuda' cannot run .*target: .*it needs f16.*; export it .*--device cuda"):
        load(*pair_folders, provider="cuda", threads=1)
    with load(*pair_folders, provider="auto", threads=1) as pair:
        assert pair.choice.provider.key == "cpu" and "it needs f16" in pair.choice.reason


def test_the_cpu_is_not_checked(pair_folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pard_onnx.runtime.model.check_target", lambda *_: pytest.fail("checked"))
    pair: Pair = load(pair_folders[0], threads=1)
    assert pair.generate(TEXT, max_new_tokens=2).stats.provider == "cpu"
