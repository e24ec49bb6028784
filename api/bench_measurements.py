"""What `pard-bench` measures, by its options, and how it is shown."""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pard_onnx.benchmarks.bench import Bench, reset_peak, summarize_trial, ways, with_predictions
from pard_onnx.benchmarks.drafters import drafters, labels, ways_of
from pard_onnx.benchmarks.measures import CONTEXT
from pard_onnx.benchmarks.measures.step_costs import Curve, measure_folder, parse_contexts
from pard_onnx.benchmarks.peers.comparison import PeerSelection, TaskOptions, compare, select_peers
from pard_onnx.benchmarks.trial import (
    OWN,
    PLAIN,
    SHIPPED,
    DecodingRequest,
    PromptSet,
    Trial,
    decode_work,
    read_prompts,
    run_trial,
    speed_up,
)
from pard_onnx.benchmarks.trial import Progress as Count
from pard_onnx.cli import stages
from pard_onnx.generation_options import load_arguments, sampling_arguments
from pard_onnx.models.checks import DRAFT_LIMIT, require_whole
from pard_onnx.models.errors import BadInput, Failure
from pard_onnx.runtime.pair import Pair, load
from pard_onnx.runtime.providers.threads import physical_cores

if TYPE_CHECKING:
    from rich.console import Console


def measure(options: argparse.Namespace) -> None:
    """Check all options, then measure."""
    from rich.console import Console

    from pard_onnx.benchmarks import display

    require_models(options)
    require_whole("--max-new-tokens", options.max_new_tokens, 2)  # rates are of the tokens after the first
    if options.limit is not None:
        require_whole("--limit", options.limit, 1)
    lengths = draft_lengths(options.sweep_k, options.draft_length)
    contexts = parse_contexts(options.contexts) if options.contexts else ()
    sets = [read_prompts(path, options.limit) for path in options.prompts or [SHIPPED]]
    if options.plot:
        display.require_plot_path(options.plot)
    if options.peers and sampling_arguments(options):
        raise BadInput("--peers decode greedily; leave the sampling options out")
    wanted = rivals_from_options(options) if options.peers else None
    if options.draft:
        labels(options.draft)
    console = Console(highlight=False, quiet=options.json)
    curves = [curve for name in options.cost or [] for curve in measured_curves(name, contexts or (CONTEXT,), options)]
    benches = [one for pair in options.pair for one in benches_of_pair(pair, sets, lengths, options, console, wanted)]
    compared = list(comparisons(sets, lengths, options, console)) if options.draft else []
    if options.cost is not None:
        context = contexts[0] if contexts else None
        benches, more = with_predictions(benches, lambda name, at: measured_curves(name, (at,), options)[0], context)
        curves += more
        console.print(display.curves_table(curves))
        for one in benches:
            console.print(display.predictions_table(one.title, one.predictions, one.ways))
    if options.plot and (benches or compared):
        display.save_plot(options.plot, [*benches, *compared])
    if options.json:
        print(json.dumps(report(benches, compared, curves, options)))
    require_agreement([*benches, *compared])


def require_models(options: argparse.Namespace) -> None:
    """Raise BadInput where nothing is named to measure, or only a part of it."""
    if options.target is not None and not options.draft:
        raise BadInput(f"--target {options.target}: has no draft to measure; add --draft DRAFT, once for each draft")
    if options.draft and options.target is None:
        raise BadInput(f"--draft {options.draft[0]}: has no target; add --target TARGET")
    if not options.pair and not options.draft and not options.cost:
        raise BadInput(
            "name a pair: --pair TARGET DRAFT, drafts of one target: --target TARGET --draft DRAFT --draft DRAFT, or "
            "folders: --cost DIR"
        )
    if options.peers and not options.pair:
        raise BadInput(f"--peers {options.peers}: other libraries are measured beside a pair; name it with --pair")


def request_from_options(options: argparse.Namespace) -> DecodingRequest:
    return DecodingRequest(options.max_new_tokens, options.chat, sampling_arguments(options))


def rivals_from_options(options: argparse.Namespace) -> PeerSelection:
    return select_peers(
        options.peers, options.peer_target, options.peer_draft, options.peer_models, options.peer_python
    )


def draft_lengths(sweep: str | None, single: int) -> list[int]:
    """The draft lengths to measure: those of a sweep such as '1..12', or a single one."""
    first, dots, last = sweep.partition("..") if sweep else (str(single), "..", str(single))
    try:
        lengths = list(range(int(first), int(last) + 1)) if dots else []
    except ValueError:
        lengths = []
    if not lengths or lengths[0] < 1 or lengths[-1] > DRAFT_LIMIT:
        option = f"--sweep-k {sweep!r}" if sweep else f"--draft-length {single}"
        raise BadInput(f"{option}: draft lengths are from 1 to {DRAFT_LIMIT}, a sweep is written as 1..12")
    return lengths


def benches_of_pair(
    names: Sequence[str],
    sets: Sequence[PromptSet],
    lengths: Sequence[int],
    options: argparse.Namespace,
    console: Console,
    wanted: PeerSelection | None,
) -> Iterator[Bench]:
    """One bench for each prompt set; the pair's sessions are loaded once."""
    request = request_from_options(options)
    reset_peak()
    target, draft = names
    with load(target, draft, cache_bytes=0, **load_arguments(options)) as pair:  # each way reads the whole prompt
        for prompts in sets:
            with progress_bar(prompts.name) as tick:
                trial = run_trial({OWN: pair}, prompts.prompts, ways(lengths), request, tick)
            one = summarize_trial(pair, pair.draft_name or "", prompts, trial)
            show(console, one)
            yield with_rivals(wanted, one, pair, prompts, trial, options, console) if wanted else one


def comparisons(
    sets: Sequence[PromptSet], lengths: Sequence[int], options: argparse.Namespace, console: Console
) -> Iterator[Bench]:
    """The drafts of one target side by side: one bench for each prompt set."""
    request = request_from_options(options)
    reset_peak()
    with drafters(options.target, options.draft, options.draft_mode, load_arguments(options)) as pairs:
        found = ways_of(pairs, lengths)
        names = ", ".join(dict.fromkeys(way.drafter for way in found if way.drafter != OWN))
        for prompts in sets:
            with progress_bar(prompts.name) as tick:
                trial = run_trial(pairs, prompts.prompts, found, request, tick)
            one = summarize_trial(pairs[OWN], names, prompts, trial)
            show(console, one, positions=True)
            yield one


def show(console: Console, one: Bench, *, positions: bool = False) -> None:
    """Print the tables of a bench. positions: with the acceptance by position of each way with drafts."""
    from pard_onnx.benchmarks import display

    console.print(display.rates_table(f"{one.title}, {one.prompt_count} prompts", one.ways))
    console.print(display.rounds_table(one.rounds))
    if positions:
        console.print(display.positions_table(one.rounds))
    console.print(f"kernel {one.kernel}, peak memory {one.peak_bytes / 2**20:.0f} MiB\n")


def with_rivals(
    wanted: PeerSelection,
    one: Bench,
    pair: Pair,
    prompts: PromptSet,
    trial: Trial,
    options: argparse.Namespace,
    console: Console,
) -> Bench:
    """The bench with the peers' results, and with the drift of plain decoding, which is measured again after them."""
    task = TaskOptions(options.max_new_tokens, options.threads or physical_cores(), options.chat)
    with stages() as tick:
        found = tuple(compare(wanted, pair, prompts, trial, task, tick))
    again = run_trial({OWN: pair}, prompts.prompts, [PLAIN], request_from_options(options))
    drift = speed_up([decode_work(r) for r in again.results[PLAIN]], [decode_work(r) for r in trial.results[PLAIN]])
    from pard_onnx.benchmarks import display

    console.print(display.peers_table(one.title, found, drift.value))
    return replace(one, rivals=found, drift=drift.value)


def measured_curves(name: str, contexts: Sequence[int], options: argparse.Namespace) -> list[Curve]:
    with progress_bar(f"steps of {Path(name).name}") as tick:
        out = []
        where = {key: value for key, value in load_arguments(options).items() if key != "draft_mode"}
        for curve in measure_folder(name, contexts, **where):
            out.append(curve)
            tick(len(out), len(contexts))
    return out


@contextmanager
def progress_bar(name: str) -> Iterator[Count]:
    """A progress bar on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(name, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)


def report(
    benches: Sequence[Bench], compared: Sequence[Bench], measured: Sequence[Curve], options: argparse.Namespace
) -> dict[str, Any]:
    return {
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "system": platform.platform(),
            "threads": options.threads or physical_cores(),
        },
        "versions": {
            "pard-onnx": version("pard-onnx"),
            "onnxruntime": onnxruntime_version(),
            "python": platform.python_version(),
        },
        "provider": options.provider,
        "max_new_tokens": options.max_new_tokens,
        "pairs": [asdict(one) for one in benches],
        "comparisons": [asdict(one) for one in compared],
        "curves": [asdict(curve) for curve in measured],
    }


def onnxruntime_version() -> str:
    from pard_onnx.runtime.providers.table import onnxruntime

    return str(onnxruntime().__version__)


def require_agreement(benches: Sequence[Bench]) -> None:
    """Failure if a draft's tokens differ from plain decoding's in a bench that must be exact."""
    for one in filter(lambda one: one.exact, benches):
        for way in one.rounds:
            if way.agreement < 1:
                raise Failure(
                    f"{one.title}: {way.name} and plain decoding differ on {100 * (1 - way.agreement):.0f} % of the "
                    "prompts; please report this"
                )
