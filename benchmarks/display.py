"""Results as tables in the terminal (rich) and as pictures (matplotlib)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from pard_onnx.benchmarks.measures.step_costs import Curve, Prediction
from pard_onnx.benchmarks.peers.comparison import PeerResult
from pard_onnx.benchmarks.quality.perplexity import Fidelity, Report
from pard_onnx.models.atomic import atomic_file
from pard_onnx.models.checks import AUTO
from pard_onnx.models.errors import BadInput
from pard_onnx.models.extras import needs
from pard_onnx.models.system_errors import write_error

from .bench import Bench
from .trial import Ratio, Summary

STEPS = (1, 9, 16)  # tokens: of plain decoding; to verify eight drafts; of a draft after an accepted long proposal
MOST_POSITIONS = 16  # columns of acceptance; --json has all
REASON = 200  # characters of a peer's error message that a table shows; --json has the whole


def rates_table(title: str, rows: Sequence[Summary]) -> Table:
    caption = (
        "decode: without prefills; overall: with them; speed-up: decode, against plain single-token steps, "
        "95 % interval over prompts; same: prompts with exact plain decoding's tokens"
    )
    columns = ("way", "decode\ntok/s", "overall\ntok/s", "first\nms", "speed-up", "same\n%")
    out = new_table(title, columns, caption)
    for row in rows:
        out.add_row(
            row.name,
            f"{row.decode_tokens_per_second:.1f}",
            f"{row.overall_tokens_per_second:.1f}",
            f"{1000 * row.time_to_first_token:.0f}",
            ratio_text(row.speed_up),
            f"{100 * row.agreement:.0f}",
        )
    return out


def rounds_table(rows: Sequence[Summary]) -> Table:
    """Tokens and time of a mean round, and the acceptance by position in the longest draft."""
    longest = max(rows, key=lambda row: (row.draft_length != AUTO, len(row.acceptance)))
    profile = " ".join(f"{100 * share:.0f}" for share in longest.acceptance)
    caption = f"accepted by position in the draft ({longest.name}), %: {profile}"
    out = new_table("rounds", ("way", "tokens", "ms", "draft %", "verify %", "other %"), caption)
    for row in rows:
        shares = (row.shares.draft, row.shares.verify, row.shares.other)
        cells = (f"{row.mean_accepted:.2f}", f"{1000 * row.round_seconds:.2f}", *(f"{100 * s:.1f}" for s in shares))
        out.add_row(row.name, *cells)
    return out


def positions_table(rows: Sequence[Summary]) -> Table:
    """The acceptance of each way by position in the draft, as far as the longest fixed draft goes."""
    fixed = (len(row.acceptance) for row in rows if row.draft_length != AUTO)
    longest = min(MOST_POSITIONS, max(fixed, default=MOST_POSITIONS))
    caption = f"accepted at each position, of the drafts that reach it, %; positions 1 to {longest}"
    out = new_table("acceptance", ("way", *map(str, range(1, longest + 1))), caption)
    for row in rows:
        cells = [f"{100 * share:.0f}" for share in row.acceptance[:longest]]
        out.add_row(row.name, *cells, *[""] * (longest - len(cells)))
    return out


def peers_table(title: str, results: Sequence[PeerResult], drift: float) -> Table:
    caption = f"ours: our self-tuned decoding over theirs; our plain decoding ran at {drift:.2f}x of before, afterwards"
    out = new_table(f"{title}: peers", ("peer", "mode", "format", "tok/s", "ours", "same\n%", "peak\nMiB"), caption)
    for one in results:
        cells = ["-"] * 4
        if one.ratio:
            peak = f"{one.peak_bytes / 2**20:.0f}" if one.peak_bytes else ""
            rate = f"{one.decode_tokens_per_second:.1f}"
            cells = [rate, f"{one.ratio.value:.2f}x", f"{100 * one.agreement:.0f}", peak]
        out.add_row(one.name, one.mode, one.format, *cells)
    reasons = [f"{one.name} {one.mode}: {one.reason[:REASON]}" for one in results if one.reason]
    out.caption = "\n".join([caption, *reasons])
    return out


def curves_table(curves: Sequence[Curve]) -> Table:
    caption = "ms by tokens in the step; target: all rows of logits; draft: masks count as tokens"
    names = (f"{Path(curve.folder).name}\non {curve.provider} at {curve.context}" for curve in curves)
    out = new_table("step costs", ("tokens", *names), caption)
    for row in zip(*(curve.costs.points for curve in curves), strict=True):
        out.add_row(str(row[0][0]), *(f"{1000 * seconds:.2f}" for _, seconds in row))
    return out


def predictions_table(title: str, predicted: Sequence[Prediction], measured: Sequence[Summary]) -> Table:
    """Predicted rates beside the measured ones."""
    found = {row.draft_length: row.decode_tokens_per_second for row in measured if row.exact}
    out = new_table(
        f"{title}: predicted from the curves, and measured", ("K", "predicted tok/s", "measured tok/s", "off by")
    )
    for row in predicted:
        actual = found.get(row.draft_length)
        off = f"{100 * (row.tokens_per_second / actual - 1):+.0f} %" if actual else ""
        name = str(row.draft_length) if row.draft_length else "plain"
        out.add_row(name, f"{row.tokens_per_second:.1f}", f"{actual:.1f}" if actual else "", off)
    return out


def quality_table(found: Report) -> Table:
    """One line for each model and kind of rows; the reference first."""
    columns = ["model", "MB", "perplexity"]
    columns += ["more %", "KL", "top-1 %"] if found.reference else []
    caption = f"{found.tokens} tokens of {found.text}; MB: all files"
    reduced = any(row.perplexity is None for one in found.models for row in one.fidelity)
    if reduced:
        columns.append("covered\n%")
        caption += "; covered: tokens of the text that the draft's vocabulary has"
    if found.reference:
        caption += "; more: than the reference, 95 % interval; KL: divergence from the reference, nats a row; "
        caption += "top-1: rows with the reference's most likely token"
    out = new_table(f"{found.role}s: quality", columns, caption)
    for one in (found.reference, *found.models):
        for i, row in enumerate(one.fidelity if one else ()):
            first = one if i == 0 else None
            name = Path(first.name).name if first else f"  after {row.rows}"
            size = f"{first.bytes / 1e6:.1f}" if first else ""
            perplexity = "-" if row.perplexity is None else f"{row.perplexity:.3f}"
            compared = _compared(row) or ([""] * 3 if found.reference else [])
            covered = [f"{100 * row.coverage:.1f}"] if reduced else []
            out.add_row(name, size, perplexity, *compared, *covered)
    return out


def _compared(row: Fidelity) -> list[str]:
    """The cells of columns that compare with a reference."""
    if row.agreement is None:
        return []
    if row.ratio is None or row.divergence is None:
        return ["-", "-", f"{100 * row.agreement:.1f}"]
    half = (row.ratio.high - row.ratio.low) / 2
    more = f"{100 * (row.ratio.value - 1):+.2f} ± {100 * half:.2f}"
    return [more, f"{max(0.0, row.divergence):.5f}", f"{100 * row.agreement:.1f}"]


def steps_table(found: Report) -> Table:
    """The models' mean accepted length, and the time of their steps."""
    columns = ["model"] + ([f"accepted\nK={found.draft_length}"] if found.partner else [])
    columns += [f"step of {width}\nms" for width in STEPS]
    caption = f"accepted: mean length on shipped prompts with {Path(found.partner).name}" if found.partner else None
    out = new_table(f"{found.role}s: steps", columns, caption)
    for one in found.models:
        cells = [f"{one.accepted:.2f}"] if one.accepted is not None else []
        cells += [f"{1000 * one.costs(width):.2f}" for width in STEPS] if one.costs else []
        out.add_row(Path(one.name).name, *cells)
    return out


def new_table(title: str, columns: Sequence[str], caption: str | None = None) -> Table:
    out = Table(box=SIMPLE_HEAD, title=title, caption=caption, title_justify="left")
    for i, name in enumerate(columns):
        out.add_column(name, justify="right" if i else "left", no_wrap=True)
    return out


def ratio_text(ratio: Ratio) -> str:
    return f"{ratio.value:.2f}x [{ratio.low:.2f}, {ratio.high:.2f}]"


ENDINGS = (".png", ".svg", ".pdf")
MARKERS = ("o", "x")  # of rows after tokens, of rows after masks


def require_plot_path(path: Path) -> None:
    """Raise BadInput, before anything is measured, if a plot cannot be written to that path."""
    if path.suffix not in ENDINGS:
        raise BadInput(f"--plot {path}: the name ends in one of {', '.join(ENDINGS)}")
    if not path.parent.is_dir():
        raise BadInput(f"--plot {path}: there is no folder {path.parent}")
    with needs("bench"):
        import matplotlib  # noqa: F401


def save_figure(path: Path, figure: Any) -> None:
    """Write the plot whole or not at all; BadInput or Failure if it cannot be written."""
    try:
        with atomic_file(path) as file:
            figure.savefig(file, dpi=150, format=path.suffix.removeprefix("."))
    except OSError as error:
        raise write_error(path, error, "choose another --plot") from error


def save_plot(path: Path, benches: Sequence[Bench]) -> None:
    """Plot the speed-up by draft length, the acceptance by position and the time of a round's parts."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (speed, acceptance, split) = pyplot.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for one in benches:
        for label, rows in one.by_drafter.items():
            _draw_speed_up(speed, one, label, rows)
            longest = max(rows, key=lambda row: len(row.acceptance))
            positions = range(1, len(longest.acceptance) + 1)
            acceptance.plot(positions, longest.acceptance, marker="o", label=label)
    label, rows = next(iter(benches[0].by_drafter.items()))
    _draw_split(split, rows)
    speed.axhline(1, color="grey", linewidth=0.8)
    speed.set(title="Speed-up over plain decoding", xlabel="draft length K", ylabel="times")
    acceptance.set(title="Acceptance", xlabel="position in the draft", ylabel="share accepted", ylim=(0, 1))
    split.set(title=f"Where the time goes: {label}", xlabel="draft length K", ylabel="ms a round")
    for axes in (speed, acceptance, split):
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    save_figure(path, figure)
    pyplot.close(figure)


def _draw_speed_up(axes: Any, one: Bench, label: str, rows: Sequence[Summary]) -> None:
    """Measured speed-ups of one drafter with intervals; dashed: those that step costs predict, over measured plain
    decoding."""
    lengths = [row.draft_length for row in rows]
    values = [row.speed_up.value for row in rows]
    below = [row.speed_up.value - row.speed_up.low for row in rows]
    above = [row.speed_up.high - row.speed_up.value for row in rows]
    line = axes.errorbar(lengths, values, yerr=(below, above), marker="o", capsize=3, label=label)
    axes.axhline(one.tuned(label).speed_up.value, color=line[0].get_color(), linestyle=":", label="auto")
    if one.predictions:
        plain = one.ways[0].decode_tokens_per_second
        predicted = [row.tokens_per_second / plain for row in one.predictions if row.draft_length in lengths]
        axes.plot(lengths, predicted, linestyle="--", color=line[0].get_color(), label="predicted")


def _draw_split(axes: Any, rows: Sequence[Summary]) -> None:
    """A round's milliseconds as stacked bars."""
    lengths = [row.draft_length for row in rows]
    bottom = [0.0] * len(rows)
    for part in ("draft", "verify", "other"):
        heights = [1000 * row.round_seconds * getattr(row.shares, part) for row in rows]
        axes.bar(lengths, heights, bottom=bottom, label=part)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]


def save_quality_plot(path: Path, found: Report) -> None:
    """Plot perplexity, and the divergence from the reference if there is one, over the size of the files."""
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
        _draw_quality(axes, found, value)
        axes.set(xlabel="MB, all files", ylabel=name, yscale=scale)
        axes.grid(alpha=0.3)
    grid[0][0].legend(fontsize="small")
    figure.suptitle(f"{found.tokens} tokens of {found.text}")
    save_figure(path, figure)
    pyplot.close(figure)


def _draw_quality(axes: Any, found: Report, value: Callable[[Fidelity], float | None]) -> None:
    """A colour for each model, a marker for each kind of rows; values that are None are left out."""
    for number, one in enumerate(one for one in (found.reference, *found.models) if one):
        for row, marker in zip(one.fidelity, MARKERS, strict=False):
            name = Path(one.name).name if len(one.fidelity) == 1 else f"{Path(one.name).name}, {row.rows}"
            height = value(row)
            if height is None:
                continue
            axes.scatter(one.bytes / 1e6, height, color=f"C{number}", marker=marker, label=name)
