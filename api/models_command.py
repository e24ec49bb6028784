"""`pard-models`: the user's library of exported models: list, pull, rm and show."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from pard_onnx.cli import Parser, exit_code
from pard_onnx.export_command import add_export_options, add_quantization
from pard_onnx.models.errors import BadInput
from pard_onnx.models.library import Entry, Library
from pard_onnx.models.precision import PRECISIONS


def parser() -> argparse.ArgumentParser:
    out = Parser(prog="pard-models", description="The library of exported models, which other commands take by name.")
    commands = out.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    known = commands.add_parser("list", help="show the models and their drafts")
    known.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    add_pull(commands.add_parser("pull", help="export or fetch a model and its published draft"))
    shown = commands.add_parser("show", help="show what is known of a model")
    shown.add_argument("name", metavar="NAME")
    shown.add_argument("--json", action="store_true", help="one JSON object")
    removed = commands.add_parser("rm", help="remove models")
    removed.add_argument("names", nargs="+", metavar="NAME")
    removed.add_argument("--yes", action="store_true", help="do not ask")
    removed.add_argument("--json", action="store_true", help="one JSON object")
    return out


def add_pull(out: argparse.ArgumentParser) -> None:
    model = "a hub id of a checkpoint or of an exported model, a local folder or GGUF file, demo-target"
    out.add_argument("model", metavar="MODEL", help=model)
    out.add_argument("--name", help="in the library; default: that of the model with its precision")
    out.add_argument("--draft", metavar="NAME", help="its draft, as MODEL; default: the published one that fits")
    out.add_argument("--no-draft", action="store_true", help="the model alone")
    out.add_argument("--draft-precision", choices=PRECISIONS, help="default: the device's for drafts")
    out.add_argument("--draft-revision", metavar="NAME", help="branch, tag or commit of the draft, if it is a hub id")
    out.add_argument("--precision", choices=PRECISIONS, help="of the model; default: the device's")
    add_quantization(out)
    add_export_options(out)
    # output: the name gives it; suffix: of a draft's name, where that is another model's
    out.set_defaults(output=None, suffix="")


def main(argv: Sequence[str] | None = None) -> int:
    options = parser().parse_args(argv)
    return exit_code(lambda: COMMANDS[options.command](Library.of_user(), options))


def run_list(library: Library, options: argparse.Namespace) -> None:
    found = [facts(library, entry) for entry in library.entries()]
    if options.json:
        print(json.dumps({"folder": str(library.folder), "models": found}))
        return
    if not found:
        print(f"{library.folder}: no models yet; pard-models pull ID gets one")
        return
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("name", "role", "MB", "precision", "context", "draft", box=SIMPLE_HEAD, caption=str(library.folder))
    for one in found:
        if one["problem"]:
            table.add_row(Text(one["name"]), Text("damaged", style="red"), "", "", "", Text(one["problem"]))
            continue
        size, draft = f"{one['bytes'] / 1e6:.0f}", "" if one["draft"] is None else one["draft"]
        table.add_row(Text(one["name"]), one["role"], size, one["precision"], str(one["context_length"]), Text(draft))
    Console(highlight=False).print(table)


def run_show(library: Library, options: argparse.Namespace) -> None:
    entry = library.find(options.name) or library.require(options.name)
    entry.manifest()  # a damaged one is an error here
    found = facts(library, entry)
    if options.json:
        print(json.dumps(found))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False)
    for name, value in found.items():
        if value is not None:
            table.add_row(Text(name.replace("_", " "), style="bold"), Text(written(value)))
    Console(highlight=False).print(table)


def run_remove(library: Library, options: argparse.Namespace) -> None:
    entries = [library.require(name) for name in dict.fromkeys(options.names)]  # all are checked before one is removed
    for entry in entries:
        notes = [f"{target.name} then decodes without its draft" for target in library.targets_of(entry)]
        if not options.yes and not agreed(f"remove {entry.name}, {size_of(entry)}", notes):
            raise BadInput(f"{entry.name}: is kept; answer y, or add --yes")
        library.remove(entry.name)
        if not options.json:
            print(f"{entry.name}: removed")
    if options.json:
        print(json.dumps({"removed": [entry.name for entry in entries]}))


def agreed(question: str, notes: Sequence[str]) -> bool:
    """Whether the user at the terminal agrees. Raises BadInput where there is nobody to ask."""
    if not sys.stdin.isatty():
        raise BadInput(f"{question}? nobody can answer here; add --yes")
    print("; ".join([question, *notes]), end="? [y/N] ", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def size_of(entry: Entry) -> str:
    try:
        return f"{entry.manifest().bytes / 1e6:.0f} MB"
    except BadInput:
        return "which is damaged"


def run_pull(library: Library, options: argparse.Namespace) -> None:
    from pard_onnx.pull import pull  # imports what exports need, which list, show and rm do not

    target, draft = pull(library, options)
    if options.json:
        found = {"model": facts(library, target.entry), "model_state": target.state}
        more = {"draft": facts(library, draft.entry), "draft_state": draft.state} if draft else {"draft": None}
        print(json.dumps(found | more))
        return
    for one in (target, draft):
        if one is not None:
            manifest = one.entry.manifest()
            print(f"{one.entry.name}: {manifest.role}, {manifest.bytes / 1e6:.0f} MB, {one.state}")
    if target.entry.manifest().role == "target":
        print(f"run: pard-chat {target.entry.name}")


def facts(library: Library, entry: Entry) -> dict[str, Any]:
    """What is known of an entry; of a damaged one only its name, its folder and the problem."""
    found: dict[str, Any] = {"name": entry.name, "folder": str(entry.folder), "problem": None}
    try:
        manifest, record = entry.manifest(), entry.record()
        draft = library.draft_of(entry) if manifest.role == "target" else None
    except BadInput as error:
        return found | {"problem": str(error)}
    return found | {
        "role": manifest.role,
        "family": manifest.spec.family,
        "draft": draft.name if draft else None,
        "precision": manifest.precision,
        "recipe": manifest.quantization.recipe if manifest.quantization else None,
        "quality": asdict(manifest.quality) | {"loss": manifest.quality.loss} if manifest.quality else None,
        "bytes": manifest.bytes,
        "device": manifest.device,
        "context_length": manifest.capacity,
        "kv_cache": manifest.kv_cache,
        "source": asdict(manifest.source),
        "pulled": {"model": record.pulled, "revision": record.revision, "options": record.options} if record else None,
    }


def written(value: object) -> str:
    """A value of `facts` for a person."""
    if isinstance(value, dict):
        known = {name: one for name, one in value.items() if one not in (None, ())}
        return ", ".join(f"{name.replace('_', ' ')} {written(one)}" for name, one in known.items())
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


COMMANDS = {"list": run_list, "pull": run_pull, "rm": run_remove, "show": run_show}

if __name__ == "__main__":
    sys.exit(main())
