"""Options of generations: models, what the text must be, tools, sampling, templates, where it runs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pard_onnx.cli import REASONING, SHOW
from pard_onnx.models.checks import AUTO
from pard_onnx.models.errors import BadInput, shown
from pard_onnx.models.library import OWN_DRAFT
from pard_onnx.runtime.decoding.draft_mode import AUTO_MODE, DRAFT_MODES
from pard_onnx.runtime.providers.table import PROVIDERS, parse_options
from pard_onnx.runtime.sampling.settings import STARTS
from pard_onnx.runtime.text.control_tokens import HANDLINGS, TEXT

if TYPE_CHECKING:  # with what a command runs by, --help would take half a second
    from pard_onnx.runtime.pair import Pair


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
