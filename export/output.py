"""The output folder of an export: checked first, then written whole or not at all."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pard_onnx.models.atomic import atomic_folder, recover
from pard_onnx.models.checkpoints.checkpoint import Checkpoint
from pard_onnx.models.checkpoints.tensors import INDEX
from pard_onnx.models.errors import BadCheckpoint, BadInput, Failure
from pard_onnx.models.folder_files import has_file
from pard_onnx.models.json_files import read_json, write_json
from pard_onnx.models.manifest import DATA, DRAFT_IDS, FILE_NAME, GRAPH, RECORD, VITISAI_CONFIG
from pard_onnx.models.system_errors import STOPS, reason, write_error

from .runtime_configs import FILE_NAME as GENAI_CONFIG

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
COPIED = (*TOKENIZER_FILES, GENERATION_CONFIG, CONFIG)
WRITTEN = frozenset((FILE_NAME, RECORD, GRAPH, DATA, GENAI_CONFIG, VITISAI_CONFIG, DRAFT_IDS, *COPIED))
ELSEWHERE = "choose another --output"
STATIC_GRAPH = re.compile(r"model\.\d+(\.prefill)?\.onnx")
QUARK_RECORD = "pard_onnx_checkpoint.json"  # in a checkpoint that --device npu-oga has written
SHARD = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
# By the file that every export of a kind has: the names of the other files, and their pattern
KINDS = {
    FILE_NAME: (WRITTEN, STATIC_GRAPH),
    QUARK_RECORD: (frozenset((QUARK_RECORD, INDEX, *COPIED)), SHARD),
}


def copy_side_files(checkpoint: Checkpoint, folder: Path) -> None:
    """Copy the checkpoint's tokenizer and configs; where an adapter changed the vocabulary, config.json says so."""
    for name in COPIED:
        source = (checkpoint.tokenizer_folder if name in TOKENIZER_FILES else checkpoint.folder) / name
        if (checkpoint.names is None or name in checkpoint.names) and has_file(source, BadCheckpoint):
            shutil.copyfile(source, folder / name)
    if checkpoint.adapter:
        spec = checkpoint.spec
        changes = {"vocab_size": spec.vocabulary.rows, "tie_word_embeddings": spec.tied}
        write_json(folder / CONFIG, read_json(folder / CONFIG) | changes)


def checked_output_folder(output: Path, checkpoint: Path, *, force: bool) -> Path:
    """The absolute path of `output`, where an export may be written. Raises BadInput, naming what forbids it.

    checkpoint: the folder that is exported, which `output` must not contain. force: an earlier export in `output` may
    be replaced; no other folder ever is.
    """
    try:
        folder = output.expanduser().resolve()
        recover(folder)
        present = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else None
        blocked = present is None and folder.exists()
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: no home folder
        raise BadInput(f"{output}: {reason(error)}; {ELSEWHERE}") from error
    if checkpoint.resolve().is_relative_to(folder):
        raise BadInput(f"{output}: holds the checkpoint itself; choose another --output")
    if blocked:
        raise BadInput(f"{output}: is a file; choose another --output")
    if present is not None and not force:
        raise BadInput(f"{output} exists already; choose another --output, or --force to replace it")
    if present and (foreign := _foreign_files(present)):
        raise BadInput(
            f"{output}: holds {foreign[0]}, which is not an export's, so --force does not replace the folder; "
            "choose another --output or move that away"
        )
    return folder


def _foreign_files(names: list[str]) -> list[str]:
    """Those of a folder's files that no export has written: all of them where no export's own file is there."""
    for own, (known, pattern) in KINDS.items():
        if own in names:
            return [name for name in names if name not in known and not pattern.fullmatch(name)]
    return names


@contextmanager
def replacing(folder: Path, *, force: bool) -> Iterator[Path]:
    """A folder to fill, which takes the place of `folder` if the body succeeds and is removed if it fails.

    Raises BadInput or Failure for what cannot be written, naming it.
    """
    try:
        with atomic_folder(folder, replace=force) as partial:
            yield partial
    except FileExistsError as error:
        if error.filename == str(folder) and folder.exists():
            made = f"{folder} was made by someone else meanwhile"
            raise Failure(f"{made}; choose another --output, or --force to replace it") from None
        raise write_error(folder, error, ELSEWHERE) from error
    except OSError as error:
        place = output_named(error, folder)
        if place is None:
            raise
        raise write_error(place, error, ELSEWHERE) from error


def output_named(error: OSError, folder: Path) -> Path | None:
    """The file or folder of an export that an error is about; None where it is about something that was read."""
    if not isinstance(error.filename, str):
        return folder if error.errno in STOPS else None
    name = Path(error.filename)
    return name if name.is_relative_to(folder) or folder.is_relative_to(name) else None
