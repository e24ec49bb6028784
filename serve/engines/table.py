"""Other engines, and how each serves a target with its PARD draft; an entry of ENGINES each.

Options and fields are those of the engines' documentation in November 2026: vLLM 0.33 (parallel draft models),
TensorRT-LLM 1.4 (PARDDecodingConfig), SGLang's page on speculative decoding.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass

from pard_onnx.models.errors import BadInput

from .command import Command
from .deployment import Deployment
from .plan import Plan
from .served_model import ServedModel

UNYAML = re.compile("[\x7f-\x9f\ufeff\ufffe\uffff]")  # what JSON may hold in a text, and YAML may not


@dataclass(frozen=True, slots=True)
class Engine:
    """An engine that serves checkpoints of the hub."""

    title: str
    runs_pard: bool
    deploy: Callable[[Plan], Deployment]


# vLLM


def vllm(plan: Plan) -> Deployment:
    """`vllm serve` with method draft_model and parallel drafting."""
    target, draft = plan.target, _required(plan)
    config: dict[str, str | int | bool] = {
        "method": "draft_model",
        "model": draft.name,
        "num_speculative_tokens": plan.length,
        "parallel_drafting": True,
    }
    if draft.revision:
        config["revision"] = draft.revision
    base = ("vllm", "serve", target.name, *_option("--revision", target.revision))
    text = json.dumps(config, ensure_ascii=False)
    # Each key is an option, so that no double quotes are needed; vLLM reads a value that is JSON as JSON
    keys = {key: value if isinstance(value, str) else json.dumps(value) for key, value in config.items()}
    notes = list(_common_notes(plan))
    if draft.revision and _is_json(draft.revision):
        del keys["revision"]
        notes.append(f"in PowerShell the draft's commit, {draft.revision}, cannot be given without double quotes")
    powershell = (*base, *(part for key, value in keys.items() for part in (f"--speculative-config.{key}", value)))
    if draft.rows and target.rows and draft.rows != target.rows:
        notes.append(
            f"vLLM refuses a draft whose vocab_size is another one ({draft.rows}, the target's is {target.rows}), also "
            "where only the padding differs: pad the draft's embedding and head to the target's size, or add "
            '"use_heterogeneous_vocab": true, which was not tried with parallel drafting'
        )
    command = Command("serve with PARD", (*base, "--speculative-config", text), powershell)
    return Deployment(
        (command,), (("speculative_config.json", json.dumps(config, indent=2, ensure_ascii=False)),), tuple(notes)
    )


# TensorRT-LLM


def tensorrt_llm(plan: Plan) -> Deployment:
    """`trtllm-serve` with PARDDecodingConfig in a YAML file."""
    target, draft = plan.target, _required(plan)
    lines = [f"revision: {yaml_text(target.revision)}"] if target.revision else []
    lines += ["speculative_config:", "  decoding_type: PARD", f"  max_draft_len: {plan.length}"]
    lines.append(f"  speculative_model: {yaml_text(draft.name)}")
    if draft.mask_id is not None:
        lines.append(f"  mask_token_id: {draft.mask_id}")
    notes = list(_common_notes(plan))
    if draft.revision:
        fetch = f"hf download {draft.name} --revision {draft.revision}"
        notes.append(f"TensorRT-LLM takes the draft's newest commit; to pin it, run {fetch} and name that folder")
    command = Command("serve with PARD", ("trtllm-serve", target.name, "--config", "pard.yaml"))
    return Deployment((command,), (("pard.yaml", "\n".join(lines) + "\n"),), tuple(notes))


def yaml_text(text: str) -> str:
    """The text as a YAML scalar."""
    return UNYAML.sub(lambda found: f"\\u{ord(found[0]):04x}", json.dumps(text, ensure_ascii=False))


# SGLang

# Drafts of other kinds, by the last part of the target's name: the algorithm and the draft
OTHER_DRAFTS = {
    "Llama-3.1-8B-Instruct": (
        ("EAGLE3", "jamesliu1/sglang-EAGLE3-Llama-3.1-Instruct-8B"),
        ("DFLASH", "z-lab/LLaMA3.1-8B-Instruct-DFlash-UltraChat"),
    ),
    "Llama-3.3-70B-Instruct": (("EAGLE3", "lmsys/sglang-EAGLE3-LLaMA3.3-Instruct-70B"),),
    "Qwen3-4B": (("DFLASH", "z-lab/Qwen3-4B-DFlash-b16"),),
    "Qwen3-8B": (("EAGLE3", "AngelSlim/Qwen3-8B_eagle3"), ("DFLASH", "z-lab/Qwen3-8B-DFlash-b16")),
}


def sglang(plan: Plan) -> Deployment:
    """What SGLang has instead of PARD: drafts of other kinds where one is published, n-grams, or none."""
    target = plan.target
    launch = ("python3", "-m", "sglang.launch_server", "--model-path", target.name)
    base = (*launch, *_option("--revision", target.revision))
    others = tuple(
        Command(
            f"serve with {algorithm}, a draft of another kind that reads the target's hidden states",
            (*base, "--speculative-algorithm", algorithm, "--speculative-draft-model-path", draft),
        )
        for algorithm, draft in OTHER_DRAFTS.get(target.known_as.rsplit("/", 1)[-1], ())
    )
    plain = (
        Command(
            "serve with drafts from n-grams of the text, without a draft model",
            (*base, "--speculative-algorithm", "NGRAM"),
        ),
        Command("serve without drafts", base),
    )
    unused = f", so {plan.draft.name} is not used" if plan.draft else ""
    notes = (
        f"SGLang cannot run PARD drafts{unused}; vllm and tensorrt-llm can",
        *_common_notes(plan, draft_used=False),
    )
    return Deployment((*others, *plain), (), notes)


ENGINES = {
    "vllm": Engine("vLLM", True, vllm),
    "tensorrt-llm": Engine("TensorRT-LLM", True, tensorrt_llm),
    "sglang": Engine("SGLang", False, sglang),
}


def _required(plan: Plan) -> ServedModel:
    if plan.draft is None:
        raise BadInput(f"{plan.target.name}: no published PARD draft is known for it; name one with --draft")
    return plan.draft


def _option(name: str, value: str | None) -> tuple[str, ...]:
    return () if value is None else (name, value)


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _common_notes(plan: Plan, *, draft_used: bool = True) -> list[str]:
    """What the user has to know, whichever engine it is."""
    models = [plan.target, *([plan.draft] if plan.draft and draft_used else [])]
    notes = [
        f"{one.name} is a folder of this machine; copy it to the server's, to the same path"
        for one in models
        if one.local
    ]
    if len(models) == 2 and any(one.kind is None for one in models):
        notes.append("the hub cannot be reached, so it was not checked that the models fit each other")
    if plan.draft and draft_used:
        notes.append(f"{plan.length} drafts a round is a starting point ({plan.reason})")
        if plan.draft.kind == "pard2":
            notes.append(f"{plan.draft.name} is a PARD-2 draft; whether the engine runs it was not tried")
    return notes
