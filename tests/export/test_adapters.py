"""LoRA adapters: merged tensors and exports, compared with peft."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import save_json, save_safetensors
from transformers import AutoModelForCausalLM

from pard_onnx.export.verify.drive import drive
from pard_onnx.export.verify.reference import reference_logits
from pard_onnx.export_command import main
from pard_onnx.models.checkpoints import tensors as reading
from pard_onnx.models.checkpoints.adapter import Adapter, _Merge
from pard_onnx.models.checkpoints.checkpoint import EMBEDDING, Checkpoint
from pard_onnx.models.checkpoints.tensors import HEAD, find_tensors, read_tensor
from pard_onnx.models.manifest import Manifest
from pard_onnx.quantize_command import main as quantize_main

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")  # peft's own notices
Tiny = Callable[..., Path]
IDS = torch.arange(20, 60)[None]

ADAPTERS: dict[str, dict[str, Any]] = {
    "some modules": {"target_modules": ["q_proj", "down_proj"]},
    "trained biases": {"target_modules": ["q_proj", "down_proj"], "bias": "lora_only"},
    "all biases": {"target_modules": ["q_proj"], "bias": "all"},
    "biases of B": {"target_modules": ["q_proj", "k_proj"], "lora_bias": True},
    "all linear": {
        "target_modules": "all-linear",
        "rank_pattern": {"q_proj": 3, r"layers\.1\..*down_proj": 5},
        "alpha_pattern": {"mlp.up_proj": 32, "^model.layers.0.self_attn.k_proj": 5},
    },
    "rank-stabilized": {"target_modules": "all-linear", "use_rslora": True, "r": 5},
    "a pattern": {"target_modules": r"(?i).*\.(Q|k)_PROJ", "exclude_modules": ["layers.1.self_attn.k_proj"]},
    "an excluding pattern": {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*\.0\..*v_proj"},
    "one layer": {"target_modules": ["q_proj", "o_proj", "gate_proj"], "layers_to_transform": [1]},
    "layers by name": {"target_modules": ["o_proj"], "layers_to_transform": 0, "layers_pattern": "layers"},
    "norms": {"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm", "norm"]},
    "a block": {"target_modules": ["q_proj", "up_proj"], "modules_to_save": ["mlp"]},
    "a head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "an embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "both": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    "both tied": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [5, 1, 300]},
    "named tokens": {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [7, 2]}},
}
# Adapters that peft merges into both of two tied matrices, or twice into one, other than it runs them
OF_THE_EMBEDDING: dict[str, dict[str, Any]] = {
    "a product of the embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "a product of the head": {"target_modules": ["lm_head"]},
    "products of both": {"target_modules": ["embed_tokens", "lm_head"], "use_rslora": True},
    "tied products": {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
}
BASES = (("qwen2", True, "float32"), ("qwen2", False, "bfloat16"), ("gemma3_text", True, "float16"))


def trained(base: Path, folder: Path, rows: int | None = None, **config: Any) -> Path:
    """An adapter of random values for a base, saved by peft. rows: to which its embedding is resized."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base)
    if rows:
        model.resize_token_embeddings(rows, mean_resizing=False)
    model = peft.get_peft_model(
        model, peft.LoraConfig(**{"r": 2, "lora_alpha": 7, "init_lora_weights": False, **config})
    )
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) * 0.05
    model.save_pretrained(folder)
    return folder


def loaded(base: Path, adapter: Path, rows: int | None = None, dtype: Any = "auto") -> Any:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    if rows:
        model.resize_token_embeddings(rows, mean_resizing=False)
    return peft.PeftModel.from_pretrained(model, adapter).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(IDS).logits.float()
    return found


@pytest.mark.parametrize("base", BASES, ids=str)
@pytest.mark.parametrize("case", ADAPTERS)
def test_tensors_are_those_that_peft_merges(
    case: str, base: tuple[str, bool, str], tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, tied, dtype = base
    if case == "biases of B" and family != "qwen2":
        pytest.skip("peft refuses it: the base has no biases")
    folder = tiny(tmp_path / "base", family, tied=tied, dtype=dtype)
    adapter = trained(folder, tmp_path / "adapter", **ADAPTERS[case])
    monkeypatch.setattr(reading, "BLOCK_VALUES", 700)  # a few rows
    checkpoint = Checkpoint.open(folder, adapter)
    wanted = loaded(folder, adapter).merge_and_unload()
    expected = wanted.state_dict()
    for name, tensor in checkpoint.tensors.items():
        blocks = [read_tensor(tensor, rows) for rows in reading.row_blocks(tensor.shape)]
        np.testing.assert_array_equal(np.concatenate(blocks), expected[name].float().numpy(), err_msg=name)
    assert checkpoint.spec.tied == torch.equal(wanted.lm_head.weight, wanted.model.embed_tokens.weight)


@pytest.mark.parametrize("tied", (True, False))
@pytest.mark.parametrize("case", OF_THE_EMBEDDING)
def test_tied_matrices_are_changed_as_the_adapter_runs(case: str, tied: bool, tiny: Tiny, tmp_path: Path) -> None:
    """peft itself warns of merging these where embedding and head are tied."""
    folder = tiny(tmp_path / "base", "qwen2", tied=tied)
    adapter = trained(folder, tmp_path / "adapter", **OF_THE_EMBEDDING[case])
    checkpoint = Checkpoint.open(folder, adapter)
    wanted = logits(loaded(folder, adapter))
    torch.testing.assert_close(reference_logits(checkpoint, IDS), wanted, atol=1e-5 * float(wanted.std()), rtol=0)
    assert checkpoint.spec.tied == (tied and case == "tied products")


@pytest.mark.parametrize("role", ("target", "draft"))
@pytest.mark.parametrize("tied", (True, False))
def test_an_export_computes_what_peft_computes(
    tied: bool, role: str, tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny(tmp_path / "base", "llama", role, tied=tied)
    adapter = trained(folder, tmp_path / "my adapter", target_modules="all-linear", modules_to_save=["lm_head"])
    arguments = ["--model", str(folder), "--adapter", str(adapter), "--output", str(tmp_path / "out")]
    assert main([*arguments, "--precision", "fp32", "--json"]) == 0
    source = json.loads(capsys.readouterr().out)["source"]
    assert source["adapter"] == {
        "name": "my adapter",
        "sha256": Checkpoint.open(folder, adapter).adapter.sha256(),  # type: ignore[union-attr]
        "revision": None,
    }
    manifest = Manifest.read(tmp_path / "out")
    assert manifest.parity is not None and manifest.parity.max_error < 1e-3
    found = drive(tmp_path / "out", manifest).step(IDS[0].numpy())
    size = manifest.spec.vocabulary.size
    wanted = logits(loaded(folder, adapter))[0].numpy()
    np.testing.assert_allclose(found[:, :size], wanted[-len(found) :, :size], atol=2e-4)


@pytest.mark.parametrize("tied", (True, False))
def test_resized_embeddings_and_the_adapters_tokenizer(tied: bool, tiny: Tiny, tmp_path: Path) -> None:
    folder = tiny(tmp_path / "base", "qwen2", tied=tied)
    adapter = trained(folder, tmp_path / "adapter", 336, target_modules=["q_proj"])
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / name, adapter / name)
    (adapter / "chat_template.jinja").write_text("{{ 'mine' }}")
    out = tmp_path / "out"
    arguments = [str(folder), "--recipe", "int8-rtn", "--adapter", str(adapter), "--output", str(out)]
    assert quantize_main(arguments) == 0
    manifest = Manifest.read(out)
    assert (manifest.spec.vocabulary.rows, manifest.spec.tied) == (336, tied)
    assert manifest.spec.chat_template == "{{ 'mine' }}" == (out / "chat_template.jinja").read_text()
    assert json.loads((out / "config.json").read_text())["vocab_size"] == 336
    wanted = logits(loaded(folder, adapter, 336))
    torch.testing.assert_close(reference_logits(Checkpoint.open(folder, adapter), IDS), wanted, atol=1e-4, rtol=0)


def test_an_export_with_an_adapter_is_quantized_like_its_checkpoint(tiny: Tiny, tmp_path: Path) -> None:
    folder = tiny(tmp_path / "base", "qwen2", tied=True)
    adapter = trained(folder, tmp_path / "adapter", 336, target_modules=["embed_tokens", "q_proj"])
    made = ["--adapter", str(adapter), "--output"]
    assert main(["--model", str(folder), "--precision", "fp32", *made, str(tmp_path / "floats")]) == 0
    assert quantize_main([str(folder), "--recipe", "int8-rtn", *made, str(tmp_path / "direct")]) == 0
    assert quantize_main([str(tmp_path / "floats"), "--recipe", "int8-rtn", "--output", str(tmp_path / "again")]) == 0
    one, two = ((tmp_path / name / "model.onnx.data").read_bytes() for name in ("direct", "again"))
    assert one == two


def test_a_report_compares_with_the_merged_reference(
    tiny: Tiny, tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny(tmp_path / "base", "llama")
    adapter = trained(folder, tmp_path / "adapter", target_modules=["q_proj", "down_proj"])
    made = ["--adapter", str(adapter)]
    assert main(["--model", str(folder), "--precision", "fp32", *made, "--output", str(tmp_path / "out")]) == 0
    report = ["--report", str(tmp_path / "out"), "--text", str(text), "--tokens", "64", "--json"]
    capsys.readouterr()
    assert quantize_main([*report, "--reference", str(folder), *made]) == 0
    fidelity = json.loads(capsys.readouterr().out)["models"][0]["fidelity"][0]
    assert fidelity["divergence"] < 1e-6
    assert quantize_main([*report, *made]) == 2
    assert "is merged into the --reference; name its checkpoint" in capsys.readouterr().err


# The rules of names

NAMES = ["q_proj", "k_proj", "down_proj", "self_attn.q_proj", "layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"]
NAMES += ["proj", "lm_head", "embed_tokens", "mlp", "1.self_attn.q_proj", "up_proj"]
PATTERNS = [*NAMES, r".*\.[qv]_proj", r"^model\.layers\.\d+\.mlp.*", "lm_head|q_proj", ".*", r"layers\.1\..*", "q_pro"]
MODULES = [
    f"model.layers.{i}.{name}"
    for i in (0, 1, 10)
    for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.down_proj")
] + ["lm_head", "model.embed_tokens"]
some = st.lists(st.sampled_from(NAMES), max_size=3, unique=True)
CONFIGS = st.fixed_dictionaries(
    {
        "target_modules": st.one_of(some, st.sampled_from(PATTERNS)),
        "exclude_modules": st.one_of(st.none(), some, st.sampled_from(PATTERNS)),
        "modules_to_save": st.one_of(st.none(), some),
        "rank_pattern": st.dictionaries(st.sampled_from(PATTERNS), st.integers(1, 9), max_size=3),
        "layers": st.one_of(st.none(), st.integers(0, 2), st.lists(st.sampled_from([0, 1, 10]), max_size=2)),
        "layers_pattern": st.sampled_from([None, "layers", ["h", "layers"], "h", []]),
    }
)


class _Empty:
    """A tensor of which only the shape is asked for."""

    dtype, nbytes, shape = "F32", 0, (4, 4)


@settings(max_examples=300, deadline=None)
@given(CONFIGS)
def test_modules_are_matched_as_peft_matches_them(config: dict[str, Any]) -> None:
    from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists
    from peft.utils.other import get_pattern_key

    layers = config.pop("layers")
    if not isinstance(config["target_modules"], str):
        config["layers_to_transform"] = layers
    if isinstance(config["target_modules"], str) or layers is None:
        config.pop("layers_pattern")
    wanted = peft.LoraConfig(r=8, **config)
    found = check_target_module_exists
    expected = {m for m in MODULES if (hit := found(wanted, m)) and not isinstance(hit, _ExcludedModule)}
    values = {"peft_type": "LORA", "r": 8, **config}
    merge = _Merge(_adapter(values), {f"{module}.weight": _Empty() for module in MODULES}, False)  # type: ignore[dict-item,misc]
    assert set(merge._targets()) == expected
    for module in MODULES:
        key = get_pattern_key(wanted.rank_pattern.keys(), module)
        assert merge._number("rank_pattern", module, "r") == wanted.rank_pattern.get(key, wanted.r)


def _adapter(values: dict[str, Any]) -> Adapter:
    from pard_onnx.models.checkpoints.config import Config

    return Adapter(Path("adapter"), Config(Path("adapter/adapter_config.json"), values), {})


# What is refused


@pytest.fixture
def pair(tiny: Tiny, tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """A base, and an adapter for its q_proj matrices."""
    base, adapter = tiny(tmp_path / "base", "llama"), tmp_path / "adapter"
    adapter.mkdir()
    write(adapter)
    yield base, adapter


def write(adapter: Path, tensors: dict[str, tuple[int, ...]] | None = None, **config: Any) -> None:
    """tensors: shapes by names; default: those of q_proj."""
    shapes = {
        f"base_model.model.model.layers.{i}.self_attn.q_proj.lora_{part}.weight": shape
        for i in range(2)
        for part, shape in (("A", (2, 64)), ("B", (64, 2)))
    }
    shapes = shapes | (tensors or {})
    save_safetensors(
        adapter / "adapter_model.safetensors",
        {name: np.full(shape, 0.1, np.float32) for name, shape in shapes.items() if shape is not None},
    )
    values = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    save_json(adapter / "adapter_config.json", {**values, "base_model_name_or_path": "org/base", **config})


PLACE = "base_model.model.model.layers.0."
CONFIGS_REFUSED: dict[str, Any] = {
    "peft_type": "IA3",
    "use_dora": True,
    "use_qalora": True,
    "alora_invocation_tokens": [1, 2],
    "layer_replication": [[0, 1]],
    "megatron_config": {"a": 1},
    "target_parameters": ["mlp.up_proj.weight"],
    "kasa_config": {"a": 1},
    "a_key_of_tomorrow": 3,
    "init_lora_weights": "pissa_niter_4",
    "rank_pattern": {"q_proj": 3},
    "lora_alpha": "4",
    "target_modules": "q_proj(",
    "exclude_modules": 3,
    "modules_to_save": ["lm_head"],
    "layers_to_transform": "0",
    "layers_pattern": 1,
    "trainable_token_indices": [1],
}


@pytest.mark.parametrize("key", CONFIGS_REFUSED)
def test_configurations_that_are_refused_by_name(
    key: str, pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    base, adapter = pair
    write(adapter, **{key: CONFIGS_REFUSED[key]})
    assert_refused(base, adapter, capsys, "rank" if key == "rank_pattern" else key)


TENSORS_REFUSED = {
    "a tensor of what is not targeted": {f"{PLACE}mlp.up_proj.lora_A.weight": (2, 64)},
    "half of a product": {f"{PLACE}self_attn.q_proj.lora_B.weight": None},
    "no product": {
        f"{PLACE}self_attn.q_proj.lora_B.weight": None,
        f"{PLACE}self_attn.q_proj.lora_A.weight": None,
    },
    "another width": {f"{PLACE}self_attn.q_proj.lora_A.weight": (2, 65)},
    "another height": {f"{PLACE}self_attn.q_proj.lora_B.weight": (63, 2)},
    "vectors": {f"{PLACE}self_attn.q_proj.lora_A.weight": (2,)},
    "magnitudes": {f"{PLACE}self_attn.q_proj.lora_magnitude_vector": (64,)},
    "an unknown module": {f"{PLACE}unknown.weight": (64,)},
    "a norm of another size": {f"{PLACE}input_layernorm.weight": (65,)},
    "another prefix": {"layers.0.self_attn.q_proj.lora_A.weight": (2, 64)},
}


@pytest.mark.parametrize("case", TENSORS_REFUSED)
def test_weights_that_do_not_fit_are_refused(
    case: str, pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    base, adapter = pair
    write(adapter, TENSORS_REFUSED[case])  # type: ignore[arg-type]
    assert_refused(base, adapter, capsys, "adapter_model.safetensors")


def assert_refused(base: Path, adapter: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    out = adapter.parent / "out"
    assert main(["--model", str(base), "--adapter", str(adapter), "--output", str(out)]) == 2
    err = capsys.readouterr().err
    assert name in err and len(err.splitlines()) == 1, err
    assert not out.exists()


def test_folders_that_are_no_adapters(pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    base, adapter = pair
    assert_refused(base, base, capsys, "no adapter_config.json, so not a LoRA adapter")
    assert_refused(base, adapter / "absent", capsys, "neither the folder of an adapter nor a hub id")
    assert_refused(base, adapter / "adapter_config.json", capsys, "is a file; name the folder of an adapter")
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    assert_refused(base, adapter, capsys, "adapter_model.bin is a pickle, which is never loaded")


def test_an_adapter_is_no_model(pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    base, adapter = pair
    assert main(["--model", str(adapter)]) == 2
    assert f"take --model org/base --adapter {adapter}" in capsys.readouterr().err
    shutil.copy(adapter / "adapter_config.json", base)
    assert main(["--model", str(base)]) == 2
    assert "holds an adapter (adapter_config.json) beside config.json" in capsys.readouterr().err


def test_a_quantized_base_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import quantized

    base, _ = quantized.write(tmp_path / "base", "gptq", family="llama")
    (tmp_path / "adapter").mkdir()
    write(tmp_path / "adapter")
    assert_refused(base, tmp_path / "adapter", capsys, "name the unquantized base with --model")


def test_an_export_takes_no_adapter(pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    base, adapter = pair
    out = base.parent / "floats"
    assert main(["--model", str(base), "--precision", "fp32", "--no-verify", "--output", str(out)]) == 0
    assert quantize_main([str(out), "--recipe", "int8-rtn", "--adapter", str(adapter)]) == 2
    assert "is exported already; an adapter is merged into the checkpoint" in capsys.readouterr().err


def test_the_default_folder_has_both_names(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    base, adapter = pair
    monkeypatch.chdir(tmp_path)
    assert main(["--model", str(base), "--adapter", str(adapter), "--no-verify"]) == 0
    assert (tmp_path / "base-adapter-int4" / "model.onnx").is_file()
    assert {EMBEDDING, HEAD} <= set(find_tensors(base))
