"""`Plan`: what a run of pard-adapt was asked for, opened and checked before any long work."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pard_onnx.models.adapt.documents import DataSet, open_data
from pard_onnx.models.atomic import recover
from pard_onnx.models.checkpoints.checkpoint import Checkpoint
from pard_onnx.models.errors import BadInput
from pard_onnx.models.hub import resolve_artifact, resolve_checkpoint
from pard_onnx.models.manifest import Manifest, Source
from pard_onnx.models.spec import ModelSpec
from pard_onnx.models.system_errors import reason
from pard_onnx.runtime.model import other_tokenizer
from pard_onnx.runtime.text.tokenizer import Text, first_difference

if TYPE_CHECKING:
    from pard_onnx.models.adapt.start import Choice, Start

ELSEWHERE = "choose another --output"
DEFAULT_LAYERS: Choice = "even"  # of --shallow, unless --layers says others
SHAPES = ("family", "layers", "hidden", "intermediate", "heads", "kv_heads", "head_dim")  # of two exports of a model


@dataclass(frozen=True, slots=True)
class Plan:
    """What was checked of the options: all that the training takes."""

    options: argparse.Namespace
    base: Checkpoint  # what the draft is made of: the draft's checkpoint or the target's
    source: Source
    target: Checkpoint | None
    target_source: Source | None
    exported: Path | None  # the exported target that writes replies, if the user names one
    data: DataSet
    mask: Any
    output: Path

    @property
    def work(self) -> Path:
        return self.options.work or self.output.with_name(f"{self.output.name}.work")

    def text(self) -> Text:
        """The tokenizer and the chat template of the draft, which are the target's too."""
        return Text(self.base.tokenizer_folder, self.base.spec.chat_template)

    def start(self) -> Start:
        from pard_onnx.models.adapt import start

        if self.options.shallow is None:
            return start.start_from(self.base.path, self.mask.id)
        return start.shallow(self.base.path, self.options.shallow, self.options.layers or DEFAULT_LAYERS, self.mask.id)


def planned(options: argparse.Namespace) -> Plan:
    """Open what the options name. Raises BadInput for what does not fit together, before any long work."""
    from pard_onnx.models.adapt.start import chosen_layers, mask_of, trainable, with_float_weights

    data = open_data(options.data)
    target = target_source = None
    if options.target is not None:
        folder, target_source = resolve_checkpoint(options.target, options.revision)
        target = Checkpoint.open(folder).as_role("target")
        if options.method == "pard2" or options.expected_acceptance == "yes":
            with_float_weights(target, "are not read beside a draft that is trained")
    if options.draft is not None:
        folder, source = resolve_checkpoint(options.draft, options.draft_revision)
        base = trainable(folder)
        if target is not None:
            require_same_tokens(target, base)
    else:
        assert target is not None and target_source is not None
        base, source = trainable(target.path).as_role("target"), target_source
        chosen_layers(base.spec.layers, options.shallow, options.layers or DEFAULT_LAYERS)
    exported = None if options.exported is None else exported_target(options.exported, base, target)
    output = options.output or Path(f"{source.model.rsplit('/', 1)[-1]}-pard")
    files = (Path(name).expanduser() for name in data.names)
    sources = [base.path, *([target.path] if target else []), *([exported] if exported else [])]
    require_output(output, options, [*sources, *(file for file in files if file.exists())])
    mask = mask_of(base, options.mask_token)
    plan = Plan(options, base, source, target, target_source, exported, data, mask, output)
    require_work(plan.work, output)
    return plan


def require_same_tokens(target: Checkpoint, draft: Checkpoint) -> None:
    """BadInput, naming the first id, for a draft whose tokens are not the target's. Padding rows may differ."""
    ours, theirs = (one.tokenizer().get_vocab(with_added_tokens=True) for one in (target, draft))
    if difference := first_difference(ours, theirs):
        raise other_tokenizer(str(target.path), str(draft.path), *difference)


def exported_target(name: str, base: Checkpoint, target: Checkpoint | None) -> Path:
    """The folder of the exported target that writes replies. Raises BadInput for an export of another model."""
    folder = resolve_artifact(name)
    manifest = Manifest.read(folder)
    if manifest.role != "target":
        raise BadInput(f"--exported {name}: is a draft; name the exported target, or leave it out")
    if target is not None:
        require_same_shapes(name, manifest.spec, target)
    tokens = base.tokenizer().get_vocab(with_added_tokens=True)
    if difference := first_difference(Text(folder, None, manifest.sizes).vocabulary(), tokens):
        raise other_tokenizer(name, str(base.path), *difference)
    return folder


def require_same_shapes(exported: str, spec: ModelSpec, target: Checkpoint) -> None:
    """BadInput for an exported model that cannot be of this checkpoint."""
    for name in SHAPES:
        theirs, ours = getattr(spec, name), getattr(target.spec, name)
        if theirs != ours:
            raise BadInput(
                f"--exported {exported}: is of another model than --target {target.path}: {name.replace('_', ' ')} is "
                f"{theirs}, not {ours}; export that target, or leave --exported out"
            )


# Folders


def require_output(output: Path, options: argparse.Namespace, sources: Sequence[Path]) -> None:
    """BadInput, naming what forbids it, for a folder that the draft may not be written to.

    sources: what is read, which must not be replaced.
    """
    from pard_onnx.models.adapt.draft_folder import WRITTEN

    named = f"--output {output}"
    try:
        recover(output)
        folder = output.resolve()
        present = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else None
        is_file = present is None and os.path.lexists(folder)
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        raise BadInput(f"{named}: {reason(error)}; {ELSEWHERE}") from error
    if held := next((source for source in sources if source.resolve().is_relative_to(folder)), None):
        raise BadInput(f"{named}: holds {held}, which the training reads; {ELSEWHERE}")
    if is_file:
        raise BadInput(f"{named}: is a file; {ELSEWHERE}")
    if present is not None and not (options.force or options.dry_run or options.prepare):
        raise BadInput(f"{output}: exists already; choose another --output, or replace it with --force")
    if present and options.force and (foreign := [name for name in present if name not in WRITTEN]):
        raise BadInput(
            f"{named}: holds {foreign[0]}, which is not a draft's, so --force does not replace the folder; "
            f"{ELSEWHERE} or move that away"
        )
    require_writable(folder.parent, named, ELSEWHERE)


def require_work(work: Path, output: Path) -> None:
    """BadInput for a work folder that cannot be written, or lies in the output folder, or the other way round."""
    named = f"--work {work}"
    try:
        folder, other = work.resolve(), output.resolve()
        is_file = folder.exists() and not folder.is_dir()
    except (OSError, RuntimeError) as error:
        raise BadInput(f"{named}: {reason(error)}; choose another --work") from error
    if folder.is_relative_to(other) or other.is_relative_to(folder):
        relation = "is" if folder == other else "lies in" if folder.is_relative_to(other) else "holds"
        raise BadInput(f"{named}: {relation} the output folder {output}; name two folders beside each other")
    if is_file:
        raise BadInput(f"{named}: is a file; choose another --work")
    require_writable(folder, named, "choose another --work")


def require_writable(folder: Path, named: str, advice: str) -> None:
    """BadInput for a folder that cannot be written, or made."""
    there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not there.is_dir():
        raise BadInput(f"{named}: {there} is not a folder; {advice}")
    if not os.access(there, os.W_OK | os.X_OK):
        raise BadInput(f"{named}: there is no permission to write to {there}; {advice}")
