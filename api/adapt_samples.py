"""The samples of a run of pard-adapt, and the target's replies that they are made of, in its work folder."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from pard_onnx.adapt_plan import Plan
from pard_onnx.cli import exported_once, stages
from pard_onnx.generation_options import template_arguments
from pard_onnx.models.adapt.documents import Document, require_roles
from pard_onnx.models.adapt.encoding import Encoder
from pard_onnx.models.adapt.replies import ASSISTANT
from pard_onnx.models.adapt.samples import Counts, Sample, SampleStore, write_samples
from pard_onnx.models.adapt.self_distill import Distiller, Ends, Reply, first_question
from pard_onnx.models.adapt.settings import WRITER_PRECISION
from pard_onnx.models.atomic import recover
from pard_onnx.models.checkpoints.vocabulary import FILE as TOKENIZER_FILE
from pard_onnx.models.checks import Progress, no_progress
from pard_onnx.models.errors import BadArtifact, BadInput
from pard_onnx.models.folder_files import read_file
from pard_onnx.models.manifest import FILE_NAME as MANIFEST
from pard_onnx.models.precision import default_precision
from pard_onnx.runtime.pair import Pair, load
from pard_onnx.runtime.text.tokenizer import Text

MOST_MANIFEST = 1 << 26  # bytes
VERSION = 1  # of how samples are made; another one makes them anew


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
                samples = encoder_of(plan, longest, counts).samples(counted(plan, progress))
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


def counted(plan: Plan, progress: Progress) -> Iterator[Document]:
    """The documents of the data, with a progress bar once their number is known."""
    data, template = plan.data, plan.base.spec.chat_template or ""
    total = sum(1 for _ in data.read())
    for number, document in enumerate(data.read(), 1):
        require_roles(document, template)
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
    if plan.exported is not None:
        return hashlib.sha256(read_file(plan.exported / MANIFEST, MOST_MANIFEST, BadArtifact)).hexdigest()
    assert plan.target is not None
    path = plan.target.path.resolve()
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return digest([WRITER_PRECISION, *((str(one), one.stat().st_size, one.stat().st_mtime_ns) for one in files)])


def distilled(plan: Plan, work: Path, progress: Progress) -> Distiller:
    """The target's replies to all documents, in a file of the work folder."""
    options, documents = plan.options, questions(plan, progress)
    work.mkdir(parents=True, exist_ok=True)
    writer = writer_folder(plan, work)
    with load(writer, None) as pair:
        text, eos_ids = pair.engine.text, plan.base.spec.vocabulary.eos_ids
        ends = Ends(end_of_reply(text, eos_ids), eos_ids[0] if len(eos_ids) == 1 else None)
        file = work / f"replies-{replies_key(plan)[:16]}.jsonl"
        write = partial(written, pair, options)
        found = Distiller(text, write, file, options.seed or 0, ends, template_arguments(options))
        found.run(documents, progress)
    return found


def questions(plan: Plan, progress: Progress = no_progress) -> list[Document]:
    """All documents, which the target is to reply to.

    BadInput where there is none, or the chat template refuses one: before the target is exported.
    """
    text, arguments, asked = plan.text(), template_arguments(plan.options), 0
    documents = list(plan.data.read())
    for number, document in enumerate(documents, 1):
        require_roles(document, text.template)
        if messages := first_question(document):
            tools = {"tools": list(document.tools)} if document.tools else {}
            try:
                text.render(messages, {**arguments, **tools, "add_generation_prompt": True})
            except BadInput as error:
                raise type(error)(f"{document.place}: {error}") from error
        asked += bool(messages or document.text.strip())
        progress("prompts", number, len(documents))
    if not asked:
        raise BadInput(
            f"--data {' '.join(plan.data.names)}: {len(documents)} documents, and none has a message or a text that "
            "the target could reply to"
        )
    held_out = plan.options.held_out or 1
    replies = sum(max(1, sum(one["role"] == ASSISTANT for one in document.messages)) for document in documents)
    if not plan.options.prepare and (asked < 2 or held_out >= replies):
        raise BadInput(
            f"--held-out {held_out}: the data asks for {replies} replies in {asked} documents, so that none would be "
            "left to train on; give more data, or a smaller --held-out"
        )
    return documents


def writer_folder(plan: Plan, work: Path) -> str:
    """The exported folder that writes replies; --target is exported to the work folder if the user names none."""
    if plan.exported is not None:
        return str(plan.exported)
    assert plan.target is not None and plan.target_source is not None
    checkpoint = plan.target.in_floats()
    # Integers of a quantized checkpoint that is no GGUF file are exported as they are
    precision = default_precision(checkpoint.bits) if checkpoint.quantization else WRITER_PRECISION
    output = work / f"target-{precision}-{writer_key(plan)[:8]}"
    return str(exported_once(checkpoint, plan.target_source, output, precision))


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
