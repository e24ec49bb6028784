"""Command-line options shared by the commands that generate text."""

from __future__ import annotations

import argparse
from typing import Any

from pard_onnx.runtime.options import AUTO
from pard_onnx.runtime.providers.table import PROVIDERS, parse_options

# Name, type, metavar, help; the defaults are those of `Sampling`.
SAMPLING = (
    ("temperature", float, "T", "0 (default) is greedy"),
    ("top-k", int, "N", "draw from so many ids"),
    ("top-p", float, "P", "draw from the fewest ids of this probability"),
    ("min-p", float, "P", "draw from ids at least so probable, relative to the most probable"),
    ("repetition-penalty", float, "X", "1 is off"),
    ("presence-penalty", float, "X", "0 is off"),
    ("frequency-penalty", float, "X", "0 is off"),
    ("seed", int, "N", "same seed, same text"),
)


def add_sampling(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling")
    for name, kind, metavar, text in SAMPLING:
        group.add_argument(f"--{name}", type=kind, metavar=metavar, help=text)


def sampling_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """The sampling options that are set, as keyword arguments of `Pair.generate`."""
    values = {name: getattr(options, name) for name in (name.replace("-", "_") for name, *_ in SAMPLING)}
    return {name: value for name, value in values.items() if value is not None}


def add_providers(parser: argparse.ArgumentParser) -> None:
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
        "fallback": options.fallback,
        "threads": options.threads,
    }


def whole_or_auto(text: str) -> int | str:
    """A draft length: a whole number or "auto"."""
    return AUTO if text == AUTO else int(text)
