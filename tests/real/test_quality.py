"""What the default export of a real model loses, against llama.cpp's Q4_K_M of the same floats; and that drafts change
no token of it.

The numbers of llama.cpp are those of its quantize on this file, measured on another text of the same kind: perplexity
11.05 where the floats have 10.316, in 105 MB.
"""

from __future__ import annotations

import calendar
import difflib
import shutil
from collections.abc import Callable
from functools import cache
from math import exp
from pathlib import Path
from pydoc_data import topics
from typing import Any

import numpy as np
import pytest
import torch
from real import smollm2_gguf, smollm2_in_transformers
from transformers import LlamaConfig, LlamaForCausalLM

from pard_onnx import load
from pard_onnx.export.verify.perplexity import losses_of
from pard_onnx.export_command import main
from pard_onnx.models.checkpoints.checkpoint import Checkpoint
from pard_onnx.models.checkpoints.vocabulary import load_tokenizer
from pard_onnx.models.manifest import Manifest
from pard_onnx.runtime.model import session_class
from pard_onnx.runtime.providers.table import CPU
from pard_onnx.runtime.providers.threads import Threads

pytestmark = pytest.mark.real
Q4_K_M = (11.05 / 10.316, 105e6)  # the perplexity's factor, and bytes
WINDOW = 512
TOKENS = 32  # of each text with drafts
# The file's own integers are kept without an option; the others round the floats that they stand for
EXPORTS = {
    "kept": [],
    "default": ["--quality", "good"],
    "int8": ["--precision", "int8"],
    "fp32": ["--precision", "fp32"],
}
PROMPTS = (
    "def quicksort(items):\n    ",
    "The three laws of thermodynamics are",
    "Il était une fois, dans un petit village,",
    "<|im_start|>user\nGive me a recipe for pancakes 🥞.<|im_end|>\n<|im_start|>assistant\n",
)


@pytest.fixture(scope="module")
def model() -> Any:
    return smollm2_in_transformers()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    @cache
    def export(name: str) -> Path:
        out = tmp_path_factory.mktemp("quality") / name
        assert main([str(smollm2_gguf()), "--output", str(out), "--context-length", "640", *EXPORTS[name]]) == 0
        return out

    return export


@pytest.fixture(scope="module")
def windows() -> list[np.ndarray]:
    """2,048 tokens, half of the standard library's source and half of Python's reference."""
    tokenizer = load_tokenizer(Checkpoint.open(smollm2_gguf()).folder / "tokenizer.json")
    source = "".join(Path(str(module.__file__)).read_text(encoding="utf-8") for module in (shutil, difflib, calendar))
    prose = " ".join(topics.topics[name] for name in sorted(topics.topics))
    ids = [tokenizer.encode(text, add_special_tokens=False).ids for text in (source, prose)]
    return [np.array(part[start : start + WINDOW]) for part in ids for start in (2000, 9000)]


def perplexity(logits: Callable[[np.ndarray], np.ndarray], windows: list[np.ndarray]) -> float:
    return exp(np.concatenate([losses_of(logits(ids)[:-1], ids[1:]) for ids in windows]).mean())


def of_folder(folder: Path, windows: list[np.ndarray]) -> float:
    """Of an exported folder, as the runtime runs it."""
    manifest = Manifest.read(folder)
    session: Any = session_class(manifest)(folder, manifest, CPU, Threads())

    def logits(ids: np.ndarray) -> np.ndarray:
        session.rollback(0)
        return np.concatenate(
            [np.array(session.step(ids[i : i + 64].tolist(), 64).logits) for i in range(0, len(ids), 64)]
        )

    return perplexity(logits, windows)


@pytest.fixture(scope="module")
def exact(model: Any, windows: list[np.ndarray]) -> float:
    """The perplexity of transformers' float32."""

    def logits(ids: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            found: np.ndarray = model(torch.from_numpy(ids[None])).logits[0].numpy()
        return found

    return perplexity(logits, windows)


@pytest.mark.parametrize(("name", "recipe"), [("default", "int4-good"), ("kept", None)])
def test_the_default_is_as_good_as_llama_cpps_q4_k_m(
    exported: Callable[[str], Path], windows: list[np.ndarray], exact: float, name: str, recipe: str | None
) -> None:
    folder = exported(name)
    manifest = Manifest.read(folder)
    assert (manifest.quantization.recipe if manifest.quantization else None) == recipe
    assert sum(path.stat().st_size for path in folder.iterdir()) <= Q4_K_M[1]
    loss = of_folder(folder, windows) / exact
    assert loss <= Q4_K_M[0], f"{loss - 1:+.2%}"
    assert manifest.quality is not None and manifest.quality.rows >= 1024
    assert abs(1 + manifest.quality.loss - loss) < 0.04  # the check at the end of the export says the same


def test_int8_loses_less_than_one_percent(
    exported: Callable[[str], Path], windows: list[np.ndarray], exact: float
) -> None:
    assert of_folder(exported("int8"), windows) / exact <= 1.01


def test_fp32_loses_nothing(exported: Callable[[str], Path], windows: list[np.ndarray], exact: float) -> None:
    assert of_folder(exported("fp32"), windows) == pytest.approx(exact, rel=1e-4)


@pytest.fixture(scope="module")
def draft(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The target's first layers as a PARD draft, exported: it was never trained, and proposes little that is right."""
    folder = tmp_path_factory.mktemp("draft")
    config = LlamaConfig(**{**model.config.to_dict(), "num_hidden_layers": 4, "quantization_config": None})
    config.pard_token, config.spd_type = model.config.vocab_size - 1, "pard"
    shallow = LlamaForCausalLM(config)
    shallow.load_state_dict(model.state_dict(), strict=False)
    shallow.save_pretrained(folder / "checkpoint")
    source = Checkpoint.open(smollm2_gguf()).folder
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(source / name, folder / "checkpoint" / name)
    options = ["--output", str(folder / "draft"), "--context-length", "640", "--quality", "fast", "--no-verify"]
    assert main(["--model", str(folder / "checkpoint"), *options]) == 0
    return folder / "draft"


@pytest.mark.parametrize("name", EXPORTS)
def test_drafts_change_no_token(exported: Callable[[str], Path], draft: Path, name: str) -> None:
    target = exported(name)
    with load(target) as plain, load(target, draft) as pair:
        for prompt in PROMPTS:
            for sampling in ({}, {"temperature": 0.8, "seed": 3}):
                wanted = plain.generate(prompt, max_new_tokens=TOKENS, **sampling).tokens
                for length in (1, 4, 8, "auto"):
                    found = pair.generate(prompt, max_new_tokens=TOKENS, draft_length=length, **sampling)
                    assert found.tokens == wanted, (prompt, length, sampling)
                    assert found.stats.exact
