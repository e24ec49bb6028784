"""The model card of a finished draft, README.md, and the plot that it shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from io import BytesIO
from pathlib import Path

from pard_onnx.models.atomic import atomic_file
from pard_onnx.models.errors import printable

from .acceptance import Acceptance
from .draft_folder import CARD, PLOT
from .outcome import Outcome
from .progress import duration
from .settings import Settings

FRONT_MATTER = ("---", "tags:", "- pard", "- speculative-decoding", "---", "")


def write_card(folder: Path, outcome: Outcome, settings: Settings, facts: Mapping[str, object]) -> None:
    """Write the card and its plot into the draft's folder. Raises OSError.

    facts: what the card says beside settings and outcome, such as data, draft and target. Without matplotlib there is
    no plot.
    """
    plot = drawn(outcome)
    if plot is not None:
        with atomic_file(folder / PLOT) as file:
            file.write(plot)
    with atomic_file(folder / CARD) as file:
        file.write(card_text(outcome, settings, facts, plot is not None).encode("utf-8"))


def card_text(outcome: Outcome, settings: Settings, facts: Mapping[str, object], plotted: bool) -> str:
    """The card's text, in Markdown."""
    name = str(facts.get("target") or facts.get("draft") or "a model")
    early = ", where it stopped because no evaluation had a gain" if outcome.stopped_early else ""
    lines = [
        *FRONT_MATTER,
        f"# A PARD draft for {_cell(name)}",
        "",
        "A parallel draft for speculative decoding ([PARD](https://arxiv.org/abs/2504.18583)), trained with "
        "`pard-adapt` of pard-onnx. `pard-export --model` takes this folder.",
        "",
        *_table(("fact", "value"), [(key.replace("_", " "), value) for key, value in facts.items()]),
        "",
        "## Acceptance on held-out samples",
        "",
        *acceptance_lines(outcome.acceptance),
        "",
        "## Training",
        "",
        f"{outcome.steps:,} of {outcome.planned_steps:,} steps in {duration(outcome.seconds)}{early}, at "
        f"{outcome.tokens_per_second:,.0f} real tokens a second. The weights are those of step {outcome.best_step:,}.",
        "",
        *([f"![Loss and mean accepted length by step]({PLOT})", ""] if plotted else []),
        *_table(("setting", "value"), [(one.name, getattr(settings, one.name)) for one in fields(settings)]),
        "",
    ]
    return "\n".join(lines)


def acceptance_lines(found: Acceptance | None) -> list[str]:
    """What was measured, as lines of Markdown."""
    if found is None or not found.rounds:
        return ["It was not measured: no samples with replies were held out."]
    lines = [
        f"Mean accepted length: **{found.mean_accepted:.2f}** tokens a round, over {found.rounds:,} rounds that take "
        "the held-out replies as what the target says.",
        "",
    ]
    rows: list[tuple[object, ...]] = [
        (position, f"{share:.1%}", *([] if found.expected_by_position is None else [f"{overlap:.1%}"]))
        for position, share, overlap in zip(
            range(1, len(found.by_position) + 1),
            found.by_position,
            found.expected_by_position or found.by_position,
            strict=True,
        )
    ]
    head = ("position", "accepted, if reached")
    if found.expected_accepted is None:
        return [*lines, *_table(head, rows)]
    lines.insert(1, f"Where tokens are sampled at temperature 1, {found.expected_accepted:.2f} are expected.")
    return [*lines, *_table((*head, "accepted where tokens are sampled"), rows)]


def drawn(outcome: Outcome) -> bytes | None:
    """Loss and mean accepted length by step, as SVG; None without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    steps = [point.step for point in outcome.history]
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    positions = len(outcome.history[-1].loss_by_position)
    for position in range(positions):
        losses = [point.loss_by_position[position] for point in outcome.history]
        left.plot(steps, losses, marker=".", label=f"position {position + 1}")
    left.set(xlabel="step", ylabel="loss, nats")
    left.legend(fontsize="x-small", ncols=1 + positions // 5)
    accepted = [point.acceptance.mean_accepted if point.acceptance else 0.0 for point in outcome.history]
    right.plot(steps, accepted, marker=".")
    right.axvline(outcome.best_step, linestyle=":", color="gray")
    right.set(xlabel="step", ylabel="mean accepted length")
    out = BytesIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(_cell(one) for one in line)} |" for line in lines]


def _cell(value: object) -> str:
    """A value in a table; names come from strangers."""
    if isinstance(value, list | tuple):
        return ", ".join(_cell(one) for one in value)
    text = printable(str(value))
    return text if text == "---" else "".join(f"\\{one}" if one in "|`*_<>[]\\" else one for one in text)
