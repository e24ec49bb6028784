"""`adapt`: the training of a parallel draft, which goes on from its last checkpoint after any interruption.

accelerate does devices, processes (`accelerate launch`), mixed precision, the accumulation of gradients and the files
of checkpoints. A step's data is a function of its number, and a step's loss the mean over all labels of the step in all
processes, so that a resumed run, or one in more processes, learns the same.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import ExitStack
from copy import copy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import GradientAccumulationPlugin
from safetensors.torch import load_file, save
from torch import Tensor, nn
from transformers import PreTrainedModel

from pard_onnx.models.atomic import atomic_file
from pard_onnx.models.errors import BadInput, Failure

from .acceptance import measure
from .attention import with_packed_attention
from .checkpoints import Checkpoints
from .heap import keep_freed_memory
from .mask_row import frozen_embedding
from .memory import require_room, uses_bf16
from .objective import Pard, Pard2, objective
from .order import TrainingOrder
from .outcome import Outcome, Point, StepSums, TrainingState
from .packing import PackedSequence, pack_samples
from .pard2 import FeatureDraft
from .progress import Report, Reporter, no_report, shown_progress
from .samples import Sample
from .settings import FREE, Settings
from .start import Start

PROJECTION, WHITENING = "target_proj.safetensors", "whitening.safetensors"
WHITENING_TOKENS = 8  # times a feature's columns, for a stable estimate of their products
BETAS = (0.9, 0.95)


def adapt(
    start: Start,
    training: Sequence[Sample],
    held_out: Sequence[Sample],
    settings: Settings,
    folder: Path,
    target: PreTrainedModel | None = None,
    report: Reporter | None = None,
) -> Outcome:
    """Train the draft in place; its model has the weights of the best evaluation afterwards.

    folder: of checkpoints, from which an interrupted training goes on. target: PARD-2's; with PARD, the expected
    acceptance is measured with it. report: None shows progress on stderr. Raises BadInput; Failure where the loss is
    no number, or memory or disk end.
    """
    if settings.method == "pard2" and target is None:
        raise BadInput("method pard2 learns from a target; name it with --target, or take --method pard")
    if not len(training):
        raise BadInput("there is no sample to train on; give more data, or hold out fewer samples")
    require_room(start, settings, target)
    folder.mkdir(parents=True, exist_ok=True)
    if not torch.cuda.is_available():
        keep_freed_memory()
    with ExitStack() as stack:
        stack.enter_context(with_packed_attention(start.model))
        if settings.freeze_embedding:
            stack.enter_context(frozen_embedding(start.model, start.mask_id))
        run = Training.prepared(start, training, held_out, settings, folder, target)
        if report is None:
            report = stack.enter_context(shown_progress()) if run.accelerator.is_main_process else no_report
        outcome = run.to_end(report)
        if settings.recompute:
            untyped: Any = start.model  # without types of its own
            untyped.activation_checkpointing_disable()
    return outcome


def accelerator_of(settings: Settings) -> Accelerator:
    """The accelerator of this process, with the steps over which it accumulates gradients."""
    state = PartialState()  # device and processes; the settings say how many sequences each process takes
    sequences = max(1, round(settings.batch_tokens / settings.sequence_tokens / state.num_processes))
    plugin = GradientAccumulationPlugin(num_steps=sequences, sync_with_dataloader=False)
    precision = "bf16" if uses_bf16(settings, state.device) else "no"
    AcceleratorState._reset_state()  # which would keep the precision of an earlier training in this process
    return Accelerator(mixed_precision=precision, gradient_accumulation_plugin=plugin)


@dataclass(slots=True)
class Training:
    """A training of one network in this process."""

    settings: Settings
    accelerator: Accelerator
    net: nn.Module  # prepared by the accelerator
    inner: nn.Module  # the same, as it was before
    names: list[str]  # of its parameters
    optimizer: torch.optim.Optimizer
    objective: Pard
    order: TrainingOrder
    held_out: Sequence[Sample]
    samples: Sequence[Sample]
    mask_id: int
    target: PreTrainedModel | None
    checkpoints: Checkpoints

    @classmethod
    def prepared(
        cls,
        start: Start,
        training: Sequence[Sample],
        held_out: Sequence[Sample],
        settings: Settings,
        folder: Path,
        target: PreTrainedModel | None,
    ) -> Training:
        accelerator = accelerator_of(settings)
        sequences = accelerator.gradient_accumulation_steps * accelerator.num_processes
        order = TrainingOrder(training, settings, start.mask_id, sequences)
        if target is not None:
            nn.Module.to(target, accelerator.device)
            nn.Module.eval(target).requires_grad_(False)
        found = objective(settings, accelerator.device, target)
        if settings.recompute:
            start.model.activation_checkpointing_enable({"use_reentrant": False})
        if isinstance(found, Pard2):
            inner = found.network(start.model, features_whitening(found, order, folder, accelerator))
        else:
            inner = found.network(start.model)
        inner.train()
        names = [name for name, _ in inner.named_parameters()]
        optimizer = optimizer_of(inner, settings)
        net, optimizer = accelerator.prepare(inner, optimizer)
        facts = {name: value for name, value in asdict(settings).items() if name not in FREE}
        facts |= {"draft": start.note, "mask_id": start.mask_id, "samples": len(training), "sequences": sequences}
        facts |= {"parameters": sum(one.numel() for one in inner.parameters())}
        checkpoints = Checkpoints(folder, accelerator, facts)
        return cls(
            settings, accelerator, net, inner, names, optimizer, found, order, held_out, training, start.mask_id,
            target, checkpoints,
        )  # fmt: skip

    def to_end(self, report: Reporter) -> Outcome:
        """Train from the last checkpoint to the end, and give the network its best weights."""
        state, steps = self.checkpoints.resume(), self.order.steps
        before = copy(state)
        while state.step < steps and state.patience_used < self.settings.patience:
            state = self._step(state, steps)
            ends = state.step == steps
            evaluates = ends or state.step % self.settings.evaluate_every == 0
            if evaluates:
                state = self._evaluated(state)
            if evaluates or state.step % self.settings.save_every == 0:
                self.checkpoints.save(state)
            report(self._report(state, before, steps, evaluates))
        self.checkpoints.load_best(self.inner)
        self.inner.eval()
        return self._outcome(state, steps)

    def _step(self, state: TrainingState, steps: int) -> TrainingState:
        """One step of the optimizer."""
        began = time.monotonic()
        count, rank = self.accelerator.gradient_accumulation_steps, self.accelerator.process_index
        packs = {number: self.order.packed(state.step, number) for number in range(rank * count, (rank + 1) * count)}
        mine = torch.tensor(
            [sum(int(np.count_nonzero(p.labels >= 0)) for p in packs.values()),
             sum(int(np.count_nonzero(p.segments == 0)) for p in packs.values())],
            device=self.accelerator.device,
        )  # fmt: skip
        labels, tokens = self.accelerator.reduce(mine, "sum").tolist()
        # backward() divides by the sequences of a step, and several processes take the mean of their gradients
        scale = count * self.accelerator.num_processes / max(1, labels)
        position = torch.zeros(3, self.settings.draft_length, device=self.accelerator.device)
        for number, packed in packs.items():
            with self.accelerator.accumulate(self.net):
                with self.accelerator.autocast():
                    found = self.objective.losses(self.net, packed)
                if not torch.isfinite(found.total):
                    raise self._no_number(state.step, number, packed)
                self.accelerator.backward(found.total * scale)
                position += torch.stack([found.by_position, found.labels, found.labels * 0])
                position[2, 0] += found.total.detach()
        norm = self.accelerator.clip_grad_norm_(self.net.parameters(), self.settings.clip)
        if norm is not None and not math.isfinite(float(norm)):  # DeepSpeed clips on its own
            raise self._no_number(state.step, *next(iter(packs.items())))
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.rate_at(state.step, steps)
        self.optimizer.step()
        self.optimizer.zero_grad()
        position = self.accelerator.reduce(position, "sum").cpu()
        sums = state.sums.with_step(float(position[2, 0]), labels, position[:2].tolist())
        spent = state.seconds + time.monotonic() - began
        return replace(state, step=state.step + 1, tokens=state.tokens + tokens, seconds=spent, sums=sums)

    def _evaluated(self, state: TrainingState) -> TrainingState:
        """The state with an evaluation; the weights are kept where it is the best one so far.

        All processes compute the same, so that none waits for a decision of another one.
        """
        found = None
        if len(self.held_out):
            with self.accelerator.autocast():
                found = measure(self.net, self.objective, self.held_out, self.mask_id, self.target)
        point = Point(state.step, state.sums.loss, state.sums.by_position, found)
        state = replace(state, history=(*state.history, point), sums=StepSums())
        if state.best is point:
            self.checkpoints.save_best(self.net, self.names, state.step)
        return state

    def _report(self, state: TrainingState, before: TrainingState, steps: int, evaluated: bool) -> Report:
        seconds, done = max(1e-9, state.seconds - before.seconds), state.step - before.step
        if evaluated:
            last = state.history[-1]
            loss, by_position, found = last.loss, last.loss_by_position, last.acceptance
        else:
            loss, by_position, found = state.sums.loss, state.sums.by_position, None
        left = seconds / done * (steps - state.step)
        return Report(state.step, steps, loss, by_position, (state.tokens - before.tokens) / seconds, left, found)

    def _no_number(self, step: int, number: int, packed: PackedSequence) -> Failure:
        """The error for a loss or gradient that is no number: it names the samples that it comes from."""
        group = self.order.groups(step)[number]
        bad = [int(one) for one in group if not self._is_finite(int(one))]
        names = ", ".join(map(str, (bad or group.tolist())[:6]))
        kind = "sample" if bad else "the sequence of samples"
        return Failure(
            f"step {step + 1}: the loss is no finite number, from {kind} {names}; {self.checkpoints.last}: lower "
            "--rate, take --precision fp32, or remove the sample, and train again"
        )

    @torch.no_grad()
    def _is_finite(self, number: int) -> bool:
        sample, settings = self.samples[number], self.settings
        rng = np.random.default_rng(settings.seed)
        alone = pack_samples([(sample.ids, sample.replies)], self.mask_id, settings.drop, rng)
        return bool(torch.isfinite(self.objective.losses(self.inner, alone).total))

    def _outcome(self, state: TrainingState, steps: int) -> Outcome:
        best = state.best
        assert best is not None  # the last step is evaluated
        projection = None
        if isinstance(self.inner, FeatureDraft):
            projection = str(self._projection(self.inner))
        accepted = best.acceptance.mean_accepted if best.acceptance else 0.0
        pace = state.tokens / max(1e-9, state.seconds)
        return Outcome(
            state.step, steps, best.step, accepted, best.acceptance, state.history, pace, state.seconds, projection
        )

    def _projection(self, net: FeatureDraft) -> Path:
        """Write PARD-2's projection, and its facts to the draft's config."""
        path = self.checkpoints.folder / PROJECTION
        assert isinstance(self.objective, Pard2)
        net.draft.config.update(net.facts(self.objective.layers))
        if self.accelerator.is_main_process:
            weight = net.projection().cpu().contiguous()
            with atomic_file(path) as file:
                file.write(save({"target_proj.weight": weight}, {"format": "pt"}))
        return path


def features_whitening(objective: Pard2, order: TrainingOrder, folder: Path, accelerator: Accelerator) -> Tensor:
    """The whitening of the features in the first sequences of a training, computed once for all of its runs."""
    path = folder / WHITENING
    with accelerator.main_process_first():
        if not path.exists():
            wanted = WHITENING_TOKENS * objective.target.config.hidden_size
            found = objective.whitening(order.first(wanted))
            with atomic_file(path) as file:
                file.write(save({"whitening": found.cpu().contiguous()}, {"format": "pt"}))
        return load_file(path)["whitening"].to(accelerator.device)


def optimizer_of(net: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """AdamW; the weights of norms, biases and embeddings do not decay."""
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, one in net.named_parameters():
        if one.requires_grad:
            (decayed if one.ndim == 2 and "embed" not in name and "lm_head" not in name else others).append(one)
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW([one for one in groups if one["params"]], lr=settings.rate, betas=BETAS)
