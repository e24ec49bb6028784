"""Which published draft a target's name stands for."""

from __future__ import annotations

import pytest

from pard_onnx.models.hub import HUB_ID
from pard_onnx.models.published_drafts import PUBLISHED, draft_candidates, drafts_by_name

LLAMA, QWEN, QWEN3 = "amd/PARD-Llama-3.2-1B", "amd/PARD-Qwen2.5-0.5B", "amd/PARD-Qwen3-0.6B"
DISTILL, LLAMA4 = "amd/PARD-DeepSeek-R1-Distill-Qwen-1.5B", "amd/PARD-Llama-4-1B"
EXPECTED = {
    "meta-llama/Llama-3.1-8B-Instruct": LLAMA,
    "meta-llama/Meta-Llama-3.1-8B": LLAMA,
    "meta-llama/Llama-3.2-3B-Instruct": LLAMA,
    "meta-llama/Llama-3.3-70B-Instruct": LLAMA,
    "unsloth/llama-3.1-8b-instruct-bnb-4bit": LLAMA,
    "Qwen/Qwen2.5-7B-Instruct": QWEN,
    "Qwen/Qwen2.5-Coder-32B-Instruct-AWQ": QWEN,
    "Qwen/Qwen2.5-Math-1.5B": QWEN,
    "Qwen/Qwen2.5-7B-Instruct-GGUF/qwen2.5-7b-instruct-q4_0": QWEN,
    "Qwen/Qwen3-8B": QWEN3,
    "Qwen/Qwen3-30B-A3B": QWEN3,
    "Qwen3-4B-Instruct-2507": QWEN3,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": DISTILL,
    "meta-llama/Llama-4-Scout-17B-16E-Instruct": LLAMA4,
    "demo-target": "demo-draft",
    "meta-llama/Llama-2-7b-chat-hf": None,
    "meta-llama/Llama-3.2-11B-Vision-Instruct": None,
    "Qwen/Qwen2.5-VL-7B-Instruct": None,
    "Qwen/Qwen3.5-9B": None,
    "Qwen/Qwen3-Embedding-8B": None,
    "Qwen/Qwen2-7B-Instruct": None,
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": None,
    "google/gemma-3-1b-it": None,
}


@pytest.mark.parametrize(("target", "draft"), EXPECTED.items())
def test_drafts_by_name(target: str, draft: str | None) -> None:
    assert [one.model for one in drafts_by_name(target)] == [draft] * (draft is not None)


def test_the_family_must_fit_the_name() -> None:
    assert not drafts_by_name("someone/Qwen2.5-as-a-llama", "llama")
    assert [one.model for one in drafts_by_name("x/Qwen3-8B", "qwen3", "pard2")] == ["amd/PARD2-Qwen3-8B"]
    assert [one.model for one in drafts_by_name("x/Qwen3-8B", "qwen3")] == [QWEN3]


def test_candidates_of_a_fine_tune_are_those_of_its_family() -> None:
    assert [one.model for one in draft_candidates("someone/my-tune", "qwen2")] == [DISTILL, QWEN]
    assert [one.model for one in draft_candidates("someone/Qwen2.5-my-tune", "qwen2")] == [QWEN, DISTILL]
    assert not draft_candidates("someone/my-tune", "gemma3_text")
    assert [one.model for one in draft_candidates("demo-target", "qwen2")] == ["demo-draft"]


def test_the_table_holds_hub_ids() -> None:
    assert all(HUB_ID.fullmatch(one.model) for one in PUBLISHED)
    assert len({one.model for one in PUBLISHED}) == len(PUBLISHED)
