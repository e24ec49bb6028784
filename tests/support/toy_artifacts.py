"""Fixtures that conftest.py hands on: toy artifact folders, scripted models for the loop, and a fake onnxruntime."""

import json
import sys
from collections.abc import Callable, Iterator
from math import inf
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import toy as graphs
from fake_onnxruntime import FakeOnnxruntime
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from pard_onnx.models.manifest import KV_MARGIN, File, Manifest, Source
from pard_onnx.models.precision import recipe
from pard_onnx.models.spec import ModelSpec, Pard, Rope, TargetFeatures, Vocabulary
from pard_onnx.runtime.providers import discovery as installed
from pard_onnx.runtime.providers import memory as device_memory
from pard_onnx.runtime.tuning import self_check
from pard_onnx.testing import MASK, ScriptedDraft, ScriptedDrafter, ScriptedTarget

SPECIAL = ["<|end|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# The template of a model that thinks and calls tools, in the form of Qwen3's
QWEN_LIKE = """{%- if tools %}{{- '<|im_start|>system\n<tools>' }}{%- for tool in tools %}{{- '\n' + (tool | tojson) }}
{%- endfor %}{{- '\n</tools><|im_end|>\n' }}{%- endif %}
{%- for message in messages %}{{- '<|im_start|>' + message.role + '\n' }}
{%- if message.reasoning_content and loop.index0 > messages | length - 3 %}
{{- '<think>\n' + message.reasoning_content + '\n</think>\n\n' }}{%- endif %}{{- message.content }}
{%- for call in message.tool_calls or [] %}{{- '\n<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- call.function.arguments | tojson }}{{- '}\n</tool_call>' }}{%- endfor %}{{- '<|im_end|>\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- if begun %}{{- '<think>\n' }}{%- endif %}
{%- endif %}"""


@pytest.fixture(scope="session")
def toy() -> ModuleType:
    """tests/support/toy.py"""
    return graphs


def tokenizer(size: int, text: str = "the quick brown fox jumps over the lazy dog") -> Tokenizer:
    """A byte-level BPE; special tokens take the last ids."""
    out = Tokenizer(models.BPE())
    out.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    out.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size - len(SPECIAL), initial_alphabet=alphabet, show_progress=False)
    out.train_from_iterator([text] * 3, trainer)
    out.add_special_tokens(SPECIAL)
    assert out.get_vocab_size() == size, out.get_vocab_size()
    return out


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., Tokenizer]:
    return tokenizer


def features_of(shape: Any) -> TargetFeatures | None:
    """What a draft of this shape reads of its target."""
    width = len(shape.features) * shape.hidden
    return TargetFeatures(shape.features, width, scale=1.0, bias=shape.bias) if shape.features else None


def manifest(
    shape: Any, role: str, folder: Path, precision: str, eos: tuple[int, ...], dtype: str, template: str
) -> Manifest:
    spec = ModelSpec(
        family="qwen2", layers=shape.layers, hidden=shape.hidden, intermediate=shape.hidden, heads=shape.heads,
        kv_heads=shape.kv_heads, head_dim=shape.head_dim, norm_eps=1e-6, rope=Rope(100.0), qk_norm=False,
        qkv_bias=False, tied=False, max_positions=shape.kv_rows, dtype="float32",
        vocabulary=Vocabulary(shape.rows, shape.size, eos), chat_template=template,
        pard=Pard(shape.mask_id, features=features_of(shape)) if role == "draft" else None,
    )  # fmt: skip
    return Manifest(
        role=role, spec=spec, precision=precision, recipe=recipe(precision), opset=21, attention="gqa",
        capacity=shape.kv_rows - KV_MARGIN, kv_rows=shape.kv_rows, kv_dtype=dtype,
        files=tuple(File.of(path) for path in sorted(folder.iterdir())), source=Source(f"toy-{role}"), tools=(),
        feature_layers=shape.features if role == "target" else (),
    )  # fmt: skip


@pytest.fixture(scope="session")
def write_artifact(toy: ModuleType) -> Callable[..., Path]:
    """Writes a toy artifact folder: write_artifact(folder, role, seed=1, **options) -> folder."""

    def write(
        folder: Path, role: str, *, seed: int = 1, precision: str = "fp32", eos: tuple[int, ...] = (),
        text: str = "the quick brown fox jumps over the lazy dog", dtype: str = "float32",
        template: str = TEMPLATE, **shape: Any,
    ) -> Path:  # fmt: skip
        wanted = toy.Shape(**shape)
        make = {"target": toy.target, "draft": toy.draft}[role]
        toy.write(make(wanted, seed, {"float32": toy.FLOAT, "float16": toy.FLOAT16}[dtype]), folder)
        tokenizer(wanted.size, text).save(str(folder / "tokenizer.json"))
        config = {"bos_token": None, "eos_token": {"content": "<|im_end|>"}}
        (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
        manifest(wanted, role, folder, precision, eos, dtype, template).write(folder)
        return folder

    return write


@pytest.fixture(scope="session")
def pair_folders(write_artifact: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A target and a draft of the same weights: it proposes well, but not always."""
    root = tmp_path_factory.mktemp("toy pär")
    return write_artifact(root / "target", "target"), write_artifact(root / "draft", "draft", rows=284)


@pytest.fixture(scope="session")
def fakes() -> SimpleNamespace:
    """The scripted classes: fakes.Target, fakes.Draft, fakes.Drafter."""
    return SimpleNamespace(Target=ScriptedTarget, Draft=ScriptedDraft, Drafter=ScriptedDrafter, MASK=MASK, VOCABULARY=7)


FOUND_ONCE = (
    device_memory.start_provider,
    installed._register,
    installed.windows_ml_catalog,
    installed.windows_ml_library,
)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., FakeOnnxruntime]]:
    """device("CUDAExecutionProvider", ...): onnxruntime with these providers, faked, and nothing known about them."""
    for found_once in FOUND_ONCE:
        found_once.cache_clear()
    monkeypatch.setenv("PARD_ONNX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(self_check, "SLOW", inf)  # what the fake takes says nothing

    def install(*providers: str, **more: Any) -> FakeOnnxruntime:
        fake = FakeOnnxruntime(*providers, **more)
        monkeypatch.setitem(sys.modules, "onnxruntime", fake)
        return fake

    yield install
    for found_once in FOUND_ONCE:
        found_once.cache_clear()
