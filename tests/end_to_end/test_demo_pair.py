"""The shipped pair end to end: commands, exactness on quantized targets, and PARD's own loop in torch."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from pard_onnx import load
from pard_onnx.export_command import main as export_main
from pard_onnx.generate_command import main as generate_main
from pard_onnx.models import demo
from pard_onnx.models.checkpoints.checkpoint import Checkpoint
from pard_onnx.models.checkpoints.tensors import read_tensor
from pard_onnx.models.hub import DEMO
from pard_onnx.models.manifest import Manifest
from pard_onnx.runtime.providers.discovery import require_installed
from pard_onnx.runtime.providers.threads import Threads
from pard_onnx.runtime.sessions.dynamic_shapes import FusedTarget

Folder = Callable[[str, str], Path]


def test_the_pair_is_small_and_padded_differently(demo_folder: Folder) -> None:
    size = sum(p.stat().st_size for part in DEMO.values() for p in part.iterdir())
    assert size <= 24 * 1000 * 1000
    target, draft = (Manifest.read(demo_folder(n, "fp32")).spec for n in ("demo-target", "demo-draft"))
    assert target.vocabulary.rows != draft.vocabulary.rows
    assert target.vocabulary.size == draft.vocabulary.size
    assert draft.pard is not None and draft.pard.mask_id == draft.vocabulary.size


def test_the_autoregressive_draft_is_the_draft_before_it_learned_the_mask() -> None:
    draft, before = Checkpoint.open(demo.DRAFT), Checkpoint.open(demo.AR_DRAFT)
    assert before.spec == replace(draft.spec, pard=None)
    rows = slice(before.spec.vocabulary.size)
    one, two = (read_tensor(c.tensors["model.embed_tokens.weight"], rows).ravel() for c in (draft, before))
    assert 0.5 < np.corrcoef(one, two)[0, 1] < 1  # related, not the same


def test_export_and_generate_by_command(demo_folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    target, draft = str(demo_folder("demo-target", "int4")), str(demo_folder("demo-draft", "int8"))
    prompt = demo.prompts()[0]
    capsys.readouterr()
    assert generate_main(["--target", target, "--draft", draft, "--prompt", prompt, "--json"]) == 0
    pard = json.loads(capsys.readouterr().out)
    assert generate_main(["--target", target, "--prompt", prompt, "--json", "--draft-length", "0"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert pard["tokens"] == plain["tokens"] and pard["text"] == plain["text"]
    assert pard["mean_accepted"] > 2
    assert plain["mean_accepted"] == 1


@pytest.mark.parametrize("precision", ("fp32", "int8", "int4"))
def test_pard_is_plain_decoding(demo_folder: Folder, precision: str) -> None:
    """Token for token, on every prompt and draft length."""
    target, draft = demo_folder("demo-target", precision), demo_folder("demo-draft", "int8")
    with load(target) as plain, load(target, draft) as pair:
        for prompt in demo.prompts():
            expected = plain.generate(prompt, max_new_tokens=64)
            for length in (1, 2, 4, 7, 8, 12):
                found = pair.generate(prompt, max_new_tokens=64, draft_length=length)
                assert found.tokens == expected.tokens
                assert found.finish_reason == expected.finish_reason


@pytest.mark.parametrize("precision", ("int8", "int4"))
def test_even_widths_give_bitwise_equal_rows(demo_folder: Folder, precision: str) -> None:
    """Width 2 throughout against mixed even widths with rollbacks over wrong tokens."""
    path = demo_folder("demo-target", precision)
    manifest = Manifest.read(path)
    ids = np.random.default_rng(0).integers(0, 2000, 96).tolist()

    def session() -> FusedTarget:
        return FusedTarget(path, manifest, require_installed("cpu"), Threads())

    narrow, mixed = session(), session()
    expected = np.concatenate([narrow.step(ids[i : i + 2], 2).logits.copy() for i in range(0, 96, 2)])
    rows, at, rng = [], 0, np.random.default_rng(1)
    while at < 96:
        width = min(int(rng.choice([2, 4, 8, 10, 12, 16])), 96 - at)
        mixed.step(rng.integers(0, 2000, 6).tolist(), 6)  # rejected
        mixed.rollback(at)
        rows.append(mixed.step(ids[at : at + width], width).logits.copy())
        at += width
    np.testing.assert_array_equal(np.concatenate(rows), expected)


def reference_rounds(prompt: list[int], count: int, k: int, eos: set[int]) -> tuple[list[int], list[int]]:
    """PARD as its definition reads, in torch and without a cache: tokens, and accepted a round."""
    target, draft = (AutoModelForCausalLM.from_pretrained(p, dtype=torch.float32) for p in (demo.TARGET, demo.DRAFT))
    real, mask = draft.config.pard_token, draft.config.pard_token

    def greedy(model: torch.nn.Module, ids: list[int], last: int) -> list[int]:
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([ids])).logits[0, -last:, :real]
        return [int(i) for i in logits.argmax(-1)]

    tokens, accepted = greedy(target, prompt, 1), []
    while len(tokens) < count and not eos & set(tokens):
        drafts = greedy(draft, prompt + tokens + [mask] * (k - 1), k)
        checked = greedy(target, prompt + tokens + drafts, k + 1)
        matched = next((i for i in range(k) if drafts[i] != checked[i]), k)
        tokens += checked[: matched + 1]
        accepted.append(matched + 1)
    return tokens, accepted


def test_rounds_are_those_of_the_definition(demo_folder: Folder) -> None:
    prompt = demo.prompts()[0]
    with load(demo_folder("demo-target", "fp32"), demo_folder("demo-draft", "fp32")) as pair:
        ids = pair.text.encode(prompt)
        tokens, accepted = reference_rounds(ids, 48, 8, set(pair.target_manifest.spec.vocabulary.eos_ids))
        result = pair.generate(ids, max_new_tokens=200, draft_length=8)
    count = min(len(result.tokens), 48)
    assert list(result.tokens[:count]) == tokens[:count]
    rounds = len(accepted) - 1  # the last may be cut by EOS on one side
    assert list(result.stats.accepted[:rounds]) == accepted[:rounds]


def test_stopping_early_leaves_the_pair_ready(demo_folder: Folder) -> None:
    prompt = demo.prompts()[0]
    with load(demo_folder("demo-target", "int4"), demo_folder("demo-draft", "int8")) as pair:
        expected = pair.generate(prompt, max_new_tokens=40).tokens
        for rounds in (1, 2, 5):
            with pair.stream(prompt, max_new_tokens=40) as stream:
                for _ in range(rounds):
                    next(stream)
            assert pair.generate(prompt, max_new_tokens=40).tokens == expected


def test_chat_template_and_eos(demo_folder: Folder) -> None:
    with load(demo_folder("demo-target", "int4"), demo_folder("demo-draft", "int8")) as pair:
        result = pair.generate(
            [{"role": "user", "content": 'Complete the code.\ndef close(self):\n    """Close the file."""\n'}],
            max_new_tokens=300,
        )
    assert result.finish_reason == "stop"
    assert "<|im_end|>" not in result.text


def test_generation_ends_at_the_capacity(tmp_path: Path, demo_folder: Folder) -> None:
    out = tmp_path / "short"
    arguments = ["--model", "demo-target", "--output", str(out), "--context-length", "40", "--no-verify"]
    assert export_main(arguments) == 0
    with load(out, demo_folder("demo-draft", "int8")) as pair:
        result = pair.generate(demo.prompts()[0][:60], max_new_tokens=500, draft_length=12)
        assert pair.capacity == 40
    assert result.finish_reason == "length"
    assert result.stats.prompt_tokens + result.stats.new_tokens == 40
