"""What a running training shows: a bar with the time that is left, the loss by position, evaluations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich import progress as rich_progress
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn

from .acceptance import Acceptance


@dataclass(frozen=True, slots=True)
class Report:
    """One step of a training."""

    step: int  # steps that are done
    steps: int
    loss: float  # nats a label
    loss_by_position: tuple[float, ...]
    tokens_per_second: float  # of this run; real tokens
    seconds_left: float
    acceptance: Acceptance | None = None  # where this step was evaluated


Reporter = Callable[[Report], None]


def no_report(report: Report) -> None:
    """A `Reporter` that shows nothing."""


@contextmanager
def shown_progress() -> Iterator[Reporter]:
    """A `Reporter` that shows a bar on stderr, and a line for each evaluation."""
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[facts]}"),
    )
    bars = rich_progress.Progress(*columns, console=Console(stderr=True, highlight=False))
    task = bars.add_task("training", total=None, facts="")

    def report(one: Report) -> None:
        bars.start()
        bars.update(task, completed=one.step, total=one.steps, facts=facts_line(one))
        if one.acceptance is not None:
            bars.console.print(evaluation_line(one))

    try:
        yield report
    finally:
        bars.stop()


def facts_line(one: Report) -> str:
    """The loss, the speed and the time that is left, in a few words."""
    return f"loss {one.loss:.3f}, {one.tokens_per_second:,.0f} tokens/s, {duration(one.seconds_left)} left"


def evaluation_line(one: Report) -> str:
    assert one.acceptance is not None
    losses = " ".join(f"{loss:.2f}" for loss in one.loss_by_position)
    accepted = " ".join(f"{share:.2f}" for share in one.acceptance.by_position)
    line = f"step {one.step}: mean accepted length {one.acceptance.mean_accepted:.2f}"
    if one.acceptance.expected_accepted is not None:
        line += f" ({one.acceptance.expected_accepted:.2f} expected where tokens are sampled)"
    return f"{line}; accepted by position {accepted}; loss by position {losses}"


def duration(seconds: float) -> str:
    """Seconds as people say them: 2:05 h, 12 min, 40 s."""
    minutes = round(seconds / 60)
    if minutes >= 60:
        return f"{minutes // 60}:{minutes % 60:02d} h"
    return f"{minutes} min" if minutes >= 2 else f"{seconds:.0f} s"
