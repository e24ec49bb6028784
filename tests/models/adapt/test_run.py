"""A whole training on a tiny model: interruptions, kills, what stops it, and what it measures."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("accelerate")
from safetensors.torch import load_file  # noqa: E402
from tiny import write  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from pard_onnx.models.adapt.acceptance import measure  # noqa: E402
from pard_onnx.models.adapt.attention import with_packed_attention  # noqa: E402
from pard_onnx.models.adapt.objective import objective  # noqa: E402
from pard_onnx.models.adapt.order import TrainingOrder, filled  # noqa: E402
from pard_onnx.models.adapt.outcome import Outcome  # noqa: E402
from pard_onnx.models.adapt.progress import Report, no_report  # noqa: E402
from pard_onnx.models.adapt.run import adapt  # noqa: E402
from pard_onnx.models.adapt.samples import Sample  # noqa: E402
from pard_onnx.models.adapt.settings import Settings  # noqa: E402
from pard_onnx.models.adapt.start import Start, start_from  # noqa: E402
from pard_onnx.models.errors import BadInput, Failure  # noqa: E402

SETTINGS = Settings(
    draft_length=3, steps=6, sequence_tokens=40, batch_tokens=80, rate=1e-2, save_every=2, evaluate_every=3
)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: Any) -> Path:
    return write(tmp_path_factory.mktemp("adapt") / "model", "qwen3", layers=2, dtype="float32")


@pytest.fixture(scope="session")
def untied(tmp_path_factory: Any) -> Path:
    return write(tmp_path_factory.mktemp("adapt") / "model", "llama", layers=2, tied=False, dtype="float32")


def sample(seed: int, length: int = 14) -> Sample:
    """A count by one from some id on, which is learned at once; its first tokens are a prompt."""
    first = np.random.default_rng(seed).integers(0, 20)
    return Sample(first + np.arange(length), np.arange(length) >= 4)


SAMPLES = [sample(seed, 8 + seed % 9) for seed in range(24)]
HELD_OUT = [sample(100), sample(101)]


def trained(folder: Path, work: Path, settings: Settings = SETTINGS, report: Any = no_report, **more: Any):
    start = start_from(folder)
    outcome = adapt(start, SAMPLES, HELD_OUT, settings, work, report=report, **more)
    return start, outcome


def same(one: Start, two: Start) -> bool:
    pairs = zip(one.model.named_parameters(), two.model.named_parameters(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


class Interrupted(Exception): ...


def at_step(step: int) -> Any:
    def report(one: Report) -> None:
        if one.step == step:
            raise Interrupted

    return report


@pytest.mark.parametrize("step", [1, 2, 3, 5])
def test_an_interrupted_training_ends_as_one_in_one_go(folder: Path, tmp_path: Path, step: int) -> None:
    whole, expected = trained(folder, tmp_path / "whole")
    with pytest.raises(Interrupted):
        trained(folder, tmp_path / "parts", report=at_step(step))
    resumed, found = trained(folder, tmp_path / "parts")
    assert same(whole, resumed)
    assert replace(found, seconds=0, tokens_per_second=0) == replace(expected, seconds=0, tokens_per_second=0)
    assert [point.step for point in found.history] == [3, 6]
    again, loaded = trained(folder, tmp_path / "parts")  # a finished run is only loaded
    assert same(whole, again) and loaded == found


EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"}


def killed(folder: Path, work: Path, event: int | None) -> bool:
    """Train in a forked child, which kills itself before some event of the file system; whether it came to its end."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    seen = 0

    def hook(name: str, arguments: Any) -> None:
        nonlocal seen
        if name in EVENTS and str(work) in str(arguments[0]):
            seen += 1
            if seen == event:
                os.kill(os.getpid(), signal.SIGKILL)

    try:
        sys.addaudithook(hook)
        trained(folder, work)
        os._exit(0)
    except BaseException:
        os._exit(1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a fork")
@pytest.mark.parametrize("every", [13, pytest.param(1, marks=pytest.mark.slow)])
def test_a_training_that_is_killed_at_any_moment_goes_on(folder: Path, tmp_path: Path, every: int) -> None:
    whole, _ = trained(folder, tmp_path / "whole")
    event, kills = every, 0
    while not killed(folder, tmp_path / f"parts{event}", event):
        kills += 1
        resumed, found = trained(folder, tmp_path / f"parts{event}")
        assert same(whole, resumed), event
        assert found.steps == 6
        left = {path.name for path in (tmp_path / f"parts{event}").iterdir()}
        # What a killed process had not renamed yet is removed by the next one that writes a folder there.
        assert {name for name in left if not name.startswith(".pard-")} <= {"checkpoint-6", "best.safetensors"}, event
        event += every
    assert kills >= 50 // every


def test_it_learns_and_the_best_weights_are_kept(folder: Path, tmp_path: Path) -> None:
    seen: list[Report] = []
    settings = replace(SETTINGS, steps=60, evaluate_every=20)
    start, outcome = trained(folder, tmp_path, settings, seen.append)
    assert outcome.mean_accepted > 2.5 and outcome.acceptance.by_position[0] > 0.9
    assert outcome.history[-1].loss < outcome.history[0].loss / 2
    assert [one.step for one in seen] == list(range(1, 61)) and seen[-1].seconds_left == 0
    assert all(len(one.loss_by_position) == 3 for one in seen)
    best = max(outcome.history, key=lambda point: point.acceptance.mean_accepted)
    assert outcome.best_step == best.step
    with with_packed_attention(start.model):
        again = measure(start.model, objective(settings, torch.device("cpu"), None), HELD_OUT, start.mask_id)
    assert again == best.acceptance
    assert start.model.config._attn_implementation == "sdpa"


def test_a_training_without_a_gain_stops_early(folder: Path, tmp_path: Path) -> None:
    settings = replace(SETTINGS, steps=40, rate=1e-9, evaluate_every=2, patience=3)
    _, outcome = trained(folder, tmp_path, settings)
    assert (outcome.steps, outcome.best_step, outcome.stopped_early) == (8, 2, True)


@pytest.mark.parametrize("where", ["last", "none"])
def test_a_loss_that_is_no_number_stops_and_names_the_sample(untied: Path, tmp_path: Path, where: str) -> None:
    start = start_from(untied)
    bad = Sample(np.array([5, 6, 250, 7, 8, 9]), np.ones(6, bool))
    with torch.no_grad():
        start.model.get_input_embeddings().weight[250] = torch.nan
    training = [*SAMPLES, bad]
    order = TrainingOrder(training, SETTINGS, start.mask_id, 2)
    step = next(s for s in range(99) if any(len(SAMPLES) in group for group in order.groups(s)))
    settings = replace(SETTINGS, steps=99, evaluate_every=99, save_every=1 if where == "last" else 99)
    good = f"the last good checkpoint is that of step {step} in" if where == "last" and step else "there is none"
    with pytest.raises(Failure, match=rf"step {step + 1}: .* from sample {len(SAMPLES)}; {good}"):
        adapt(start, training, HELD_OUT, settings, tmp_path, report=no_report)
    kept = [path.name for path in tmp_path.iterdir()]
    assert kept == ([f"checkpoint-{step}"] if where == "last" and step else [])


def test_another_training_is_not_continued(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        trained(folder, tmp_path, report=at_step(2))
    for changed in ({"rate": 2e-2}, {"seed": 5}, {"steps": 9}, {"draft_length": 4}):
        name, value = next(iter(changed.items()))
        with pytest.raises(BadInput, match=f"{name} is {getattr(SETTINGS, name)}, not {value}"):
            trained(folder, tmp_path, replace(SETTINGS, **changed))
    trained(folder, tmp_path, replace(SETTINGS, save_every=5, patience=9))


def test_a_frozen_embedding_trains_the_masks_row_alone(folder: Path, tmp_path: Path) -> None:
    before = start_from(folder).model.get_input_embeddings().weight.detach().clone()
    start, _ = trained(folder, tmp_path, replace(SETTINGS, freeze_embedding=True))
    after = start.model.get_input_embeddings().weight.detach()
    changed = (before != after).any(dim=1).nonzero().flatten().tolist()
    assert changed == [start.mask_id]
    assert "mask_row" not in dict(start.model.get_input_embeddings().named_parameters())
    assert start.model.get_input_embeddings().weight.requires_grad


def test_packing_changes_no_gradient(folder: Path, tmp_path: Path) -> None:
    """A step on packed sequences is one on each sample alone, whichever form attention has."""
    samples = [sample(seed, length) for seed, length in ((1, 12), (2, 9), (3, 15))]
    found = []
    for tokens, batch, form in ((40, 40, "chunks"), (40, 40, "dense"), (15, 45, "chunks")):
        settings = replace(
            SETTINGS, ratio=1.0, floor=1.0, steps=1, sequence_tokens=tokens, batch_tokens=batch, attention=form
        )
        start = start_from(folder)
        adapt(start, samples, HELD_OUT, settings, tmp_path / f"{tokens}{form}", report=no_report)
        found.append([one.detach() for one in start.model.parameters()])
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)


def test_recomputing_activations_changes_nothing(folder: Path, tmp_path: Path) -> None:
    one, _ = trained(folder, tmp_path / "kept")
    two, _ = trained(folder, tmp_path / "recomputed", replace(SETTINGS, recompute=True))
    for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("frozen", [False, True])
def test_pard2_learns_from_its_target(folder: Path, tmp_path: Path, frozen: bool) -> None:
    target = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    settings = replace(SETTINGS, method="pard2", freeze_embedding=frozen)
    with pytest.raises(Interrupted):
        trained(folder, tmp_path / "parts", settings, at_step(3), target=target)
    start, outcome = trained(folder, tmp_path / "parts", settings, target=target)
    whole, expected = trained(folder, tmp_path / "whole", settings, target=target)
    assert same(start, whole) and outcome.history == expected.history
    projection = load_file(outcome.projection)["target_proj.weight"]
    config = start.model.config
    assert projection.shape == (config.hidden_size, config.pard2_target_dim) and projection.abs().max() > 0
    assert config.pard2 and config.pard2_target_layers == [-1, -2]
    assert 1 <= outcome.acceptance.expected_accepted <= 4


def test_what_cannot_be_trained_is_refused(folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    with pytest.raises(BadInput, match="no sample to train on"):
        adapt(start_from(folder), [], HELD_OUT, SETTINGS, tmp_path / "work", report=no_report)
    with pytest.raises(BadInput, match="--target"):
        trained(folder, tmp_path / "work", replace(SETTINGS, method="pard2"))
    monkeypatch.setattr("pard_onnx.models.adapt.memory.available_memory", lambda device: 1 << 20)
    with pytest.raises(BadInput, match=r"not enough memory .* smaller draft"):
        trained(folder, tmp_path / "work")
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("held_out", [[], [Sample(np.arange(3), np.zeros(3, bool))]])
def test_a_training_without_held_out_replies_ends(folder: Path, tmp_path: Path, held_out: Any) -> None:
    outcome: Outcome = adapt(start_from(folder), SAMPLES, held_out, SETTINGS, tmp_path, report=no_report)
    assert outcome.steps == 6 and outcome.mean_accepted == 0


def test_every_sample_is_learned_once_an_epoch() -> None:
    settings = replace(SETTINGS, steps=None, epochs=2.0)
    order = TrainingOrder(SAMPLES, settings, 299, 1)
    groups = [order.groups(step)[0] for step in range(order.steps)]
    assert sorted(np.concatenate(groups).tolist()) == sorted([*range(len(SAMPLES))] * 2)
    lengths = np.array([len(one.ids) for one in SAMPLES])
    assert all(lengths[group].sum() <= settings.sequence_tokens for group in groups)
    assert sum(lengths) * 2 / len(groups) > 0.8 * settings.sequence_tokens
    again = TrainingOrder(SAMPLES, settings, 299, 1)
    assert again.groups(order.steps - 1)[0].tolist() == groups[-1].tolist()  # without the steps before it


def test_a_sample_that_is_too_long_has_a_sequence_of_its_own() -> None:
    assert [one.tolist() for one in filled(np.arange(3), np.array([5, 50, 4]), 10)] == [[0, 2], [1]]


PROCESSES = """
import sys
from dataclasses import replace
from pathlib import Path
sys.path[:0] = sys.argv[3:]
import torch
torch.set_num_threads(1)
from test_run import SETTINGS, trained
start, outcome = trained(Path(sys.argv[1]), Path(sys.argv[2]), replace(SETTINGS, batch_tokens=80))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="accelerate launch on CPUs")
def test_two_processes_learn_what_one_learns(folder: Path, tmp_path: Path) -> None:
    """Two processes take one sequence of a step each; one process takes both."""
    trained(folder, tmp_path / "whole")
    script = tmp_path / "script.py"
    script.write_text(PROCESSES)
    here = Path(__file__).parent
    paths = [str(here), str(here.parents[1] / "support")]
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ]
    command = [*launch, "--mixed_precision", "no", "--main_process_port", "0", "--dynamo_backend", "no"]
    subprocess.run([*command, str(script), str(folder), str(tmp_path / "two"), *paths], check=True, timeout=300)
    assert {path.name for path in (tmp_path / "two").iterdir()} == {"checkpoint-6", "best.safetensors"}
    one, two = (load_file(tmp_path / name / "best.safetensors") for name in ("whole", "two"))
    for name, weights in one.items():
        torch.testing.assert_close(two[name], weights, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.bin", "state.json"])
@pytest.mark.parametrize("content", [b"", b"half a file", None])
def test_a_damaged_checkpoint_is_refused(folder: Path, tmp_path: Path, file: str, content: bytes | None) -> None:
    with pytest.raises(Interrupted):
        trained(folder, tmp_path, report=at_step(2))
    path = tmp_path / "checkpoint-2" / file
    path.write_bytes(path.read_bytes()[:-40] if content is None else content)
    with pytest.raises(BadInput, match=r"checkpoint-2: is .* remove .* to begin anew"):
        trained(folder, tmp_path)
