"""Pictures: speed-up, acceptance and the time split of pairs; quality against size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pard_onnx.benchmarks.quality.perplexity import Fidelity, Report
from pard_onnx.models.errors import BadInput
from pard_onnx.runtime.options import AUTO

from .bench import Bench
from .statistics import Summary

ENDINGS = (".png", ".svg", ".pdf")
MARKERS = ("o", "x")  # rows after real tokens, after masks


def require_writable(path: Path) -> None:
    """BadInput before anything is measured, rather than after."""
    if path.suffix not in ENDINGS:
        raise BadInput(f"--plot {path}: the name ends in one of {', '.join(ENDINGS)}")
    if not path.parent.is_dir():
        raise BadInput(f"--plot {path}: there is no folder {path.parent}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise BadInput('matplotlib is not installed; run: pip install "pard-onnx[bench]"') from None


def save(path: Path, benches: Sequence[Bench]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (speed, acceptance, split) = pyplot.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for one in benches:
        draw_speed_up(speed, one)
        longest = max(one.fixed, key=lambda row: len(row.acceptance))
        positions = range(1, len(longest.acceptance) + 1)
        acceptance.plot(positions, longest.acceptance, marker="o", label=one.title)
    draw_split(split, benches[0].fixed)
    speed.axhline(1, color="grey", linewidth=0.8)
    speed.set(title="Speed-up over plain decoding", xlabel="draft length K", ylabel="times")
    acceptance.set(title="Acceptance", xlabel="position in the draft", ylabel="share accepted", ylim=(0, 1))
    split.set(title=f"Where the time goes: {benches[0].title}", xlabel="draft length K", ylabel="ms a round")
    for axes in (speed, acceptance, split):
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def draw_speed_up(axes: Any, one: Bench) -> None:
    """Measured with intervals; dashed: predicted from the step costs, over the plain decoding that was measured."""
    lengths = [row.draft_length for row in one.fixed]
    values = [row.speed_up.value for row in one.fixed]
    below = [row.speed_up.value - row.speed_up.low for row in one.fixed]
    above = [row.speed_up.high - row.speed_up.value for row in one.fixed]
    line = axes.errorbar(lengths, values, yerr=(below, above), marker="o", capsize=3, label=one.title)
    tuned = next(way for way in one.ways if way.draft_length == AUTO)
    axes.axhline(tuned.speed_up.value, color=line[0].get_color(), linestyle=":", label="auto")
    if one.predictions:
        plain = one.ways[0].decode_tokens_per_second
        predicted = [row.tokens_per_second / plain for row in one.predictions if row.draft_length in lengths]
        axes.plot(lengths, predicted, linestyle="--", color=line[0].get_color(), label="predicted")


def draw_split(axes: Any, rows: Sequence[Summary]) -> None:
    """Stacked bars of a round's milliseconds."""
    lengths = [row.draft_length for row in rows]
    bottom = [0.0] * len(rows)
    for part in ("draft", "verify", "other"):
        heights = [1000 * row.round_seconds * getattr(row.shares, part) for row in rows]
        axes.bar(lengths, heights, bottom=bottom, label=part)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]


def save_quality(path: Path, found: Report) -> None:
    """Perplexity, and the divergence from the reference if there is one, against the size of the files."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels: list[tuple[str, str, Callable[[Fidelity], float | None]]] = [
        ("perplexity", "linear", lambda row: row.perplexity)
    ]
    if found.reference:
        panels.append(("KL divergence from the reference, nats", "log", lambda row: row.divergence))
    figure, grid = pyplot.subplots(1, len(panels), figsize=(6 * len(panels), 4.5), layout="constrained", squeeze=False)
    for axes, (name, scale, value) in zip(grid[0], panels, strict=True):
        draw_quality(axes, found, value)
        axes.set(xlabel="MB, all files", ylabel=name, yscale=scale)
        axes.grid(alpha=0.3)
    grid[0][0].legend(fontsize="small")
    figure.suptitle(f"{found.tokens} tokens of {found.text}")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def draw_quality(axes: Any, found: Report, value: Callable[[Fidelity], float | None]) -> None:
    """A colour a model, a marker a kind of rows; nothing of a draft whose vocabulary is reduced."""
    for number, one in enumerate(one for one in (found.reference, *found.models) if one):
        for row, marker in zip(one.fidelity, MARKERS, strict=False):
            name = Path(one.name).name if len(one.fidelity) == 1 else f"{Path(one.name).name}, {row.rows}"
            height = value(row)
            if height is None:
                continue
            axes.scatter(one.bytes / 1e6, height, color=f"C{number}", marker=marker, label=name)
