"""Command-line options that the commands which generate share."""

from __future__ import annotations

import argparse
from typing import Any

from pard_onnx.runtime.options import AUTO

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


def sampling(options: argparse.Namespace) -> dict[str, Any]:
    """What was given, as keyword arguments of `Pair.generate`."""
    given = {name: getattr(options, name) for name in (name.replace("-", "_") for name, *_ in SAMPLING)}
    return {name: value for name, value in given.items() if value is not None}


def whole_or_auto(text: str) -> int | str:
    """A draft length."""
    return AUTO if text == AUTO else int(text)
