"""`Plan`: what a run of pard-adapt was asked for, opened and checked before any long work."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pard_onnx.models.adapt.documents import DataSet, open_data
from pard_onnx.models.atomic import recover
from pard_onnx.models.checkpoints.checkpoint import Checkpoint
from pard_onnx.models.errors import BadInput
from pard_onnx.models.hub import resolve_checkpoint
from pard_onnx.models.manifest import Source
from pard_onnx.runtime.model import other_tokenizer
from pard_onnx.runtime.text.tokenizer import Text, first_difference

if TYPE_CHECKING:
    from pard_onnx.models.adapt.start import Start


@dataclass(frozen=True, slots=True)
class Plan:
    """What was checked of the options: all that the training takes."""

    options: argparse.Namespace
    base: Checkpoint  # what the draft is made of: the draft's checkpoint or the target's
    source: Source
    target: Checkpoint | None
    target_source: Source | None
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
        return start.shallow(self.base.path, self.options.shallow, self.options.layers, self.mask.id)


def planned(options: argparse.Namespace) -> Plan:
    """Open what the options name. Raises BadInput for what does not fit together, before any long work."""
    from pard_onnx.models.adapt.start import chosen_layers, mask_of, trainable

    data = open_data(options.data)
    target = target_source = None
    if options.target is not None:
        folder, target_source = resolve_checkpoint(options.target, options.revision)
        target = Checkpoint.open(folder).as_role("target")
    if options.draft is not None:
        folder, source = resolve_checkpoint(options.draft, options.draft_revision)
        base = trainable(folder)
        if target is not None:
            require_same_tokens(target, base)
    else:
        assert target is not None and target_source is not None
        base, source = trainable(target.path).as_role("target"), target_source
        chosen_layers(base.spec.layers, options.shallow, options.layers)
    output = options.output or Path(f"{source.model.rsplit('/', 1)[-1]}-pard")
    recover(output)
    if output.exists() and not (options.force or options.dry_run or options.prepare):
        raise BadInput(f"{output}: exists already; choose another --output, or replace it with --force")
    return Plan(options, base, source, target, target_source, data, mask_of(base, options.mask_token), output)


def require_same_tokens(target: Checkpoint, draft: Checkpoint) -> None:
    """BadInput, naming the first id, for a draft whose tokens are not the target's. Padding rows may differ."""
    ours, theirs = (one.tokenizer().get_vocab(with_added_tokens=True) for one in (target, draft))
    if difference := first_difference(ours, theirs):
        raise other_tokenizer(str(target.path), str(draft.path), *difference)
