"""What quantization may cost the shipped target: perplexity on held-out text, beside plain rounding's."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from tokenizers import Tokenizer

from pard_onnx.export.exporter import Job, export
from pard_onnx.models.checkpoints.checkpoint import Checkpoint
from pard_onnx.models.demo import TARGET, corpus
from pard_onnx.models.manifest import Manifest, Source
from pard_onnx.quantize.quantizer import QuantizationRequest
from pard_onnx.quantize.recipes import named_recipe

LENGTH, WINDOWS = 512, 6
SEEN = 24  # windows in front, on which the recipes' constants were chosen


@pytest.fixture(scope="module")
def held_out() -> np.ndarray:
    """Windows [n, LENGTH] of modules that neither training nor calibration saw, and nothing was chosen by."""
    tokenizer = Tokenizer.from_file(str(TARGET / "tokenizer.json"))
    documents = [text for module in corpus.modules() if module.held_out for text in corpus.documents(module)]
    np.random.default_rng(1).shuffle(documents)
    ids: list[int] = []
    for document in documents:
        ids += tokenizer.encode(document).ids
        if len(ids) >= LENGTH * (SEEN + WINDOWS):
            break
    return np.array(ids[LENGTH * SEEN : LENGTH * (SEEN + WINDOWS)]).reshape(WINDOWS, LENGTH)


@pytest.fixture(scope="module")
def perplexity(tmp_path_factory: pytest.TempPathFactory, held_out: np.ndarray) -> Callable[[str | None], float]:
    """perplexity(recipe); None: the checkpoint in fp32."""
    found: dict[str | None, float] = {}

    def measure(name: str | None) -> float:
        if name not in found:
            folder = tmp_path_factory.mktemp("gate") / "out"
            order = QuantizationRequest(named_recipe(name)) if name else None
            job = Job(Checkpoint.open(TARGET), Source("demo-target"), folder, "fp32", order=order, verify=False)
            export(job)
            found[name] = _perplexity(folder, held_out)
        return found[name]

    return measure


def _perplexity(folder: Path, windows: np.ndarray) -> float:
    spec = Manifest.read(folder).spec
    session = ort.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    cache = np.zeros((1, spec.kv_heads, LENGTH, spec.head_dim), np.float32)
    past = {f"past_key_values.{i}.{part}": cache for i in range(spec.layers) for part in ("key", "value")}
    losses = []
    for ids in windows:
        feeds = {"input_ids": ids[None], "attention_mask": np.ones((1, LENGTH), np.int64), **past}
        logits = session.run(["logits"], feeds)[0][0, :-1, : spec.vocabulary.size]
        exponents = np.exp(logits - logits.max(axis=-1, keepdims=True))
        chosen = np.take_along_axis(exponents, ids[1:, None], axis=-1)[:, 0]
        losses.append(-np.log(chosen / exponents.sum(axis=-1)).mean())
    return float(np.exp(np.mean(losses)))


@pytest.mark.parametrize(
    ("recipe", "most"),
    (("int8-rtn", 0.005), ("int4-gptq", 0.03), pytest.param("int4-mixed", 0.015, marks=pytest.mark.slow)),
)
def test_recipes_keep_the_held_out_perplexity(
    perplexity: Callable[[str | None], float], recipe: str, most: float
) -> None:
    assert perplexity(recipe) / perplexity(None) - 1 < most


@pytest.mark.slow
def test_plain_rounding_loses_more(perplexity: Callable[[str | None], float]) -> None:
    """The reason for everything else: on this text it stays outside of the gate."""
    assert perplexity("int4-rtn") / perplexity(None) - 1 > 0.03
    assert perplexity("int4-gptq") < perplexity("int4-rtn")
