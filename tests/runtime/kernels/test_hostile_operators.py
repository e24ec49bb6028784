"""What a stranger's graph and data file may ask of the operators: an error of ONNX Runtime, whatever they say."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import literal_attention
import literal_matmul as literal
import numpy as np
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from one_node import attention_feeds, attention_model, matmul_model, of_one_node, session
from onnx import ModelProto, TensorProto, helper

from pard_onnx.runtime import kernels

pytestmark = pytest.mark.skipif(kernels.load() is None, reason="the kernels are not built")
ERRORS = (
    ort.capi.onnxruntime_pybind11_state.Fail,
    ort.capi.onnxruntime_pybind11_state.RuntimeException,
    ort.capi.onnxruntime_pybind11_state.InvalidArgument,
    ort.capi.onnxruntime_pybind11_state.EPFail,
)
N, K, BLOCK = 32, 256, 32
AHEAD = 1024  # bytes of zeros in front of the weights
HUGE = 2**62
A = helper.make_tensor_value_info("A", TensorProto.FLOAT, [1, "rows", None])
Y = helper.make_tensor_value_info("Y", TensorProto.FLOAT, [1, "rows", None])
WRONG_TYPES: list[Any] = ["text", 1.5, [1, 2], [1.5], ["text"]]


class Stored:
    """A matrix in a data file, behind some other bytes."""

    def __init__(self, folder: Path, **changes: NDArray[np.generic]) -> None:
        matrix = literal.random_matrix(np.random.default_rng(0), N, K, 4, BLOCK, True)
        self.parts = {"B": matrix.levels, "scales": matrix.scales, "zero_points": matrix.zero_points} | changes
        self.path = folder / "wéights"
        data, self.offsets = bytes(AHEAD), {}
        for name, array in self.parts.items():
            assert array is not None
            self.offsets[f"{name}_offset"] = len(data)
            data += array.tobytes()
        self.size = len(data)
        self.path.write_bytes(data)

    def attributes(self, prefix: str = "") -> dict[str, Any]:
        shape = {"K": K, "N": N, "bits": 4, "block_size": BLOCK, "weights_file": str(self.path)}
        return shape | {prefix + name: offset for name, offset in self.offsets.items()}


def model(attributes: dict[str, Any], operator: str = "MatMulNBits") -> ModelProto:
    given = {name: value for name, value in attributes.items() if value is not None}
    return of_one_node(helper.make_node(operator, ["A"], ["Y"], domain="pard_onnx", **given), [A], [Y], {})


def refused(graph: ModelProto, words: str) -> None:
    with pytest.raises(ERRORS, match=words):
        session(graph)


FILE_ATTACKS: list[tuple[dict[str, Any], str]] = [
    *(({name: value}, name) for name in ("K", "N", "bits", "block_size") for value in (0, -1, -(2**63), 2**63 - 1)),
    *(({name: value}, f"{name}.*another type") for name in ("K", "N", "B_offset") for value in WRONG_TYPES),
    *(({name: value}, "another type") for name in ("zero_points_offset", "minimums_offset") for value in WRONG_TYPES),
    *(({name: None}, name) for name in ("K", "N", "bits", "block_size", "B_offset", "scales_offset", "weights_file")),
    *(({"N": HUGE // 2**shift}, "more memory|not within its") for shift in range(0, 56, 4)),
    *(({"K": HUGE // 2**shift}, "more memory|not within its") for shift in range(0, 52, 4)),
    *(({"N": HUGE // 2**shift, "K": 2**shift}, "more memory|not within its") for shift in range(5, 52, 4)),
    *(({"bits": 2**shift + 4}, "bits") for shift in (8, 16, 32, 62)),
    *(({"block_size": 2**shift + 32}, "block_size") for shift in (8, 16, 32, 62)),
    *(
        ({name: value}, f"{name} {value} .*not within its")
        for name in ("B_offset", "scales_offset", "zero_points_offset")
        for value in (-1, -(2**63), 10**6, 2**63 - 1)
    ),
    ({"zero_points_offset": None, "minimums_offset": 0}, "minimums beside scales in float32"),
    ({"minimums_offset": 0, "scales_half": 1}, "minimums are for 4 bits without zero points"),
    ({"bits": 8}, "not within its"),
    ({"scales_half": 2}, "scales_half 2, not 0 or 1"),
    ({"weights_file": ""}, "no name of a file"),
    ({"weights_file": 5}, "weights_file is of another type"),
    ({"weights_file": "a\0b"}, "no name of a file"),
    *(({"weights_file": name}, "cannot be read") for name in ("/", "/dev/zero", "/dev/null", "/nowhere", "x" * 300)),
]


@pytest.mark.parametrize(("changes", "words"), FILE_ATTACKS, ids=lambda value: str(value)[:60])
def test_attributes_of_weights_in_a_file(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    attributes = Stored(tmp_path).attributes()
    session(model(attributes))
    refused(model(attributes | changes), words)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    refused(model(Stored(tmp_path).attributes() | {"weights_file": str(tmp_path / "pipe")}), "no regular file")


@pytest.mark.parametrize("missing", [1, 100, AHEAD, None])
def test_a_file_that_ends_too_early(missing: int | None, tmp_path: Path) -> None:
    stored = Stored(tmp_path)
    left = 0 if missing is None else stored.size - missing
    os.truncate(stored.path, left)
    refused(model(stored.attributes()), f"not within its {left}")


def test_a_file_of_holes_is_no_memory(tmp_path: Path) -> None:
    """N asks for more than the machine has, and the file seems to hold it."""
    stored = Stored(tmp_path)
    try:
        os.truncate(stored.path, 2**43)
    except OSError:
        pytest.skip("the file system has no such files")
    refused(model(stored.attributes() | {"N": 2**33, "zero_points_offset": None}), "out of memory|not within its")


def test_another_file_in_the_same_place_is_read_anew(tmp_path: Path) -> None:
    """A second session of the process finds what an export has put there since."""
    x = np.ones((1, 1, K), np.float32)
    first = session(model(Stored(tmp_path).attributes())).run(None, {"A": x})[0]
    assert (first != 0).any()
    (tmp_path / "wéights").unlink()
    second = Stored(tmp_path, scales=np.zeros((N, K // BLOCK), np.float32))
    assert (session(model(second.attributes())).run(None, {"A": x})[0] == 0).all()


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("at", [0, 17, N * K // BLOCK - 1])
def test_numbers_that_are_not_finite(value: float, at: int, tmp_path: Path) -> None:
    scales = np.ones(N * K // BLOCK, np.float32)
    halves, spoiled = scales.astype(np.float16), scales.copy()
    spoiled[at] = value
    refused(model(Stored(tmp_path, scales=spoiled).attributes()), "scales are not all finite")
    stored = Stored(tmp_path, scales=spoiled.astype(np.float16))
    refused(model(stored.attributes() | {"scales_half": 1}), "scales are not all finite")
    without = {"scales_half": 1, "zero_points_offset": None}
    refused(model(stored.attributes() | without | {"minimums_offset": 0}), "scales are not all finite")
    stored = Stored(tmp_path, scales=halves, minimums=spoiled.astype(np.float16))
    refused(model(stored.attributes() | without), "minimums are not all finite")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"N": 24}, "N 24 is no multiple of 16"),
        ({"N": HUGE}, "more memory"),
        ({"N": 2**63 - 16}, "more memory"),
        ({"up_B_offset": None}, "no attribute up_B_offset"),
        ({"up_zero_points_offset": None}, "no attribute up_zero_points_offset"),
        ({"gate_zero_points_offset": None}, "a needless attribute up_zero_points_offset"),
        ({"up_minimums_offset": 0}, "a needless attribute up_minimums_offset"),
        ({"up_scales_offset": -5}, "up_scales_offset -5 .*not within its"),
        ({"gate_scales_half": "yes"}, "gate_scales_half is of another type"),
        ({"weights_file": None}, "no name of a file"),
    ],
)
def test_attributes_of_two_matrices(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    stored = Stored(tmp_path)
    attributes = stored.attributes("gate_") | stored.attributes("up_")
    session(model(attributes, "GatedMatMulNBits"))
    refused(model(attributes | changes, "GatedMatMulNBits"), f"GatedMatMulNBits: .*{words}|{words}")


CONSTANT_ATTACKS: list[tuple[dict[str, Any], str]] = [
    *(({"N": HUGE // 2**shift}, "more memory|is of another size") for shift in range(0, 58, 4)),
    *(({"K": HUGE // 2**shift}, "more memory|is of another size") for shift in range(0, 54, 4)),
    ({"B_offset": 0}, "B_offset without weights_file"),
    ({"minimums_offset": 0}, "minimums_offset without weights_file"),
    ({"weights_file": "x"}, "weights_file beside weights among the inputs"),
    ({"bits": 8}, "B is of another size"),
    ({"block_size": 64}, "scales is of another size"),
]


@pytest.mark.parametrize(("changes", "words"), CONSTANT_ATTACKS, ids=lambda value: str(value)[:60])
def test_attributes_of_weights_in_the_graph(changes: dict[str, Any], words: str) -> None:
    matrix = literal.random_matrix(np.random.default_rng(0), N, K, 4, BLOCK, True, bias=True)
    refused(matmul_model(matrix, "pard_onnx", **changes), words)


@pytest.mark.parametrize(
    ("name", "index", "words"),
    [("B", 1, "B"), ("scales", 2, "scales"), ("zero_points", 3, "zero_points"), ("bias", 5, "bias")],
)
def test_weights_that_the_graph_computes_or_leaves_out(name: str, index: int, words: str) -> None:
    """A bias that was no constant used to be left out of the sums."""
    matrix = literal.random_matrix(np.random.default_rng(0), N, K, 4, BLOCK, True, bias=True)
    graph = matmul_model(matrix, "pard_onnx")
    tensor = next(t for t in graph.graph.initializer if t.name == name)
    graph.graph.input.append(helper.make_tensor_value_info(name, tensor.data_type, tensor.dims))
    graph.graph.initializer.remove(tensor)
    refused(graph, f"{words} is no constant of the graph")
    if index < 3:
        graph.graph.node[0].input[index] = ""
        refused(graph, f"{words} is missing")


@pytest.mark.parametrize(("name", "size"), [("scales", N * K // BLOCK), ("zero_points", N * 4), ("bias", N)])
def test_constants_of_another_size(name: str, size: int) -> None:
    for wrong in (0, 1, size - 1, size + 1):
        matrix = literal.random_matrix(np.random.default_rng(0), N, K, 4, BLOCK, True, bias=True)
        graph = matmul_model(matrix, "pard_onnx")
        tensor = next(t for t in graph.graph.initializer if t.name == name)
        width = 1 if tensor.data_type == TensorProto.UINT8 else 4
        del tensor.dims[:]
        tensor.dims.append(wrong)
        tensor.raw_data = bytes(wrong * width)
        refused(graph, f"{name} is of another size")


STEP = literal_attention.random_step(np.random.default_rng(0), 3, 20, 4, 2, 16, spare=2)
ATTENTION_ATTACKS: list[tuple[dict[str, Any], str]] = [
    *(({name: value}, f"{name} {value}") for name in ("num_heads", "kv_num_heads") for value in (0, -1, -(2**63))),
    *(
        ({name: value}, f"{name} is of another type")
        for name in ("num_heads", "kv_num_heads", "do_rotary", "local_window_size")
        for value in WRONG_TYPES
    ),
    *(({"scale": value}, "scale is of another type") for value in (1, "text", [1.5])),
    *(({"scale": value}, "scale is not finite") for value in (np.inf, -np.inf, np.nan)),
    ({"do_rotary": 2}, "do_rotary 2, not 0 or 1"),
    ({"do_rotary": -(2**63)}, "do_rotary -9223372036854775808"),
    ({"num_heads": None}, "no attribute num_heads"),
    ({"kv_num_heads": 2**63 - 1}, "no multiple of kv_num_heads"),
]


@pytest.mark.parametrize(("changes", "words"), ATTENTION_ATTACKS, ids=lambda value: str(value)[:60])
def test_attributes_of_attention(changes: dict[str, Any], words: str) -> None:
    refused(attention_model(STEP, "pard_onnx", **changes), words)


@pytest.mark.parametrize("name", ["cos", "sin"])
def test_attention_without_a_rotary_table(name: str) -> None:
    graph = attention_model(STEP, "pard_onnx")
    inputs = graph.graph.node[0].input
    inputs[list(inputs).index(name)] = ""
    refused(graph, "do_rotary is 1, and there are no rotary tables")


@pytest.mark.parametrize("heads", [4 + 2**shift for shift in range(2, 63)])
@pytest.mark.parametrize("packed", [True, False])
def test_heads_that_wrap_to_the_true_width(heads: int, packed: bool) -> None:
    """4 + 2^60 heads of 16 floats are as wide as 4 heads, in 64 bits."""
    opened = session(attention_model(STEP, "pard_onnx", packed=packed, num_heads=heads))
    with pytest.raises(ERRORS, match=r"more memory|num_heads"):
        opened.run(None, attention_feeds(STEP, packed))


@pytest.mark.parametrize("window", [-(2**63), -1, 0, 2**62, 2**63 - 1])
def test_a_window_without_bounds_is_none(window: int) -> None:
    expected = session(attention_model(STEP, "pard_onnx")).run(None, attention_feeds(STEP))
    found = session(attention_model(STEP, "pard_onnx", local_window_size=window)).run(None, attention_feeds(STEP))
    assert [x.tobytes() for x in found] == [x.tobytes() for x in expected]


@pytest.mark.parametrize("total", [-(2**31), -1, 0, 2**31 - 1, 26])
@pytest.mark.parametrize("last", [-(2**31), -1, 2**31 - 1, 26])
def test_lengths_of_a_step(last: int, total: int) -> None:
    opened = session(attention_model(STEP, "pard_onnx"))
    changes = {"seqlens_k": np.array([last], np.int32), "total": np.array(total, np.int32)}
    with pytest.raises(ERRORS, match="seqlens_k"):
        opened.run(None, attention_feeds(STEP, **changes))


@pytest.mark.parametrize("shape", [(1, 2, 25, 0), (1, 2, 0, 16), (1, 2, 0, 2**40), (1, 2, 0, 2**58), (0, 2, 25, 16)])
def test_caches_without_rows_or_width(shape: tuple[int, ...]) -> None:
    opened = session(attention_model(STEP, "pard_onnx"))
    empty = np.empty(shape, np.float32)
    with pytest.raises(ERRORS, match=r"head_dim|query|seqlens_k|more memory"):
        opened.run(None, attention_feeds(STEP, past_key=empty, past_value=empty))
