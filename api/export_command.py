"""`pard-export`: a checkpoint to a folder that ONNX Runtime runs."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pard_onnx.cli import Parser, exit_code, export_with_progress
from pard_onnx.export.output import place
from pard_onnx.models.checkpoint import Checkpoint
from pard_onnx.models.hub import resolve_checkpoint
from pard_onnx.models.manifest import KV_CACHE_FORMATS, Manifest
from pard_onnx.models.precision import DEFAULT_PRECISION, PRECISIONS, default_precision


def parser() -> argparse.ArgumentParser:
    out = Parser(prog="pard-export", description="Export a checkpoint for ONNX Runtime.")
    out.add_argument(
        "--model",
        required=True,
        metavar="ID_OR_PATH",
        help="a hub id, a checkpoint folder, demo-target, demo-draft or demo-ar-draft",
    )
    out.add_argument("--output", type=Path, metavar="DIR", help="default: NAME-PRECISION in the current folder")
    precision = f"default: {DEFAULT_PRECISION}, or what a quantized checkpoint has; its integers stay in any case"
    out.add_argument("--precision", choices=PRECISIONS, help=precision)
    add_export_options(out)
    return out


def add_export_options(out: argparse.ArgumentParser) -> None:
    """What every export can be told."""
    out.add_argument(
        "--role",
        choices=("auto", "draft", "target"),
        default="auto",
        help="default: draft if the checkpoint has a mask token",
    )
    out.add_argument("--context-length", type=int, metavar="N", help="tokens; default: the model's, at most 4096")
    cache = "int8: a quarter of float32's memory, slower verification; one scale a channel or (int8-tensor) a layer"
    out.add_argument("--kv-cache", choices=KV_CACHE_FORMATS, default="float", help=cache)
    out.add_argument("--revision", help="branch, tag or commit of a hub id")
    out.add_argument("--force", action="store_true", help="replace the output folder")
    out.add_argument("--no-verify", dest="verify", action="store_false", help="skip the check against torch")
    out.add_argument("--json", action="store_true", help="one JSON object on stdout")


def main(argv: Sequence[str] | None = None) -> int:
    options = parser().parse_args(argv)
    return exit_code(lambda: run(options))


def run(options: argparse.Namespace) -> None:
    folder, source = resolve_checkpoint(options.model, options.revision)
    checkpoint = Checkpoint.open(folder).as_role(options.role)
    precision = options.precision or default_precision(checkpoint.bits)
    output = options.output or Path(f"{source.model.rsplit('/', 1)[-1]}-{precision}")
    place(output, folder, force=options.force)
    manifest = export_with_progress(
        checkpoint,
        source,
        output,
        precision,
        capacity=options.context_length,
        kv_cache=options.kv_cache,
        verify=options.verify,
        force=options.force,
    )
    report(manifest, output, as_json=options.json)


def summary(manifest: Manifest, output: Path) -> dict[str, Any]:
    return {
        "output": str(output),
        "role": manifest.role,
        "family": manifest.spec.family,
        "precision": manifest.precision,
        "context_length": manifest.capacity,
        "kv_cache": manifest.kv_cache,
        "bytes": sum(file.size for file in manifest.files),
        "source": asdict(manifest.source),
        "parity": asdict(manifest.parity) if manifest.parity else None,
        "tensors": [asdict(tensor) for tensor in manifest.tensors],
    }


def report(manifest: Manifest, output: Path, *, as_json: bool) -> None:
    facts = summary(manifest, output)
    if as_json:
        print(json.dumps(facts))
        return
    parity = manifest.parity
    checked = (
        "not checked against torch"
        if parity is None
        else (f"against torch: mean logit error {parity.mean_error:.2g}, top-1 agreement {parity.top1_agreement:.0%}")
    )
    method = manifest.source.quantization
    taken = f", integers of its {method} checkpoint" if method else ""
    print(f"{output}: {manifest.role}, {manifest.precision}{taken}, {facts['bytes'] / 1e6:.1f} MB; {checked}")


if __name__ == "__main__":
    sys.exit(main())
