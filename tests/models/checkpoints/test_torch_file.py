"""Files of torch.save: what torch itself reads, and what no reader may run."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pard_onnx.models.checkpoints.tensors import read_tensor
from pard_onnx.models.checkpoints.torch_file import read_torch_file
from pard_onnx.models.errors import BadCheckpoint

FILES = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
TYPES = (torch.float32, torch.float16, torch.bfloat16)


@st.composite
def views(draw: st.DrawFn) -> torch.Tensor:
    """A tensor of a type that is read: of several dimensions, some of them transposed, cut or repeated."""
    shape = draw(st.lists(st.integers(0, 5), max_size=3))
    found = torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    found = found.to(draw(st.sampled_from(TYPES)))
    for _ in range(draw(st.integers(0, 2)) if shape else 0):
        axis = draw(st.integers(0, len(shape) - 1))
        change = draw(st.sampled_from(("transposed", "cut", "repeated")))
        if change == "transposed":
            found = found.transpose(0, axis)
        elif change == "cut" and found.shape[axis] > 1:
            found = found.narrow(axis, 1, found.shape[axis] - 1)
        elif change == "repeated" and found.shape[axis] == 1:
            found = found.expand(*(3 if i == axis else -1 for i in range(found.dim())))
    return found


def floats(value: torch.Tensor) -> np.ndarray:
    return value.detach().float().numpy()


@FILES
@given(tensors=st.dictionaries(st.text(max_size=8), views(), max_size=4), shared=st.booleans())
def test_good_files_are_read_as_torch_reads_them(
    tmp_path: Path, tensors: dict[str, torch.Tensor], shared: bool
) -> None:
    if shared and tensors:
        first = next(iter(tensors.values()))
        tensors = {**tensors, "again": first, "part": first[:1] if first.dim() else first}
    torch.save(tensors, tmp_path / "file.bin")
    wanted = torch.load(tmp_path / "file.bin", weights_only=True)
    found = read_torch_file(tmp_path / "file.bin")
    assert list(found) == list(wanted)
    for name, tensor in wanted.items():
        assert found[name].shape == tuple(tensor.shape)
        assert np.array_equal(read_tensor(found[name]), floats(tensor), equal_nan=True)
        if tensor.dim():
            assert np.array_equal(read_tensor(found[name], slice(1, 3)), floats(tensor)[1:3], equal_nan=True)


@pytest.mark.parametrize("kind", ("state", "parameters", "mixed"))
def test_whole_states_are_read(tmp_path: Path, kind: str) -> None:
    layer = torch.nn.Linear(6, 4).to(torch.bfloat16)
    saved: dict[str, Any] = {
        "state": layer.state_dict(),  # an OrderedDict with attributes
        "parameters": dict(layer.named_parameters()),
        "mixed": {**layer.state_dict(), "step": 3, "rate": 0.5, "list": [1, None, True], "inner": {"x": torch.ones(2)}},
    }[kind]
    torch.save(saved, tmp_path / "file.bin")
    found = read_torch_file(tmp_path / "file.bin")
    assert sorted(found) == ["bias", "weight"]
    assert np.array_equal(read_tensor(found["weight"]), floats(layer.weight))


@FILES
@given(data=st.data())
def test_damaged_files_are_refused_or_read_within_bounds(tmp_path: Path, data: st.DataObject) -> None:
    torch.save({"a": torch.randn(5, 3).t(), "b": torch.ones(4, dtype=torch.float16)}, tmp_path / "good.bin")
    whole = bytearray((tmp_path / "good.bin").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(whole) - 1))
        whole[place] = data.draw(st.integers(0, 255))
    (tmp_path / "file.bin").write_bytes(whole[: data.draw(st.sampled_from((len(whole), len(whole) // 2, 40)))])
    require_bounded(tmp_path / "file.bin")


@FILES
@given(data=st.data())
def test_damaged_descriptions_are_refused_or_read_within_bounds(tmp_path: Path, data: st.DataObject) -> None:
    torch.save({"a": torch.randn(5, 3), "b": torch.ones(4, dtype=torch.float16)}, tmp_path / "good.bin")
    with zipfile.ZipFile(tmp_path / "good.bin") as archive:
        described = bytearray(archive.read("good/data.pkl"))
    for _ in range(data.draw(st.integers(1, 5))):
        place = data.draw(st.integers(0, len(described) - 1))
        edit = data.draw(st.sampled_from(("change", "remove", "repeat", "insert")))
        if edit == "change":
            described[place] = data.draw(st.integers(0, 255))
        elif edit == "remove":
            del described[place : place + data.draw(st.integers(1, 9))]
        elif edit == "repeat":
            described[place:place] = described[place : place + data.draw(st.integers(1, 40))]
        else:
            described[place:place] = data.draw(st.binary(max_size=6))
    replaced(tmp_path / "good.bin", tmp_path / "file.bin", bytes(described))
    require_bounded(tmp_path / "file.bin")


def require_bounded(path: Path) -> None:
    try:
        found = read_torch_file(path)
    except BadCheckpoint as error:
        assert str(path) in str(error) and "\n" not in str(error)
        return
    size = path.stat().st_size
    for tensor in found.values():
        assert 0 <= tensor.offset <= size and tensor.extent <= size
        if tensor.dtype in ("F32", "F16", "BF16") and np.prod(tensor.shape, dtype=float) < 1e6:
            read_tensor(tensor)


def replaced(good: Path, path: Path, described: bytes, compression: int = zipfile.ZIP_STORED) -> None:
    """The archive with another description of its tensors."""
    with zipfile.ZipFile(good) as archive, zipfile.ZipFile(path, "w", compression) as out:
        for entry in archive.infolist():
            content = described if entry.filename.endswith("data.pkl") else archive.read(entry)
            out.writestr(f"file/{entry.filename.partition('/')[2]}", content)


class Poison:
    """Whatever a pickle may ask for: it is never asked."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.reduced = function, arguments

    def __reduce__(self) -> Any:
        return self.reduced


@pytest.mark.parametrize(
    "value",
    (
        Poison(os.system, "touch poisoned"),
        Poison(eval, "open('poisoned', 'w')"),
        Poison(open, "poisoned", "w"),
        {"target_proj.weight": Poison(Path.touch, Path("poisoned"))},
        Poison(torch.load, "poisoned"),
        Poison(getattr, "x", "upper"),
        Poison(OrderedDict, [("a", 1)]),
        torch.nn.Linear(2, 2),
    ),
    ids=("system", "eval", "open", "inside", "torch", "getattr", "arguments", "module"),
)
def test_nothing_of_a_pickle_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: object) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(value, "file.bin")
    with pytest.raises(BadCheckpoint, match=r"file\.bin: is not a file of tensors that is read here"):
        read_torch_file(tmp_path / "file.bin")
    assert not Path("poisoned").exists()


def test_a_name_of_a_poisoned_pickle_is_told(tmp_path: Path) -> None:
    torch.save(Poison(os.system, "true"), tmp_path / "file.bin")
    with pytest.raises(BadCheckpoint, match=r"it names '(posix|nt)\.system', which is no part of a tensor"):
        read_torch_file(tmp_path / "file.bin")


def written(tmp_path: Path, **options: Any) -> Path:
    torch.save({"a": torch.ones(64, 64)}, tmp_path / "file.bin", **options)
    return tmp_path / "file.bin"


def test_files_of_other_formats_are_refused_by_name(tmp_path: Path) -> None:
    path = written(tmp_path, _use_new_zipfile_serialization=False)
    with pytest.raises(BadCheckpoint, match=r"in the format of torch before 1\.6"):
        read_torch_file(path)
    path.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(BadCheckpoint, match="no zip archive"):
        read_torch_file(path)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(BadCheckpoint, match="Git LFS pointer"):
        read_torch_file(path)
    path.write_bytes(b"")
    with pytest.raises(BadCheckpoint, match="no zip archive"):
        read_torch_file(path)


def test_compressed_archives_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path)
    with zipfile.ZipFile(path) as archive:
        described = archive.read("file/data.pkl")
    replaced(path, tmp_path / "bomb.bin", described, zipfile.ZIP_DEFLATED)
    with pytest.raises(BadCheckpoint, match="compressed or encrypted"):
        read_torch_file(tmp_path / "bomb.bin")


def test_entries_that_are_there_twice_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path)
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("file/data/0", b"1234")
    with pytest.raises(BadCheckpoint, match="twice"):
        read_torch_file(path)


def test_a_description_of_another_length_than_the_values_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path)
    with zipfile.ZipFile(path) as archive:
        described = archive.read("file/data.pkl")
    torch.save({"a": torch.ones(8)}, tmp_path / "small.bin")
    replaced(tmp_path / "small.bin", tmp_path / "file2.bin", described)
    with pytest.raises(BadCheckpoint, match="larger than its values"):
        read_torch_file(tmp_path / "file2.bin")


def test_a_large_description_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path)
    out = io.BytesIO()
    pickle.dump({"a": "x" * (5 << 20)}, out, protocol=2)
    replaced(path, tmp_path / "large.bin", out.getvalue())
    with pytest.raises(BadCheckpoint, match="at most"):
        read_torch_file(tmp_path / "large.bin")
