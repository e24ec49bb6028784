"""Every family and role against torch: logits, and greedy tokens through the whole runtime."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import LLAMA3
from transformers import AutoModelForCausalLM

from pard_onnx import load
from pard_onnx.models.families import FAMILIES as TABLE
from pard_onnx.models.manifest import Manifest

FAMILIES = tuple(TABLE)
PROMPT = list(range(20, 45))
Exported = Callable[..., tuple[Path, Path]]


def transformers_greedy(checkpoint: Path, prompt: list[int], count: int) -> list[int]:
    """Greedy tokens without EOS; ids that the tokenizer does not have are suppressed."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    padding = list(range(300, model.config.vocab_size))
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count, suppress_tokens=padding
    )
    tokens: list[int] = out[0, len(prompt) :].tolist()
    return tokens[:-1] if tokens and tokens[-1] == 299 else tokens


@pytest.mark.parametrize("tied", (False, True))
@pytest.mark.parametrize("role", ("target", "draft"))
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_torchs(exported: Exported, family: str, role: str, tied: bool) -> None:
    _, artifact = exported(family, role, "fp32", tied=tied)
    parity = Manifest.read(artifact).parity
    assert parity is not None
    assert parity.max_error < 1e-4
    assert parity.rollback_error < 1e-4
    assert parity.top1_agreement == 1.0


def test_the_manifest_says_which_widths_give_equal_rows(demo_folder: Callable[[str, str], Path]) -> None:
    parity = Manifest.read(demo_folder("demo-target", "int4")).parity
    assert parity is not None
    assert set(range(2, 17, 2)) <= set(parity.exact_widths)
    draft = Manifest.read(demo_folder("demo-draft", "int8")).parity
    assert draft is not None and draft.exact_widths == ()


@pytest.mark.parametrize("family", FAMILIES)
def test_pard_gives_the_tokens_of_transformers(exported: Exported, family: str) -> None:
    checkpoint, target = exported(family, "target", "fp32")
    # The draft has the target's weights: its first token of a round is right, the others are not.
    _, draft = exported(family, "draft", "fp32")
    expected = transformers_greedy(checkpoint, PROMPT, 40)
    with load(target, draft) as pair:
        for length in (1, 2, 5, 12):
            result = pair.generate(PROMPT, max_new_tokens=40, draft_length=length)
            assert list(result.tokens) == expected
            assert result.stats.mean_accepted >= 1.5
    with load(target) as plain:
        assert list(plain.generate(PROMPT, max_new_tokens=40).tokens) == expected


def test_pair_with_padded_vocabularies_of_different_sizes(exported: Exported) -> None:
    checkpoint, target = exported("qwen2", "target", "fp32", vocab_rows=384)
    _, draft = exported("qwen2", "draft", "fp32", vocab_rows=320)
    with load(target, draft) as pair:
        result = pair.generate(PROMPT, max_new_tokens=40, draft_length=4)
    assert list(result.tokens) == transformers_greedy(checkpoint, PROMPT, 40)


def test_sharded_checkpoint(exported: Exported) -> None:
    checkpoint, artifact = exported("llama", "target", "fp32", shards=3)
    with load(artifact) as pair:
        tokens = pair.generate(PROMPT, max_new_tokens=10).tokens
    assert list(tokens) == transformers_greedy(checkpoint, PROMPT, 10)


def test_half_precision_checkpoints(exported: Exported) -> None:
    for dtype in ("bfloat16", "float16"):
        _, artifact = exported("qwen2", "target", "fp32", dtype=dtype)
        parity = Manifest.read(artifact).parity
        assert parity is not None and parity.mean_error < 0.05  # torch itself computed in half precision


def test_llama3_scaling_past_its_original_context(tmp_path: Path, tiny: Callable[..., Path]) -> None:
    from pard_onnx.export.exporter import Job, export
    from pard_onnx.models.checkpoints.checkpoint import Checkpoint
    from pard_onnx.models.manifest import Source

    checkpoint = tiny(tmp_path / "long", "llama", rope=LLAMA3, max_positions=16384)
    export(Job(Checkpoint.open(checkpoint), Source("tiny"), tmp_path / "out", "fp32", capacity=9000))
    prompt = [(i * 37 + i // 7) % 290 for i in range(8300)]
    with load(tmp_path / "out") as pair:
        tokens = pair.generate(prompt, max_new_tokens=8).tokens
    assert list(tokens) == transformers_greedy(checkpoint, prompt, 8)


def test_a_draft_in_dynamic_int8_changes_nothing(tmp_path: Path, exported: Exported, tiny: Callable[..., Path]) -> None:
    from pard_onnx.export.exporter import Job, export
    from pard_onnx.models.checkpoints.checkpoint import Checkpoint
    from pard_onnx.models.manifest import Source
    from pard_onnx.models.precision import DYNAMIC_INT8, INT8, Recipe

    checkpoint = Checkpoint.open(tiny(tmp_path / "tiny", "qwen2", "draft"))
    export(Job(checkpoint, Source("tiny"), tmp_path / "draft", "int8", recipe=Recipe(DYNAMIC_INT8, INT8, INT8)))
    _, target = exported("qwen2", "target", "int4")
    with load(target, tmp_path / "draft") as pair:
        plain = pair.generate(PROMPT, max_new_tokens=40, draft_length=0).tokens
        assert pair.generate(PROMPT, max_new_tokens=40, draft_length=6).tokens == plain
