"""`pard-export --features` and `--for-draft`: which layers a target's export gives, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from tiny import make_pard2

from pard_onnx.export_command import job_of_model, main, parser
from pard_onnx.models.errors import BadInput
from pard_onnx.models.manifest import Manifest

Tiny = Callable[..., Path]


@pytest.fixture
def target(tmp_path: Path, tiny: Tiny) -> Path:
    return tiny(tmp_path / "target", "qwen3", "target")


@pytest.fixture
def draft(tmp_path: Path, tiny: Tiny) -> Path:
    return make_pard2(tiny(tmp_path / "draft", "qwen3", "draft", hidden=32))


def layers(model: Path, *options: str) -> tuple[int, ...]:
    parsed = parser().parse_args([str(model), *options])
    return job_of_model(parsed, str(model)).feature_layers


def test_layers_are_named_or_those_of_a_draft(target: Path, draft: Path) -> None:
    assert layers(target) == ()
    assert layers(target, "--features=-1, -3") == (-1, -3)
    assert layers(target, "--features", str(draft)) == (-1, -2, -3)
    assert layers(target, "--for-draft", str(draft)) == (-1, -2, -3)
    assert layers(target, "--for-draft", str(draft), "--features=-1,-2,-3") == (-1, -2, -3)


def test_a_draft_that_reads_tokens_alone_needs_no_features(target: Path, tmp_path: Path, tiny: Tiny) -> None:
    plain = tiny(tmp_path / "plain", "qwen3", "draft")
    assert layers(target, "--for-draft", str(plain)) == ()
    with pytest.raises(BadInput, match="reads no hidden states of its target; leave it out"):
        layers(target, "--features", str(plain))


@pytest.mark.parametrize(
    ("features", "message"),
    (
        ("-4", "the target has no hidden state -4; with 2 layers it has -1 to -3"),
        ("-1,-1", "each layer may be there once"),
        ("0", "has 0; layers are counted from the last one, which is -1"),
        ("-1,2", "has 2; layers are counted"),
        ("-1,,2", "neither a checkpoint folder nor a hub id"),
        ("", "neither a checkpoint folder|empty|name"),
    ),
)
def test_layers_that_the_model_does_not_have_are_refused(target: Path, features: str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        layers(target, f"--features={features}")


@pytest.mark.parametrize(
    ("family", "options", "projection", "message"),
    (
        ("llama", {}, {}, "is a draft for llama targets; this one is qwen3"),
        (
            "qwen3",
            {},
            {"target_hidden": 128},
            "hidden states of 128 numbers; this target's have 64: it is the draft of an",
        ),
        ("qwen3", {}, {"layers": (-1, -8)}, "the target has no hidden state -8; with 2 layers it has -1 to -3"),
    ),
)
def test_the_draft_of_another_target_is_refused(
    target: Path, tmp_path: Path, tiny: Tiny, family: str, options: dict[str, Any], projection: Any, message: str
) -> None:
    other = make_pard2(tiny(tmp_path / "other", family, "draft", **options), **projection)
    for option in ("--features", "--for-draft"):
        with pytest.raises(BadInput, match=message):
            layers(target, option, str(other))


def refused(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    assert main(list(options)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_more_layers_than_the_draft_reads(target: Path, draft: Path) -> None:
    """Also in another order: the draft's columns are chosen where it runs."""
    make_pard2(draft, layers=(-1, -3))
    assert layers(target, "--features=-3,-2,-1", "--for-draft", str(draft)) == (-3, -2, -1)


def test_contradictions_are_refused(target: Path, draft: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both = refused(capsys, str(target), "--features=-1", "--for-draft", str(draft))
    assert "--features=-1 beside --for-draft" in both and "which reads -1,-2,-3" in both
    assert "is a draft, and features are a target's" in refused(capsys, str(draft), "--features=-1")
    assert "is not a draft: it has no mask id" in refused(capsys, str(target), "--for-draft", str(target))


@pytest.mark.slow
def test_an_exported_draft_names_the_layers_too(
    target: Path, draft: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(model: Path, name: str, *options: str) -> Sequence[int]:
        out = tmp_path / name
        assert main([str(model), "--output", str(out), "--precision", "fp32", "--json", *options]) == 0
        found: Sequence[int] = json.loads(capsys.readouterr().out)["feature_layers"]
        return found

    assert run(draft, "exported draft") == []
    assert run(target, "exported target", "--for-draft", str(tmp_path / "exported draft")) == [-1, -2, -3]
    assert Manifest.read(tmp_path / "exported target").feature_layers == (-1, -2, -3)
