"""Fixtures that several folders of tests share. Helper modules lie beside: pytest's `pythonpath` has these folders."""

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny as checkpoints


@pytest.fixture(scope="session")
def tiny() -> Callable[..., Path]:
    """Writes a tiny random checkpoint and returns its folder: tests/tiny.py's `write`."""
    return checkpoints.write
