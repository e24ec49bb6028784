"""PARD speculative decoding on ONNX Runtime: `pair = load(target, draft)`, `pair.generate(prompt)`."""

from importlib.metadata import version

from pard_onnx.models.errors import (
    BadArtifact,
    BadCheckpoint,
    BadInput,
    BadProvider,
    Failure,
    PardError,
    PardWarning,
    TooLong,
)
from pard_onnx.runtime.chat import Chat
from pard_onnx.runtime.options import Options
from pard_onnx.runtime.pair import Pair, load
from pard_onnx.runtime.result import Chunk, Facts, Result, Seconds, Stats
from pard_onnx.runtime.sampling.settings import Sampling
from pard_onnx.runtime.stream import Stream

__version__ = version("pard-onnx")

__all__ = [
    "BadArtifact",
    "BadCheckpoint",
    "BadInput",
    "BadProvider",
    "Chat",
    "Chunk",
    "Facts",
    "Failure",
    "Options",
    "Pair",
    "PardError",
    "PardWarning",
    "Result",
    "Sampling",
    "Seconds",
    "Stats",
    "Stream",
    "TooLong",
    "__version__",
    "load",
]
