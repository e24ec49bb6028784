"""Exported folders from a stranger: each attack is refused with one line and exit code 2, at once."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from hostile import GRAPH, SECRET, copied, edit_graph, external, listen, one_line, replace, reseal
from onnx import AttributeProto, TensorProto, helper

from pard_onnx import load
from pard_onnx.generate_command import main
from pard_onnx.models.errors import BadArtifact
from pard_onnx.models.graph_file import MOST_FIELDS
from pard_onnx.models.hub import resolve_artifact
from pard_onnx.models.manifest import Manifest
from pard_onnx.quantize_command import main as quantize

pytestmark = [pytest.mark.timeout(30, func_only=True), pytest.mark.skipif(os.name == "nt", reason="FIFOs and links")]
DATA, TOKENIZER = "model.onnx.data", "tokenizer.json"


def link(name: str, to: str) -> Callable[[Path], None]:
    return lambda folder: replace(folder / name, lambda path: path.symlink_to(to))


PLACES: dict[str, Callable[[Path], object]] = {
    "FIFO": os.mkfifo,
    "socket": listen,
    "folder": Path.mkdir,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "link to a file outside": lambda path: path.symlink_to(path.parent.parent / "outside" / "secret.txt"),
    "relative link that leaves": lambda path: path.symlink_to("../outside/secret.txt"),
    "link to a link that leaves": lambda path: (
        (path.parent / "middle").symlink_to("../outside/secret.txt"),
        path.symlink_to("middle"),
    ),
    "link to nothing": lambda path: path.symlink_to("nothing"),
    "link to itself": lambda path: path.symlink_to(path.name),
}


@pytest.mark.parametrize("name", ["pard_onnx.json", GRAPH, DATA, TOKENIZER, "generation_config.json"])
@pytest.mark.parametrize("place", PLACES)
def test_something_else_in_a_files_place(
    good: Path, tmp_path: Path, name: str, place: str, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = copied(good, tmp_path / "folder")
    replace(folder / name, PLACES[place])
    assert main(["--target", str(folder), "--prompt", "a"]) == 2
    assert name in one_line(capfd)


def tensor(place: str) -> TensorProto:
    """A tensor whose values are in another file."""
    out = TensorProto(name="stolen", data_type=TensorProto.UINT8, dims=[4], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", place), ("offset", "0"), ("length", "4")):
        entry = out.external_data.add()
        entry.key, entry.value = key, value
    return out


def subgraph(operator: str, attribute: str) -> onnx.NodeProto:
    inner = helper.make_graph([], "inner", [], [], [tensor("../outside/secret.txt")])
    return helper.make_node(operator, ["a"], ["b"], **{attribute: inner})


def twice(model: onnx.ModelProto) -> None:
    model.graph.initializer.add().CopyFrom(model.graph.initializer[0])


def own_operator(model: onnx.ModelProto) -> None:
    """This package's operator reads the file that its attribute names."""
    node = next(node for node in model.graph.node if node.op_type == "MatMulNBits")
    node.domain = "pard_onnx"
    node.attribute.add().CopyFrom(helper.make_attribute("weights_file", "/etc/passwd"))
    node.attribute.add().CopyFrom(helper.make_attribute("B_offset", 0))


def own_attribute(model: onnx.ModelProto) -> None:
    node = next(node for node in model.graph.node if node.op_type == "MatMulNBits")
    node.attribute.add().CopyFrom(helper.make_attribute("weights_file", "/etc/passwd"))


def set_numbers(**numbers: int) -> Callable[[onnx.ModelProto], None]:
    """Change attributes of the matmuls."""

    def edit(model: onnx.ModelProto) -> None:
        for node in model.graph.node:
            for attribute in node.attribute if node.op_type == "MatMulNBits" else ():
                attribute.i = numbers.get(attribute.name, attribute.i)

    return edit


def caches(**numbers: int) -> Callable[[onnx.ModelProto], None]:
    """Change the shapes of the graph's KV caches."""

    def edit(model: onnx.ModelProto) -> None:
        for value in [*model.graph.input, *model.graph.output]:
            if "key" in value.name or "value" in value.name:
                for index, size in numbers.items():
                    value.type.tensor_type.shape.dim[int(index[1:])].dim_value = size

    return edit


def attribute_twice(model: onnx.ModelProto) -> None:
    node = next(node for node in model.graph.node if node.op_type == "MatMulNBits")
    node.attribute.add().CopyFrom(helper.make_attribute("N", 1 << 62))


def function(model: onnx.ModelProto) -> None:
    model.functions.add(name="f", domain="d").node.add().CopyFrom(helper.make_node("Identity", ["a"], ["b"]))


def misused(model: onnx.ModelProto) -> None:
    """Nodes without the inputs that the rewriting looks at."""
    for node in model.graph.node:
        if node.op_type in ("Sigmoid", "Mul", "Cast"):
            del node.input[:]


GRAPHS: dict[str, tuple[Callable[[onnx.ModelProto], object], str]] = {
    "absolute": (lambda m: external(m, location="/etc/passwd"), "'/etc/passwd', which the manifest does not list"),
    "upwards": (lambda m: external(m, location="../outside/secret.txt"), "which the manifest does not list"),
    "through the folder": (lambda m: external(m, location="./model.onnx.data"), "which the manifest does not list"),
    "device": (lambda m: external(m, location="/dev/zero"), "which the manifest does not list"),
    "memory": (lambda m: external(m, location="*/_ORT_MEM_ADDR_/*"), "which the manifest does not list"),
    "empty": (lambda m: external(m, location=""), "which the manifest does not list"),
    "unlisted": (lambda m: external(m, location="unlisted.data"), "which the manifest does not list"),
    "not UTF-8": (lambda m: external(m, location="é"), "which the manifest does not list"),
    "negative": (lambda m: external(m, offset="-1"), "is at"),
    "huge": (lambda m: external(m, offset=str(1 << 62)), "bytes is in bytes"),
    "beyond 64 bits": (lambda m: external(m, offset=str(1 << 64)), "is at"),
    "many digits": (lambda m: external(m, offset="9" * 5000), "is at"),
    "no number": (lambda m: external(m, offset="0x10"), "is at"),
    "other digits": (lambda m: external(m, offset="٣"), "is at"),
    "underscore": (lambda m: external(m, offset="1_0"), "is at"),
    "length": (lambda m: external(m, length="1"), "bytes is in bytes"),
    "a long one": (lambda m: external(m, length=str((1 << 63) - 1)), "bytes is in bytes"),
    "past the end": (lambda m: external(m, offset="5483519"), "bytes is in bytes"),
    "unknown entry": (lambda m: external(m, basepath=".."), "is not clear"),
    "external attribute": (
        lambda m: m.graph.node.add().CopyFrom(helper.make_node("Constant", [], ["c"], value=tensor(DATA))),
        "half outside",
    ),
    "If": (lambda m: m.graph.node.add().CopyFrom(subgraph("If", "then_branch")), "the operator 'If'"),
    "Loop": (lambda m: m.graph.node.add().CopyFrom(subgraph("Loop", "body")), "the operator 'Loop'"),
    "subgraph of a known operator": (lambda m: m.graph.node.add().CopyFrom(subgraph("Add", "body")), "holds a graph"),
    "ConstantOfShape": (
        lambda m: m.graph.node.add().CopyFrom(helper.make_node("ConstantOfShape", ["a"], ["b"])),
        "the operator 'ConstantOfShape'",
    ),
    "compiled graph": (
        lambda m: m.graph.node.add().CopyFrom(
            helper.make_node("EPContext", ["a"], ["b"], domain="com.microsoft", ep_cache_context="/etc/passwd")
        ),
        "the operator 'com.microsoft.EPContext'",
    ),
    "this package's operator": (own_operator, "the operator 'pard_onnx.MatMulNBits'"),
    "this package's attribute": (own_attribute, "weights_file"),
    "another name of a domain": (
        lambda m: m.graph.node.add().CopyFrom(helper.make_node("Loop", ["a"], ["b"], domain="ai.onnx")),
        "the operator 'ai.onnx.Loop'",
    ),
    "function": (function, "functions or training steps"),
    "training": (lambda m: m.training_info.add().initialization.CopyFrom(m.graph), "functions or training steps"),
    "sparse": (
        lambda m: m.graph.sparse_initializer.add().values.CopyFrom(tensor("../outside/secret.txt")),
        "sparse tensors",
    ),
    "tensor twice": (twice, "twice"),
    "attribute twice": (attribute_twice, "has an attribute twice"),
    "attribute of graphs": (
        lambda m: m.graph.node[0].attribute.add(name="g", type=AttributeProto.GRAPHS).graphs.add(name="g"),
        "holds a graph",
    ),
    "no graph": (lambda m: m.ClearField("graph"), "it has no graph"),
    "N wraps": (set_numbers(N=1 << 62), GRAPH),
    "K wraps": (set_numbers(K=1 << 62), GRAPH),
    "negative N": (set_numbers(N=-16), GRAPH),
    "N more than there is": (set_numbers(N=1 << 20), GRAPH),
    "bits": (set_numbers(bits=8), GRAPH),
    "other heads": (caches(_1=4), "pard_onnx.json says batch 1, kv_heads 2"),
    "other dimension": (caches(_3=64), "head_dim 128"),
    "fewer rows": (caches(_2=8), "kv_rows"),
    "fewer inputs": (lambda m: m.graph.input.pop(), "has no input logits_to_keep"),
    "fewer caches": (lambda m: m.graph.output.pop(), "has 11 KV caches named present."),
    "a cache more": (
        lambda m: m.graph.input.append(helper.make_tensor_value_info("past_key_values.99.key", 1, [1, 2, 8, 128])),
        "has 13 KV caches named past_key_values.",
    ),
    "an input more": (
        lambda m: m.graph.input.append(helper.make_tensor_value_info("more", 1, [1])),
        "has the input 'more'",
    ),
    "no inputs": (misused, GRAPH),
}


@pytest.mark.parametrize("attack", GRAPHS)
def test_graphs(good: Path, tmp_path: Path, attack: str, capfd: pytest.CaptureFixture[str]) -> None:
    folder, (edit, message) = copied(good, tmp_path / "folder"), GRAPHS[attack]
    (folder / "unlisted.data").write_bytes(bytes(1 << 20))
    edit_graph(folder, edit)
    assert main(["--target", str(folder), "--prompt", "a"]) == 2
    assert message in one_line(capfd)


BYTES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "cut": lambda data: data[: len(data) // 2],
    "graph twice": lambda data: data * 2,
    # The key of field 7 with a bit that readers in C++ drop: they would see a second graph
    "key of more than 32 bits": lambda data: data + b"\xba\x80\x80\x80\x10\x02\x0a\x00",
    "key of field 0": lambda data: data + b"\x02\x00",
    "length beyond the end": lambda data: data + b"\x3a\xff\xff\xff\xff\x07",
    "groups": lambda data: data + b"\x0b" * 1000 + b"\x0c" * 1000,
    "location that is not UTF-8": lambda data: data.replace(b"model.onnx.data", b"model.onnx.\xff\xfe\xfd\xfc"),
    "location of zeros": lambda data: data.replace(b"model.onnx.data", b"model.onnx.dat\0"),
    "text": lambda _: b"not a graph at all\n" * 100,
    "many fields": lambda _: b"\x08\x00" * (MOST_FIELDS + 1),
}


@pytest.mark.parametrize("attack", BYTES)
def test_bytes_of_graphs(good: Path, tmp_path: Path, attack: str, capfd: pytest.CaptureFixture[str]) -> None:
    folder = copied(good, tmp_path / "folder")
    (folder / GRAPH).write_bytes(BYTES[attack]((folder / GRAPH).read_bytes()))
    reseal(folder)
    assert main(["--target", str(folder), "--prompt", "a"]) == 2
    assert GRAPH in one_line(capfd)


@pytest.mark.parametrize("kernel", ["", "off"])
def test_files_that_the_manifest_does_not_list_are_ignored(
    good: Path, tmp_path: Path, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied(good, tmp_path / "folder")
    with load(folder) as pair:
        expected, sampling = pair.generate("def f(x):", max_new_tokens=8).tokens, pair.own_sampling
    monkeypatch.setenv("PARD_ONNX_KERNEL", kernel)
    own = (folder / "generation_config.json", folder / "tokenizer_config.json")
    for path in own:
        path.unlink()
        os.mkfifo(path)
    for name in ("special_tokens_map.json", "added_tokens.json", "vitisai_config.json", "model.1.onnx", "chat.jinja"):
        (folder / name).symlink_to("../outside/secret.txt")
    names = {path.name for path in own}
    reseal(folder, lambda value: value.update(files=[f for f in value["files"] if f["name"] not in names]))
    with load(folder) as pair:
        assert pair.own_sampling is None != sampling
        if not kernel:
            assert pair.generate("def f(x):", max_new_tokens=8).tokens == expected


def test_links_of_the_hubs_cache_lead_to_its_blobs_alone(good: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--org--name"
    snapshot, blobs = repository / "snapshots" / "0123", repository / "blobs"
    for folder in (snapshot, blobs, tmp_path / "models--org--other" / "blobs"):
        folder.mkdir(parents=True)
    for file in good.iterdir():
        (blobs / file.name).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    found = resolve_artifact(snapshot)
    Manifest.read(found).verify(found)
    other = tmp_path / "models--org--other" / "blobs" / GRAPH
    other.write_text(SECRET)
    link(GRAPH, str(other))(snapshot)
    assert main(["--target", str(snapshot), "--prompt", "a"]) == 2


def test_blobs_that_are_a_link_are_no_blobs(good: Path, tmp_path: Path) -> None:
    """Or a folder that looks like the hub's cache could name any file."""
    snapshot = tmp_path / "snapshots" / "0123"
    shutil.copytree(good, snapshot)
    secret = tmp_path / "secret" / GRAPH
    secret.parent.mkdir()
    shutil.move(snapshot / GRAPH, secret)
    (tmp_path / "blobs").symlink_to(secret.parent)
    (snapshot / GRAPH).symlink_to(f"../../blobs/{GRAPH}")
    with pytest.raises(BadArtifact, match=r"is a link to .*, outside its folder"):
        load(snapshot, threads=1)


def test_a_file_that_is_swapped_after_a_good_load(
    good: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Same size, same times: a hash that was remembered would not tell."""
    folder = copied(good, tmp_path / "folder")
    path = folder / DATA
    os.utime(path, ns=(10**18, 10**18))
    Manifest.read(folder).verify(folder)
    path.write_bytes(path.read_bytes()[::-1])
    os.utime(path, ns=(10**18, 10**18))
    assert main(["--target", str(folder), "--prompt", "a"]) == 2
    assert "has been changed (its hash differs)" in one_line(capfd)


def transposed(model: onnx.ModelProto) -> None:
    """A matrix of the same size in another shape."""
    tensor = next(t for t in model.graph.initializer if t.external_data and "down_proj" in t.name)
    tensor.dims[:] = tensor.dims[::-1]


FLOATS: dict[str, tuple[Callable[[onnx.ModelProto], object], str]] = {
    "upwards": (lambda m: outside(m, "../outside/secret.txt"), "which the manifest does not list"),
    "device": (lambda m: outside(m, "/dev/zero"), "which the manifest does not list"),
    "another shape": (transposed, "of the graph has the shape"),
    "no matrix": (lambda m: m.graph.ClearField("initializer"), "its graph has no"),
}


def outside(model: onnx.ModelProto, place: str) -> None:
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = place


@pytest.mark.parametrize("attack", FLOATS)
def test_float_exports(good_floats: Path, tmp_path: Path, attack: str, capfd: pytest.CaptureFixture[str]) -> None:
    folder, (edit, message) = copied(good_floats, tmp_path / "float"), FLOATS[attack]
    edit_graph(folder, edit)
    assert quantize(["--model", str(folder), "--recipe", "int8-rtn", "--output", str(tmp_path / "out")]) == 2
    assert message in one_line(capfd) and not (tmp_path / "out").exists()


def test_unlisted_files_are_not_copied_into_an_export(good_floats: Path, tmp_path: Path) -> None:
    folder = copied(good_floats, tmp_path / "float")
    for name in ("merges.txt", "vocab.json", "special_tokens_map.json"):
        (folder / name).symlink_to("../outside/secret.txt")
    out = tmp_path / "out"
    assert quantize(["--model", str(folder), "--recipe", "int8-rtn", "--no-verify", "--output", str(out)]) == 0
    names = {path.name for path in out.iterdir()}
    assert names == set(Manifest.read(out).sizes) | {"pard_onnx.json"} and "merges.txt" not in names
