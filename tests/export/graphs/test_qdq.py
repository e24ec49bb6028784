"""Static recipes: what is rounded and what is not, ranges and integers as onnxruntime.quantization makes them, and the
same rows from every graph of a model."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantType
from onnxruntime.quantization.calibrate import MinMaxCalibrater, TensorData, TensorsData
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

import pard_onnx
from pard_onnx.export.exporter import Job, export
from pard_onnx.export.verify.drive import drive
from pard_onnx.models.checkpoints.checkpoint import Checkpoint
from pard_onnx.models.checkpoints.tensors import read_tensor
from pard_onnx.models.devices import DEVICES, Form, form_for
from pard_onnx.models.errors import BadInput
from pard_onnx.models.manifest import DATA, GRAPH, VITISAI_CONFIG, Manifest, Source
from pard_onnx.models.spec import ModelSpec
from pard_onnx.quantize.calibration.ranges import ActivationRanges, measure_ranges
from pard_onnx.quantize.calibration.text import CalibrationRow, calibration_rows, read_text_file
from pard_onnx.quantize.quantizer import QuantizationRequest
from pard_onnx.quantize.recipes import named_recipe

Tiny = Callable[..., Path]
TEXT = "def the quick brown fox: return self\nlazy dogs import for value in range " * 40
PLAIN = form_for(DEVICES["cpu"], attention="portable")
NPU = form_for(DEVICES["npu"], draft_length=4)
FORMS = {"dynamic": PLAIN, "npu": NPU}
# What is exported: recipe, form, family, role, and whether the head is tied to the embedding.
A8 = ("int8-a8w8", "dynamic", "qwen2", "target", False)
A8_DRAFT = ("int8-a8w8", "dynamic", "qwen2", "draft", False)
A8_NPU = ("int8-a8w8", "npu", "qwen2", "target", False)
A8_NPU_DRAFT = ("int8-a8w8", "npu", "qwen2", "draft", False)
A16 = ("int8-a16w8", "dynamic", "llama", "target", True)
A16_NPU_DRAFT = ("int8-a16w8", "npu", "qwen3", "draft", False)
ALL = (A8, A8_DRAFT, A8_NPU, A8_NPU_DRAFT, A16, A16_NPU_DRAFT)


@dataclass(frozen=True)
class Made:
    checkpoint: Checkpoint
    folder: Path
    text: Path

    @property
    def manifest(self) -> Manifest:
        return Manifest.read(self.folder)

    @property
    def graphs(self) -> dict[str, onnx.GraphProto]:
        paths = sorted(self.folder.glob("*.onnx"))
        return {path.name: onnx.load(path, load_external_data=False).graph for path in paths}

    @property
    def rows(self) -> list[CalibrationRow]:
        tokenizer = Tokenizer.from_file(str(self.checkpoint.folder / "tokenizer.json"))
        return calibration_rows(read_text_file(self.text), tokenizer, self.checkpoint.spec)


Make = Callable[..., Made]
Which = tuple[str, str, str, str, bool]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny: Tiny) -> Make:
    """made(*one of ALL): exported once."""
    done: dict[tuple[object, ...], Made] = {}

    def make(recipe: str, kind: str, family: str, role: str, tied: bool) -> Made:
        key = (recipe, kind, family, role, tied)
        if key not in done:
            root = tmp_path_factory.mktemp("static")
            (root / "text.txt").write_text(TEXT)
            checkpoint = Checkpoint.open(tiny(root / "model", family, role, tied=tied))
            named, out = named_recipe(recipe), root / "out"
            order = QuantizationRequest(named, root / "text.txt")
            export(Job(checkpoint, Source("tiny"), out, named.precision, order=order, form=FORMS[kind], capacity=128))
            done[key] = Made(checkpoint, root / "out", root / "text.txt")
        return done[key]

    return make


@pytest.mark.parametrize("which", ALL, ids=lambda which: "-".join(which[:4]))
def test_logits_are_near_torchs(made: Make, which: Which) -> None:
    """Those after a rollback among them. These models' logits have a spread of about 1."""
    manifest, recipe = made(*which).manifest, which[0]
    parity, most = manifest.parity, {"int8-a8w8": 0.15, "int8-a16w8": 0.04}[recipe]
    assert parity is not None
    assert 0 < parity.mean_error < most and parity.rollback_error < 8 * most
    told = manifest.quantization
    assert told is not None and told.recipe == recipe == manifest.precision and told.calibration is not None
    assert {tensor.format for tensor in manifest.tensors} == {recipe}


def producers(graph: onnx.GraphProto) -> dict[str, onnx.NodeProto]:
    return {output: node for node in graph.node for output in node.output}


def products(graph: onnx.GraphProto) -> Iterator[tuple[str, onnx.NodeProto]]:
    """The MatMuls that read a stored matrix, by its name."""
    made_by = producers(graph)
    stored = {tensor.name for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "MatMul":
            source = node.input[1]
            while source in made_by and made_by[source].op_type in ("Transpose", "DequantizeLinear"):
                source = made_by[source].input[0]
            if source in stored and source.endswith(".weight"):
                yield source.removesuffix(".weight"), node


@pytest.mark.parametrize("which", (A8_NPU_DRAFT, A16), ids=("npu", "tied"))
def test_all_products_of_weights_are_rounded_and_nothing_else(made: Make, which: Which) -> None:
    artifact, recipe = made(*which), which[0]
    domain = "com.microsoft" if recipe == "int8-a16w8" and artifact.manifest.opset < 21 else ""
    for name, graph in artifact.graphs.items():
        made_by, found = producers(graph), dict(products(graph))
        whole = "prefill" not in name  # whose last layer gives keys and values, and no more
        assert len(found) == (15 if whole else 9)
        for matrix, node in found.items():
            weight = made_by[node.input[1]]
            weight = made_by[weight.input[0]] if weight.op_type == "Transpose" else weight
            read = made_by[node.input[0]]
            assert weight.op_type == read.op_type == "DequantizeLinear"
            assert made_by[read.input[0]].op_type == "QuantizeLinear"
            given = [n.op_type for n in graph.node if node.output[0] in n.input]
            assert given == (["Add"] if "lm_head" in matrix or "embed" in matrix else ["QuantizeLinear"])
        pairs = [n for n in graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
        # Two for each of four inputs and seven products a layer, and for the head's input; one for a matrix.
        assert len(pairs) == (2 * (2 * 11 + 1) + 15 if whole else 2 * (11 + 3) + 9)
        assert {n.domain for n in pairs} == {domain}
        floats = [t for t in graph.initializer if t.data_type == onnx.TensorProto.FLOAT and len(t.dims) > 1]
        assert all("rotary" in t.name or t.dims[-1] == 1 or "plain" in t.name for t in floats)
        caches = [value for value in (*graph.input, *graph.output) if "key" in value.name or "value" in value.name]
        assert caches and all(v.type.tensor_type.elem_type == onnx.TensorProto.FLOAT for v in caches)
        onnx.checker.check_model(artifact.folder / name, full_check=True)


def test_what_the_npu_is_given(made: Make) -> None:
    """Signed bytes, as Ryzen AI documents them, its operators alone, and no file for the compiler of bfloat16."""
    artifact = made(*A8_NPU_DRAFT)
    assert not (artifact.folder / VITISAI_CONFIG).exists()
    for graph in artifact.graphs.values():
        used = {f"{n.domain}.{n.op_type}".lstrip(".") for n in graph.node}
        assert "QuantizeLinear" in used and used <= DEVICES["npu"].operators
        zeros = {t.data_type for t in graph.initializer if t.name.startswith("zero.")}
        assert zeros == {onnx.TensorProto.INT8}
        for tensor in graph.initializer:
            assert all(entry.value == DATA for entry in tensor.external_data if entry.key == "location")
    sizes = sum(t.bytes for t in artifact.manifest.tensors)
    tables = 2 * artifact.manifest.kv_rows * artifact.manifest.spec.head_dim * 4
    stored = (artifact.folder / DATA).stat().st_size
    assert stored < sizes + tables + 4096 * (2 * len(artifact.manifest.tensors) + 2)  # once for all widths


class Reader(CalibrationDataReader):
    def __init__(self, feeds: list[dict[str, Any]]) -> None:
        self._feeds = iter(feeds)

    def get_next(self) -> dict[str, Any] | None:
        return next(self._feeds, None)


def feeds(graph: onnx.GraphProto, spec: ModelSpec, ids: NDArray[np.int64], rows: int) -> dict[str, Any]:
    """Of a step from an empty cache of so many rows, as far as the graph has these inputs."""
    cache = np.zeros((1, spec.kv_heads, rows, spec.head_dim), np.float32)
    found = {f"past_key_values.{i}.{part}": cache for i in range(spec.layers) for part in ("key", "value")}
    found |= {"input_ids": ids[None], "position_ids": np.arange(len(ids))[None], "logits_to_keep": np.array([0])}
    found["attention_mask"] = np.ones((1, rows), np.int64)
    return {value.name: found[value.name] for value in graph.input}


def test_ranges_are_what_onnxruntimes_calibrater_finds(exported: Callable[..., tuple[Path, Path]], made: Make) -> None:
    """In the whole float graph: the layer-wise pass in torch sees the same numbers, biases not yet added."""
    folder, artifact = exported("qwen2", "target", "fp32", device="cpu", attention="portable")
    checkpoint = Checkpoint.open(folder)
    rows = [replace(row, ids=row.ids[:100], positions=row.positions[:100]) for row in made(*A8).rows]
    found = measure_ranges(checkpoint, rows, lambda _: None)
    graph = onnx.load(artifact / GRAPH, load_external_data=False).graph
    calibrater = MinMaxCalibrater(artifact / GRAPH, augmented_model_path=made(*A8).text.with_suffix(".onnx"))
    calibrater.augment_graph()
    calibrater.create_inference_session()
    calibrater.collect_data(Reader([feeds(graph, checkpoint.spec, row.ids, 100) for row in rows]))
    theirs = calibrater.compute_data()
    checked = 0
    for name, node in products(graph):
        names = [found.outputs.get(n) for n in _all_of(name)]
        _same(found.inputs[_all_of(name)[0]].largest, theirs[node.input[0]])
        if "lm_head" not in name:
            _same(max(m.largest for m in names if m), theirs[node.output[0]])
        checked += 1
    assert checked == 2 * 5 + 1


def _all_of(name: str) -> list[str]:
    """Matrices of one product: q, k and v are one in float graphs."""
    first, *rest = name.split("+")
    return [first, *(f"{first.rsplit('.', 1)[0]}.{part}" for part in rest)]


def _same(largest: np.float32, theirs: TensorData) -> None:
    lowest, highest = theirs.range_value
    np.testing.assert_allclose(largest, max(-lowest, highest), rtol=1e-4)


@pytest.mark.parametrize("which", (A8_NPU, A16_NPU_DRAFT, A16), ids=("a8", "a16", "tied"))
def test_the_graph_is_onnxruntimes_own(made: Make, which: Which) -> None:
    """Taken back to floats and quantized by QDQQuantizer with the same ranges it gives the same logits, bit for bit."""
    artifact, bits = made(*which), named_recipe(which[0]).format.activations
    known = measure_ranges(artifact.checkpoint, artifact.rows, lambda _: None)
    static = next((graph for graph in artifact.manifest.graphs if graph.width > 1), None)
    path = artifact.folder / (static.file if static else GRAPH)
    model = onnx.load(path)
    ids = artifact.rows[0].ids[: static.width if static else 60]
    given = feeds(model.graph, artifact.checkpoint.spec, ids, artifact.manifest.kv_rows)
    theirs = _quantized(model, _to_floats(model.graph, artifact.checkpoint), known, bits)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    ours, expected = (
        ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"]).run(["logits"], given)[0]
        for graph in (path, theirs.SerializeToString())
    )
    np.testing.assert_array_equal(ours, expected)


def _to_floats(graph: onnx.GraphProto, checkpoint: Checkpoint) -> dict[str, onnx.NodeProto]:
    """Without Q and DQ around the layers' products, whose weights are the checkpoint's; those, by matrix."""
    made_by, found = producers(graph), {n: node for n, node in products(graph) if "layers" in n}
    gone: list[onnx.NodeProto] = []
    for name, node in found.items():
        weight, read = made_by[node.input[1]], made_by[node.input[0]]
        array = read_tensor(checkpoint.tensors[f"{name}.weight"], None).T.copy()
        graph.initializer.append(numpy_helper.from_array(array, f"{name}.float"))
        node.input[0], node.input[1] = made_by[read.input[0]].input[0], f"{name}.float"
        (rounded,) = [n for n in graph.node if node.output[0] in n.input]
        (back,) = [n for n in graph.node if rounded.output[0] in n.input]
        for reader in graph.node:
            reader.input[:] = [node.output[0] if i == back.output[0] else i for i in reader.input]
        gone += [weight, rounded, back]
    for node in gone:
        graph.node.remove(node)
    read_by = {i for node in graph.node for i in node.input} | {o.name for o in graph.output}
    for unread in ("DequantizeLinear", "QuantizeLinear"):
        for node in [n for n in graph.node if n.op_type == unread and n.output[0] not in read_by]:
            graph.node.remove(node)
        read_by = {i for node in graph.node for i in node.input} | {o.name for o in graph.output}
    return found


def _quantized(
    model: onnx.ModelProto, names: dict[str, onnx.NodeProto], known: ActivationRanges, bits: int
) -> onnx.ModelProto:
    limits = {node.input[0]: known.inputs[name].clip(bits) for name, node in names.items()}
    limits |= {node.output[0]: known.outputs[name].clip(bits) for name, node in names.items()}
    quantizer = QDQQuantizer(
        onnx.shape_inference.infer_shapes(model),
        per_channel=True,
        reduce_range=False,
        weight_qType=QuantType.QInt8,
        activation_qType=QuantType.QInt8 if bits == 8 else QuantType.QInt16,
        tensors_range=TensorsData(CalibrationMethod.MinMax, {n: (-t, t) for n, t in limits.items()}),
        nodes_to_quantize=[node.name for node in names.values()],
        nodes_to_exclude=[],
        op_types_to_quantize=["MatMul"],
        extra_options={"ActivationSymmetric": True, "WeightSymmetric": True},
    )
    return quantizer.quantize_model()


@pytest.mark.parametrize("pair", ((A8, A8_NPU), (A8_DRAFT, A8_NPU_DRAFT)), ids=("target", "draft"))
def test_fixed_shapes_give_the_rows_of_the_dynamic_graph(made: Make, pair: tuple[Which, Which]) -> None:
    """Unsigned bytes there, signed here. Ids that the tokenizer lacks stay impossible."""
    found, ids = [], made(*pair[0]).rows[0].ids
    for artifact in (made(*which) for which in pair):
        graph, drafts = drive(artifact.folder, artifact.manifest), 4 if artifact.manifest.role == "draft" else 1
        steps = (ids[:30], ids[30:33], ids[33:34])
        found.append(np.concatenate([graph.step(step, drafts)[-drafts:] for step in steps]))
        size = artifact.manifest.spec.vocabulary.size
        assert np.isneginf(found[-1][:, size:]).all() and np.isfinite(found[-1][:, :size]).all()
    np.testing.assert_allclose(found[1][:, :size], found[0][:, :size], atol=2e-3)


@pytest.mark.parametrize("pair", ((A8, A8_DRAFT), (A8_NPU, A8_NPU_DRAFT)), ids=("dynamic", "npu"))
def test_drafting_changes_no_token(made: Make, pair: tuple[Which, Which]) -> None:
    target, draft = (made(*which).folder for which in pair)
    prompt = list(range(40, 60))
    with pard_onnx.load(target=str(target), draft=str(draft), threads=1) as pair:
        plain = pair.generate(prompt, max_new_tokens=24, draft_length=0)
        drafted = pair.generate(prompt, max_new_tokens=24, draft_length=3)
    assert plain.tokens == drafted.tokens and len(plain.tokens) == 24


def test_a_form_without_the_operators_is_refused() -> None:
    with pytest.raises(BadInput, match="--attention portable"):
        _job(Form())
    with pytest.raises(BadInput, match="int8-a8w8 on webgpu: it has no kernels for it; use fp32, fp16, int8, int4"):
        _job(form_for(DEVICES["webgpu"]))
    with pytest.raises(BadInput, match="int8-a8w8 beside activations in float16"):
        _job(form_for(DEVICES["npu"], floats="float16"))
    with pytest.raises(BadInput, match="its scales come from text; use pard-quantize --recipe int8-a8w8"):
        _job(NPU, ordered=False)


def _job(wanted: Form, *, ordered: bool = True) -> None:
    from pard_onnx.models.demo import TARGET

    order = QuantizationRequest(named_recipe("int8-a8w8")) if ordered else None
    Job(Checkpoint.open(TARGET), Source("demo"), Path("out"), "int8-a8w8", order=order, form=wanted).resolved_recipe()


def test_numbers_beyond_floats_are_refused(tmp_path: Path, tiny: Tiny) -> None:
    folder = tiny(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][:] = 3e38
    save_file(weights, folder / "model.safetensors")
    row = CalibrationRow(np.arange(8), np.arange(8))
    with pytest.raises(BadInput, match=r"layers\.1\.mlp\.down_proj: .* is not finite over this text"):
        measure_ranges(Checkpoint.open(folder), [row], lambda _: None)
