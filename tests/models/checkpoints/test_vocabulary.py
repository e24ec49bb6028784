"""Every reader of a text gets all of its tokens, whatever truncation or padding tokenizer.json has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from pard_onnx.export.kv_cache import windows
from pard_onnx.export.verify import parity
from pard_onnx.models.checkpoints.checkpoint import Checkpoint
from pard_onnx.models.checkpoints.vocabulary import load_tokenizer
from pard_onnx.models.errors import BadArtifact, BadCheckpoint, BadInput
from pard_onnx.quantize import quantizer
from pard_onnx.quantize.calibration.text import TextFile, read_text_file
from pard_onnx.quantize.draft_vocabulary import select_vocabulary
from pard_onnx.quantize.quantizer import QuantizationRequest, quantize
from pard_onnx.quantize.recipes import named_recipe

LIMIT = 7


class Seen(Exception):
    """Ends a quantization once its calibration text was tokenized."""


def kv_windows(checkpoint: Checkpoint, text: Path, _: pytest.MonkeyPatch) -> list[int]:
    found: list[int] = windows(checkpoint, read_text_file(text)).flatten().tolist()
    return found


def parity_ids(checkpoint: Checkpoint, _: Path, __: pytest.MonkeyPatch) -> list[int]:
    found: list[int] = parity._ids(checkpoint).tolist()
    return found


def vocabulary(checkpoint: Checkpoint, text: Path, _: pytest.MonkeyPatch) -> list[int]:
    found: list[int] = select_vocabulary(checkpoint, 70, text).ids.tolist()
    return found


def calibration(checkpoint: Checkpoint, text: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    seen: list[int] = []

    def rows(file: TextFile, tokenizer: Tokenizer, _: object) -> Any:
        seen.extend(file.tokens(tokenizer).tolist())
        raise Seen

    monkeypatch.setattr(quantizer, "calibration_rows", rows)
    request = QuantizationRequest(named_recipe("int4-gptq"), calibration=text)
    with pytest.raises(Seen), quantize(checkpoint, request, text.parent / "work", lambda *_: None):
        pass
    return seen


@pytest.mark.parametrize("read", [kv_windows, parity_ids, vocabulary, calibration])
def test_texts_are_never_cut_or_padded(
    tmp_path: Path,
    tiny: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    read: Callable[[Checkpoint, Path, pytest.MonkeyPatch], list[int]],
) -> None:
    folder = tiny(tmp_path / "model", role="draft")
    text = tmp_path / "text.txt"
    text.write_text("def fox(jumps): return lazy dogs over the quick brown range " * 40)
    expected = read(Checkpoint.open(folder), text, monkeypatch)
    path = folder / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.enable_truncation(LIMIT)
    tokenizer.enable_padding(length=20_000)
    tokenizer.save(str(path))
    assert len(tokenizer.encode("a b c d e f g h i j").ids) == 20_000
    assert np.array_equal(read(Checkpoint.open(folder), text, monkeypatch), expected)
    assert len(expected) > LIMIT


@pytest.mark.parametrize("error", [BadInput, BadArtifact, BadCheckpoint])
@pytest.mark.parametrize("content", [None, "", "{}", "[]"])
def test_a_file_that_is_no_tokenizer(tmp_path: Path, content: str | None, error: type[BadInput]) -> None:
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(error, match=r"no tokenizer\.json|tokenizer\.json cannot be read: "):
        load_tokenizer(path, error)
