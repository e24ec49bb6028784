"""The sampling settings of a model's makers: transformers' own, and losslessly drafted like all others."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
from transformers import GenerationConfig

from pard_onnx import BadArtifact, BadInput, Pair, PardWarning, Sampling, load
from pard_onnx.models.manifest import File, Manifest
from pard_onnx.runtime.sampling.generation_config import read_sampling

QWEN = {"do_sample": True, "repetition_penalty": 1.05, "temperature": 0.7, "top_p": 0.8, "top_k": 20}
TEXT = "the quick brown"


def written(folder: Path, value: Any) -> Path:
    (folder / "generation_config.json").write_text(json.dumps(value), encoding="utf-8")
    return folder


@pytest.mark.parametrize("seed", range(30))
def test_settings_are_those_of_transformers(tmp_path: Path, seed: int) -> None:
    random = Random(seed)
    choices: dict[str, list[Any]] = {
        "do_sample": [True, False, None],
        "temperature": [0.6, 1.0, 1, None],
        "top_k": [20, 0, None],
        "top_p": [0.8, 1.0, None],
        "min_p": [0.05, None],
        "repetition_penalty": [1.05, 1.0, None],
        "typical_p": [0.9],
        "num_beams": [4],
        "eos_token_id": [[1, 2]],
        "transformers_version": ["4.37.0"],
    }
    value = {key: random.choice(found) for key, found in choices.items() if random.random() < 0.7}
    config = GenerationConfig(**value)
    config.update(**GenerationConfig._get_default_generation_params(), defaults_only=True, allow_custom_entries=True)
    drawn: dict[str, Any] = {}
    if config.do_sample:
        drawn = {"temperature": config.temperature, "top_k": config.top_k, "top_p": config.top_p}
        drawn["min_p"] = config.min_p or 0.0
    expected = Sampling(repetition_penalty=config.repetition_penalty, **drawn)
    assert read_sampling(written(tmp_path, value)) == expected


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ({"do_sample": True, "temperature": "hot"}, "temperature must be a number, not 'hot'"),
        ({"do_sample": True, "top_p": 1.5}, "top_p must be above 0 and at most 1 (all ids), not 1.5"),
        ({"do_sample": True, "top_k": -1}, "top_k must be at least 1, or 0 for all ids, not -1"),
        ({"do_sample": True, "top_k": 20.5}, "top_k must be a whole number, not 20.5"),
        ({"do_sample": True, "min_p": True}, "min_p must be a number, not True"),
        ({"repetition_penalty": 0}, "repetition_penalty must be above 0"),
        ({"do_sample": "yes"}, "do_sample must be true or false, not 'yes'"),
        ([], "holds a JSON list"),
    ],
)
def test_a_value_that_is_not_valid_is_named(tmp_path: Path, value: Any, problem: str) -> None:
    with pytest.raises(BadArtifact) as caught:
        read_sampling(written(tmp_path, value))
    assert str(caught.value).startswith(f"{tmp_path / 'generation_config.json'}: ") and problem in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def qwen_like(write_artifact: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = written(write_artifact(tmp_path_factory.mktemp("own") / "target", "target"), QWEN | {"temperature": 9.0})
    manifest = Manifest.read(folder)
    files = (*manifest.files, File.of(folder / "generation_config.json"))
    replace(manifest, files=files).write(folder)
    return folder


@pytest.fixture(scope="module")
def pair(qwen_like: Path, pair_folders: tuple[Path, Path]) -> Pair:
    return load(qwen_like, pair_folders[1], threads=1)


@pytest.mark.parametrize("k", [1, 8, "auto"])
def test_the_models_own_settings_are_drafted_losslessly(pair: Pair, qwen_like: Path, k: Any) -> None:
    own = {"temperature": 9.0, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05}
    alone = load(qwen_like, threads=1)
    for seed in range(4):
        expected = alone.generate(TEXT, max_new_tokens=30, draft_length=0, seed=seed, **own).tokens  # type: ignore[arg-type]
        assert pair.generate(TEXT, max_new_tokens=30, draft_length=k, seed=seed, sampling="model").tokens == expected
    greedy = pair.generate(TEXT, max_new_tokens=30)
    assert greedy.tokens != expected and greedy.stats.seed is None
    assert pair.generate(TEXT, max_new_tokens=30, sampling="greedy", draft_length=k).tokens == greedy.tokens


def test_given_settings_beat_the_models(pair: Pair) -> None:
    given = pair.generate(TEXT, max_new_tokens=20, sampling="model", temperature=0, repetition_penalty=1.0)
    assert given.tokens == pair.generate(TEXT, max_new_tokens=20).tokens
    options: dict[str, Any] = {"max_new_tokens": 20, "seed": 3, "top_k": 3}
    by_hand = pair.generate(TEXT, temperature=9.0, top_p=0.8, repetition_penalty=1.05, **options)
    assert pair.generate(TEXT, sampling="model", **options).tokens == by_hand.tokens
    chat = pair.chat()
    by_hand = chat.send("fox", temperature=9.0, top_p=0.8, repetition_penalty=1.05, **options)
    assert pair.chat().send("fox", sampling="model", **options).tokens == by_hand.tokens


def test_a_model_without_settings_is_greedy_with_a_warning(pair_folders: tuple[Path, Path]) -> None:
    with load(*pair_folders, threads=1) as plain:
        assert plain.own_sampling is None
        with pytest.warns(PardWarning, match=r"has no generation_config\.json, so its own sampling is greedy"):
            result = plain.generate(TEXT, max_new_tokens=8, sampling="model")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert result.tokens == plain.generate(TEXT, max_new_tokens=8).tokens
        with pytest.raises(BadInput, match="sampling must be 'greedy' or 'model', not 'best'"):
            plain.stream(TEXT, sampling="best")  # type: ignore[arg-type]
