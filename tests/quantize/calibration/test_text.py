"""Calibration text: files to rows of tokens, a draft's with its masks."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from pard_onnx.models.checkpoints.checkpoint import Checkpoint
from pard_onnx.models.errors import BadInput
from pard_onnx.quantize.calibration.text import DRAFT_ROW, ROW, SHIPPED, calibration_rows, read_text_file

Tiny = Callable[..., Path]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    (
        ("a.jsonl", b'{"text": "fine"}\n\n{"text": \n', "line 3: is not JSON"),
        ("a.jsonl", b'{"text": "fine"}\n["no"]\n', "line 2: needs an object"),
        ("a.jsonl", b'{"text": 5}\n', "line 1: needs an object"),
        ("a.jsonl", b'{"text": " "}\n', "has no text"),
        ("a.txt", b" \n", "has no text"),
        ("a.txt", b"", "has no text"),
        ("a.txt", b"\xff\xfe", "is not UTF-8"),
        ("a.txt", None, "No such file"),
    ),
)
def test_bad_files(tmp_path: Path, name: str, content: bytes | None, reason: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput, match=reason) as caught:
        read_text_file(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


def test_texts(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "one"}\n\n{"data": "two"}\n')
    (tmp_path / "a.txt").write_text("one\ntwo")
    assert read_text_file(tmp_path / "a.jsonl").texts == ("one", "two")
    assert read_text_file(tmp_path / "a.txt").texts == ("one\ntwo",)
    assert read_text_file(tmp_path / "a.txt").sha256 != read_text_file(tmp_path / "a.jsonl").sha256


def test_the_shipped_text_is_mixed() -> None:
    texts = read_text_file(SHIPPED).texts
    assert 30_000 < sum(map(len, texts)) < 60_000
    assert any("<|im_start|>" in text for text in texts) and any("def " in text for text in texts)


def test_rows_of_a_target(tmp_path: Path, tiny: Tiny) -> None:
    checkpoint = Checkpoint.open(tiny(tmp_path / "model", max_positions=4096))
    tokenizer = Tokenizer.from_file(str(checkpoint.folder / "tokenizer.json"))
    found = calibration_rows(read_text_file(SHIPPED), tokenizer, checkpoint.spec)
    assert all(len(row.ids) == ROW and row.mask is None for row in found) and len(found) > 10
    first = tokenizer.encode(read_text_file(SHIPPED).texts[0]).ids[:ROW]
    np.testing.assert_array_equal(found[0].ids[: len(first)], first)


def test_rows_of_a_draft_hold_its_masks(tmp_path: Path, tiny: Tiny) -> None:
    """A mask sees the prefix that it stands behind, and the masks between."""
    checkpoint = Checkpoint.open(tiny(tmp_path / "model", role="draft"))
    tokenizer = Tokenizer.from_file(str(checkpoint.folder / "tokenizer.json"))
    row = calibration_rows(read_text_file(SHIPPED), tokenizer, checkpoint.spec)[0]
    assert checkpoint.spec.pard is not None and row.mask is not None
    masks = row.ids == checkpoint.spec.pard.mask_id
    assert 0.3 < masks.mean() < 0.8 and (~masks).sum() == DRAFT_ROW
    np.testing.assert_array_equal(row.positions[~masks], np.arange(DRAFT_ROW))
    for at in np.flatnonzero(masks)[::50]:
        seen = np.flatnonzero(row.mask[at])
        assert (row.positions[seen] <= row.positions[at]).all() and len(set(row.positions[seen])) == len(seen)
        assert len(seen) == row.positions[at] + 1


def test_a_text_shorter_than_a_row(tmp_path: Path, tiny: Tiny) -> None:
    (tmp_path / "a.txt").write_text("def fox")
    checkpoint = Checkpoint.open(tiny(tmp_path / "model"))
    found = calibration_rows(
        read_text_file(tmp_path / "a.txt"),
        Tokenizer.from_file(str(checkpoint.folder / "tokenizer.json")),
        checkpoint.spec,
    )
    assert len(found) == 1 and 0 < len(found[0].ids) < 10
