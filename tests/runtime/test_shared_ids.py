"""Pairs whose tokenizers share their ids but for some that only one of them has: the text is the target's own."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from pard_onnx import BadArtifact, Pair, load
from pard_onnx.models.errors import PardWarning
from pard_onnx.models.manifest import File, Manifest
from pard_onnx.runtime.decoding.shared_ids import SharedIds

WriteArtifact = Callable[..., Path]
TEXT = "the quick <|tool|>brown<|tool|>"
SAMPLED: dict[str, Any] = {"max_new_tokens": 40, "temperature": 40.0, "logit_bias": {280: 90.0, 281: 90.0}}


@pytest.fixture
def write_with_tokens(write_artifact: WriteArtifact, make_tokenizer: Callable[..., Tokenizer]) -> Callable[..., Path]:
    """An artifact whose tokenizer has further tokens, from id 280 on."""

    def write(folder: Path, role: str, *tokens: str, rows: int = 288) -> Path:
        words = "pack my box with five dozen liquor jugs and then some more of them"  # enough to train a tokenizer on
        write_artifact(folder, role, size=280 + len(tokens), rows=rows, mask_id=rows - 1, text=words)
        tokenizer = make_tokenizer(280)
        tokenizer.add_special_tokens(list(tokens))
        tokenizer.save(str(folder / "tokenizer.json"))
        manifest = Manifest.read(folder)
        replace(manifest, files=tuple(File.of(folder / file.name) for file in manifest.files)).write(folder)
        return folder

    return write


def opened(target: Path, draft: Path) -> tuple[Pair, str]:
    with pytest.warns(PardWarning) as caught:
        pair = load(target, draft, threads=1)
    (warning,) = caught
    assert "\n" not in str(warning.message)
    return pair, str(warning.message)


@pytest.mark.parametrize("rows", [282, 288])
def test_a_target_with_more_tokens(write_with_tokens: Callable[..., Path], tmp_path: Path, rows: int) -> None:
    """The draft's embedding has no rows for them, or has rows that stand for nothing."""
    target = write_with_tokens(tmp_path / "target", "target", "<|tool|>", "<|result|>", "<|more|>", "<|most|>")
    draft = write_with_tokens(tmp_path / "draft", "draft", rows=rows)
    pair, warning = opened(target, draft)
    assert f"{draft}: the draft lacks 4 of the target's tokens (the first is '<|tool|>', id 280)" in warning
    alone, seen = load(target, threads=1), set()
    for seed in range(6):
        expected = alone.generate(TEXT, draft_length=0, seed=seed, **SAMPLED)
        seen |= set(expected.tokens)
        for k in (1, 8, "auto"):
            result = pair.generate(TEXT, draft_length=k, seed=seed, **SAMPLED)
            assert (result.tokens, result.text) == (expected.tokens, expected.text)
    assert {280, 281} & seen
    assert pair.generate("the quick brown", draft_length=4, max_new_tokens=40).stats.mean_accepted > 1.1


def test_a_draft_with_more_tokens(write_with_tokens: Callable[..., Path], tmp_path: Path) -> None:
    """It would like to propose them; the target has no rows for them."""
    target = write_with_tokens(tmp_path / "target", "target", rows=280)
    draft = write_with_tokens(tmp_path / "draft", "draft", *(f"<|{i}|>" for i in range(20)), rows=305)
    pair, warning = opened(target, draft)
    assert "the draft has 20 tokens that the target lacks (the first is '<|0|>', id 280)" in warning
    proposed: list[int] = []
    session = pair.engine.models[1].session  # type: ignore[union-attr]
    step = session.step
    session.step = lambda ids, k: proposed.extend(step(ids, k)[0].tolist()) or step(ids, k)  # type: ignore[method-assign]
    alone = load(target, threads=1)
    for prompt in ("the quick", "lazy dog", [5, 6, 7], [1]):
        expected = alone.generate(prompt, draft_length=0, max_new_tokens=30)
        for k in (1, 8, "auto"):
            assert pair.generate(prompt, draft_length=k, max_new_tokens=30).tokens == expected.tokens  # type: ignore[arg-type]
    assert max(proposed) >= 280


def test_a_shared_id_that_differs_is_refused(write_with_tokens: Callable[..., Path], tmp_path: Path) -> None:
    target = write_with_tokens(tmp_path / "target", "target", "<|tool|>", "<|result|>")
    draft = write_with_tokens(tmp_path / "draft", "draft", "<|pad|>")
    with pytest.raises(BadArtifact, match=r"id 280 is '<\|pad\|>' there and '<\|tool\|>' here"):
        load(target, draft)


def test_the_same_tokens_say_nothing(write_with_tokens: Callable[..., Path], tmp_path: Path) -> None:
    target = write_with_tokens(tmp_path / "target", "target", "<|tool|>")
    draft = write_with_tokens(tmp_path / "draft", "draft", "<|tool|>", rows=300)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(target, draft)


def test_stand_ins_and_cuts() -> None:
    shared = SharedIds(frozenset({7, 8}), frozenset({9}), 2)
    assert shared.for_draft([1, 7, 3, 8]) == [1, 2, 3, 2] and shared.for_draft([1, 9]) == [1, 9]
    assert [shared.proposable(ids) for ids in ((), (9,), (1, 2), (1, 9, 2))] == [0, 0, 2, 1]
