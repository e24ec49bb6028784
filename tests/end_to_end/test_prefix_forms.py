"""Requests that start from earlier ones' rows give the same text in every form of graphs and KV caches."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pard_onnx import Pair, load
from pard_onnx.export_command import main

# Options of pard-export
FORMS: dict[str, list[str]] = {
    "int8 KV cache": ["--precision", "fp32", "--kv-cache", "int8"],
    "int8 KV cache, a scale a layer": ["--precision", "int8", "--kv-cache", "int8-tensor"],
    "float16": ["--precision", "fp16"],
    "float16, int4": ["--precision", "int4", "--io-dtype", "fp16"],
    "plain operators": ["--precision", "fp32", "--attention", "portable"],
    "fixed shapes": ["--precision", "fp32", "--device", "npu"],
}
WAYS: list[dict[str, Any]] = [{}, {"draft_length": 0}, {"draft_length": 5}, {"temperature": 1.2, "seed": 3}]


SLOW = ("int8 KV cache, a scale a layer", "float16, int4", "plain operators")
PARAMS = [pytest.param(form, marks=[pytest.mark.slow] * (form in SLOW)) for form in FORMS]


@pytest.fixture(scope="module", params=PARAMS)
def folders(request: pytest.FixtureRequest, tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("forms")
    made = []
    for role in ("target", "draft"):
        checkpoint = tiny(root / role, "qwen2", role, layers=2, max_positions=2048)
        out = root / f"{role}-onnx"
        options = [*FORMS[request.param], "--context-length", "1500", "--no-verify", "--output", str(out)]
        assert main(["--model", str(checkpoint), *options]) == 0
        made.append(out)
    return made


def test_texts_are_those_without_a_cache(folders: list[Path]) -> None:
    chance = np.random.default_rng(7)
    with load(*folders, threads=1) as pair, load(*folders, threads=1, cache_bytes=0) as without:
        chunk = pair.engine.models[0].tuning.chunk  # where steps of other widths give other rows, whole ones are reused
        texts = [chance.integers(1, 250, 2 * chunk + 50).tolist()]
        reused = [answered(pair, without, texts[0], {})]
        for number, common in enumerate([0, 20, chunk - 1, chunk, chunk + 30, 2 * chunk + 10] * 2):
            base = texts[0 if common > 20 else int(chance.integers(len(texts)))]
            ids = base[:common] + chance.integers(1, 250, int(chance.integers(1, 60))).tolist()
            reused.append(answered(pair, without, ids, WAYS[number % len(WAYS)]))
            texts.append(ids)
        assert sum(reused) >= 2 * chunk


def answered(pair: Pair, without: Pair, ids: list[int], options: dict[str, Any]) -> int:
    """The tokens that came from earlier requests; the text must be the same."""
    found, expected = (one.generate(ids, max_new_tokens=12, **options) for one in (pair, without))
    assert (found.tokens, found.finish_reason) == (expected.tokens, expected.finish_reason)
    assert expected.stats.cached_tokens == 0
    return found.stats.cached_tokens
