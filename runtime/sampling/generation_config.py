"""The sampling settings that a model's makers recommend: its generation_config.json, read as transformers reads it.

`do_sample` decides whether tokens are drawn; without it decoding is greedy, and of the other settings the repetition
penalty alone has an effect. Where tokens are drawn, settings that the file leaves out are transformers' defaults, of
which top_k is 50.

The file's other keys are ignored. `num_beams`, `num_return_sequences`, `penalty_alpha` and their relatives ask for
several texts at a time, which speculative decoding does not have. `typical_p`, `epsilon_cutoff`, `eta_cutoff`, `top_h`,
`no_repeat_ngram_size`, `suppress_tokens`, `bad_words_ids` and other filters have no counterpart here. `max_length`,
`max_new_tokens`, `stop_strings` and `max_time` are the caller's to set. Ids of EOS are read when a model is exported.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from pard_onnx.models.errors import BadArtifact, BadInput
from pard_onnx.models.folder_files import has_file
from pard_onnx.models.json_files import read_json

from .settings import Sampling

FILE = "generation_config.json"
DRAWN = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": 0.0}  # transformers' defaults
ALWAYS = {"repetition_penalty": 1.0}


def read_sampling(folder: Path, names: Collection[str] | None = None) -> Sampling | None:
    """The settings in a folder's generation_config.json; None if it has no such file.

    names: of the files that may be read, as a manifest lists them; None: all.

    Raises BadArtifact, naming file and key, for a value that is not valid.
    """
    path = folder / FILE
    if (names is not None and FILE not in names) or not has_file(path, BadArtifact):
        return None
    values = {key: value for key, value in read_json(path, BadArtifact).items() if value is not None}
    drawn = values.get("do_sample", False)
    if not isinstance(drawn, bool):
        raise wrong_value(path, f"do_sample must be true or false, not {drawn!r}")
    settings: dict[str, Any] = {key: values.get(key, default) for key, default in ALWAYS.items()}
    if drawn:
        settings |= {key: values.get(key, default) for key, default in DRAWN.items()}
    try:
        return Sampling(**settings)
    except BadInput as error:
        raise wrong_value(path, str(error)) from None


def wrong_value(path: Path, problem: str) -> BadArtifact:
    return BadArtifact(f"{path}: {problem}; correct the checkpoint's file and export it again, or decode greedily")
