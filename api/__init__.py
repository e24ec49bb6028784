"""PARD speculative decoding on ONNX Runtime: `pair = load(target, draft)`, `pair.generate(prompt)`.

The names are imported when they are first used, so that the commands can set their signal handlers before that.
"""

from importlib import import_module

TYPE_CHECKING = False  # as typing's, whose import takes milliseconds
if TYPE_CHECKING:
    from pard_onnx.models.errors import (
        BadArtifact,
        BadCheckpoint,
        BadInput,
        BadProvider,
        Busy,
        Failure,
        PardError,
        PardWarning,
        TooLong,
    )
    from pard_onnx.models.helper_process import freeze_support
    from pard_onnx.runtime.chat import Chat
    from pard_onnx.runtime.guided.grammar import Grammar
    from pard_onnx.runtime.info import ModelInfo, PairInfo, Versions
    from pard_onnx.runtime.options import Options
    from pard_onnx.runtime.pair import Pair, load
    from pard_onnx.runtime.result import Chunk, Facts, Result, Round, Seconds, Stats
    from pard_onnx.runtime.sampling.logprobs import TokenLogprob
    from pard_onnx.runtime.sampling.settings import Sampling
    from pard_onnx.runtime.scoring import Score
    from pard_onnx.runtime.stream import Stream
    from pard_onnx.runtime.text.tool_calls import ToolCall, ToolCallDelta

    __version__: str

__all__ = [
    "BadArtifact",
    "BadCheckpoint",
    "BadInput",
    "BadProvider",
    "Busy",
    "Chat",
    "Chunk",
    "Facts",
    "Failure",
    "Grammar",
    "ModelInfo",
    "Options",
    "Pair",
    "PairInfo",
    "PardError",
    "PardWarning",
    "Result",
    "Round",
    "Sampling",
    "Score",
    "Seconds",
    "Stats",
    "Stream",
    "TokenLogprob",
    "TooLong",
    "ToolCall",
    "ToolCallDelta",
    "Versions",
    "__version__",
    "freeze_support",
    "load",
]

_ERRORS = (
    "BadArtifact", "BadCheckpoint", "BadInput", "BadProvider", "Busy", "Failure", "PardError", "PardWarning", "TooLong",
)  # fmt: skip
# The module of each name
_MODULES = dict.fromkeys(_ERRORS, "models.errors") | {
    "freeze_support": "models.helper_process",
    "Chat": "runtime.chat",
    "Grammar": "runtime.guided.grammar",
    **dict.fromkeys(("ModelInfo", "PairInfo", "Versions"), "runtime.info"),
    "Options": "runtime.options",
    **dict.fromkeys(("Pair", "load"), "runtime.pair"),
    **dict.fromkeys(("Chunk", "Facts", "Result", "Round", "Seconds", "Stats"), "runtime.result"),
    "Sampling": "runtime.sampling.settings",
    "Score": "runtime.scoring",
    "Stream": "runtime.stream",
    "TokenLogprob": "runtime.sampling.logprobs",
    **dict.fromkeys(("ToolCall", "ToolCallDelta"), "runtime.text.tool_calls"),
}

if not TYPE_CHECKING:  # type checkers would take any name for one that exists

    def __getattr__(name: str) -> object:
        """A public name, imported now."""
        if name == "__version__":
            from importlib.metadata import version

            found = version("pard-onnx")
        elif name in _MODULES:
            found = getattr(import_module(f"pard_onnx.{_MODULES[name]}"), name)
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = found
        return found

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
