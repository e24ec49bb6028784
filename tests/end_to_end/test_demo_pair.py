"""The shipped pair end to end: commands, exactness on quantized targets, and PARD's own loop in torch."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pard_onnx import Pair, load
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
MASK = 2040  # of the shipped drafts


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


Propose = Callable[[list[int], int], list[int]]  # (text, k) -> k tokens


def greedy(logits: torch.Tensor) -> list[int]:
    """The tokens of the largest logits; ids past the tokenizer's, of which the mask is the first, are none."""
    return [int(id_) for id_ in logits[:, :MASK].argmax(-1)]


def pard(ids: list[int], k: int) -> list[int]:
    """PARD's proposals as its definition reads."""
    return greedy(torch_model("draft")(input_ids=torch.tensor([ids + [MASK] * (k - 1)])).logits[0, -k:])


def pard2(ids: list[int], k: int, features: bool = True) -> list[int]:
    """PARD-2's: each token's embedding with the projection of the target's states of the token before it."""
    draft, states = torch_model("pard2-draft"), torch_model("target")(torch.tensor([ids]), output_hidden_states=True)
    matrix = load_file(demo.PARD2_DRAFT / "pard_warp_model" / "model.safetensors")["target_proj.weight"].float()
    hidden = torch.cat([states.hidden_states[layer][0] for layer in draft.config.pard2_target_layers], -1)
    before = torch.cat([torch.zeros_like(hidden[:1]), hidden[:-1]])
    read = torch.cat([before, before[-1:].expand(k - 1, -1)]) * features
    embeddings = draft.get_input_embeddings()(torch.tensor(ids + [MASK] * (k - 1)))
    embeddings = embeddings + draft.config.pard2_scale * read @ matrix.T
    return greedy(draft(inputs_embeds=embeddings[None]).logits[0, -k:])


@cache
def torch_model(name: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(Path(demo.__file__).parent / name, dtype=torch.float32)


@torch.inference_mode()
def reference_rounds(
    prompt: list[int], count: int, k: int, eos: set[int], propose: Propose
) -> tuple[list[int], list[int]]:
    """The rounds as their definition reads, in torch and without a cache: tokens, and accepted a round."""

    def target(ids: list[int], last: int) -> list[int]:
        return greedy(torch_model("target")(input_ids=torch.tensor([ids])).logits[0, -last:])

    tokens, accepted = target(prompt, 1), []
    while len(tokens) < count and not eos & set(tokens):
        drafts = propose(prompt + tokens, k)
        checked = target(prompt + tokens + drafts, k + 1)
        matched = next((i for i in range(k) if drafts[i] != checked[i]), k)
        tokens += checked[: matched + 1]
        accepted.append(matched + 1)
    return tokens, accepted


def require_rounds(pair: Pair, propose: Propose) -> None:
    """The pair's rounds of a prompt are those of the definition."""
    ids = pair.text.encode(demo.prompts()[0])
    tokens, accepted = reference_rounds(ids, 48, 8, set(pair.target_manifest.spec.vocabulary.eos_ids), propose)
    result = pair.generate(ids, max_new_tokens=200, draft_length=8)
    count = min(len(result.tokens), 48)
    assert list(result.tokens[:count]) == tokens[:count]
    rounds = len(accepted) - 1  # the last may be cut by EOS on one side
    assert list(result.stats.accepted[:rounds]) == accepted[:rounds]
    assert sum(accepted) > 2 * len(accepted)


def test_rounds_are_those_of_the_definition(demo_folder: Folder) -> None:
    with load(demo_folder("demo-target", "fp32"), demo_folder("demo-draft", "fp32")) as pair:
        require_rounds(pair, pard)


@pytest.fixture(scope="module")
def pard2_folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The shipped target, with what its PARD-2 draft reads, and that draft."""
    root = tmp_path_factory.mktemp("shipped pard2")
    target, draft = root / "target", root / "draft"
    words = ["--precision", "fp32", "--no-verify", "--output"]
    assert export_main(["demo-pard2-draft", *words, str(draft)]) == 0
    assert export_main(["demo-target", "--for-draft", str(draft), *words, str(target)]) == 0
    return target, draft


@pytest.mark.parametrize("mode", ["target-dependent", "target-independent"])
def test_rounds_of_the_pard2_draft_are_those_of_the_definition(pard2_folders: tuple[Path, Path], mode: Any) -> None:
    with load(*pard2_folders, draft_mode=mode) as pair:
        require_rounds(pair, partial(pard2, features=mode == "target-dependent"))


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
