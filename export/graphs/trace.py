"""transformers' modelling code to an abstract graph, without a weight in memory.

The model is built and traced under fake tensors. Before tracing, its leaves are swapped for modules
that emit one abstract operator each, in the domain `pard`, carrying the checkpoint's name of the
weights instead of the weights:

  pard.Linear(x) {name, out, bias}      x [.., in] to [.., out]
  pard.Norm(x) {name, epsilon}          RMS norm over the last axis
  pard.Embedding(ids) {name, hidden, scale}   scale: what the rows are multiplied by
  pard.LastRows(x, n)                   the last n rows of axis 1, all if n is 0

Features, the hidden states that a PARD-2 draft reads, are what enters a decoder layer, and what the last norm gives.

Attention enters through transformers' AttentionInterface (attention.py). What is left, the order of
operations, residuals and activations, is the modelling code's own. The leaves are found by the exact classes
that the family names (models/families); a module that holds weights and is none of them is refused.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from optimum.exporters.tasks import TasksManager
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from pard_onnx.models.checkpoints.config import transformers_refusals
from pard_onnx.models.devices import FUSED_OPSET
from pard_onnx.models.errors import BadCheckpoint
from pard_onnx.models.families import FAMILIES, Family
from pard_onnx.models.spec import ModelSpec
from pard_onnx.quantize.calibration.layers import rotary_tables, transformers_config

from .attention import LayerCaches, Variant, table_name
from .tape import DOMAIN, FEATURE_ROWS, HIDDEN_STATES

TASK = "text-generation"
OPSET = FUSED_OPSET  # loads in every provider's wheel since onnxruntime 1.22
_symbolic = torch.onnx.ops.symbolic
Attributes = dict[str, int | float | str | bool | Sequence[int] | Sequence[float] | Sequence[str] | Sequence[bool]]
# It tells of every optional package that is not installed.
logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)


@dataclass(frozen=True, slots=True)
class Trace:
    """graph: inputs `ids`, `rows_to_keep` [1], past and the variant's extra inputs; outputs logits and present. With
    features also the input FEATURE_ROWS [1] and the output HIDDEN_STATES.
    tables: those of the inputs that are rotary tables, [rows, ...]."""

    model: ir.Model
    tables: dict[str, Tensor]


class _Linear(nn.Module):
    def __init__(self, name: str, source: nn.Linear) -> None:
        super().__init__()
        self.name, self.out, self.biased = name, source.out_features, source.bias is not None

    def forward(self, x: Tensor) -> Tensor:
        attributes: Attributes = {"name": self.name, "out": self.out, "bias": int(self.biased)}
        shape = (*x.shape[:-1], self.out)
        return _symbolic(f"{DOMAIN}::Linear", [x], attributes, dtype=x.dtype, shape=shape, version=1)


class _Norm(nn.Module):
    """What is added to its weight is no part of the operator: the weight is stored with it (store.py)."""

    def __init__(self, name: str, source: nn.Module, epsilon: str) -> None:
        super().__init__()
        self.name, self.epsilon = name, float(getattr(source, epsilon))

    def forward(self, x: Tensor) -> Tensor:
        attributes: Attributes = {"name": self.name, "epsilon": self.epsilon}
        return _symbolic(f"{DOMAIN}::Norm", [x], attributes, dtype=x.dtype, shape=x.shape, version=1)


class _Embedding(nn.Module):
    def __init__(self, name: str, source: nn.Embedding, scale: float = 1.0) -> None:
        super().__init__()
        self.name, self.hidden, self.dtype, self.scale = name, source.embedding_dim, source.weight.dtype, scale

    def forward(self, ids: Tensor) -> Tensor:
        attributes: Attributes = {"name": self.name, "hidden": self.hidden, "scale": self.scale}
        shape = (*ids.shape, self.hidden)
        return _symbolic(f"{DOMAIN}::Embedding", [ids], attributes, dtype=self.dtype, shape=shape, version=1)


class _Unrotated(nn.Module):
    """Stands for the rotary embedding: the attention operator rotates."""

    def __init__(self, name: str, source: nn.Module) -> None:
        super().__init__()

    def forward(self, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> tuple[Tensor, Tensor]:
        return x, x


Leaf = Callable[[str, Any], nn.Module]  # of a module's name in the model, and the module


def _leaves(family: Family, spec: ModelSpec, model: nn.Module) -> dict[type, Leaf]:
    """By exact class: torch's own two, and the family's, which stand beside its model in transformers."""
    modelling: Any = sys.modules[type(model).__module__]
    found: dict[type, Leaf] = {
        nn.Linear: _Linear,
        nn.Embedding: _Embedding,
        getattr(modelling, family.norm.class_name): lambda name, source: _Norm(name, source, family.norm.epsilon),
        getattr(modelling, family.rotary): _Unrotated,
    }
    if family.embedding is not None:
        scale = spec.embedding_scale or 1.0
        scaled = getattr(modelling, family.embedding.class_name)
        found[scaled] = lambda name, source: _Embedding(name, source, scale)
    return found


def swap(module: nn.Module, leaves: Mapping[type, Leaf], prefix: str = "") -> None:
    """Put each leaf in the place of the module that it is made of. Raises BadCheckpoint for a module that holds
    parameters or buffers and is no leaf: it would be traced with what it holds, or lose it."""
    for name, child in list(module.named_children()):
        leaf = leaves.get(type(child))
        if leaf is not None:
            setattr(module, name, leaf(prefix + name, child))
        elif any(held is not None for held in (*child._parameters.values(), *child._buffers.values())):
            raise BadCheckpoint(
                f"{prefix}{name} is a {type(child).__name__}, which holds weights and which its family's file in "
                "models/families does not name; this model cannot be exported"
            )
        else:
            swap(child, leaves, f"{prefix}{name}.")


class _Trunk(nn.Module):
    """ids to logits of the last `rows_to_keep` rows, with the caches as explicit inputs and outputs.

    feature_layers: as TargetFeatures.layers; with any, the features of the last `feature_rows` rows are given too.
    """

    def __init__(self, model: Any, spec: ModelSpec, feature_layers: Sequence[int] = ()) -> None:
        super().__init__()
        self.model: Any = model
        self.spec = spec
        self.feature_layers = feature_layers
        self.states: dict[int, Tensor] = {}  # by their places in transformers' list of hidden states
        for place in (_place(spec, layer) for layer in feature_layers):
            if place < spec.layers:
                model.model.layers[place].register_forward_pre_hook(partial(self._keep, place), with_kwargs=True)

    def _keep(self, place: int, _: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        self.states[place] = inputs[0] if inputs else named["hidden_states"]

    def forward(
        self,
        ids: Tensor,
        rows_to_keep: Tensor,
        extra: dict[str, Tensor],
        past: list[tuple[Tensor, Tensor]],
        feature_rows: Tensor | None = None,
    ) -> tuple[Any, ...]:
        caches = LayerCaches(self.spec, past, extra)
        hidden = self.model.model(input_ids=ids, use_cache=False, caches=caches).last_hidden_state
        found = self.model.lm_head(_last_rows(hidden, rows_to_keep)), [caches.present[i] for i in range(len(past))]
        if feature_rows is None:
            return found
        self.states[self.spec.layers] = hidden
        states = [self.states[_place(self.spec, layer)] for layer in self.feature_layers]
        kept = [_last_rows(state, feature_rows) for state in states]
        return *found, kept[0] if len(kept) == 1 else torch.cat(kept, dim=-1)


def _last_rows(x: Tensor, count: Tensor) -> Tensor:
    return _symbolic(f"{DOMAIN}::LastRows", [x, count], dtype=x.dtype, shape=x.shape, version=1)


def _place(spec: ModelSpec, layer: int) -> int:
    """The place of a feature's layer in transformers' list, which begins with what enters the first layer."""
    return spec.layers + 1 + layer


@contextlib.contextmanager
def _rotation_left_to_attention(model: nn.Module) -> Iterator[None]:
    """The modelling code rotates through a function of its module; while tracing it passes through."""
    modelling: Any = sys.modules[type(model).__module__]
    original = modelling.apply_rotary_pos_emb
    modelling.apply_rotary_pos_emb = lambda q, k, *_, **__: (q, k)
    try:
        yield
    finally:
        modelling.apply_rotary_pos_emb = original


def _no_mask(*_: Any, **__: Any) -> None:
    """Causality is the attention operator's."""


def trace(
    folder: Path,
    spec: ModelSpec,
    variant: Variant,
    rows: int,
    dtype: torch.dtype,
    feature_layers: Sequence[int] = (),
) -> Trace:
    """Trace the checkpoint in `folder` (its config alone is read). Raises BadCheckpoint.

    rows: of the KV buffers and rotary tables; dtype: of activations. feature_layers: of the output `hidden_states`,
    which is not there without any.
    """
    with transformers_refusals(folder):
        # The dtype that was understood: transformers refuses some names that tools write
        config = transformers_config(folder, spec)
    config.vocab_size = spec.vocabulary.rows  # an adapter may have resized the embedding
    name = f"pard_onnx_{variant.name}"
    AttentionInterface.register(name, variant.attend)
    AttentionMaskInterface.register(name, _no_mask)
    build = TasksManager.get_model_class_for_task(TASK, framework="pt", model_type=spec.family)
    with FakeTensorMode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.export's own notices
        with transformers_refusals(folder):
            model = build.from_config(config, attn_implementation=name, dtype=dtype).eval()
        rotary = type(model.model.rotary_emb)
        try:
            swap(model, _leaves(FAMILIES[spec.family], spec, model))
        except BadCheckpoint as error:
            raise BadCheckpoint(f"{folder / 'config.json'}: {error}") from None
        with _rotation_left_to_attention(model):
            trunk = _Trunk(model, spec, feature_layers)
            program = _export(trunk, *_dummies(spec, variant, dtype, features=bool(feature_layers)))
    return Trace(program, _rotary_tables(rotary(config), spec, variant, rows))


def _dummies(spec: ModelSpec, variant: Variant, dtype: torch.dtype, *, features: bool) -> tuple[Any, Any]:
    """Example arguments and which of their dimensions are dynamic. The numbers only have to differ."""
    batch, sequence, rows, layers = 2, 3, 32, spec.layers
    shape = (batch, spec.kv_heads, rows, spec.head_dim)
    past = [(torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)) for _ in range(layers)]
    extra = variant.extra(batch, sequence, rows + 1)
    for rotary in spec.rotaries:  # tensors of their own: one that comes in twice would be one input
        cos, sin = (torch.zeros(rows + 1, spec.head_dim // 2, dtype=dtype) for _ in range(2))
        extra |= {table_name(name, rotary): table.clone() for name, table in variant.tables(cos, sin).items()}
    count = torch.zeros(1, dtype=torch.int64)
    arguments: tuple[Any, ...] = (torch.zeros(batch, sequence, dtype=torch.int64), count, extra, past)
    dim = torch.export.Dim
    cache = {0: dim("batch"), 2: dim("rows")}
    dynamic: tuple[Any, ...] = (
        {0: dim("batch"), 1: dim("sequence")},
        None,
        {k: {i: dim(name) for i, name in enumerate(variant.dims.get(k, ()))} for k in extra},
        [(cache, cache)] * layers,
    )
    if features:
        arguments, dynamic = (*arguments, count.clone()), (*dynamic, None)
    return arguments, dynamic


def _export(trunk: _Trunk, arguments: Any, dynamic: Any) -> ir.Model:
    layers = range(len(arguments[3]))
    caches = ["{}." + f"{i}.{part}" for i in layers for part in ("key", "value")]
    rows, states = ([FEATURE_ROWS], [HIDDEN_STATES]) if trunk.feature_layers else ([], [])
    program = torch.onnx.export(
        trunk,
        arguments,
        dynamo=True,
        optimize=False,
        verbose=False,
        opset_version=OPSET,
        dynamic_shapes=dynamic,
        input_names=["ids", "rows_to_keep", *arguments[2], *(c.format("past_key_values") for c in caches), *rows],
        output_names=["logits", *(c.format("present") for c in caches), *states],
    )
    assert program is not None
    return program.model


def _rotary_tables(module: nn.Module, spec: ModelSpec, variant: Variant, rows: int) -> dict[str, Tensor]:
    """The variant's tables for each rotary rule, from the family's own module: the scalings are transformers'."""
    found: dict[str, Tensor] = {}
    for rotary, tables in rotary_tables(module, spec, torch.arange(rows)[None]).items():
        cos, sin = (table[0, :, : spec.head_dim // 2].contiguous() for table in tables)
        found |= {table_name(name, rotary): table for name, table in variant.tables(cos, sin).items()}
    return found
