"""A replica: a checkpoint with the shape of a public model that computes the same function as a shipped demo model.

    python benchmarks/replicas/replica.py --like Qwen2.5-1.5B --role target --output DIR
    python benchmarks/replicas/replica.py --like Qwen2.5-0.5B --role draft --output DIR
    python benchmarks/replicas/replica.py --like Qwen2.5-0.5B --role pard2-draft --reads Qwen2.5-7B --output DIR
    python benchmarks/replicas/replica.py --like Qwen3-8B --role target --random --output DIR

Its steps take as long as the public model's, and its tokens and its acceptance are the demo pair's. So speed can be
measured offline, by any program that reads Hugging Face checkpoints. Weights are written tensor by tensor in bfloat16;
widening.py describes how they are made. The demo models support contexts of up to 2048 tokens, whatever the public
model's limit is.

A pard2-draft is the draft with a projection of the hidden states of a target like --reads. The projection costs what a
trained one does, and its results are so small that they change no sum: both modes propose the same tokens, so that
their rounds differ in time alone. With --random, weights are random, and every geometry and family is possible: times
of steps are the public model's, tokens mean nothing.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Any

from pard_onnx.benchmarks.replicas.random_weights import RandomWeights, negligible
from pard_onnx.benchmarks.replicas.widening import Widening, obstacles
from pard_onnx.cli import Parser, exit_code, stages
from pard_onnx.export.output import replacing
from pard_onnx.models import demo
from pard_onnx.models.checkpoints.checkpoint import Checkpoint
from pard_onnx.models.checkpoints.config import read_config
from pard_onnx.models.checkpoints.projection import FOLDER, FOUR_LAYERS, WEIGHT
from pard_onnx.models.checkpoints.tensors import INDEX, ONE_FILE
from pard_onnx.models.checks import nearest_name
from pard_onnx.models.errors import BadInput
from pard_onnx.models.families import shapes
from pard_onnx.models.spec import ModelSpec, Rope, TargetFeatures

PARD2 = "pard2-draft"
ROLES = {"target": demo.TARGET, "draft": demo.DRAFT, PARD2: demo.DRAFT, "ar-draft": demo.AR_DRAFT}
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
COPIED = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
SHARD = 4_000_000_000  # bytes of a file at most, unless a single tensor is larger
BFLOAT16_BYTES = 2


@dataclass(frozen=True, slots=True)
class Geometry:
    """The shape of a public model."""

    family: str  # `model_type` in config.json
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    rows: int  # of the embedding matrix, padding included
    tied: bool
    theta: float
    max_positions: int
    norm_eps: float = 1e-6


GEOMETRIES = {
    "Qwen2.5-0.5B": Geometry("qwen2", 24, 896, 14, 2, 64, 4864, 151936, True, 1e6, 32768),
    "Qwen2.5-1.5B": Geometry("qwen2", 28, 1536, 12, 2, 128, 8960, 151936, True, 1e6, 32768),
    "Qwen2.5-3B": Geometry("qwen2", 36, 2048, 16, 2, 128, 11008, 151936, True, 1e6, 32768),
    "Qwen2.5-7B": Geometry("qwen2", 28, 3584, 28, 4, 128, 18944, 152064, False, 1e6, 32768),
    "DeepSeek-R1-Distill-Qwen-1.5B": Geometry("qwen2", 28, 1536, 12, 2, 128, 8960, 151936, False, 1e4, 131072),
    "Llama-3.2-1B": Geometry("llama", 16, 2048, 32, 8, 64, 8192, 128256, True, 5e5, 131072, 1e-5),
    "Llama-3.1-8B": Geometry("llama", 32, 4096, 32, 8, 128, 14336, 128256, False, 5e5, 131072, 1e-5),
    "Qwen3-0.6B": Geometry("qwen3", 28, 1024, 16, 8, 128, 3072, 151936, True, 1e6, 40960),
    "Qwen3-8B": Geometry("qwen3", 36, 4096, 32, 8, 128, 12288, 151936, False, 1e6, 40960),
}


def geometry_by_name(name: str, option: str = "--like") -> Geometry:
    """The geometry of the model `name`. Raises BadInput for an unknown one, with the nearest known one."""
    if name not in GEOMETRIES:
        nearest = nearest_name(name, GEOMETRIES, least_similarity=0.5)
        hint = f"the nearest known one is {nearest!r}" if nearest else f"known: {', '.join(GEOMETRIES)}"
        raise BadInput(f"{option} {name!r}: no such geometry; {hint}")
    return GEOMETRIES[name]


@dataclass(frozen=True, slots=True)
class TensorShape:
    """A tensor of the replica."""

    name: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return BFLOAT16_BYTES * prod(self.shape)


def widened_spec(small: ModelSpec, like: Geometry) -> ModelSpec:
    """The spec of `small` with the shape of another model."""
    return replace(
        small,
        family=like.family,
        layers=like.layers,
        hidden=like.hidden,
        intermediate=like.intermediate,
        heads=like.heads,
        kv_heads=like.kv_heads,
        head_dim=like.head_dim,
        norm_eps=like.norm_eps,
        rope=Rope(like.theta),
        tied=like.tied,
        max_positions=like.max_positions,
        vocabulary=replace(small.vocabulary, rows=like.rows),
    )


def random_spec(small: ModelSpec, like: Geometry) -> ModelSpec:
    """The spec of a model with another shape, and with the parts of its family."""
    return replace(widened_spec(small, like), qk_norm=like.family == "qwen3", qkv_bias=like.family == "qwen2")


def with_features(draft: ModelSpec, target: str) -> ModelSpec:
    """The spec of a draft that reads the hidden states of a target like the model `target`, as the published ones do.

    Raises BadInput for an unknown model, and for one of another family or with too few layers.
    """
    like = geometry_by_name(target, "--reads")
    if like.family != draft.family:
        raise BadInput(f"--reads {target}: is a {like.family}, and the draft a {draft.family}; name one of its family")
    if -min(FOUR_LAYERS) > like.layers + 1:
        raise BadInput(f"--reads {target}: has {like.layers} layers, too few for hidden state {min(FOUR_LAYERS)}")
    assert draft.pard
    features = TargetFeatures(FOUR_LAYERS, len(FOUR_LAYERS) * like.hidden)
    return replace(draft, pard=replace(draft.pard, spd_type="pard2", features=features))


def config(small: Checkpoint, wide: ModelSpec) -> dict[str, Any]:
    """The values of config.json, as in published checkpoints of the family, so that older programs can read it."""
    own = read_config(small.folder).values
    kept = ("bos_token_id", "eos_token_id", "pad_token_id", "pard_token", "spd_type")
    implied = wide.hidden == wide.heads * wide.head_dim  # published files then leave it out
    facts = {key: own[key] for key in kept if key in own}
    if not implied or wide.family != small.spec.family:
        facts["head_dim"] = wide.head_dim
    if wide.pard and (features := wide.pard.features):
        facts |= {"pard2": True, "spd_type": wide.pard.spd_type, "pard2_proj_bias": features.bias}
        facts |= {"pard2_scale": features.scale, "pard2_target_dim": features.width}
        facts["pard2_target_layers"] = list(features.layers)
    return facts | {
        "architectures": [ARCHITECTURES[wide.family]],
        "model_type": wide.family,
        "hidden_act": "silu",
        "hidden_size": wide.hidden,
        "intermediate_size": wide.intermediate,
        "num_hidden_layers": wide.layers,
        "max_window_layers": wide.layers,
        "num_attention_heads": wide.heads,
        "num_key_value_heads": wide.kv_heads,
        "max_position_embeddings": wide.max_positions,
        "rms_norm_eps": wide.norm_eps,
        "rope_theta": wide.rope.theta,
        "tie_word_embeddings": wide.tied,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": wide.vocabulary.rows,
    }


def shards(tensors: Sequence[TensorShape]) -> dict[str, list[TensorShape]]:
    """The tensors of each file, in order; a single file has the name that needs no index."""
    parts: list[list[TensorShape]] = [[]]
    for tensor in tensors:
        if parts[-1] and sum(t.nbytes for t in parts[-1]) + tensor.nbytes > SHARD:
            parts.append([])
        parts[-1].append(tensor)
    if len(parts) == 1:
        return {ONE_FILE: parts[0]}
    return {f"model-{i:05}-of-{len(parts):05}.safetensors": part for i, part in enumerate(parts, 1)}


def header(tensors: Sequence[TensorShape]) -> bytes:
    """The header of a safetensors file in which tensors follow one another without gaps."""
    ends = list(accumulate((t.nbytes for t in tensors), initial=0))
    facts: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for tensor, start, end in zip(tensors, ends, ends[1:], strict=False):
        facts[tensor.name] = {"dtype": "BF16", "shape": tensor.shape, "data_offsets": [start, end]}
    text = json.dumps(facts).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write(small: Checkpoint, wide: ModelSpec, folder: Path, *, drawn: bool = False) -> Iterator[tuple[int, int]]:
    """Write the checkpoint into an empty folder; yields (bytes written, all bytes) after each block.

    drawn: whether its weights are random.
    """
    for name in COPIED:
        shutil.copyfile(small.folder / name, folder / name)
    write_json(folder / "config.json", config(small, wide))
    every = [TensorShape(name, shape) for name, shape in shapes(wide)]
    tensors, projection = ([t for t in every if (t.name == WEIGHT) is its] for its in (False, True))
    files = shards(tensors)
    if len(files) > 1:
        index = {t.name: file for file, part in files.items() for t in part}
        write_json(folder / INDEX, {"metadata": {"total_size": sum(t.nbytes for t in tensors)}, "weight_map": index})
    if projection:
        (folder / FOLDER).mkdir()
        files[f"{FOLDER}/{ONE_FILE}"] = projection
    weights = RandomWeights(dict(shapes(wide))) if drawn else Widening.of(small, wide)
    total, done = sum(t.nbytes for t in every), 0
    for file, part in files.items():
        with (folder / file).open("wb") as stream:
            stream.write(header(part))
            for tensor in part:
                its = negligible(tensor.name, tensor.shape) if tensor in projection else weights
                for block in its.tensor(tensor.name):
                    stream.write(block.data)
                    done += block.nbytes
                    yield done, total


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8", newline="\n")


def replica_spec(name: str, role: str, small: ModelSpec, *, drawn: bool = False) -> ModelSpec:
    """The spec of a role's replica like the model `name`. drawn: with random weights.

    Raises BadInput for a model whose shape is not possible.
    """
    like = geometry_by_name(name)
    if drawn:
        return random_spec(small, like)
    wide = widened_spec(small, like)
    if reasons := list(obstacles(small, wide)):
        possible = [key for key, like in GEOMETRIES.items() if not list(obstacles(small, widened_spec(small, like)))]
        raise BadInput(
            f"--like {name}: the demo {role} cannot be made so: {', '.join(reasons)}; possible: {', '.join(possible)}, "
            "or any with --random"
        )
    return wide


def parser() -> argparse.ArgumentParser:
    out = Parser(prog="replica.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    out.add_argument("--like", required=True, metavar="MODEL", help=", ".join(GEOMETRIES))
    out.add_argument("--role", choices=ROLES, default="target", help="which demo model (default: target)")
    out.add_argument("--reads", metavar="MODEL", help=f"of a {PARD2}: the target whose hidden states it reads")
    out.add_argument("--random", action="store_true", help="random weights, for any geometry")
    out.add_argument("-o", "--output", type=Path, required=True, metavar="DIR")
    return out


def main(argv: Sequence[str] | None = None) -> int:
    options = parser().parse_args(argv)
    return exit_code(lambda: run(options))


def run(options: argparse.Namespace) -> None:
    small = Checkpoint.open(ROLES[options.role])
    if (options.role == PARD2) is not (options.reads is not None):
        fix = (
            f"leave it out, or take --role {PARD2}" if options.reads else "name the target whose hidden states it reads"
        )
        raise BadInput(f"--role {options.role} {'with' if options.reads else 'without'} --reads; {fix}")
    wide = replica_spec(options.like, options.role, small.spec, drawn=options.random)
    wide = with_features(wide, options.reads) if options.reads else wide
    if options.output.exists():
        raise BadInput(f"{options.output} exists already; choose another --output")
    with replacing(options.output.absolute(), force=False) as folder, stages() as progress:
        for done, total in write(small, wide, folder, drawn=options.random):
            progress("writing", done, total)
    print(f"{options.output}: {options.role} like {options.like}, {total / 1e9:.2f} GB")


if __name__ == "__main__":
    sys.exit(main())
