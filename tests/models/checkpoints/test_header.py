"""Headers of safetensors files: what the safetensors library refuses is refused here too, in one line."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pard_onnx.models.checkpoints.tensors import read_header
from pard_onnx.models.errors import BadCheckpoint

safetensors = pytest.importorskip("safetensors")
Facts = dict[str, Any]
SIZES = {"F32": 4, "F16": 2, "BF16": 2, "I32": 4, "U8": 1, "F64": 8}


def written(path: Path, header: str, data: int) -> Path:
    text = header.encode("utf-8", "surrogatepass")
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(data))
    return path


def library_reads(path: Path) -> bool:
    try:
        with safetensors.safe_open(path, "numpy") as file:
            list(file.keys())
    except Exception:  # a class of its own, of which the name differs between versions
        return False
    return True


def is_read(path: Path) -> bool:
    try:
        read_header(path)
    except BadCheckpoint as error:
        assert "\n" not in str(error) and str(path) in str(error)
        return False
    return True


@st.composite
def tensors(draw: st.DrawFn) -> tuple[dict[str, Facts], int]:
    """A right header, and the bytes of its data."""
    found: dict[str, Facts] = {}
    offset = 0
    for index in range(draw(st.integers(0, 3))):
        dtype = draw(st.sampled_from(sorted(SIZES)))
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        size = SIZES[dtype]
        for extent in shape:
            size *= extent
        found[f"t{index}"] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    return found, offset


VALUES = st.one_of(
    st.integers(-2, 40),
    st.sampled_from([None, True, False, "0", "4", 1.0, 0.5, [], {}, [0], [0, 4], 1 << 63, 1 << 64, "F32", "F8", "é"]),
).map(deepcopy)  # a list that is drawn twice may be put into itself


@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tensors(), st.data(), st.integers(-2, 9))
def test_changed_headers_are_read_only_where_the_library_reads_them(
    tmp_path: Path, whole: tuple[dict[str, Facts], int], data: st.DataObject, more: int
) -> None:
    header, size = whole
    changes = data.draw(st.integers(0, 2))
    for _ in range(changes if header else 0):
        fact = header[data.draw(st.sampled_from(sorted(header)))]
        key = data.draw(st.sampled_from(["dtype", "shape", "data_offsets", "more"]))
        if isinstance(fact.get(key), list) and fact[key] and data.draw(st.booleans()):
            fact[key][data.draw(st.integers(0, len(fact[key]) - 1))] = data.draw(VALUES)
        else:
            fact[key] = data.draw(VALUES)
    if data.draw(st.booleans()):
        header["__metadata__"] = data.draw(
            st.sampled_from([{"format": "pt"}, {}, None, {"a": 1}, 3, 0, "", [], False, {"a": None}])
        )
    path = written(tmp_path / "model.safetensors", json.dumps(header), max(0, size + (more if more < 4 else 0)))
    assert not is_read(path) or library_reads(path) or _of_unknown_types(header)
    if changes == 0 and "__metadata__" not in header:
        assert is_read(path) == library_reads(path)


def _of_unknown_types(header: dict[str, Facts]) -> bool:
    """Tensors of types that are not exported are told of by their names, later and only if they are needed."""
    return any(isinstance(fact, dict) and fact.get("dtype") not in ("F32", "F16", "BF16") for fact in header.values())


FACT = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
TEXTS = {
    "a name twice": f'{{"t":{FACT},"t":{FACT}}}',
    "a shape twice": '{"t":{"dtype":"F32","shape":[2],"shape":[1],"data_offsets":[0,4]}}',
    "space before it": f' {{"t":{FACT}}}',
    "a byte order mark": f'\ufeff{{"t":{FACT}}}',
    "half a surrogate pair in the metadata": f'{{"__metadata__":{{"a":"\\ud800"}},"t":{FACT}}}',
    "half a surrogate pair": f'{{"\\ud800":{FACT}}}',
    "a number that is none": '{"t":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"more":NaN}}',
    "a list": "[]",
    "text behind it": f'{{"t":{FACT}}} x',
    "metadata twice": f'{{"__metadata__":{{}},"__metadata__":{{}},"t":{FACT}}}',
    "overlapping": f'{{"t":{FACT},"u":{FACT}}}',
    "a gap": '{"t":{"dtype":"F32","shape":[],"data_offsets":[4,8]}}',
    "three offsets": '{"t":{"dtype":"F32","shape":[1],"data_offsets":[0,4,4]}}',
    "a product beyond 64 bits": '{"t":{"dtype":"F32","shape":[4294967296,4294967296,0],"data_offsets":[0,0]}}',
}


@pytest.mark.parametrize("case", TEXTS)
def test_texts_that_are_refused(case: str, tmp_path: Path) -> None:
    size = {"a gap": 8, "a list": 0, "a product beyond 64 bits": 0}.get(case, 4)
    path = written(tmp_path / "model.safetensors", TEXTS[case], size)
    assert not is_read(path)


@example(b"")
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=40))
def test_any_bytes_are_read_or_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    assert not is_read(path) or library_reads(path)


@pytest.mark.parametrize("more", (1, 4, 4096))
def test_bytes_behind_the_tensors_are_counted(more: int, tmp_path: Path) -> None:
    path = written(tmp_path / "model.safetensors", f'{{"t":{FACT}}}', 4 + more)
    with pytest.raises(BadCheckpoint, match=rf"\({more} bytes behind its tensors\)"):
        read_header(path)
