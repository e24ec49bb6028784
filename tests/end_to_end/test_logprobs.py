"""Log probabilities of the shipped pair: transformers' own, and the same numbers whatever is drafted."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from pard_onnx import load
from pard_onnx.benchmarks.trial import SHIPPED, read_prompts
from pard_onnx.models import demo
from pard_onnx.runtime.sampling.logprobs import TokenLogprob

Folder = Callable[[str, str], Path]
CLOSE = 1e-3
LENGTHS: list[Any] = [0, 1, 4, 8, "auto"]


def reference(ids: list[int]) -> torch.Tensor:
    """The log probabilities after each token, by transformers in float32."""
    model = AutoModelForCausalLM.from_pretrained(demo.TARGET, dtype=torch.float32)
    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1)


def require_close(one: TokenLogprob | None, row: torch.Tensor, size: int) -> None:
    assert one is not None
    assert one.logprob == pytest.approx(row[one.token].item(), abs=CLOSE)
    best = row[:size].topk(len(one.top)).values.tolist()
    assert [other.logprob for other in one.top] == pytest.approx(best, abs=CLOSE)
    assert [row[other.token].item() for other in one.top] == pytest.approx(best, abs=CLOSE)


def test_they_are_those_of_transformers(demo_folder: Folder) -> None:
    prompt = read_prompts(SHIPPED, 1).prompts[0]
    with load(demo_folder("demo-target", "fp32"), demo_folder("demo-draft", "int8")) as pair:
        size = pair.target_manifest.spec.vocabulary.size
        for options in ({}, {"temperature": 1.0, "seed": 3, "logit_bias": {7: -5.0}}):
            result = pair.generate(prompt, max_new_tokens=40, logprobs=20, prompt_logprobs=3, **options)  # type: ignore[arg-type]
            ids = [*pair.encode(prompt), *result.tokens]
            rows = reference(ids)
            assert result.logprobs is not None and result.prompt_logprobs is not None
            found = [*result.prompt_logprobs, *result.logprobs]
            assert [one.token for one in found[1:] if one] == ids[1:]
            for one, row in zip(found[1:], rows, strict=False):
                require_close(one, row, size)
        start = len(result.prompt_logprobs)
        score = pair.score(prompt, result.text)
        expected = sum(rows[at - 1, ids[at]].item() for at in range(start, len(ids)))
        assert score.logprob == pytest.approx(expected, abs=CLOSE * len(result.tokens))
        greedy = all(rows[at - 1].argmax() == ids[at] for at in range(start, len(ids)))
        assert score.is_greedy == greedy


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
@pytest.mark.parametrize(
    "kernel", ["", pytest.param("off", marks=pytest.mark.slow)], ids=["own kernel", "ONNX Runtime's kernel"]
)
def test_drafts_change_no_bit_of_them(
    demo_folder: Folder, precision: str, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PARD_ONNX_KERNEL", kernel)
    prompts = ["def read_lines(path):\n    ", "class Node:\n    def __init__(self"]
    with load(demo_folder("demo-target", precision), demo_folder("demo-draft", "int8")) as pair:
        for prompt in prompts:
            for way in ({}, {"temperature": 0.9, "top_p": 0.95, "repetition_penalty": 1.1, "seed": 5}):
                results = [
                    pair.generate(prompt, max_new_tokens=40, draft_length=k, logprobs=5, prompt_logprobs=2, **way)  # type: ignore[arg-type]
                    for k in LENGTHS
                ]
                assert results[0].prompt_logprobs
                assert len(results[0].logprobs or ()) == len(results[0].tokens) > 10
                for result in results[1:]:
                    assert result.logprobs == results[0].logprobs
                    assert result.prompt_logprobs == results[0].prompt_logprobs
                if not kernel:  # a prompt that is read in other steps has the same rows
                    plain = pair.generate(prompt, max_new_tokens=40, logprobs=5, **way)  # type: ignore[arg-type]
                    assert plain.logprobs == results[0].logprobs
                    continued = pair.score(prompt, results[0].tokens, logprobs=5)
                    assert continued.tokens == results[0].logprobs
