"""A P-EAGLE draft from its checkpoint to the text: the same commands as for other drafts, and the target's own text."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peagle_reference
import pytest
import torch
from tiny import make_pard2, make_peagle
from transformers import AutoModelForCausalLM, AutoTokenizer

from pard_onnx import BadArtifact, Pair, load
from pard_onnx.export_command import main as export_main
from pard_onnx.models import demo
from pard_onnx.models.hub import DEMO
from pard_onnx.runtime.decoding.pard2 import Pard2Drafter

PROMPTS = ("def the quick brown fox", "return self import for value in range: " * 12)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["int4", "int8", "fp32"])
def test_a_p_eagle_draft_changes_no_text(precision: str, tmp_path: Path, tiny: Callable[..., Path]) -> None:
    """Its target is of another family and has other layers and another size than the draft."""
    target = tiny(tmp_path / "target", "qwen3", "target", hidden=128, layers=4)
    draft = make_peagle(tiny(tmp_path / "draft", "llama", "draft"), target_hidden=128, layers=(1, 2, 3))
    out, drafted, plain = tmp_path / "out", tmp_path / "drafted", tmp_path / "plain"
    common = ["--precision", precision, "--accept-loss"]
    assert export_main([str(draft), *common, "--output", str(drafted)]) == 0
    assert export_main([str(target), "--for-draft", str(drafted), *common, "--no-verify", "--output", str(out)]) == 0
    assert export_main([str(target), *common, "--no-verify", "--output", str(plain)]) == 0
    with load(out, drafted, draft_mode="target-dependent", threads=1) as pair:
        for prompt in PROMPTS:
            for settings in ({}, {"temperature": 0.8, "seed": 3}):
                wanted = pair.generate(prompt, max_new_tokens=24, draft_length=0, **settings)
                for length in (1, 4, 16, "auto"):
                    found = pair.generate(prompt, max_new_tokens=24, draft_length=length, lookup=False, **settings)
                    assert found.tokens == wanted.tokens, (prompt, settings, length)
                    assert length == "auto" or "p-eagle" in found.stats.sources
    with pytest.raises(BadArtifact, match=r"exported with none; export it again: .*--features=-4,-3,-2"):
        load(plain, drafted, draft_mode="target-dependent")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pard2", "p-eagle"])
def test_graphs_of_fixed_shapes_change_no_text(kind: str, tmp_path: Path, tiny: Callable[..., Path]) -> None:
    """The form for NPUs, here on the CPU. Each export is compared with torch, in both modes of the draft."""
    target, draft = tiny(tmp_path / "target", "llama", "target", layers=4), tiny(tmp_path / "draft", "llama", "draft")
    if kind == "pard2":
        make_pard2(draft, layers=(-1, -2), bias=True)
    else:
        make_peagle(draft, layers=(1, 2, 3))
    out, drafted = tmp_path / "out", tmp_path / "drafted"
    common = ["--precision", "fp32", "--device", "npu", "--draft-length", "4", "--context-length", "256"]
    assert export_main([str(draft), *common, "--output", str(drafted)]) == 0
    assert export_main([str(target), "--for-draft", str(drafted), *common, "--output", str(out)]) == 0
    with load(out, drafted, provider="cpu", draft_mode="target-dependent", threads=1) as pair:
        for prompt in PROMPTS:
            wanted = pair.generate(prompt, max_new_tokens=24, draft_length=0)
            for length in (1, 4, "auto"):
                found = pair.generate(prompt, max_new_tokens=24, draft_length=length, lookup=False)
                assert found.tokens == wanted.tokens, (prompt, length)
                assert length == "auto" or kind in found.stats.sources


TEXTS, NEW, LAYERS = 4, 48, (1, 3, 5)


@pytest.fixture(scope="module")
def overfit_pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """The shipped target, and a P-EAGLE draft that was trained on a few of its replies, as published."""
    root, folder = tmp_path_factory.mktemp("peagle"), DEMO["demo-target"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer, texts = AutoTokenizer.from_pretrained(folder), []
    with torch.inference_mode():
        for prompt in demo.prompts()[:TEXTS]:
            prompt_ids = tokenizer(prompt, return_tensors="pt").input_ids
            ids = model.generate(prompt_ids, max_new_tokens=NEW, do_sample=False)
            states = model(ids, output_hidden_states=True).hidden_states
            texts.append((ids[0], torch.cat([states[layer][0] for layer in LAYERS], -1)))
    inner = {"model_type": "llama", "vocab_size": 2176, "hidden_size": 64, "intermediate_size": 128, "head_dim": 32}
    inner |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "eos_token_id": 2039}
    inner |= {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "bos_token_id": None, "hidden_act": "silu"}
    raw = {"architectures": ["PEagleSpeculator"], "speculators_model_type": "peagle", "transformer_layer_config": inner}
    raw |= {"mask_token_id": 2040, "eagle_aux_hidden_state_layer_ids": list(LAYERS), "target_hidden_size": 256}
    raw |= {"norm_before_residual": True, "draft_vocab_size": 2176, "tie_word_embeddings": False}
    draft, drafted, out = root / "checkpoint", root / "draft", root / "target"
    shutil.copytree(folder, draft, ignore=shutil.ignore_patterns("*.safetensors"))
    peagle_reference.save(draft, raw, peagle_reference.overfit(raw, texts, steps=150))
    common = ["--precision", "fp32", "--no-verify", "--output"]
    assert export_main([str(draft), *common, str(drafted)]) == 0
    assert export_main(["demo-target", "--for-draft", str(drafted), *common, str(out)]) == 0
    with load(out, drafted, draft_mode="target-dependent", threads=1) as pair:
        yield pair


def accepted(pair: Pair, draft_length: int = 4) -> float:
    """Mean tokens a round over the texts that the draft was trained on."""
    tokens = rounds = 0.0
    for prompt in demo.prompts()[:TEXTS]:
        stats = pair.generate(prompt, max_new_tokens=NEW, draft_length=draft_length, lookup=False).stats
        tokens, rounds = tokens + stats.new_tokens, rounds + stats.rounds
    return tokens / rounds


@pytest.mark.slow
def test_a_draft_that_has_learned_is_accepted(overfit_pair: Pair) -> None:
    assert accepted(overfit_pair) > 3
    assert accepted(overfit_pair, 1) > 1.7


@pytest.mark.slow
@pytest.mark.parametrize("shift", [-1, 1])
def test_features_that_are_shifted_by_one_token_are_not(
    overfit_pair: Pair, shift: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error of one row leaves the text as it is, and costs nearly all that the draft has learned."""
    rows = Pard2Drafter._rows

    def shifted(self: Pard2Drafter, first: int, count: int) -> Any:
        return rows(self, first + shift, count)

    aligned = accepted(overfit_pair)
    monkeypatch.setattr(Pard2Drafter, "_rows", shifted)
    assert accepted(overfit_pair) < 1 + (aligned - 1) / 3
