"""`pard-adapt`: a PARD draft for a model, trained from an autoregressive sibling or from some of its own layers."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pard_onnx.cli import Parser, exit_code, printable
from pard_onnx.generation_options import add_template_arguments
from pard_onnx.models.adapt.samples import SampleStore
from pard_onnx.models.adapt.settings import CHOICES, WRITER_PRECISION, Settings
from pard_onnx.models.checks import finite_number, require_whole
from pard_onnx.models.errors import BadInput
from pard_onnx.models.extras import needs

if TYPE_CHECKING:  # with what runs models and renders chats, --help would take twice as long
    from pard_onnx.adapt_plan import Plan
    from pard_onnx.models.adapt.outcome import Outcome
    from pard_onnx.models.adapt.start import Start
    from pard_onnx.models.checkpoints.checkpoint import Checkpoint

LAYERS = ("first", "last", "even")
AUTO, YES, NO = "auto", "yes", "no"  # whether expected acceptance is measured
NOT_MEASURED = "not measured; --expected-acceptance yes loads the target for it"
SPARED = 0.2  # the share of the memory that stays free where nobody has asked for it
HELD_OUT, HELD_OUT_SHARE = 64, 20  # samples at most, and one of so many
NEW_TOKENS = 512  # of a reply
# The options that are fields of `Settings`: metavar, help
SETTINGS = {
    "draft_length": ("K", "tokens that the draft proposes in a pass"),
    "ratio": ("X", "the share of masks that each further position keeps of the one before (COD)"),
    "floor": ("X", "the least share that a position keeps"),
    "rate": ("X", "the peak learning rate"),
    "warmup": ("X", "the share of the steps over which the rate rises"),
    "weight_decay": ("X", "of AdamW"),
    "epochs": ("N", "passes over the data"),
    "steps": ("N", "steps of the optimizer, instead of epochs"),
    "sequence_tokens": ("N", "tokens of a sample at most"),
    "batch_tokens": ("N", "tokens of a step of the optimizer"),
    "seed": ("N", "of the order of the data, of masks, and of replies of --self-distill"),
    "precision": (None, "in which the training computes; auto is bf16 on a GPU that has it, else fp32"),
    "attention": (None, "how masked attention is computed; auto is the fastest on the device"),
    "recompute": (None, "compute activations again in the backward pass, which takes less memory and more time"),
    "freeze_embedding": (None, "train the layers, not the embedding"),
    "save_every": ("N", "steps from one checkpoint to the next"),
    "evaluate_every": ("N", "steps from one measurement on held-out samples to the next"),
    "patience": ("N", "measurements without a gain after which the training ends"),
}


def parser() -> argparse.ArgumentParser:
    out = Parser(prog="pard-adapt", description="Train a PARD draft for a model.")
    add_start(out)
    add_data(out)
    add_training(out)
    out.add_argument("--output", type=Path, metavar="DIR", help="default: NAME-pard in the current folder")
    out.add_argument("--force", action="store_true", help="replace an existing output folder")
    work = "samples, replies and checkpoints, from which a run that was interrupted goes on; default: OUTPUT.work"
    out.add_argument("--work", type=Path, metavar="DIR", help=work)
    out.add_argument("--prepare", action="store_true", help="write samples and replies, and end before the training")
    out.add_argument("--dry-run", action="store_true", help="check all, show the plan and its memory, write nothing")
    out.add_argument("--json", action="store_true", help="one JSON object")
    return out


def add_start(out: argparse.ArgumentParser) -> None:
    group = out.add_argument_group("what the draft is made of")
    draft = (
        "a small model of the target's family, or a PARD draft to train on: a hub id, a checkpoint folder, a GGUF file"
    )
    group.add_argument("--draft", metavar="ID_OR_DIR", help=draft)
    group.add_argument("--shallow", type=int, metavar="N", help="instead: N layers of the target itself")
    group.add_argument("--layers", choices=LAYERS, help="which ones (default: even, over all)")
    target = "the model that the draft is for; needed by --shallow, --self-distill and --method pard2"
    group.add_argument("--target", metavar="ID_OR_DIR", help=target)
    group.add_argument("--mask-token", type=int, metavar="ID", help="default: an unused id is found, or a row is added")
    for part, name in (("", "target"), ("draft-", "draft")):
        group.add_argument(f"--{part}revision", metavar="NAME", help=f"branch, tag or commit of the {name}'s hub id")


def add_data(out: argparse.ArgumentParser) -> None:
    group = out.add_argument_group("data")
    forms = (
        "JSON lines of conversations (AMD's, OpenAI's, ShareGPT's) or texts, plain text, or a data set of the hub, "
        "ORG/NAME[/CONFIG][:SPLIT]"
    )
    group.add_argument("--data", nargs="+", required=True, metavar="F", help=forms)
    group.add_argument(
        "--held-out", type=int, metavar="N", help=f"samples to measure with (default: 5 %%, at most {HELD_OUT})"
    )
    group.add_argument("--self-distill", action="store_true", help="let the target write all replies anew")
    exported = f"the exported target that writes them (default: --target is exported to {WRITER_PRECISION})"
    group.add_argument("--exported", metavar="DIR", help=exported)
    group.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="of these replies; 0 is greedy (default)"
    )
    group.add_argument(
        "--max-new-tokens", type=int, default=NEW_TOKENS, metavar="N", help=f"of one (default: {NEW_TOKENS})"
    )
    add_template_arguments(out)


def add_training(out: argparse.ArgumentParser) -> None:
    group = out.add_argument_group("training")
    own = "pard, or pard2: weighs tokens by the target's confidence and reads its hidden states (default: pard)"
    group.add_argument("--method", choices=CHOICES["method"], default="pard", help=own)
    expected = (
        "measure also the acceptance of sampled tokens, for which --target is loaded; auto (default): where it is "
        "named, its memory fits, and one process trains. --method pard2 always does"
    )
    group.add_argument("--expected-acceptance", choices=(AUTO, YES, NO), default=AUTO, help=expected)
    defaults = {field.name: field.default for field in fields(Settings)}
    for name, (metavar, text) in SETTINGS.items():
        default, option = defaults[name], f"--{name.replace('_', '-')}"
        if default is False:
            group.add_argument(option, action="store_true", help=text)
            continue
        kind = int if default is None else type(default)
        shown = "" if default is None else f" (default: {default})"
        group.add_argument(option, type=kind, metavar=metavar, choices=CHOICES.get(name), help=text + shown)


def main(argv: Sequence[str] | None = None) -> int:
    options = parser().parse_args(argv)
    return exit_code(lambda: run(options))


def run(options: argparse.Namespace) -> None:
    require_sense(options)
    settings = settings_of(options)
    with needs("adapt"):
        from pard_onnx.adapt_plan import planned
        from pard_onnx.adapt_samples import prepared

        plan = planned(options)
    if options.dry_run:
        with tempfile.TemporaryDirectory() as scratch:
            dry_run(plan, settings, Path(scratch))
        return
    if is_main_process() and not options.prepare:
        require_memory(plan, settings)
    with main_process_first():
        store = prepared(plan, settings.sequence_tokens, plan.work)
    if options.prepare:
        say(plan, {"samples": asdict(store.facts)}, [facts_line(store), f"prepared in {plan.work}"])
        return
    train(plan, settings, store)


# Options


def require_sense(options: argparse.Namespace) -> None:
    """BadInput for options that contradict one another, before anything is read."""
    if (options.draft is None) == (options.shallow is None):
        raise BadInput("name what the draft is made of: --draft ID_OR_DIR, or --shallow N with --target")
    of_target = {"--shallow": options.shallow is not None, "--method pard2": options.method == "pard2"}
    of_target["--expected-acceptance yes"] = options.expected_acceptance == YES
    of_target["--self-distill"] = options.self_distill and options.exported is None
    missing = [name for name, needed in of_target.items() if needed]
    if missing and options.target is None:
        raise BadInput(f"{missing[0]}: of which target? name it with --target ID_OR_DIR")
    for name, value, needed, is_there in (
        ("--layers", options.layers, "--shallow", options.shallow is not None),
        ("--revision", options.revision, "--target", options.target is not None),
        ("--draft-revision", options.draft_revision, "--draft", options.draft is not None),
        ("--exported", options.exported, "--self-distill", options.self_distill),
        ("--temperature", options.temperature or None, "--self-distill", options.self_distill),
    ):
        if value is not None and not is_there:
            raise BadInput(f"{name} {value}: is for {needed}; add that, or leave it out")
    if options.method == "pard2" and options.expected_acceptance == NO:
        raise BadInput(
            "--expected-acceptance no: --method pard2 has the target in memory, and measures it; leave it out"
        )
    if options.shallow is not None:
        require_whole("--shallow", options.shallow, 1)
    if options.held_out is not None:
        require_whole("--held-out", options.held_out, 1)
    require_whole("--max-new-tokens", options.max_new_tokens, 1)
    if finite_number("--temperature", options.temperature) < 0:
        raise BadInput(f"--temperature must be at least 0, not {options.temperature}")


def settings_of(options: argparse.Namespace) -> Settings:
    given = {name: getattr(options, name) for name in SETTINGS if getattr(options, name) is not None}
    try:
        return Settings(method=options.method, **given)
    except BadInput as error:  # which begins with the name of a field
        name, _, problem = str(error).partition(" ")
        raise BadInput(f"--{name.replace('_', '-')} {problem}") from error


def main_process_first() -> Any:
    """Where `accelerate launch` has started several processes, one prepares the data, and the others then find it."""
    if processes() == 1:
        return nullcontext()
    from accelerate import PartialState

    return PartialState().main_process_first()


def processes() -> int:
    """The processes that `accelerate launch` has started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


# Training


def train(plan: Plan, settings: Settings, store: SampleStore) -> None:
    """Train the draft, and write its folder, its card and what to do with it."""
    with needs("adapt"):
        from pard_onnx.models.adapt.card import write_card
        from pard_onnx.models.adapt.draft_folder import write_draft
        from pard_onnx.models.adapt.memory import require_room
        from pard_onnx.models.adapt.run import adapt
        from pard_onnx.models.adapt.start import loaded_model
    training, held_out = store.split(held_out_of(plan.options, store))
    start = plan.start()
    beside = target_beside(plan, settings, start)
    if beside is not None:
        require_room(start, settings, beside.spec)
    target = None if beside is None else loaded_model(beside.in_floats())
    outcome = adapt(start, training, held_out, settings, plan.work / "training", target)
    if not is_main_process():
        return
    projection = Path(outcome.projection) if outcome.projection else None
    facts = facts_of(plan, start, store)
    card = partial(write_card, outcome=outcome, settings=settings, facts=facts)
    write_draft(start, plan.output, projection, card, replace=plan.options.force)
    say(plan, {"outcome": asdict(outcome)}, outcome_lines(plan, outcome))


def target_beside(plan: Plan, settings: Settings, start: Start) -> Checkpoint | None:
    """The target that is in memory while the draft is trained: PARD-2's, or one that says what acceptance to expect."""
    from pard_onnx.models.adapt.memory import estimate

    wish = plan.options.expected_acceptance
    if settings.method == "pard2" or plan.target is None or wish == YES:
        return plan.target
    if wish == NO or processes() > 1 or plan.target.in_floats().quantization is not None:
        return None
    found = estimate(start, settings, plan.target.spec)
    has_room = found.available is not None and found.total <= (1 - SPARED) * found.available
    return plan.target if has_room else None


def require_memory(plan: Plan, settings: Settings) -> None:
    """BadInput where the training does not fit into the memory, before replies and samples are made for it."""
    with needs("adapt"):
        from pard_onnx.models.adapt.memory import require_room
    start = plan.start()
    beside = target_beside(plan, settings, start)
    require_room(start, settings, None if beside is None else beside.spec)


def held_out_of(options: argparse.Namespace, store: SampleStore) -> int:
    if options.held_out is not None:
        return int(options.held_out)
    return max(1, min(HELD_OUT, len(store) // HELD_OUT_SHARE))


def dry_run(plan: Plan, settings: Settings, scratch: Path) -> None:
    """Show what a run would do: what is made of the data, and the memory that it takes."""
    from pard_onnx.adapt_samples import prepared, questions
    from pard_onnx.models.adapt.memory import estimate

    facts: dict[str, Any] = {}
    if plan.options.self_distill:
        documents = len(questions(plan))
        facts["documents"], line = documents, f"data: {documents} documents, whose replies the target would write"
    else:
        store = prepared(plan, settings.sequence_tokens, scratch)
        store.split(held_out_of(plan.options, store))
        facts["samples"], line = asdict(store.facts), facts_line(store)
    start = plan.start()
    beside = target_beside(plan, settings, start)
    found = estimate(start, settings, None if beside is None else beside.spec)
    facts["memory"] = asdict(found) | {"total": found.total, "fits": found.fits}
    facts["expected_acceptance"] = beside is not None
    lines = [f"draft: {start.note}", mask_line(plan), line, f"memory: {found}"]
    if plan.target is not None:
        lines.append(f"expected acceptance: {'measured with the target' if beside else NOT_MEASURED}")
    say(plan, facts, [*lines, f"would write {plan.output}"])


# What is shown


def facts_of(plan: Plan, start: Start, store: SampleStore) -> dict[str, object]:
    """What the model card says beside the training's outcome."""
    target = plan.target_source.model if plan.target_source else None
    return {
        "draft": plan.source.model,
        "start": start.note,
        "target": target,
        "data": list(plan.data.names),
        "self_distilled": plan.options.self_distill,
        "mask_token": plan.mask.id,
        **asdict(store.facts),
    }


def mask_line(plan: Plan) -> str:
    return f"mask token: {plan.mask.id}, {plan.mask.note}"


def facts_line(store: SampleStore) -> str:
    facts = store.facts
    share = facts.reply_tokens / max(1, facts.tokens)
    line = (
        f"data: {facts.documents:,} documents, {facts.samples:,} samples, {facts.tokens:,} tokens, "
        f"{share:.0%} of them in replies"
    )
    line += f"; {facts.cut:,} were too long and are cut" if facts.cut else ""
    return line + (f"; {facts.unused:,} have no reply and are left out" if facts.unused else "")


def outcome_lines(plan: Plan, outcome: Outcome) -> list[str]:
    folder = plan.output
    target = plan.options.target or "TARGET"
    return [
        f"{folder}: a PARD draft; mean accepted length {outcome.mean_accepted:.2f} on held-out samples",
        f"pard-export --model {folder}",
        f"pard-export --model {target}" + (f" --for-draft {folder}" if outcome.projection else ""),
        "pard-bench --pair TARGET DRAFT",
    ]


def say(plan: Plan, facts: dict[str, Any], lines: Sequence[str]) -> None:
    if plan.options.json:
        mask = {"id": plan.mask.id, "rows": plan.mask.rows, "note": plan.mask.note}
        print(
            json.dumps({"output": str(plan.output), "work": str(plan.work), "mask_token": mask, **facts}, default=str)
        )
        return
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True, markup=False)
    for line in lines:
        console.print(printable(line))


if __name__ == "__main__":
    sys.exit(main())
