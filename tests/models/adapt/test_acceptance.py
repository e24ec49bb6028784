"""Held-out acceptance against rounds that are run one after another, as decoding runs them; the card; memory."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("accelerate")
from tiny import write  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from pard_onnx.models.adapt.acceptance import Acceptance, measure  # noqa: E402
from pard_onnx.models.adapt.attention import with_packed_attention  # noqa: E402
from pard_onnx.models.adapt.card import write_card  # noqa: E402
from pard_onnx.models.adapt.memory import estimate, packed_tokens  # noqa: E402
from pard_onnx.models.adapt.objective import objective  # noqa: E402
from pard_onnx.models.adapt.outcome import Outcome, Point  # noqa: E402
from pard_onnx.models.adapt.samples import Sample  # noqa: E402
from pard_onnx.models.adapt.settings import Settings  # noqa: E402
from pard_onnx.models.adapt.start import Start, start_from  # noqa: E402
from pard_onnx.models.checkpoints.checkpoint import Checkpoint  # noqa: E402
from pard_onnx.models.errors import BadInput  # noqa: E402

CPU, K = torch.device("cpu"), 4
SETTINGS = Settings(draft_length=K)


def proposals(model: Any, prefix: list[int], mask_id: int) -> tuple[list[int], Any]:
    """What the draft proposes after a prefix, as at run time, and its probabilities."""
    with torch.inference_mode():
        logits = model(torch.tensor([[*prefix, *[mask_id] * (K - 1)]]), use_cache=False).logits[0, -K:]
    return logits.argmax(-1).tolist(), logits.softmax(-1)


def greedy_text(model: Any, prompt: list[int], mask_id: int, count: int, rng: Any) -> list[int]:
    """A text of which the draft gets some tokens right."""
    text = list(prompt)
    while len(text) < len(prompt) + count:
        found, _ = proposals(model, text, mask_id)
        text += [
            int(one) if rng.random() < 0.8 else int(rng.integers(0, 290)) for one in found[: rng.integers(1, K + 1)]
        ]
    return text[: len(prompt) + count]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: Any) -> tuple[Start, Any, list[Sample]]:
    folder = tmp_path_factory.mktemp("pair")
    start = start_from(write(folder / "draft", "qwen2", layers=1, dtype="float32"))
    target = AutoModelForCausalLM.from_pretrained(
        write(folder / "target", "llama", layers=1, seed=1, dtype="float32"), dtype=torch.float32
    ).eval()
    start.model.eval()
    rng, samples = np.random.default_rng(0), []
    for prompt, count in ((5, 20), (1, 7), (9, 2)):
        text = greedy_text(start.model, rng.integers(0, 290, prompt).tolist(), start.mask_id, count, rng)
        samples.append(Sample(np.array(text), np.arange(len(text)) >= prompt))
    two_replies = np.concatenate([samples[0].ids, samples[1].ids])
    samples.append(Sample(two_replies, np.concatenate([samples[0].replies, samples[1].replies])))
    return start, target, samples


def test_the_mean_accepted_length_is_that_of_rounds_one_after_another(pair: Any, monkeypatch: Any) -> None:
    start, _, samples = pair
    monkeypatch.setattr("pard_onnx.models.adapt.acceptance.BASES", 6)
    rounds = tokens = 0
    for one in samples:
        ids, replies = one.ids.tolist(), one.replies.tolist()
        place = 0
        while place < len(ids):
            if not replies[place] or place == 0:
                place += 1
                continue
            found, _ = proposals(start.model, ids[:place], start.mask_id)
            count = 0
            while (
                place + count < len(ids) and replies[place + count] and count < K and found[count] == ids[place + count]
            ):
                count += 1
            count += place + count < len(ids) and replies[place + count]  # the target's own token
            rounds, tokens, place = rounds + 1, tokens + count, place + count
    with with_packed_attention(start.model):
        found = measure(start.model, objective(SETTINGS, CPU, None), samples, start.mask_id)
    assert found.rounds == rounds and found.mean_accepted == pytest.approx(tokens / rounds)
    assert found.mean_accepted > 1.5  # so that chains were walked


def test_acceptance_by_position_is_of_the_places_that_are_reached(pair: Any) -> None:
    start, target, samples = pair
    reached, accepted, overlaps = np.zeros(K), np.zeros(K), []
    for one in samples:
        ids, replies = one.ids.tolist(), one.replies.tolist()
        with torch.inference_mode():
            wanted = target(torch.tensor([ids]), use_cache=False).logits[0].softmax(-1)
        for base in range(len(ids) - 1):
            if not replies[base + 1]:
                continue
            found, drafted = proposals(start.model, ids[: base + 1], start.mask_id)
            for j in range(K):
                place = base + 1 + j
                if place >= len(ids) or not replies[place]:
                    break
                reached[j] += 1
                if found[j] != ids[place]:
                    break
                accepted[j] += 1
            ends = base + K + 1
            if ends <= len(ids) and all(replies[base + 1 : ends]):
                overlaps.append(torch.minimum(drafted, wanted[base : base + K]).sum(-1).numpy())
    with with_packed_attention(start.model):
        found = measure(start.model, objective(SETTINGS, CPU, None), samples, start.mask_id, target)
    assert found.by_position == pytest.approx((accepted / np.maximum(reached, 1)).tolist())
    assert found.expected_by_position == pytest.approx(np.mean(overlaps, axis=0).tolist(), rel=1e-4)
    expected = 1 + np.cumprod(overlaps, axis=1).sum(axis=1).mean()
    assert found.expected_accepted == pytest.approx(expected, rel=1e-4)


OUTCOME = Outcome(
    200, 400, 100, 2.75, Acceptance((0.7, 0.5), 2.75, 40, (0.6, 0.4), 1.84),
    (Point(100, 2.0, (1.5, 2.5), Acceptance((0.7, 0.5), 2.75, 40)), Point(200, 1.0, (0.5, 1.5), None)), 812.0, 4000.0,
)  # fmt: skip


def test_the_card_says_what_was_trained(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    write_card(tmp_path, OUTCOME, SETTINGS, {"target": "org/|evil`\n# x", "data": ["a.jsonl", "b"], "samples": 12})
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "\n# A PARD draft for org/\\|evil\\` # x\n" in text
    for part in (
        "**2.75**",
        "| 2 | 50.0% | 40.0% |",
        "1.84 are expected",
        "| data | a.jsonl, b |",
        "1:07 h",
        "stopped",
    ):
        assert part in text
    for name in ("draft\\_length | 4", "rate | 0.0002", "(training.svg)"):
        assert name in text
    assert (tmp_path / "training.svg").read_bytes().lstrip().startswith(b"<?xml")


def test_the_card_needs_no_plot_and_no_acceptance(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    write_card(tmp_path, replace(OUTCOME, acceptance=None), SETTINGS, {})
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "not measured" in text and "training.svg" not in text
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


@pytest.mark.parametrize(
    ("name", "value"),
    [("method", "eagle"), ("draft_length", 0), ("draft_length", 33), ("ratio", 0.0), ("ratio", 1.5), ("floor", -1.0),
     ("rate", float("nan")), ("rate", 0.0), ("epochs", 0.0), ("steps", 0), ("sequence_tokens", 9), ("batch_tokens", 0),
     ("warmup", 2.0), ("precision", "fp8"), ("attention", "flash"), ("patience", 0), ("save_every", 0), ("seed", -1)],
)  # fmt: skip
def test_settings_that_cannot_be_are_refused(name: str, value: Any) -> None:
    with pytest.raises(BadInput, match=name):
        Settings(**{name: value})


@pytest.mark.parametrize("steps", [1, 2, 10, 333])
def test_the_rate_rises_and_falls(steps: int) -> None:
    rates = [SETTINGS.rate_at(step, steps) for step in range(steps)]
    top = rates.index(max(rates))
    assert all(0 < rate <= SETTINGS.rate for rate in rates) and max(rates) == SETTINGS.rate
    assert rates[: top + 1] == sorted(rates[: top + 1]) and rates[top:] == sorted(rates[top:], reverse=True)


def test_the_estimate_names_what_to_change(pair: Any, monkeypatch: Any) -> None:
    start, target, _ = pair
    whole = estimate(start, SETTINGS)
    parameters = sum(one.numel() for one in start.model.parameters())
    assert (whole.weights, whole.gradients, whole.optimizer) == (4 * parameters, 4 * parameters, 8 * parameters)
    assert estimate(start, SETTINGS, target).total > whole.total
    monkeypatch.setattr("pard_onnx.models.adapt.memory.available_memory", lambda device: whole.total - 1)
    found = estimate(start, SETTINGS)
    assert not found.fits and "--recompute --sequence-tokens 512 would take about" in str(found)
    smaller = estimate(start, replace(SETTINGS, recompute=True, sequence_tokens=512))
    assert smaller.fits and smaller.advice == ""
    assert packed_tokens(replace(SETTINGS, sequence_tokens=1004)) == 1004 + 700 + 490 + 343


@pytest.mark.parametrize("method", ["pard", "pard2"])
@pytest.mark.parametrize(("family", "tied"), [("llama", False), ("qwen3", True), ("gemma3_text", True)])
def test_a_target_is_estimated_by_its_spec(
    pair: Any, tmp_path: Path, monkeypatch: Any, family: str, tied: bool, method: Any
) -> None:
    start, _, _ = pair
    folder = write(tmp_path / "model", family, tied=tied, dtype="bfloat16")
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    monkeypatch.setattr("pard_onnx.models.adapt.memory.available_memory", lambda device: None)
    settings = replace(SETTINGS, method=method)
    assert estimate(start, settings, Checkpoint.open(folder).spec) == estimate(start, settings, loaded)


def test_a_target_that_measures_is_the_first_that_is_left_out(pair: Any, monkeypatch: Any) -> None:
    start, target, _ = pair
    room = estimate(start, SETTINGS, target).total - 1
    monkeypatch.setattr("pard_onnx.models.adapt.memory.available_memory", lambda device: room)
    found = estimate(start, SETTINGS, target)
    assert not found.fits and found.advice.startswith("--expected-acceptance no would take")


PEAK = """
import sys, resource, torch
from pathlib import Path
import numpy as np
from pard_onnx.models.adapt import run
from pard_onnx.models.adapt.memory import estimate
from pard_onnx.models.adapt.samples import Sample
from pard_onnx.models.adapt.settings import Settings
from pard_onnx.models.adapt.start import start_from
torch.set_num_threads(1)
start = start_from(Path(sys.argv[1]))
settings = Settings(steps=2, sequence_tokens=int(sys.argv[3]), batch_tokens=10, evaluate_every=9)
samples = [Sample(np.arange(settings.sequence_tokens) % 200, np.ones(settings.sequence_tokens, bool))] * 2
run.adapt(start, samples, [], settings, Path(sys.argv[2]), report=lambda one: None)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, estimate(start, settings).total)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes there")
@pytest.mark.parametrize("tokens", [256, 1024])
def test_the_estimate_is_near_what_is_used(tmp_path: Path, tokens: int) -> None:
    from pard_onnx.models import demo

    command = [sys.executable, "-c", PEAK, str(demo.TARGET), str(tmp_path / "work"), str(tokens)]
    peak, told = map(int, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
    assert 0.6 * peak < told < 1.7 * peak
