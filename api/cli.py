"""What the commands share: errors to exit codes, exports with progress bars, options of generations."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import pard_onnx
from pard_onnx.interrupts import Interrupts
from pard_onnx.models.atomic import recover
from pard_onnx.models.checks import AUTO, Progress
from pard_onnx.models.errors import BadInput, PardError, PardWarning, escaped, one_line, shown
from pard_onnx.models.extras import needs
from pard_onnx.models.library import OWN_DRAFT
from pard_onnx.models.system_errors import is_out_of_memory, os_error_line, out_of_memory
from pard_onnx.runtime.decoding.draft_mode import AUTO_MODE, DRAFT_MODES
from pard_onnx.runtime.providers.table import PROVIDERS, parse_options
from pard_onnx.runtime.sampling.settings import STARTS
from pard_onnx.runtime.text.control_tokens import HANDLINGS, TEXT
from pard_onnx.standard_streams import STANDARD_OUTPUT, to_null_device, utf8_streams

if TYPE_CHECKING:  # with what a command runs by, and with rich, --help would take half a second
    from rich import progress as rich_progress

    from pard_onnx.export.job import Job
    from pard_onnx.models.checkpoints.checkpoint import Checkpoint
    from pard_onnx.models.manifest import Manifest, Source
    from pard_onnx.models.precision import Precision
    from pard_onnx.runtime.pair import Pair
    from pard_onnx.runtime.result import Chunk, Result

REASONING = SHOW, HIDE = "show", "hide"
TRACEBACK = "PARD_ONNX_TRACEBACK"  # an environment variable: if set, unexpected errors are raised with a traceback


# Control characters but tab and line end: a model's text must not move the cursor, or write to the clipboard
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def for_stdout(text: str) -> str:
    """A model's text as it is printed: on a terminal, control characters are written as their escapes."""
    return printable(text) if sys.stdout.isatty() else text


def printable(text: str) -> str:
    """The text, with escapes for control characters."""
    return CONTROLS.sub(lambda found: escaped(found[0]), text)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, as those of all bad input, and which knows --version."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.add_argument(
            "--version", action=PrintVersion, nargs=0, default=argparse.SUPPRESS, help="print the version"
        )

    def print_help(self, file: Any = None) -> None:
        """As argparse's, which ignores that the output cannot be written."""
        if file is not None:
            super().print_help(file)
        elif code := exit_code(lambda: print(self.format_help(), end="")):
            self.exit(code)

    def error(self, message: str) -> NoReturn:
        self.exit(2, one_line(f"error: {message}; {self.prog} --help lists the options") + "\n")


class PrintVersion(argparse.Action):
    """Prints the version, and ends the command."""

    def __call__(self, parser: argparse.ArgumentParser, *rest: Any) -> None:
        parser.exit(exit_code(lambda: print(f"pard-onnx {pard_onnx.__version__}")))


def exit_code(command: Callable[[], None]) -> int:
    """Run a command and return 0, or 2 for bad input and 1 for failures, with one line on stderr.

    After a signal that ended it the code is 128 and the signal's number (130 for Ctrl-C), whatever became of the
    signal's exception: C extensions turn it into others.
    """
    utf8_streams()
    interrupts = Interrupts()
    code = 0
    try:
        with interrupts:
            code = outcome(command, interrupts)
    except KeyboardInterrupt:  # a signal on the way out, or without handlers of ours
        code = 128 + signal.SIGINT
    finally:
        interrupts.restore()
    return interrupts.exit_code or code


def outcome(command: Callable[[], None], interrupts: Interrupts) -> int:
    """The exit code of a command that no signal has ended."""
    try:
        with one_line_warnings():
            command()
            sys.stdout.flush()
    except Exception as error:
        if interrupts.number is not None:
            return interrupts.exit_code
        if isinstance(error, PardError):
            return complain(str(error), error.exit_code)
        if isinstance(error, BrokenPipeError):  # the reader has closed the pipe; Python must not write to it at exit
            to_null_device(sys.stdout)
            return 1
        if isinstance(error, OSError):
            return complain(system_problem(error), 1)
        if os.environ.get(TRACEBACK):
            raise
        if is_out_of_memory(error):
            return complain(system_problem(error), 1)
        return complain(f"{type(error).__name__}: {error}; not foreseen, please report it with {TRACEBACK}=1", 1)
    return 0


def system_problem(error: Exception) -> str:
    """What to say of memory or of a file that the system does not give."""
    if is_out_of_memory(error) or not isinstance(error, OSError):
        return str(out_of_memory(error))
    if error.filename == STANDARD_OUTPUT:
        to_null_device(sys.stdout)  # which holds text that cannot be written
    return os_error_line(error)


@contextmanager
def one_line_warnings() -> Iterator[None]:
    """Print this package's warnings as one line on stderr; all other warnings are shown as usual."""
    usual = warnings.showwarning

    def show_warning(message: Warning | str, category: type[Warning], *location: Any, **more: Any) -> None:
        if issubclass(category, PardWarning):
            print(f"warning: {' '.join(str(message).split())}", file=sys.stderr)
        else:
            usual(message, category, *location, **more)

    with warnings.catch_warnings():
        warnings.simplefilter("always", PardWarning)
        warnings.showwarning = show_warning
        yield


def complain(message: str, code: int) -> int:
    """Print an error in one line on stderr and return the exit code."""
    try:
        print(f"error: {' '.join(one_line(message).split())}", file=sys.stderr)
    except OSError:  # nobody reads stderr any more
        to_null_device(sys.stderr)
    return code


@contextmanager
def stages() -> Iterator[Progress]:
    """Progress bars on stderr, one for each stage."""
    from rich import progress as rich
    from rich.console import Console

    columns = (rich.TextColumn("{task.description:>8}"), rich.BarColumn(), rich.TaskProgressColumn())
    bars = rich.Progress(*columns, rich.TimeElapsedColumn(), console=Console(stderr=True))
    tasks: dict[str, rich_progress.TaskID] = {}

    def progress(stage: str, done: int, total: int) -> None:
        bars.start()  # not before the first stage: errors before it are one line, without an empty line above
        if stage not in tasks:
            tasks[stage] = bars.add_task(stage, total=total)
        bars.update(tasks[stage], completed=done, total=total)

    try:
        yield progress
    finally:
        if tasks:
            bars.stop()


def export_job(job: Job) -> Manifest:
    """Export with progress bars on stderr. BadInput where the export extra is missing.

    onnx_ir is imported here and torch while exporting, both after the checks that need neither: the imports take
    seconds, and bad input is refused at once.
    """
    with needs("export"):
        from pard_onnx.export.exporter import export
    with stages() as progress:
        return export(job, progress)


def exported_once(checkpoint: Checkpoint, source: Source, output: Path, precision: Precision) -> Path:
    """The folder `output`, to which the checkpoint is exported now if it does not exist."""
    recover(output)
    if not output.exists():
        from pard_onnx.export.job import Job  # imported late, as most commands do not export

        print(f"exporting {source.model} to {precision}", file=sys.stderr)
        export_job(Job(checkpoint, source, output, precision))
    return output


def add_models(parser: argparse.ArgumentParser, without_draft: str) -> None:
    """The models that a command runs, which `models_of` reads. without_draft: what it does without one."""
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="a target and its own draft: a name in pard-models list"
    )
    parser.add_argument("--target", help="exported target: a folder, a name in the library or a hub id")
    parser.add_argument("--draft", help=f"exported PARD draft, likewise; without it and MODEL, {without_draft}")


def models_of(options: argparse.Namespace) -> tuple[str, str | None]:
    """The target and the draft of the options of `add_models`. Raises BadInput for no target, or for two."""
    if options.model is not None and options.target is not None:
        raise BadInput(f"{options.model} and --target {options.target}: two targets; name one")
    if options.model is None and options.target is None:
        raise BadInput("name the target: MODEL, a name that pard-models list shows, or --target DIR")
    if options.model is not None:
        return options.model, options.draft or OWN_DRAFT
    return options.target, options.draft


def add_stops(parser: argparse.ArgumentParser) -> None:
    text = "end before this text, which may have special tokens; repeatable"
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help=text)
    ids = "end at this token, as at the model's own end; repeatable"
    parser.add_argument("--stop-token-id", action="append", type=int, default=[], metavar="ID", help=ids)


def stop_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """The options of `add_stops`, as keyword arguments of `Pair.generate`."""
    return {"stop": options.stop, "stop_token_ids": options.stop_token_id}


def add_grammar(parser: argparse.ArgumentParser) -> None:
    """What the text must be. The options exclude one another."""
    group = parser.add_mutually_exclusive_group()
    schema = "the text is JSON of this schema; needs the extra `guided`, as the next three do"
    group.add_argument("--json-schema", metavar="FILE|TEXT", help=schema)
    group.add_argument("--regex", metavar="REGEX", help="the whole text matches this regular expression")
    group.add_argument("--choice", action="append", metavar="TEXT", help="the text is one of these; repeatable")
    group.add_argument("--grammar", type=Path, metavar="FILE", help="the text is of this Lark grammar")


def grammar_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """The options of `add_grammar`, as keyword arguments of `Pair.generate`. BadInput names the option and the file."""
    out: dict[str, Any] = {"regex": options.regex, "choice": options.choice}
    if options.json_schema is not None:
        out["response_format"] = json_schema(options.json_schema)
    if options.grammar is not None:
        out["grammar"] = text_of("--grammar", options.grammar)
    refuse_bad_options(out)
    return out


def refuse_bad_options(arguments: Mapping[str, Any]) -> None:
    """BadInput for options of a generation that are wrong, before the models load."""
    from pard_onnx.runtime.options import Options

    Options.from_keywords(arguments)


def json_schema(given: str) -> dict[str, Any]:
    """The JSON schema in a file, or in the option itself if it begins with a brace."""
    is_text = given.lstrip().startswith("{")
    text = given if is_text else text_of("--json-schema", Path(given))
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"--json-schema {shown(given)}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise BadInput(f"--json-schema {shown(given)}: a JSON schema must be an object, not {shown(value)}")
    return {"type": "json_schema", "json_schema": {"schema": value}}


def text_of(option: str, file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise BadInput(f"{option} {file}: the file cannot be read: {error}") from error


def add_tools(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("tools and reasoning")
    tools = "what the model may call: a JSON list of tools in OpenAI's form; calls are printed, not made"
    group.add_argument("--tools", type=Path, metavar="FILE", help=tools)
    choice = "auto (default), none, required, or the name of the tool that must be called"
    group.add_argument("--tool-choice", metavar="CHOICE", help=choice)
    group.add_argument("--max-reasoning-tokens", type=int, metavar="N", help="end the model's thinking after N tokens")
    group.add_argument(
        "--reasoning", choices=REASONING, default=SHOW, help="the thinking, on stderr (default: show it)"
    )


def tool_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """The options of `add_tools`, as keyword arguments of `Pair.generate`. BadInput names the option and the file."""
    out: dict[str, Any] = {}
    if options.tools is not None:
        try:
            out["tools"] = json.loads(text_of("--tools", options.tools), parse_constant=refuse_constant)
        except (ValueError, RecursionError) as error:
            raise BadInput(f"--tools {options.tools}: not JSON: {error}") from error
    for name in ("tool_choice", "max_reasoning_tokens"):
        if getattr(options, name) is not None:
            out[name] = getattr(options, name)
    refuse_bad_options(out)
    return out


class Thoughts:
    """Shows reasoning on stderr, dimmed on a terminal; the reply is on stdout."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._shown = options.reasoning == SHOW
        from rich.console import Console

        self._console = Console(stderr=True, highlight=False)
        self._open_line = False

    def show(self, chunk: Chunk) -> None:
        """Call this before the chunk's text is shown."""
        if self._shown and chunk.reasoning:
            from rich.text import Text

            text = printable(chunk.reasoning) if self._console.is_terminal else chunk.reasoning
            self._console.print(Text(text, style="dim"), end="", soft_wrap=True)
            self._open_line = True
        if chunk.text or chunk.tool_calls:
            self.end_line()

    def end_line(self) -> None:
        if self._open_line:
            self._open_line = False
            print(file=sys.stderr, flush=True)


def call_lines(result: Result) -> list[str]:
    """The calls of a reply as lines: JSON objects in OpenAI's form."""
    return [for_stdout(json.dumps(call.as_message(), ensure_ascii=False)) for call in result.tool_calls]


# Name, type, metavar, help; the defaults are those of `Sampling`.
SAMPLING = (
    ("temperature", float, "T", "0 is greedy"),
    ("top-k", int, "N", "draw from so many ids"),
    ("top-p", float, "P", "draw from the fewest ids of this probability"),
    ("min-p", float, "P", "draw from ids at least so probable, relative to the most probable"),
    ("repetition-penalty", float, "X", "1 is off"),
    ("presence-penalty", float, "X", "0 is off"),
    ("frequency-penalty", float, "X", "0 is off"),
    ("seed", int, "N", "same seed, same text"),
)


def add_sampling(parser: argparse.ArgumentParser, default: str = "greedy") -> None:
    group = parser.add_argument_group("sampling")
    own = "where the settings start from: model is its makers' generation_config.json; those below beat it"
    group.add_argument("--sampling", choices=STARTS, help=f"{own} (default: {default})")
    for name, kind, metavar, text in SAMPLING:
        group.add_argument(f"--{name}", type=kind, metavar=metavar, help=text)


def sampling_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """The sampling options that are set, as keyword arguments of `Pair.generate`."""
    names = ("sampling", *(name.replace("-", "_") for name, *_ in SAMPLING))
    values = {name: getattr(options, name) for name in names}
    return {name: value for name, value in values.items() if value is not None}


def with_own_sampling(pair: Pair, generation: Mapping[str, Any], default: str) -> tuple[dict[str, Any], str | None]:
    """The keyword arguments of a generation, and a line that says how tokens are chosen; None for what was asked for.

    default: what the settings start from where the user has not said.
    """
    from pard_onnx.runtime.options import Options

    greedy = {**generation, "sampling": "greedy"}
    if generation.get("sampling", default) == "greedy":
        return greedy, None
    plain, own = Options.from_keywords(greedy).sampling, pair.own_sampling
    if own is None:
        return greedy, f"sampling: {plain} ({pair.target_name} has no generation_config.json)"
    chosen = {**generation, "sampling": "model"}
    settings = Options.from_keywords(chosen, lambda: own).sampling
    if settings == plain:
        return greedy, f"sampling: {plain} (the model's own settings)"
    return chosen, f"sampling: {settings} (the model's own settings, but for yours; --sampling greedy turns them off)"


def add_template_arguments(parser: argparse.ArgumentParser) -> None:
    text = "a variable of the chat template, such as enable_thinking=false; VALUE is JSON or text; repeatable"
    parser.add_argument("--template-arg", action="append", default=[], metavar="NAME=VALUE", help=text)


def add_special_tokens(parser: argparse.ArgumentParser) -> None:
    text = "special tokens in users' messages: text (default), encode them as tokens, or refuse them"
    parser.add_argument("--special-tokens", choices=HANDLINGS, default=TEXT, help=text)


def template_arguments(options: argparse.Namespace) -> dict[str, object]:
    """The arguments of --template-arg by name: values that are JSON are read, all others are text."""
    out: dict[str, object] = {}
    for pair in options.template_arg:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise BadInput(f"--template-arg is written NAME=VALUE, not {pair!r}")
        try:
            out[name] = json.loads(value, parse_constant=refuse_constant)
        except (ValueError, RecursionError):
            out[name] = value
    return out


def refuse_constant(name: str) -> None:
    """NaN and Infinity are text: JSON has no such numbers."""
    raise ValueError(name)


def add_revisions(parser: argparse.ArgumentParser) -> None:
    for part in ("", "draft-"):
        text = f"branch, tag or commit of {'the draft' if part else 'the target'}, if it is a hub id"
        parser.add_argument(f"--{part}revision", metavar="NAME", help=text)


def revision_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """The options of `add_revisions`, as keyword arguments of `load`."""
    return {"revision": options.revision, "draft_revision": options.draft_revision}


def add_providers(parser: argparse.ArgumentParser) -> None:
    mode = "of a PARD-2 draft, whether it reads the target's hidden states; auto (default): if the target gives them"
    parser.add_argument("--draft-mode", choices=DRAFT_MODES, default=AUTO_MODE, help=mode)
    group = parser.add_argument_group("where it runs")
    names = ", ".join(PROVIDERS)
    key = f"auto, or one of {names} (default: cpu); KEY:1 is its second device"
    group.add_argument("--provider", default="cpu", metavar="KEY", help=key)
    group.add_argument("--draft-provider", metavar="KEY", help="of the draft (default: the target's)")
    option = "an option of the provider's own; repeatable"
    group.add_argument("--provider-option", action="append", default=[], metavar="NAME=VALUE", help=option)
    own = "the same for the draft's provider"
    group.add_argument("--draft-provider-option", action="append", default=[], metavar="NAME=VALUE", help=own)
    group.add_argument("--fallback", action="store_true", help="continue on the CPU if the provider does not run")
    group.add_argument("--threads", type=int, metavar="N", help="on the CPU (default: the physical cores)")


def load_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """The options of `add_providers`, as keyword arguments of `load`."""
    return {
        "provider": options.provider,
        "draft_provider": options.draft_provider,
        "provider_options": parse_options(options.provider_option),
        "draft_provider_options": parse_options(options.draft_provider_option),
        "draft_mode": options.draft_mode,
        "fallback": options.fallback,
        "threads": options.threads,
    }


def whole_or_auto(text: str) -> int | str:
    """A draft length: a whole number or "auto"."""
    return AUTO if text == AUTO else int(text)
