"""What surrounds generations: shared models, progress, facts, log lines, and the first steps."""

import dataclasses
import gc
import json
import logging
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import pard_onnx
from pard_onnx import BadInput, Failure, Pair, load

TEXT = "the quick brown fox"


@pytest.fixture
def pair(pair_folders: tuple[Path, Path]) -> Iterator[Pair]:
    with load(*pair_folders, threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def other_draft(write_artifact: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_artifact(tmp_path_factory.mktemp("other") / "draft", "draft", rows=284, seed=2)


@pytest.fixture(scope="module")
def other_target(write_artifact: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_artifact(tmp_path_factory.mktemp("other") / "target", "target", seed=3)


def tokens(pair: Pair, **options: Any) -> tuple[int, ...]:
    return pair.generate(TEXT, **{"max_new_tokens": 24, "draft_length": 4, **options}).tokens


# --- shared models


def test_two_drafts_share_a_target(pair: Pair, other_draft: Path, pair_folders: tuple[Path, Path]) -> None:
    expected = tokens(pair)
    with load(pair, other_draft, threads=1) as second, load(pair) as third:
        assert second.engine.models[0].session is third.engine.models[0].session is pair.engine.models[0].session
        assert second.engine.models[1].session is not pair.engine.models[1].session  # type: ignore[union-attr]
        assert (second.target_name, second.draft_name) == (pair.target_name, str(other_draft))
        assert tokens(second) == tokens(third, draft_length=0) == tokens(pair) == expected
        assert second.info().target.shared and not pair.info().target.shared


def test_two_targets_share_a_draft(pair: Pair, other_target: Path) -> None:
    with load(other_target, threads=1) as alone, load(other_target, pair, threads=1) as second:
        assert second.engine.models[1].session is pair.engine.models[1].session  # type: ignore[union-attr]
        assert tokens(second) == tokens(alone, draft_length=0)
        assert tokens(second) != tokens(pair)
    with load(pair, pair) as third:
        assert tokens(third) == tokens(pair)


@pytest.mark.parametrize("lender_first", [True, False])
def test_weights_live_until_the_last_pair_is_closed(
    pair_folders: tuple[Path, Path], other_draft: Path, lender_first: bool
) -> None:
    lender = load(*pair_folders, threads=1)
    borrower = load(lender, other_draft, threads=1)
    session = weakref.ref(lender.engine.models[0].session)
    expected = tokens(lender)
    first, last = (lender, borrower) if lender_first else (borrower, lender)
    first.close()
    with pytest.raises(Failure, match="this pair is closed; load it again"):
        tokens(first)
    assert session() is not None and tokens(last) == expected
    with pytest.raises(Failure, match="this pair is closed; load it again"):
        load(first)
    last.close()
    del lender, borrower, first, last
    gc.collect()
    assert session() is None


def test_generations_of_pairs_that_share_take_turns(pair: Pair, other_draft: Path) -> None:
    """Round by round in one thread, and at once in several; chats too, whose KV caches stay their own."""
    expected = tokens(pair, max_new_tokens=40)
    sampled = tokens(pair, temperature=1.0, seed=1)
    with load(pair, other_draft, threads=1) as second:
        streams = [one.stream(TEXT, max_new_tokens=40, draft_length=4) for one in (pair, second)]
        for _ in range(100):
            for stream in streams:
                next(stream, None)
        assert [stream.result.tokens for stream in streams] == [expected, expected]
        found: list[tuple[int, ...]] = []

        def run(one: Pair) -> None:
            for _ in range(4):
                found.append(tokens(one, temperature=1.0, seed=1))

        threads = [threading.Thread(target=run, args=(one,)) for one in (pair, second)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == [sampled] * 8
        with pair.chat() as one, second.chat() as two:
            for _ in range(2):
                assert one.send("fox", max_new_tokens=5).tokens == two.send("fox", max_new_tokens=5).tokens
            assert one.send("fox", max_new_tokens=5).stats.cached_tokens > 5


def test_what_cannot_be_shared_is_told(pair: Pair, pair_folders: tuple[Path, Path], other_target: Path) -> None:
    with load(other_target, threads=1) as alone, pytest.raises(BadInput, match="has no draft to share; name the fold"):
        load(other_target, alone)
    for options, problem in (
        ({"provider": "cuda"}, r"a provider for the target \('cuda'\), but the target is open already; leave it out"),
        ({"provider_options": {"a": 1}}, "provider options of the target .* is open already"),
        ({"revision": "v1"}, r"a revision of the target \('v1'\), but the target is open already"),
    ):
        with pytest.raises(BadInput, match=problem):
            load(pair, **options)
    with pytest.raises(BadInput, match=r"a provider for the draft \('cpu'\), but the draft is open already"):
        load(other_target, pair, draft_provider="cpu")
    with pytest.raises(BadInput, match="target must be the folder, the name in the library or the hub id"):
        load(5)  # type: ignore[arg-type]


# --- progress


def test_progress_goes_through_all_stages(pair_folders: tuple[Path, Path], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("PARD_ONNX_CACHE", str(tmp_path))  # nothing is known of these files
    reports: list[tuple[str, int, int]] = []
    load(*pair_folders, threads=1, progress=lambda *report: reports.append(report)).close()
    stages = list(dict.fromkeys(stage for stage, *_ in reports))
    names = ("verify target", "verify draft", "open target", "measure target", "open draft", "measure draft")
    assert stages == list(names)
    for stage in stages:
        steps = [(done, total) for name, done, total in reports if name == stage]
        assert steps == sorted(steps) and steps[0][0] == 0 and steps[-1][0] == steps[-1][1] > 0
        assert len({total for _, total in steps}) == 1


def test_files_that_were_hashed_before_count_too(write_artifact: Callable[..., Path], tmp_path: Path) -> None:
    folder = write_artifact(tmp_path / "target", "target")
    for file in folder.iterdir():
        os.utime(file, (1e9, 1e9))  # young files are always hashed
    for _ in range(2):
        reports: list[tuple[str, int, int]] = []
        load(folder, threads=1, progress=lambda *report, found=reports: found.append(report)).close()
        verified = [(done, total) for stage, done, total in reports if stage == "verify target"]
        assert verified[-1][0] == verified[-1][1] > 0


def test_progress_may_end_the_loading(pair_folders: tuple[Path, Path]) -> None:
    class Cancelled(Exception):
        pass

    def progress(stage: str, done: int, total: int) -> None:
        if stage == "open draft":
            raise Cancelled

    with pytest.raises(Cancelled):
        load(*pair_folders, threads=1, progress=progress)
    with pytest.raises(BadInput, match="progress must be a function of a stage and what is done and the total, not"):
        load(*pair_folders, progress=None)  # type: ignore[arg-type]


# --- info


def test_info_is_json(pair: Pair) -> None:
    info = pair.info()
    found = json.loads(json.dumps(dataclasses.asdict(info)))
    assert found["versions"].keys() == {"pard_onnx", "onnxruntime", "numpy", "tokenizers", "python"}
    assert found["versions"]["pard_onnx"] == pard_onnx.__version__
    assert found["target"]["name"] == pair.target_name and found["draft"]["role"] == "draft"
    stats = pair.generate(TEXT, max_new_tokens=2).stats
    assert (found["kernel"], found["exact"], tuple(found["exact_widths"])) == (stats.kernel, stats.exact, stats.widths)
    assert found["context"] == pair.capacity
    assert found["target"]["provider"] == stats.provider == "cpu"
    size = sum(file.stat().st_size for file in Path(pair.target_name).iterdir() if file.name.startswith("model"))
    assert found["target"]["weight_bytes"] == size
    assert found["weight_bytes"] == size + found["draft"]["weight_bytes"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        info.kernel = "other"  # type: ignore[misc]


def test_info_of_a_target_alone(pair_folders: tuple[Path, Path]) -> None:
    with load(pair_folders[0], threads=1) as alone:
        assert alone.info().draft is None
    with pytest.raises(Failure, match="closed"):
        alone.info()


# --- logging


def test_nothing_is_logged_that_somebody_wrote(
    pair_folders: tuple[Path, Path], caplog: pytest.LogCaptureFixture, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setenv("PARD_ONNX_CACHE", str(tmp_path))
    secret = "jumps"
    with caplog.at_level(logging.DEBUG, "pard_onnx"), load(*pair_folders, threads=1) as pair:
        result = pair.generate(f"the quick {secret}", max_new_tokens=8)
        with pair.chat(secret) as chat:
            chat.send(secret, max_new_tokens=3)
        pair.warm_up()
    lines = [record.getMessage() for record in caplog.records]
    assert all(record.name.startswith("pard_onnx.") and record.levelno < logging.WARNING for record in caplog.records)
    for wanted in ("opened on cpu in", "measured in", "loaded in", "8 tokens after", "warmed up in", "files verified"):
        assert any(wanted in line for line in lines), wanted
    assert not [line for line in lines if secret in line or "\n" in line or (result.text and result.text in line)]


def test_without_a_handler_nothing_is_printed(pair: Pair, capfd: pytest.CaptureFixture[str]) -> None:
    pair.generate(TEXT, max_new_tokens=2)
    assert capfd.readouterr() == ("", "")
    assert [type(handler) for handler in logging.getLogger("pard_onnx").handlers] == [logging.NullHandler]


# --- warm_up


@pytest.mark.parametrize("with_draft", [True, False])
def test_warming_up_takes_the_usual_steps_and_changes_no_text(
    pair_folders: tuple[Path, Path], with_draft: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with load(pair_folders[0], pair_folders[1] if with_draft else None, threads=1) as pair:
        expected = pair.generate(TEXT, max_new_tokens=20)
        session, seen = pair.engine.models[0].session, []
        step = session.step
        monkeypatch.setattr(session, "step", lambda ids, keep: seen.append(len(ids)) or step(ids, keep))
        chats, encode_chat = [], pair.text.encode_chat
        monkeypatch.setattr(pair.text, "encode_chat", lambda *given: chats.append(given) or encode_chat(*given))
        assert pair.warm_up() > 0
        assert chats
        assert max(seen) > 8  # a prompt
        assert 1 in seen or 2 in seen  # a plain round
        assert not with_draft or 8 in seen  # one that verifies drafts
        seen.clear()
        assert pair.generate(TEXT, max_new_tokens=20).tokens == expected.tokens
        with pair.chat() as chat:
            assert chat.send("fox", max_new_tokens=2).stats.cached_tokens == 0


def test_the_smallest_capacity_is_warmed_up(
    write_artifact: Callable[..., Path], tmp_path: Path, pair_folders: tuple[Path, Path]
) -> None:
    for room in (2, 9, 11, 40):
        folder = write_artifact(tmp_path / str(room), "target", kv_rows=64 + room)
        with load(folder, pair_folders[1], threads=1) as pair:
            pair.warm_up()
