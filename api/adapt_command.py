"""`pard-adapt`: a PARD draft for a model, trained from an autoregressive sibling or from some of its own layers."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from pard_onnx.cli import Parser, exit_code, exported_once, extra, printable, stages
from pard_onnx.generation_options import add_template_arguments, template_arguments
from pard_onnx.models.adapt.documents import DataSet, Document, open_data
from pard_onnx.models.adapt.encoding import Encoder
from pard_onnx.models.adapt.samples import Counts, Sample, SampleStore, write_samples
from pard_onnx.models.adapt.self_distill import Distiller, Ends, Reply
from pard_onnx.models.adapt.settings import CHOICES, Settings
from pard_onnx.models.atomic import recover
from pard_onnx.models.checkpoints.checkpoint import Checkpoint
from pard_onnx.models.checkpoints.vocabulary import FILE as TOKENIZER_FILE
from pard_onnx.models.checks import Progress, finite_number, require_whole
from pard_onnx.models.errors import BadArtifact, BadInput
from pard_onnx.models.folder_files import read_file
from pard_onnx.models.hub import resolve_artifact, resolve_checkpoint
from pard_onnx.models.manifest import FILE_NAME as MANIFEST
from pard_onnx.models.manifest import Source
from pard_onnx.models.precision import Precision
from pard_onnx.runtime.model import other_tokenizer
from pard_onnx.runtime.pair import Pair, load
from pard_onnx.runtime.text.tokenizer import Text, first_difference

if TYPE_CHECKING:
    from pard_onnx.models.adapt.outcome import Outcome
    from pard_onnx.models.adapt.start import Start

LAYERS = ("first", "last", "even")
HELD_OUT, HELD_OUT_SHARE = 64, 20  # samples at most, and one of so many
WRITER_PRECISION: Precision = "int8"  # of an exported target that writes replies: it says nearly what the floats say
NEW_TOKENS = 512  # of a reply
MOST_MANIFEST = 1 << 26  # bytes
VERSION = 1  # of how samples are made; another one makes them anew
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
    group.add_argument("--layers", choices=LAYERS, default="even", help="which ones (default: even, over all)")
    target = "the model that the draft is for; needed by --shallow, --self-distill and --method pard2"
    group.add_argument("--target", metavar="ID_OR_DIR", help=target)
    group.add_argument("--mask-token", type=int, metavar="ID", help="default: an unused id is found, or a row is added")
    for part, name in (("", "target"), ("draft-", "draft")):
        group.add_argument(f"--{part}revision", metavar="NAME", help=f"branch, tag or commit of the {name}'s hub id")


def add_data(out: argparse.ArgumentParser) -> None:
    group = out.add_argument_group("data")
    forms = (
        "JSON lines of conversations (AMD's, OpenAI's, ShareGPT's) or texts, plain text, or ORG/NAME[:SPLIT] of the hub"
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
    with extra("adapt"):
        plan = planned(options)
    if options.dry_run:
        with tempfile.TemporaryDirectory() as scratch:
            dry_run(plan, settings, Path(scratch))
        return
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
    needs = {"--shallow": options.shallow is not None, "--method pard2": options.method == "pard2"}
    needs["--self-distill"] = options.self_distill and options.exported is None
    missing = [name for name, needed in needs.items() if needed]
    if missing and options.target is None:
        raise BadInput(f"{missing[0]}: of which target? name it with --target ID_OR_DIR")
    if options.exported is not None and not options.self_distill:
        raise BadInput(
            f"--exported {options.exported}: writes the replies of --self-distill; add that, or leave it out"
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
    return Settings(method=options.method, **given)


def main_process_first() -> Any:
    """Where `accelerate launch` has started several processes, one prepares the data, and the others then find it."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return nullcontext()
    from accelerate import PartialState

    return PartialState().main_process_first()


def is_main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


# The plan


@dataclass(frozen=True, slots=True)
class Plan:
    """What was checked of the options: all that the training takes."""

    options: argparse.Namespace
    base: Checkpoint  # what the draft is made of: the draft's checkpoint or the target's
    source: Source
    target: Checkpoint | None
    target_source: Source | None
    data: DataSet
    mask: Any
    output: Path

    @property
    def work(self) -> Path:
        return self.options.work or self.output.with_name(f"{self.output.name}.work")

    def text(self) -> Text:
        """The tokenizer and the chat template of the draft, which are the target's too."""
        return Text(self.base.tokenizer_folder, self.base.spec.chat_template)

    def start(self) -> Start:
        from pard_onnx.models.adapt import start

        if self.options.shallow is None:
            return start.start_from(self.base.path, self.mask.id)
        return start.shallow(self.base.path, self.options.shallow, self.options.layers, self.mask.id)


def planned(options: argparse.Namespace) -> Plan:
    """Open what the options name. Raises BadInput for what does not fit together, before any long work."""
    from pard_onnx.models.adapt.start import chosen_layers, mask_of, trainable

    data = open_data(options.data)
    target = target_source = None
    if options.target is not None:
        folder, target_source = resolve_checkpoint(options.target, options.revision)
        target = Checkpoint.open(folder).as_role("target")
    if options.draft is not None:
        folder, source = resolve_checkpoint(options.draft, options.draft_revision)
        base = trainable(folder)
        if target is not None:
            require_same_tokens(target, base)
    else:
        assert target is not None and target_source is not None
        base, source = trainable(target.path).as_role("target"), target_source
        chosen_layers(base.spec.layers, options.shallow, options.layers)
    output = options.output or Path(f"{source.model.rsplit('/', 1)[-1]}-pard")
    recover(output)
    if output.exists() and not (options.force or options.dry_run or options.prepare):
        raise BadInput(f"{output}: exists already; choose another --output, or replace it with --force")
    return Plan(options, base, source, target, target_source, data, mask_of(base, options.mask_token), output)


def require_same_tokens(target: Checkpoint, draft: Checkpoint) -> None:
    """BadInput, naming the first id, for a draft whose tokens are not the target's. Padding rows may differ."""
    ours, theirs = (one.tokenizer().get_vocab(with_added_tokens=True) for one in (target, draft))
    if difference := first_difference(ours, theirs):
        raise other_tokenizer(str(target.path), str(draft.path), *difference)


# Samples


def prepared(plan: Plan, longest: int, work: Path) -> SampleStore:
    """The samples in the work folder; made now if they are not there. BadInput for data without a single reply."""
    options = plan.options
    key = key_of(plan, longest)
    folder = work / f"samples-{key[:16]}"
    recover(folder)
    if not folder.exists():
        with stages() as progress:
            counts = Counts()
            if options.self_distill:
                samples = distilled(plan, work, progress).samples(longest, counts)
            else:
                samples = encoder_of(plan, longest, counts).samples(counted(plan.data, progress))
            write_samples(folder, some(samples, plan, counts), counts)
    return SampleStore(folder)


def some(samples: Iterable[tuple[int, Sample]], plan: Plan, counts: Counts) -> Iterator[tuple[int, Sample]]:
    """The samples; BadInput where there is none, so that nothing is written."""
    is_empty = True
    for sample in samples:
        is_empty = False
        yield sample
    if is_empty:
        names = " ".join(plan.data.names)
        raise BadInput(
            f"--data {names}: {counts.documents} documents, and none has a reply to learn from; give conversations "
            "with an assistant's messages, or let the target write them with --self-distill"
        )


def encoder_of(plan: Plan, longest: int, counts: Counts) -> Encoder:
    spec, arguments = plan.base.spec, template_arguments(plan.options)
    rows = plan.mask.rows
    return Encoder(plan.text(), plan.mask.id, rows, spec.vocabulary.eos_ids, longest, arguments, counts)


def counted(data: DataSet, progress: Progress) -> Iterator[Document]:
    """The documents of the data, with a progress bar once their number is known."""
    total = sum(1 for _ in data.read())
    for number, document in enumerate(data.read(), 1):
        yield document
        progress("samples", number, total)


def key_of(plan: Plan, longest: int) -> str:
    """A digest of all that samples depend on."""
    options, spec = plan.options, plan.base.spec
    tokenizer = hashlib.sha256((plan.base.tokenizer_folder / TOKENIZER_FILE).read_bytes()).hexdigest()
    facts: list[object] = [VERSION, plan.data.digest, tokenizer, spec.chat_template, longest, plan.mask.id]
    facts += [spec.vocabulary.eos_ids, template_arguments(options)]
    if options.self_distill:
        facts.append(replies_key(plan))
    return digest(facts)


def digest(facts: object) -> str:
    return hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()


# Replies of the target


def replies_key(plan: Plan) -> str:
    """A digest of all that the target's replies depend on."""
    options = plan.options
    facts = [VERSION, plan.data.digest, writer_key(plan), options.temperature, options.max_new_tokens]
    return digest([*facts, options.seed or 0, template_arguments(options)])


def writer_key(plan: Plan) -> str:
    """A digest of the model that writes replies: of its manifest, or of the target's files by their times."""
    if plan.options.exported is not None:
        manifest = resolve_artifact(plan.options.exported) / MANIFEST
        return hashlib.sha256(read_file(manifest, MOST_MANIFEST, BadArtifact)).hexdigest()
    assert plan.target is not None
    path = plan.target.path.resolve()
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return digest([WRITER_PRECISION, *((str(one), one.stat().st_size, one.stat().st_mtime_ns) for one in files)])


def distilled(plan: Plan, work: Path, progress: Progress) -> Distiller:
    """The target's replies to all documents, in a file of the work folder."""
    options, documents = plan.options, list(plan.data.read())
    work.mkdir(parents=True, exist_ok=True)
    writer = exported_target(plan, work)
    with load(writer, None) as pair:
        text, eos_ids = pair.engine.text, plan.base.spec.vocabulary.eos_ids
        if difference := first_difference(text.vocabulary(), plan.text().vocabulary()):
            raise other_tokenizer(writer, plan.source.model, *difference)
        ends = Ends(end_of_reply(text, eos_ids), eos_ids[0] if len(eos_ids) == 1 else None)
        file = work / f"replies-{replies_key(plan)[:16]}.jsonl"
        write = partial(written, pair, options)
        found = Distiller(text, write, file, options.seed or 0, ends, template_arguments(options))
        found.run(documents, progress)
    return found


def exported_target(plan: Plan, work: Path) -> str:
    """The exported folder that writes replies; --target is exported to the work folder if the user names none."""
    if plan.options.exported is not None:
        return str(plan.options.exported)
    assert plan.target is not None and plan.target_source is not None
    output = work / f"target-{WRITER_PRECISION}-{writer_key(plan)[:8]}"
    return str(exported_once(plan.target, plan.target_source, output, WRITER_PRECISION))


def written(pair: Pair, options: argparse.Namespace, prompt: Sequence[int], seed: int) -> Reply:
    """What the target writes after the ids of a prompt."""
    sampling: dict[str, Any] = {"temperature": options.temperature, "seed": seed} if options.temperature else {}
    found = pair.generate(list(prompt), max_new_tokens=options.max_new_tokens, **sampling)
    return Reply(found.tokens, found.text, found.finish_reason == "stop")


def end_of_reply(text: Text, eos_ids: Sequence[int]) -> int | None:
    """The EOS token that ends a reply: the one that the chat template writes after one, or the only one."""
    if text.has_template:
        messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
        with suppress(BadInput):  # a template may want other messages
            ids = text.encode_chat(messages, {"add_generation_prompt": False})
            found = [id_ for id_ in ids if id_ in eos_ids]
            if found:
                return found[-1]
    return eos_ids[0] if len(eos_ids) == 1 else None


# Training


def train(plan: Plan, settings: Settings, store: SampleStore) -> None:
    """Train the draft, and write its folder, its card and what to do with it."""
    with extra("adapt"):
        from pard_onnx.models.adapt.card import write_card
        from pard_onnx.models.adapt.draft_folder import write_draft
        from pard_onnx.models.adapt.run import adapt
        from pard_onnx.models.adapt.start import loaded_model
    training, held_out = store.split(held_out_of(plan.options, store))
    start = plan.start()
    target = loaded_model(plan.target) if settings.method == "pard2" and plan.target else None
    outcome = adapt(start, training, held_out, settings, plan.work / "training", target)
    if not is_main_process():
        return
    projection = Path(outcome.projection) if outcome.projection else None
    facts = facts_of(plan, start, store)
    card = partial(write_card, outcome=outcome, settings=settings, facts=facts)
    write_draft(start, plan.output, projection, card, replace=plan.options.force)
    say(plan, {"outcome": asdict(outcome)}, outcome_lines(plan, outcome))


def held_out_of(options: argparse.Namespace, store: SampleStore) -> int:
    if options.held_out is not None:
        return int(options.held_out)
    return max(1, min(HELD_OUT, len(store) // HELD_OUT_SHARE))


def dry_run(plan: Plan, settings: Settings, scratch: Path) -> None:
    """Show what a run would do: what is made of the data, and the memory that it takes."""
    from pard_onnx.models.adapt.memory import estimate
    from pard_onnx.models.adapt.start import loaded_model

    facts: dict[str, Any] = {}
    if plan.options.self_distill:
        documents = sum(1 for _ in plan.data.read())
        facts["documents"], line = documents, f"data: {documents} documents, whose replies the target would write"
    else:
        store = prepared(plan, settings.sequence_tokens, scratch)
        store.split(held_out_of(plan.options, store))
        facts["samples"], line = asdict(store.facts), facts_line(store)
    start = plan.start()
    target = loaded_model(plan.target) if settings.method == "pard2" and plan.target else None
    found = estimate(start, settings, target)
    facts["memory"] = asdict(found) | {"total": found.total, "fits": found.fits}
    say(plan, facts, [f"draft: {start.note}", mask_line(plan), line, f"memory: {found}", f"would write {plan.output}"])


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
        f"pard-export --model {target}",
        "pard-bench --pair TARGET DRAFT",
    ]


def say(plan: Plan, facts: dict[str, Any], lines: Sequence[str]) -> None:
    if plan.options.json:
        mask = {"id": plan.mask.id, "rows": plan.mask.rows, "note": plan.mask.note}
        print(
            json.dumps({"output": str(plan.output), "work": str(plan.work), "mask_token": mask, **facts}, default=str)
        )
        return
    console = Console(highlight=False, soft_wrap=True, markup=False)
    for line in lines:
        console.print(printable(line))


if __name__ == "__main__":
    sys.exit(main())
