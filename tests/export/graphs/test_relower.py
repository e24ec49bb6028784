"""Float exports quantized without their checkpoint: the same as quantizing the checkpoint."""

import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from pard_onnx.export.exporter import Job, export
from pard_onnx.export.float_export import FloatExport
from pard_onnx.export.job import requantize_job
from pard_onnx.export.verify.drive import drive
from pard_onnx.models.checkpoints.checkpoint import Checkpoint
from pard_onnx.models.devices import DEVICES, form_for
from pard_onnx.models.errors import BadInput
from pard_onnx.models.manifest import Manifest, Source
from pard_onnx.quantize.quantizer import QuantizationRequest
from pard_onnx.quantize.recipes import named_recipe

Exported = Callable[..., tuple[Path, Path]]
Tiny = Callable[..., Path]


def order_of(name: str, text: Path) -> QuantizationRequest:
    named = named_recipe(name)
    return QuantizationRequest(named, text if named.needs_text else None, "0.8" if named.mixed else None)


def operators(folder: Path) -> dict[str, Counter[str]]:
    graphs = {path.name: onnx.load(path, load_external_data=False).graph for path in folder.glob("*.onnx")}
    return {name: Counter(node.op_type for node in graph.node) for name, graph in graphs.items()}


def vectors(folder: Path) -> dict[tuple[str, str], np.ndarray]:
    """What the graphs themselves hold of the weights: norms and biases."""
    graphs = {path.name: onnx.load(path, load_external_data=False).graph for path in folder.glob("*.onnx")}
    inside = [(name, t) for name, graph in graphs.items() for t in graph.initializer if not t.external_data]
    named = [(name, t) for name, t in inside if t.name.endswith((".weight", ".bias"))]
    return {(name, t.name): onnx.numpy_helper.to_array(t) for name, t in named}


def same(one: Path, other: Path) -> None:
    """The same graphs up to generated names, the same bytes of weights, the same told of them."""
    found, expected = Manifest.read(one), Manifest.read(other)
    assert operators(one) == operators(other)
    held, wanted = vectors(one), vectors(other)
    assert held.keys() == wanted.keys() and held
    assert all(np.array_equal(held[name], wanted[name]) for name in held)
    assert (one / "model.onnx.data").read_bytes() == (other / "model.onnx.data").read_bytes()
    unlike = {"files", "source", "parity"}
    assert all(getattr(found, name) == getattr(expected, name) for name in Manifest.__slots__ if name not in unlike)
    found.verify(one)


slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("recipe", "family", "role", "options"),
    (
        ("int4-rtn", "qwen2", "target", {}),
        ("int4-awq-gptq", "qwen2", "target", {}),
        ("int4-mixed", "qwen3", "draft", {"tied": True}),
        ("int4-gptq", "llama", "target", {"attention": "portable"}),
        ("int8-a8w8", "qwen2", "target", {"attention": "portable"}),
        ("int4-awq-gptq", "gemma3_text", "target", {"tied": True}),  # whose norms multiply by 1 + weight
        ("int4-awq", "gemma3_text", "draft", {"attention": "portable"}),
        ("int4-gptq", "smollm3", "draft", {}),
        pytest.param("int8-a16w8", "qwen3", "draft", {"attention": "portable", "tied": True}, marks=slow),
        pytest.param("int8-dynamic", "qwen2", "draft", {}, marks=slow),
        pytest.param("int4-awq", "qwen3", "target", {"attention": "portable", "tied": True}, marks=slow),
        pytest.param("int4-mixed", "llama", "target", {}, marks=slow),
        ("int4-good", "llama", "draft", {}),
        pytest.param("int8-smooth", "qwen2", "target", {"tied": True}, marks=slow),
        pytest.param("int8-gptq", "qwen2", "draft", {"attention": "portable", "tied": True}, marks=slow),
    ),
)
def test_it_is_what_the_checkpoint_gives(
    exported: Exported, tmp_path: Path, text: Path, recipe: str, family: str, role: str, options: dict[str, object]
) -> None:
    checkpoint, artifact = exported(family, role, "fp32", verify=False, **options)
    order, wanted = order_of(recipe, text), form_for(DEVICES["cpu"], attention=options.get("attention"))  # type: ignore[arg-type]
    direct = Job(Checkpoint.open(checkpoint), Source("tiny"), tmp_path / "direct", "int4", order=order, form=wanted)
    export(replace(direct, precision=order.recipe.precision, verify=False))
    export(requantize_job(FloatExport.open(artifact), tmp_path / "again", order, verify=False))
    same(tmp_path / "again", tmp_path / "direct")


@pytest.mark.parametrize("device", ("cuda", pytest.param("migraphx", marks=slow)))
def test_half_precision_is_the_checkpoint_rounded_to_it(
    exported: Exported, tmp_path: Path, text: Path, device: str
) -> None:
    """migraphx has static graphs over one data file."""
    checkpoint, artifact = exported("qwen2", "target", "fp16", device=device, dtype="float16", verify=False)
    order = order_of("int4-gptq", text)
    job = Job(
        Checkpoint.open(checkpoint), Source("tiny"), tmp_path / "direct", order=order, form=form_for(DEVICES[device])
    )
    export(replace(job, verify=False))
    manifest = export(requantize_job(FloatExport.open(artifact), tmp_path / "again", order, verify=False))
    same(tmp_path / "again", tmp_path / "direct")
    assert manifest.device == device and manifest.source == Source("tiny", export="fp16")


def test_the_int8_kv_cache_stays_or_comes(exported: Exported, tmp_path: Path, text: Path) -> None:
    checkpoint, artifact = exported("qwen2", "target", "fp32", verify=False)
    order = order_of("int4-rtn", text)
    whole = Job(Checkpoint.open(checkpoint), Source("tiny"), tmp_path / "whole", "fp32", kv_cache="int8", verify=False)
    export(whole)
    stays = export(requantize_job(FloatExport.open(tmp_path / "whole"), tmp_path / "stays", order, verify=False))
    comes = requantize_job(FloatExport.open(artifact), tmp_path / "comes", order, kv_cache="int8", verify=False)
    for manifest in (stays, export(comes)):
        assert (manifest.kv_cache, manifest.kv_dtype) == ("int8", "int8")
        drive(tmp_path / "stays", manifest).step(np.arange(9))
    with pytest.raises(BadInput, match="is int8; leave the option out"):
        requantize_job(FloatExport.open(tmp_path / "whole"), tmp_path / "no", order, kv_cache="int8-tensor")


def test_it_is_checked_against_torch_on_its_own_weights(exported: Exported, tmp_path: Path, text: Path) -> None:
    artifact = exported("qwen2", "target", "fp32", verify=False)[1]
    parity = export(requantize_job(FloatExport.open(artifact), tmp_path / "again", order_of("int8-rtn", text))).parity
    assert parity is not None and parity.mean_error < 0.05


LIGHT = """
import sys
from pathlib import Path
from pard_onnx.quantize_command import main
assert main([sys.argv[1], "--recipe", "int4-rtn", "--no-verify", "--output", sys.argv[2], "--json"]) == 0
heavy = {"torch", "transformers", "optimum"} & sys.modules.keys()
assert not heavy, heavy
"""


def test_without_text_and_check_it_needs_no_torch(exported: Exported, tmp_path: Path) -> None:
    artifact = exported("qwen2", "target", "fp32", verify=False)[1]
    subprocess.run([sys.executable, "-c", LIGHT, str(artifact), str(tmp_path / "out")], check=True, cwd=tmp_path)
    assert Manifest.read(tmp_path / "out").precision == "int4"
