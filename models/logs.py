"""The package's loggers, all below `pard_onnx`. An application that wants their lines adds a handler to that one.

DEBUG and INFO are used, nothing above: problems are exceptions and warnings. A line has names, numbers and reasons,
never a prompt or a generated text. Names are written as `repr` writes them, so that a line stays a line.
"""

from __future__ import annotations

import logging

logging.getLogger("pard_onnx").addHandler(logging.NullHandler())


def logger(module: str) -> logging.Logger:
    """The logger of a module of this package, by its name."""
    return logging.getLogger(module)
