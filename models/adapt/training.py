"""A resumable training loop: Muon for matrices, AdamW for the rest, safetensors checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

Batch = TypeVar("Batch")


@dataclass(frozen=True, slots=True)
class Schedule:
    """The number of steps and the learning rate of each."""

    steps: int
    rate: float  # the peak learning rate of both optimizers
    warmup: int = 40  # steps over which the rate rises linearly to its peak
    decay: float = 0.5  # the last share of the steps, over which the rate falls linearly to zero
    weight_decay: float = 0.02  # of Muon
    save_every: int = 50  # steps

    def factor(self, step: int) -> float:
        """The share of the peak rate at `step` (0-based)."""
        left = (self.steps - step) / max(1, math.ceil(self.steps * self.decay))
        return min(1.0, (step + 1) / max(1, self.warmup), left)


def train(
    model: nn.Module,
    batch: Callable[[int], Batch],
    loss: Callable[[nn.Module, Batch], Tensor],
    schedule: Schedule,
    folder: Path,
    log: Callable[[str], None] = print,
) -> None:
    """Train `model` in place, and leave it in eval mode.

    An interrupted run continues from the last checkpoint in `folder`; a finished run is only loaded.

    batch: the training data of a step, a pure function of the step's number, so that a resumed run is exact.
    loss: a scalar, in nats.
    """
    optimizers = _optimizers(model, schedule)
    step = _resume(model, optimizers, folder)
    model.train()
    device = next(model.parameters()).device.type
    started, seen, running = time.monotonic(), step, 0.0
    while step < schedule.steps:
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = schedule.rate * schedule.factor(step)
        with torch.autocast(device, torch.bfloat16):
            value = loss(model, batch(step))
        torch.autograd.backward(value)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        running = value.item() if running == 0.0 else 0.95 * running + 0.05 * value.item()
        if step % 10 == 0:
            pace = (time.monotonic() - started) / (step - seen)
            log(f"step {step}/{schedule.steps}  loss {running:.3f}  {pace:.2f} s/step")
        if step % schedule.save_every == 0 or step == schedule.steps:
            _save(model, optimizers, step, folder)
    model.eval()


def _optimizers(model: nn.Module, schedule: Schedule) -> list[torch.optim.Optimizer]:
    """Muon takes the hidden matrices; embeddings, norms and biases keep AdamW (Jordan et al. 2024)."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    matrices = [p for n, p in named if p.ndim == 2 and "embed" not in n and "lm_head" not in n]
    matrix_ids = {id(p) for p in matrices}
    rest = [p for _, p in named if id(p) not in matrix_ids]
    return [
        torch.optim.Muon(
            matrices, lr=schedule.rate, weight_decay=schedule.weight_decay, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(rest, lr=schedule.rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def _save(model: nn.Module, optimizers: list[torch.optim.Optimizer], step: int, folder: Path) -> None:
    tensors = {f"model.{n}": p.detach() for n, p in model.named_parameters()}
    for i, optimizer in enumerate(optimizers):
        for j, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{j}.{k}": torch.as_tensor(v) for k, v in state.items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "checkpoint.tmp", {"step": str(step)})
    (folder / "checkpoint.tmp").replace(folder / "checkpoint.safetensors")


def _resume(model: nn.Module, optimizers: list[torch.optim.Optimizer], folder: Path) -> int:
    """Load the checkpoint, if there is one, and return the number of steps already done."""
    path = folder / "checkpoint.safetensors"
    if not path.exists():
        return 0
    with safe_open(path, "pt") as file:
        step = int(file.metadata()["step"])
        # Clones: a tensor of safetensors keeps the file mapped, and Windows does not replace a mapped file.
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - not a dict
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[f"model.{name}"])
    for i, optimizer in enumerate(optimizers):
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith(f"optimizer.{i}."):
                _, _, j, name = key.split(".", 3)
                state.setdefault(int(j), {})[name] = value
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    return step
