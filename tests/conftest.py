"""Fixtures that several folders of tests share."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


def _load(name: str) -> ModuleType:
    """A helper module beside this file; with --import-mode=importlib, tests/ is not on sys.path."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec and spec.loader
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_tiny = _load("tiny")


@pytest.fixture(scope="session")
def tiny() -> Callable[..., Path]:
    """Writes a tiny random checkpoint and returns its folder: tests/tiny.py's `write`."""
    return _tiny.write
