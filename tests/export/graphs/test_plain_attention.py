"""Portable graphs under random schedules of steps, rollbacks and ragged batches, beside torch without a cache."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

Exported = Callable[..., tuple[Path, Path]]
Logits = NDArray[np.float32]
ROWS, SIZE, LAYERS = 64, 300, 2
# (rolled back, new tokens) of each row of the batch, step by step
SCHEDULES = st.integers(1, 3).flatmap(
    lambda batch: st.lists(
        st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=batch, max_size=batch),
        min_size=1,
        max_size=6,
    )
)


@dataclass
class Batch:
    """The graph driven by the contract of docs/architecture.md: a batch whose rows stand at different places."""

    session: ort.InferenceSession
    starts: list[int]  # the KV row of each sequence's first token; rows before it hold nonsense
    tokens: list[list[int]] = field(init=False)
    caches: dict[str, NDArray[np.float32]] = field(init=False)

    def __post_init__(self) -> None:
        batch, random = len(self.starts), np.random.default_rng(0)
        self.tokens = [[] for _ in self.starts]
        names = [f"past_key_values.{i}.{part}" for i in range(LAYERS) for part in ("key", "value")]
        self.caches = {n: random.normal(size=(batch, 2, ROWS, 16)).astype(np.float32) for n in names}

    def step(self, new: list[list[int]]) -> list[Logits]:
        """Append to each sequence; logits of its new tokens. Shorter rows are padded, before or behind."""
        width = max(map(len, new))
        ids = np.zeros((len(new), width), np.int64)
        positions = np.zeros_like(ids)
        ends = [start + len(old) + len(more) for start, old, more in zip(self.starts, self.tokens, new, strict=True)]
        keys = max(ends) + width
        mask = np.ones((len(new), keys), np.int64)
        for row, more in enumerate(new):
            padding = width - len(more)
            before = padding if row % 2 else 0
            ids[row, before : before + len(more)] = more
            own = np.arange(ends[row] - len(more), ends[row])
            behind = np.arange(ends[row], ends[row] + padding)
            positions[row] = np.concatenate([behind[:before], own, behind[before:]])
            mask[row, : self.starts[row]] = 0
        feeds = {"input_ids": ids, "position_ids": positions, "attention_mask": mask} | self.caches
        presents = [name.replace("past_key_values", "present") for name in self.caches]
        logits, *caches = self.session.run(["logits", *presents], feeds)
        self.caches = dict(zip(self.caches, caches, strict=True))
        for old, more in zip(self.tokens, new, strict=True):
            old += more
        firsts = [width - len(more) if row % 2 else 0 for row, more in enumerate(new)]
        return [
            logits[row, first : first + len(more)] for row, (first, more) in enumerate(zip(firsts, new, strict=True))
        ]


@pytest.fixture(scope="module")
def model(exported: Exported) -> tuple[ort.InferenceSession, torch.nn.Module]:
    checkpoint, artifact = exported("qwen2", "target", "fp32", device="cpu", attention="portable")
    session = ort.InferenceSession(artifact / "model.onnx", providers=["CPUExecutionProvider"])
    return session, AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()


def literal(network: torch.nn.Module, tokens: list[int]) -> Logits:
    with torch.inference_mode():
        logits: Logits = network(input_ids=torch.tensor([tokens])).logits[0, :, :SIZE].numpy()
    return logits


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    phases=(Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink),
)
@given(schedule=SCHEDULES, data=st.data())
def test_every_schedule_gives_the_literal_logits(
    model: tuple[ort.InferenceSession, torch.nn.Module], schedule: list[list[tuple[int, int]]], data: st.DataObject
) -> None:
    session, network = model
    batch = Batch(session, data.draw(st.lists(st.integers(0, 5), min_size=len(schedule[0]), max_size=len(schedule[0]))))
    random = np.random.default_rng(data.draw(st.integers(0, 9)))
    for step in schedule:
        for tokens, (back, _) in zip(batch.tokens, step, strict=True):
            del tokens[max(0, len(tokens) - back) :]
        new = [random.integers(0, SIZE, count).tolist() for _, count in step]
        if not any(new):
            continue
        for found, tokens, more in zip(batch.step(new), batch.tokens, new, strict=True):
            if more:
                np.testing.assert_allclose(found[:, :SIZE], literal(network, tokens)[-len(more) :], atol=2e-4)


def test_single_tokens_and_one_step_agree(model: tuple[ort.InferenceSession, torch.nn.Module]) -> None:
    session, _ = model
    ids = list(range(7, 27))
    whole = Batch(session, [0]).step([ids])[0]
    one_by_one = Batch(session, [0])
    np.testing.assert_allclose(
        np.concatenate([one_by_one.step([[i]])[0] for i in ids])[:, :SIZE], whole[:, :SIZE], atol=1e-5
    )


def test_the_cache_is_updated_in_place(model: tuple[ort.InferenceSession, torch.nn.Module]) -> None:
    """Past and present bound to one buffer: the rows that are written, and no others, change."""
    session, _ = model
    expected = Batch(session, [0])
    before = {name: cache.copy() for name, cache in expected.caches.items()}
    logits = expected.step([[5, 6, 7]])[0]
    binding = session.io_binding()
    inputs = {
        "input_ids": np.array([[5, 6, 7]]),
        "position_ids": np.array([[0, 1, 2]]),
        "attention_mask": np.ones((1, 6), np.int64),
    }
    for name, array in inputs.items():
        binding.bind_cpu_input(name, array)
    for name, cache in before.items():
        value = ort.OrtValue.ortvalue_from_numpy(cache)
        binding.bind_ortvalue_input(name, value)
        binding.bind_ortvalue_output(name.replace("past_key_values", "present"), value)
    binding.bind_output("logits")
    session.run_with_iobinding(binding)
    np.testing.assert_array_equal(binding.get_outputs()[-1].numpy()[0], logits)
    for name, cache in before.items():
        np.testing.assert_array_equal(cache, expected.caches[name])
