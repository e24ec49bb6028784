"""A GGUF file as a checkpoint: the folder of its configs and tokenizer in transformers' form, and its tensors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from pard_onnx.models.atomic import atomic_folder, sweep
from pard_onnx.models.cache_folder import made_cache_folder
from pard_onnx.models.checkpoints.quantization import QuantizationConfig
from pard_onnx.models.checkpoints.tensors import Tensor
from pard_onnx.models.errors import BadCheckpoint
from pard_onnx.models.families import shapes
from pard_onnx.models.spec import ModelSpec
from pard_onnx.models.system_errors import write_error

from .config import Architecture, architecture_of, config_values, named_tensors, stored_name
from .file import GgufFile
from .tokenizer import GgufTokenizer
from .types import GgufMatrix, GgufTensor

TEMPLATE = "tokenizer.chat_template"
ENDS = {"model.embed_tokens", "lm_head"}
GGUF = QuantizationConfig("gguf", "gguf", bits=None, group=None, zeros=False)


@dataclass(frozen=True, slots=True)
class GgufCheckpoint:
    """A GGUF file in transformers' terms."""

    file: Path
    architecture: Architecture
    folder: Path  # with config.json, generation_config.json, tokenizer.json and tokenizer_config.json; no weights
    tensors: Mapping[str, GgufTensor]  # by transformers' names

    @classmethod
    def open(cls, path: Path) -> GgufCheckpoint:
        """Read the header and write the folder. Raises BadCheckpoint, or `write_error` for the cache."""
        file = GgufFile.read(path)
        _, architecture = architecture_of(file)
        tokenizer = GgufTokenizer.read(file.metadata)
        ids = {"bos_token_id": tokenizer.special("bos"), "eos_token_id": tokenizer.ends()}
        config = config_values(file, ids | {"pad_token_id": tokenizer.special("padding")})
        tensors = named_tensors(file, architecture, config["num_attention_heads"], config["num_key_value_heads"])
        template = file.metadata.values.get(TEMPLATE)
        if template is not None and not isinstance(template, str):
            raise file.metadata.fault(TEMPLATE, "is no text in UTF-8; convert the model again")
        texts = {
            "config.json": _text(config),
            "generation_config.json": _text(ids),
            "tokenizer.json": tokenizer.json(),
            "tokenizer_config.json": _text(tokenizer.config(template)),
        }
        return cls(path, architecture, _written(texts), tensors)

    def needed(self, spec: ModelSpec) -> tuple[dict[str, Tensor], dict[str, GgufMatrix]]:
        """The tensors in floats, and the matrices in integers by their names without `.weight`.

        Raises BadCheckpoint where the file has others than a model of `spec` needs.
        """
        tensors: dict[str, Tensor] = {}
        packed: dict[str, GgufMatrix] = {}
        for name, shape in shapes(spec):
            tensor, own = self.tensors.get(name), stored_name(name, self.architecture)
            if tensor is None:
                raise BadCheckpoint(f"{self.file}: no tensor {own}; a {spec.family} checkpoint needs it")
            if tensor.shape != shape:
                raise BadCheckpoint(
                    f"{self.file}: tensor {own} is {list(tensor.shape)}; the metadata says {list(shape)}"
                )
            if len(shape) == 2 and tensor.kind.integers:
                packed[name.removesuffix(".weight")] = GgufMatrix(tensor)
            else:
                tensors[name] = tensor
        held = sum(prod(matrix.shape) for name, matrix in packed.items() if name not in ENDS)
        if 2 * held < sum(prod(shape) for name, shape in shapes(spec) if "layers" in name):
            # Most of the layers are in other types: a few matrices in integers make no quantized model
            tensors |= {f"{name}.weight": matrix.tensor for name, matrix in packed.items()}
            packed = {}
        for name in sorted(self.tensors):
            if name not in tensors and name.removesuffix(".weight") not in packed:
                own = stored_name(name, self.architecture)
                raise BadCheckpoint(f"{self.file}: has {own}, which a {spec.family} model of its metadata has not")
        return tensors, packed


def _text(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _written(texts: Mapping[str, str]) -> Path:
    """A folder of this package's cache with these files; its name is made of what they hold."""
    name = hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:32]
    folder = made_cache_folder() / "gguf" / name
    sweep(folder.parent)
    if folder.is_dir():
        return folder
    try:
        with atomic_folder(folder) as partial:
            for file, text in texts.items():
                (partial / file).write_text(text, encoding="utf-8", newline="\n")
    except OSError as error:
        if not folder.is_dir():  # else another process was faster
            raise write_error(folder, error, "name another folder in PARD_ONNX_CACHE") from error
    return folder
