"""The same settings in transformers give the same distributions."""

from typing import Any

import literal_sampling as literal
import numpy as np
import pytest

from pard_onnx.runtime.sampling.filters import candidates
from pard_onnx.runtime.sampling.penalties import Penalties
from pard_onnx.runtime.sampling.settings import Sampling

torch = pytest.importorskip("torch")
process = pytest.importorskip("transformers.generation.logits_process")
VOCABULARY = 200
TOKENS = [3, 5, 5, 199, 0]


def peer(sampling: Sampling, logits: torch.Tensor) -> list[float]:
    """Probabilities by transformers' processors, in the order of its `generate`."""
    chain = [process.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)]
    chain.append(process.TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        chain.append(process.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        chain.append(process.TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        chain.append(process.MinPLogitsWarper(sampling.min_p))
    scores = process.LogitsProcessorList(chain)(torch.tensor([TOKENS]), logits)
    out: list[float] = scores.softmax(-1)[0].tolist()
    return out


@pytest.mark.parametrize("repetition", [1.0, 1.3, 0.7])
@pytest.mark.parametrize(
    "settings",
    [{"temperature": 0.7}, {"temperature": 2.0, "top_k": 20}, {"temperature": 0.9, "top_p": 0.8},
     {"temperature": 1.1, "min_p": 0.1}, {"temperature": 1.5, "top_k": 90, "top_p": 0.9, "min_p": 0.05}],
    ids=str,
)  # fmt: skip
def test_transformers_agrees(settings: dict[str, Any], repetition: float) -> None:
    sampling = Sampling(**settings, repetition_penalty=repetition)
    for seed in range(10):
        logits = (np.random.default_rng(seed).normal(size=VOCABULARY) * 2).astype(np.float32)
        wanted = peer(sampling, torch.tensor(logits)[None])
        penalties = Penalties(sampling, VOCABULARY, 2)
        penalties.count_committed(TOKENS)
        penalized = penalties.apply(logits, np.empty_like(logits))
        found = candidates(penalized, sampling, np.empty_like(logits))
        ours = np.zeros(VOCABULARY)
        ours[slice(None) if found.ids is None else found.ids] = found.weights
        np.testing.assert_allclose(ours / ours.sum(), wanted, atol=1e-6)
        np.testing.assert_allclose(
            literal.probabilities(logits.tolist(), sampling, TOKENS[:2], TOKENS[2:]), wanted, atol=1e-6
        )
