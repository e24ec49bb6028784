"""Results as rich tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table

from pard_onnx.benchmarks.measures.step_costs import Curve, Prediction
from pard_onnx.benchmarks.peers.comparison import Rival
from pard_onnx.benchmarks.quality.perplexity import Fidelity, Report
from pard_onnx.runtime.options import AUTO

from .statistics import Ratio, Summary

STEPS = (1, 9, 16)  # tokens: plain decoding, eight drafts verified, a draft that catches up
REASON = 200  # characters of what a peer says in a table; --json has it all


def of_rates(title: str, rows: Sequence[Summary]) -> Table:
    caption = (
        "decode: without prefills; overall: with them; speed-up: decode, against plain single-token steps, "
        "95 % interval over prompts; same: prompts with exact plain decoding's tokens"
    )
    columns = ("way", "decode\ntok/s", "overall\ntok/s", "first\nms", "speed-up", "same\n%")
    out = table(title, columns, caption)
    for row in rows:
        out.add_row(
            row.name,
            f"{row.decode_tokens_per_second:.1f}",
            f"{row.overall_tokens_per_second:.1f}",
            f"{1000 * row.time_to_first_token:.0f}",
            interval(row.speed_up),
            f"{100 * row.agreement:.0f}",
        )
    return out


def of_rounds(rows: Sequence[Summary]) -> Table:
    """What a round is made of, and which positions of the longest draft were accepted."""
    longest = max(rows, key=lambda row: (row.draft_length != AUTO, len(row.acceptance)))
    profile = " ".join(f"{100 * share:.0f}" for share in longest.acceptance)
    caption = f"accepted by position in the draft ({longest.name}), %: {profile}"
    out = table("rounds", ("way", "tokens", "ms", "draft %", "verify %", "other %"), caption)
    for row in rows:
        shares = (row.shares.draft, row.shares.verify, row.shares.other)
        cells = (f"{row.mean_accepted:.2f}", f"{1000 * row.round_seconds:.2f}", *(f"{100 * s:.1f}" for s in shares))
        out.add_row(row.name, *cells)
    return out


def of_rivals(title: str, rivals: Sequence[Rival], drift: float) -> Table:
    caption = f"ours: our self-tuned decoding over theirs; our plain decoding ran at {drift:.2f}x of before, afterwards"
    out = table(f"{title}: peers", ("peer", "mode", "format", "tok/s", "ours", "same\n%", "peak\nMiB"), caption)
    for one in rivals:
        cells = ["-"] * 4
        if one.ratio:
            peak = f"{one.peak_bytes / 2**20:.0f}" if one.peak_bytes else ""
            rate = f"{one.decode_tokens_per_second:.1f}"
            cells = [rate, f"{one.ratio.value:.2f}x", f"{100 * one.agreement:.0f}", peak]
        out.add_row(one.name, one.mode, one.format, *cells)
    reasons = [f"{one.name} {one.mode}: {one.reason[:REASON]}" for one in rivals if one.reason]
    out.caption = "\n".join([caption, *reasons])
    return out


def of_curves(curves: Sequence[Curve]) -> Table:
    caption = "ms by tokens in the step; target: all rows of logits; draft: masks count as tokens"
    names = (f"{Path(curve.folder).name}\non {curve.provider} at {curve.context}" for curve in curves)
    out = table("step costs", ("tokens", *names), caption)
    for row in zip(*(curve.costs.points for curve in curves), strict=True):
        out.add_row(str(row[0][0]), *(f"{1000 * seconds:.2f}" for _, seconds in row))
    return out


def of_predictions(title: str, predicted: Sequence[Prediction], measured: Sequence[Summary]) -> Table:
    """The model of the curves beside what decoding gave."""
    found = {row.draft_length: row.decode_tokens_per_second for row in measured if row.exact}
    out = table(
        f"{title}: predicted from the curves, and measured", ("K", "predicted tok/s", "measured tok/s", "off by")
    )
    for row in predicted:
        actual = found.get(row.draft_length)
        off = f"{100 * (row.tokens_per_second / actual - 1):+.0f} %" if actual else ""
        name = str(row.draft_length) if row.draft_length else "plain"
        out.add_row(name, f"{row.tokens_per_second:.1f}", f"{actual:.1f}" if actual else "", off)
    return out


def of_quality(found: Report) -> Table:
    """One line a model and kind of rows; the reference first."""
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
    out = table(f"{found.role}s: quality", columns, caption)
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
    """Cells of what is known only against a reference."""
    if row.agreement is None:
        return []
    if row.ratio is None or row.divergence is None:
        return ["-", "-", f"{100 * row.agreement:.1f}"]
    half = (row.ratio.high - row.ratio.low) / 2
    more = f"{100 * (row.ratio.value - 1):+.2f} ± {100 * half:.2f}"
    return [more, f"{max(0.0, row.divergence):.5f}", f"{100 * row.agreement:.1f}"]


def of_usefulness(found: Report) -> Table:
    """What the models' quality is worth: accepted tokens, and the time that steps take."""
    columns = ["model"] + ([f"accepted\nK={found.draft_length}"] if found.partner else [])
    columns += [f"step of {width}\nms" for width in STEPS]
    caption = f"accepted: mean length on shipped prompts with {Path(found.partner).name}" if found.partner else None
    out = table(f"{found.role}s: steps", columns, caption)
    for one in found.models:
        cells = [f"{one.accepted:.2f}"] if one.accepted is not None else []
        cells += [f"{1000 * one.costs(width):.2f}" for width in STEPS] if one.costs else []
        out.add_row(Path(one.name).name, *cells)
    return out


def table(title: str, columns: Sequence[str], caption: str | None = None) -> Table:
    out = Table(box=SIMPLE_HEAD, title=title, caption=caption, title_justify="left")
    for i, name in enumerate(columns):
        out.add_column(name, justify="right" if i else "left", no_wrap=True)
    return out


def interval(ratio: Ratio) -> str:
    return f"{ratio.value:.2f}x [{ratio.low:.2f}, {ratio.high:.2f}]"
