"""The training loop: what an interruption leaves, and the schedule."""

import math
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from safetensors import SafetensorError, safe_open  # noqa: E402

from pard_onnx.models.adapt.training import Schedule, train  # noqa: E402 - it imports torch

SCHEDULE = Schedule(steps=6, rate=1e-2, warmup=2, save_every=3)


class Net(torch.nn.Module):
    """Parameters of every kind that the loop tells apart: an embedding, matrices, norms and biases."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(11, 8)
        self.hidden = torch.nn.Linear(8, 16)
        self.norm = torch.nn.LayerNorm(16)
        self.lm_head = torch.nn.Linear(16, 11, bias=False)

    def forward(self, ids):
        return self.lm_head(self.norm(torch.relu(self.hidden(self.embed(ids)))))


class Interrupted(Exception): ...


def batch(step):
    return torch.randint(11, (4, 9), generator=torch.Generator().manual_seed(step))


def loss(net, ids):
    assert net.training
    logits = net(ids[:, :-1])
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


def train_net(folder, schedule=SCHEDULE, stop_at=None, log=lambda _: None):
    """A fresh net, trained; the numbers of the steps whose batch was asked for."""
    net, asked = Net().eval(), []

    def counted(step):
        if step == stop_at:
            raise Interrupted
        asked.append(step)
        return batch(step)

    try:
        train(net, counted, loss, schedule, folder, log)
    except Interrupted:
        assert stop_at is not None
    return net, asked


def assert_equal(one, two):
    for (name, expected), actual in zip(one.named_parameters(), two.parameters(), strict=True):
        assert torch.equal(expected, actual), name


@pytest.mark.parametrize(
    ("stop_at", "again_from"),
    [pytest.param(3, 3, id="at a checkpoint"), pytest.param(5, 3, id="after one"), pytest.param(1, 0, id="before any")],
)
def test_an_interrupted_run_ends_as_one_in_one_go(tmp_path, stop_at, again_from):
    whole, asked = train_net(tmp_path / "whole")
    assert asked == [0, 1, 2, 3, 4, 5]

    _, asked = train_net(tmp_path / "parts", stop_at=stop_at)
    assert asked == list(range(stop_at))
    resumed, asked = train_net(tmp_path / "parts")
    assert asked == list(range(again_from, 6))
    assert_equal(whole, resumed)
    assert not resumed.training


def test_training_moves_every_parameter(tmp_path):
    before, (after, _) = Net(), train_net(tmp_path)
    for (name, was), now in zip(before.named_parameters(), after.parameters(), strict=True):
        assert not torch.equal(was, now), name


def test_a_finished_run_is_only_loaded(tmp_path):
    schedule = Schedule(steps=6, rate=1e-2, warmup=2, save_every=4)
    whole, _ = train_net(tmp_path, schedule)
    loaded, asked = train_net(tmp_path, schedule)
    assert asked == []
    assert_equal(whole, loaded)
    assert not loaded.training


def test_it_learns(tmp_path):
    net, _ = train_net(tmp_path, Schedule(steps=60, rate=3e-2, warmup=4, save_every=100))
    seen = batch(0)
    assert loss(net.train(), seen).item() < loss(Net(), seen).item() - 0.05


@pytest.mark.parametrize("warmup", [1, 20])
def test_the_rate_is_the_schedules(tmp_path, warmup):
    """Adam's first step moves a parameter by just the rate."""
    net, _ = train_net(tmp_path, Schedule(steps=1, rate=1e-2, warmup=warmup))
    moved = (net.norm.bias - Net().norm.bias).abs().max().item()
    assert moved == pytest.approx(1e-2 / warmup, rel=1e-3)


def test_a_checkpoint_cut_off_while_written_is_not_read(tmp_path):
    whole, _ = train_net(tmp_path / "whole")
    train_net(tmp_path / "parts", stop_at=4)
    (tmp_path / "parts" / "checkpoint.tmp").write_bytes(b"half a checkpoint")
    resumed, asked = train_net(tmp_path / "parts")
    assert asked == [3, 4, 5]
    assert_equal(whole, resumed)
    assert [path.name for path in (tmp_path / "parts").iterdir()] == ["checkpoint.safetensors"]


def test_checkpoints_are_safetensors_alone(tmp_path, monkeypatch):
    def forbidden(*_args, **_kwargs):
        raise AssertionError("a pickle was read or written")

    for module, names in ((torch, ("load", "save")), (pickle, ("load", "loads", "dump", "dumps", "Unpickler"))):
        for name in names:
            monkeypatch.setattr(module, name, forbidden)
    train_net(tmp_path, stop_at=4)
    with safe_open(tmp_path / "checkpoint.safetensors", "pt") as file:
        assert file.metadata() == {"step": "3"}
        assert {name.split(".")[0] for name in file.keys()} == {"model", "optimizer"}  # noqa: SIM118 - not a dict
    train_net(tmp_path)


def test_a_pickle_under_the_checkpoints_name_is_refused(tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    torch.save({"step": 3}, path)
    with pytest.raises(SafetensorError):
        train_net(tmp_path)


def test_every_tenth_step_is_told(tmp_path):
    lines = []
    train_net(tmp_path, Schedule(steps=20, rate=1e-3), log=lines.append)
    assert [line.split("  ")[0] for line in lines] == ["step 10/20", "step 20/20"]


SCHEDULES = st.builds(
    Schedule,
    steps=st.integers(1, 300),
    rate=st.just(1.0),
    warmup=st.integers(0, 100),
    decay=st.floats(0.0, 1.0),
)


@settings(deadline=None)
@given(SCHEDULES)
def test_the_rate_rises_stays_and_falls(schedule):
    factors = [schedule.factor(step) for step in range(schedule.steps)]
    assert all(0.0 < factor <= 1.0 for factor in factors)
    top = factors.index(max(factors))
    assert factors[: top + 1] == sorted(factors[: top + 1])
    assert factors[top:] == sorted(factors[top:], reverse=True)
    assert schedule.factor(schedule.steps) == 0.0

    falling = math.ceil(schedule.steps * schedule.decay)
    plateau = range(max(0, schedule.warmup - 1), schedule.steps - falling + 1)
    assert all(factors[step] == 1.0 for step in plateau if step < schedule.steps)
    for step in range(min(schedule.warmup, schedule.steps - falling)):
        assert factors[step] == (step + 1) / schedule.warmup
    for step in range(max(schedule.warmup, schedule.steps - falling), schedule.steps):
        assert factors[step] == (schedule.steps - step) / falling


def test_the_documented_schedule():
    schedule = Schedule(steps=100, rate=1.0, warmup=10, decay=0.4)
    assert [schedule.factor(step) for step in (0, 4, 9, 30, 60, 80, 99)] == [0.1, 0.5, 1.0, 1.0, 1.0, 0.5, 0.025]
