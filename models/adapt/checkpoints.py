"""The files of a training: its last checkpoint, written whole or not at all, and the best weights so far.

checkpoint-STEP/   accelerate's state of model and optimizer, and state.json; the one before goes when this is whole
best.safetensors   the trained weights at the best evaluation, whose step is in its metadata
"""

from __future__ import annotations

import logging
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from pard_onnx.models.atomic import atomic_file, put_folder, remove_folder
from pard_onnx.models.errors import BadInput
from pard_onnx.models.json_files import read_json, write_json
from pard_onnx.models.records import from_json, to_json
from pard_onnx.models.system_errors import is_out_of_memory

from .outcome import TrainingState

NAME = re.compile(r"checkpoint-(\d+)")
# accelerate warns of tied weights at each checkpoint, which are written once and loaded for both
logging.getLogger("accelerate.utils.other").setLevel(logging.ERROR)
PARTIAL, STATE, BEST = "checkpoint.partial", "state.json", "best.safetensors"


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """The checkpoints of one training in a folder."""

    folder: Path
    accelerator: Accelerator
    facts: dict[str, Any]  # what a checkpoint was trained with, which a resumed run must have again

    def save(self, state: TrainingState) -> None:
        """Write a checkpoint; the one before is removed when the new one is on the disk. Raises OSError."""
        partial, main = self.folder / PARTIAL, self.accelerator.is_main_process
        if main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(partial))
        self.accelerator.wait_for_everyone()
        if main:
            write_json(partial / STATE, {"facts": self.facts, "state": to_json(state)})
            put_folder(partial, self.folder / f"checkpoint-{state.step}")
            self._keep(state.step)
        self.accelerator.wait_for_everyone()

    def resume(self) -> TrainingState:
        """Load the last checkpoint into what the accelerator has prepared. A state of step 0 if there is none.

        Raises BadInput for a checkpoint of another training, with what differs.
        """
        found = self._found()
        if not found:
            return TrainingState()
        path = found[-1][1]
        try:
            read = read_json(path / STATE)
            facts, state = dict(read["facts"]), from_json(TrainingState, read["state"])
        except (OSError, TypeError, ValueError, KeyError) as error:
            raise BadInput(f"{path}: is no checkpoint ({error}); remove {self.folder} to begin anew") from error
        for name, value in self.facts.items():
            if facts.get(name) != value:
                raise BadInput(
                    f"{self.folder}: has a checkpoint whose {name} is {facts.get(name)}, not {value}; go on with that "
                    "one, or remove the folder to begin anew"
                )
        try:
            self.accelerator.load_state(str(path))
        except Exception as error:  # torch raises errors of all kinds for a damaged file
            if is_out_of_memory(error):
                raise
            raise BadInput(f"{path}: is damaged ({error}); remove {self.folder} to begin anew") from error
        if self.accelerator.is_main_process:  # where a process was killed while it wrote the last one
            self._keep(state.step)
        return state

    def save_best(self, net: nn.Module, names: list[str], step: int) -> None:
        """Write the weights of these names."""
        weights = self.accelerator.get_state_dict(net)  # of all processes' parts, where they have parts
        if self.accelerator.is_main_process:
            tensors = {name: weights[name].detach().cpu().contiguous() for name in names}
            with atomic_file(self.folder / BEST) as file:
                file.write(save(tensors, {"step": str(step)}))

    def load_best(self, net: nn.Module) -> None:
        """Give the network the best weights."""
        self.accelerator.wait_for_everyone()
        with safe_open(self.folder / BEST, "pt") as file, torch.no_grad():
            parameters: dict[str, Tensor] = dict(net.named_parameters())
            for name in file.keys():  # noqa: SIM118 - not a dict
                parameters[name].copy_(file.get_tensor(name))

    @property
    def last(self) -> str:
        """The last good checkpoint, for messages."""
        found = self._found()
        return f"the last good checkpoint is that of step {found[-1][0]} in {self.folder}" if found else "there is none"

    def _keep(self, step: int) -> None:
        """Remove all checkpoints but that of `step`, and one that is not whole."""
        shutil.rmtree(self.folder / PARTIAL, ignore_errors=True)
        for other, path in self._found():
            if other != step:
                remove_folder(path)

    def _found(self) -> list[tuple[int, Path]]:
        """The whole checkpoints, the latest last."""
        paths = self.folder.iterdir() if self.folder.is_dir() else ()
        return sorted((int(found[1]), path) for path in paths if (found := NAME.fullmatch(path.name)))
