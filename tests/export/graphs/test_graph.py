"""The exported graphs: operators per layer, names, sharing, and what their outputs promise."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from pard_onnx.models.manifest import Manifest

Exported = Callable[..., tuple[Path, Path]]
FEW, MANY = 2, 4  # layers


def optimized(artifact: Path, scratch: Path) -> Counter[str]:
    """Operators after ONNX Runtime's own optimization."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(scratch / "optimized.onnx")
    ort.InferenceSession(artifact / "model.onnx", options, providers=["CPUExecutionProvider"])
    graph = onnx.load(scratch / "optimized.onnx", load_external_data=False).graph
    return Counter(node.op_type for node in graph.node)


@pytest.mark.parametrize("precision", ("fp32", "int8", "int4"))
@pytest.mark.parametrize("role", ("target", "draft"))
@pytest.mark.parametrize("family", ("llama", "qwen2"))
def test_a_layer_has_at_most_twelve_operators(
    exported: Exported, tmp_path: Path, family: str, role: str, precision: str
) -> None:
    counts = [optimized(exported(family, role, precision, layers=n)[1], tmp_path) for n in (FEW, MANY)]
    layer = (counts[1] - counts[0]).total() / (MANY - FEW)
    assert layer <= 12
    assert not {"Reshape", "Transpose"} & (counts[1] - counts[0]).keys()
    assert counts[1]["GroupQueryAttention"] == MANY


def test_qwen3_norms_its_heads_outside_attention(exported: Exported, tmp_path: Path) -> None:
    few, many = (optimized(exported("qwen3", "target", "int4", layers=n)[1], tmp_path) for n in (FEW, MANY))
    layer = many - few
    assert layer["GroupQueryAttention"] == MANY - FEW
    assert layer["SimplifiedLayerNormalization"] == 2 * (MANY - FEW)  # of queries and keys
    assert layer["MatMulNBits"] == 5 * (MANY - FEW)  # q/k/v in one, o, gate, up, down
    assert not layer["Transpose"]


def test_opset_and_ir_load_everywhere(exported: Exported) -> None:
    model = onnx.load(exported("qwen2", "target", "int4")[1] / "model.onnx", load_external_data=False)
    assert {o.domain: o.version for o in model.opset_import} == {"": 21, "com.microsoft": 1}
    assert model.ir_version == 10
    assert not [p for node in model.graph.node for p in node.metadata_props]


@pytest.mark.parametrize("precision", ("int4", "int8", "fp32"))
def test_tied_embeddings_are_stored_once(exported: Exported, precision: str) -> None:
    sizes = {
        tied: (exported("qwen2", "target", precision, tied=tied, vocab_rows=4096)[1] / "model.onnx.data").stat().st_size
        for tied in (True, False)
    }
    bytes_per_weight = {"int4": 0.5, "int8": 1, "fp32": 4}[precision]
    assert sizes[False] - sizes[True] >= 4096 * 64 * bytes_per_weight


def feeds(artifact: Path, ids: list[int]) -> dict[str, np.ndarray]:
    spec = Manifest.read(artifact).spec
    cache = np.zeros((1, spec.kv_heads, 64, spec.head_dim), np.float32)
    names = [f"past_key_values.{i}.{part}" for i in range(spec.layers) for part in ("key", "value")]
    return {
        "input_ids": np.array([ids], np.int64),
        "attention_mask": np.ones((1, len(ids)), np.int64),
        **dict.fromkeys(names, cache),
    }


def session(artifact: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(artifact / "model.onnx", options, providers=["CPUExecutionProvider"])


def test_logits_to_keep_is_optional_and_cuts_rows(exported: Exported) -> None:
    artifact = exported("qwen2", "target", "fp32")[1]
    run = session(artifact)
    given = feeds(artifact, [5, 6, 7, 8])
    assert "logits_to_keep" not in {i.name for i in run.get_inputs()}
    whole = run.run(["logits"], given)[0]
    assert whole.shape == (1, 4, 320)
    for keep in (1, 3, 4):
        kept = run.run(["logits"], given | {"logits_to_keep": np.array([keep])})[0]
        np.testing.assert_array_equal(kept, whole[:, -keep:])


@pytest.mark.parametrize("precision", ("fp32", "fp16", "int8", "int4"))
@pytest.mark.parametrize("role", ("target", "draft"))
def test_padding_ids_are_impossible(exported: Exported, role: str, precision: str) -> None:
    artifact = exported("qwen2", role, precision)[1]
    given = feeds(artifact, [5, 6, 7])
    if precision == "fp16":
        given = {k: v.astype(np.float16) if v.dtype == np.float32 else v for k, v in given.items()}
    if role == "draft":
        given["draft_length"] = np.array([3])
    logits = session(artifact).run(["logits"], given)[0]
    assert logits.dtype == np.float32
    assert np.isneginf(logits[..., 300:]).all()
    assert np.isfinite(logits[..., :300]).all()


def test_draft_proposes_the_argmax_and_its_probability(exported: Exported) -> None:
    artifact = exported("qwen3", "draft", "fp32")[1]
    run, given = session(artifact), feeds(artifact, [5, 6, 7])
    for length in (1, 2, 8):
        ids, probabilities, logits = run.run(
            ["draft_ids", "draft_probabilities", "logits"], given | {"draft_length": np.array([length])}
        )
        assert ids.shape == probabilities.shape == (1, length)
        np.testing.assert_array_equal(ids, logits.argmax(-1))
        exponents = np.exp(logits - logits.max(-1, keepdims=True))
        np.testing.assert_allclose(probabilities, 1 / exponents.sum(-1), rtol=1e-5)


def test_mask_rows_do_not_reach_the_real_ones(exported: Exported) -> None:
    """The first draft is the autoregressive one, whatever the draft length is."""
    artifact = exported("qwen2", "draft", "fp32")[1]
    run, given = session(artifact), feeds(artifact, [5, 6, 7])
    first = [run.run(["logits"], given | {"draft_length": np.array([k])})[0][0, 0] for k in (1, 4, 8)]
    np.testing.assert_allclose(first[1], first[0], atol=1e-5)
    np.testing.assert_allclose(first[2], first[0], atol=1e-5)
