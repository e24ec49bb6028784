"""The KV cache in int8, from export to conversations: rounded once, exact in any split, a quarter of the memory."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from pard_onnx import load
from pard_onnx.export.exporter import Job, export
from pard_onnx.export.kv_cache import INT8_FORMATS, largest_magnitudes, windows
from pard_onnx.export.verify.drive import drive
from pard_onnx.export_command import main
from pard_onnx.models.checkpoints.checkpoint import Checkpoint
from pard_onnx.models.manifest import Manifest, Source
from pard_onnx.quantize.calibration.text import TextFile, read_text_file
from pard_onnx.runtime.providers.discovery import require_installed
from pard_onnx.runtime.providers.threads import Threads
from pard_onnx.runtime.sessions.dynamic_shapes import FusedTarget
from pard_onnx.runtime.sessions.kv_cache import KvCache

Tiny = Callable[..., Path]
IDS = np.random.default_rng(5).integers(0, 290, 60)
ROWS = 96


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str, str], Path]]:
    """made(role, kv cache): a tiny model in fp32, exported once."""
    import tiny

    root = tmp_path_factory.mktemp("kv")

    def make(role: str, kv_cache: str) -> Path:
        out = root / f"{role}-{kv_cache}"
        if not out.exists():
            checkpoint = root / role
            if not checkpoint.exists():
                tiny.write(checkpoint, "qwen2", role, layers=2)
            export(Job(Checkpoint.open(checkpoint), Source("tiny"), out, "fp32", kv_cache=kv_cache))
        return out

    yield make


def read(folder: Path, splits: tuple[int, ...]) -> tuple[NDArray[np.float32], dict[str, NDArray[np.generic]]]:
    """All logits, and the caches, after steps of these widths."""
    manifest = Manifest.read(folder)
    driver = drive(folder, manifest)
    logits, start = [], 0
    for width in splits:
        logits.append(driver.step(IDS[start : start + width]))
        start += width
    return np.concatenate(logits), driver.caches


@pytest.mark.parametrize("kv_cache", INT8_FORMATS)
def test_rows_are_rounded_by_their_scales(made: Callable[[str, str], Path], kv_cache: str) -> None:
    """The first layer's rows are the float graph's, divided, rounded and clipped; all logits stay near."""
    import onnx
    from onnx import numpy_helper

    folder = made("target", kv_cache)
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    scales = {t.name: numpy_helper.to_array(t) for t in graph.initializer if t.name.endswith("_scale")}
    wanted, floats = read(made("target", "float"), (60,))
    found, rounded = read(folder, (60,))
    for part in ("key", "value"):
        assert scales[f"0.{part}_scale"].shape == ((1, 2, 1, 16) if kv_cache == "int8" else (1,))
        levels = np.clip(np.rint(floats[f"past_key_values.0.{part}"] / scales[f"0.{part}_scale"]), -128, 127)
        np.testing.assert_array_equal(rounded[f"past_key_values.0.{part}"], levels)
    size = Manifest.read(folder).spec.vocabulary.size
    error = np.abs(found[:, :size] - wanted[:, :size]).mean() / wanted[:, :size].std()
    assert 0 < error < 0.02


def test_scales_are_of_the_largest_magnitudes(made: Callable[[str, str], Path]) -> None:
    """Of every row that was written, a draft's masks included; a channel that is always 0 takes its layer's."""
    for role in ("target", "draft"):
        folder = made(role, "float")
        manifest = Manifest.read(folder)
        text = np.stack([IDS[:40], IDS[20:]])
        driver = drive(folder, manifest)
        found = largest_magnitudes(driver, text)
        masks = 7 if role == "draft" else 0
        expected: dict[str, list[float]] = {}
        for ids in text:
            once = drive(folder, manifest)
            once.step(ids, masks + 1)
            for name, rows in once.caches.items():
                for head, channel in np.ndindex(2, 16):
                    largest = max(abs(float(x)) for x in rows[0, head, : 40 + masks, channel])
                    expected.setdefault(f"{name[16:]} {head} {channel}", []).append(largest)
        for name, largest in found.items():
            for head, channel in np.ndindex(2, 16):
                assert largest[head, channel] == pytest.approx(max(expected[f"{name} {head} {channel}"]), rel=1e-5)
    largest = np.array([[0.0, 2.0], [4.0, 1.0]], np.float32)
    channel, tensor = INT8_FORMATS["int8"].scales(largest), INT8_FORMATS["int8-tensor"].scales(largest)
    np.testing.assert_allclose(channel[0, :, 0], np.array([[4, 2], [4, 1]]) * 1.25 / 127)
    np.testing.assert_allclose(tensor, [4 / 127])


def test_any_split_gives_the_same_rows(made: Callable[[str, str], Path]) -> None:
    """In floats, a step of several tokens and steps of one differ in the last bits; what is rounded does not."""
    whole, caches = read(made("target", "int8"), (60,))
    for splits in ((1,) * 60, (30, 9, 9, 9, 1, 1, 1), (16, 16, 16, 12)):
        logits, others = read(made("target", "int8"), splits)
        np.testing.assert_allclose(logits[:, :300], whole[:, :300], atol=1e-4)
        for name, rows in caches.items():
            np.testing.assert_array_equal(rows[:, :, :60], others[name][:, :, :60])


def test_rollback_leaves_no_trace(made: Callable[[str, str], Path]) -> None:
    folder = made("target", "int8")
    session = FusedTarget(folder, Manifest.read(folder), require_installed("cpu"), Threads(1))
    session.step(IDS[:30].tolist(), 1)
    wanted = session.step(IDS[30:39].tolist(), 9).logits.copy()
    rows = session.cache.read(0, 39)
    assert rows.dtype == np.int8
    for wrong in (1, 9, 21):
        session.rollback(30)
        session.step(IDS[:wrong].tolist(), 1)
        session.rollback(30)
        np.testing.assert_array_equal(session.step(IDS[30:39].tolist(), 9).logits, wanted)
        np.testing.assert_array_equal(session.cache.read(0, 39), rows)


def test_memory_is_a_quarter(made: Callable[[str, str], Path]) -> None:
    sizes = [
        sum(array.nbytes for array in KvCache(Manifest.read(made("target", kind)))._arrays)
        for kind in ("float", "int8")
    ]
    assert sizes[0] == 4 * sizes[1]


def test_pairs_and_conversations(made: Callable[[str, str], Path], tmp_path: Path) -> None:
    """Drafts change no token; a conversation goes on from disk, smaller by what the rows are."""
    target, draft = made("target", "int8"), made("draft", "int8")
    with load(target, draft) as pair:
        plain = pair.generate(IDS[:20].tolist(), max_new_tokens=40, draft_length=0)
        for length in (2, 5):
            drafted = pair.generate(IDS[:20].tolist(), max_new_tokens=40, draft_length=length)
            assert drafted.stats.exact and drafted.tokens == plain.tokens
        chat = pair.chat()
        chat.send("the quick brown fox", max_new_tokens=8)
        chat.save(tmp_path / "small.chat")
        again = pair.restore(tmp_path / "small.chat")
        assert again.send("jumps", max_new_tokens=8).text == chat.send("jumps", max_new_tokens=8).text
    with load(made("target", "float"), made("draft", "float")) as pair:
        chat = pair.chat()
        chat.send("the quick brown fox", max_new_tokens=8)
        chat.save(tmp_path / "large.chat")
    large, small = ((tmp_path / f"{name}.chat").stat().st_size for name in ("large", "small"))
    assert large > 2.5 * small


def test_the_manifest_says_it(made: Callable[[str, str], Path]) -> None:
    manifest = Manifest.read(made("target", "int8"))
    assert (manifest.kv_cache, manifest.kv_dtype) == ("int8", "int8")
    assert manifest.parity is not None and manifest.parity.top1_agreement > 0.8
    plain = Manifest.read(made("target", "float"))
    assert (plain.kv_cache, plain.kv_dtype) == ("float", "float32")


def test_the_command(tmp_path: Path, tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(tiny(tmp_path / "model", "llama", layers=1))
    out = str(tmp_path / "out")
    assert main(["--model", folder, "--precision", "fp16", "--kv-cache", "int8", "--output", out, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kv_cache"] == "int8"
    with load(out) as pair:
        assert len(pair.generate(IDS[:9].tolist(), max_new_tokens=4).tokens) <= 4
    with pytest.raises(SystemExit) as caught:
        main(["--model", folder, "--kv-cache", "int4", "--output", str(tmp_path / "no")])
    err = capsys.readouterr().err
    assert caught.value.code == 2 and "'int4'" in err and len(err.splitlines()) == 1


def test_windows_of_the_calibration_text(tmp_path: Path, tiny: Tiny) -> None:
    """They fit the model's context, masks included; a text of less than one is repeated."""
    checkpoint = Checkpoint.open(tiny(tmp_path / "model", max_positions=64))
    assert windows(checkpoint, read_text_file()).shape == (8, 56)
    (only,) = windows(checkpoint, TextFile("short", "", ("the quick brown fox",)))
    assert len(only) == 56 and only[0] in only[1:]
