"""The peers: who they are, what they can do, and what each of them is run with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from pard_onnx.models.checks import nearest_name
from pard_onnx.models.errors import BadInput

Form = Literal["checkpoint", "artifact", "gguf", "openvino", "optimum"]
PLAIN = "plain"
LENGTHS = (2, 4, 8)
Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Mode:
    """draft: it needs an autoregressive draft model; draft_lengths: those of which the fastest is taken;
    settings: the worker's own."""

    name: str
    draft: bool = False
    draft_lengths: tuple[int, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, slots=True)
class Peer:
    """modules: what must be importable; install: how it becomes so; formats: of the weights, the usual one first."""

    name: str
    worker: str
    modules: tuple[str, ...]
    install: str
    form: Form
    formats: tuple[str, ...]
    modes: tuple[Mode, ...]

    def mode(self, name: str) -> Mode:
        """The mode of that name. Raises BadInput."""
        return _known(f"{self.name} has no mode", name, {mode.name: mode for mode in self.modes})

    def format(self, name: str | None) -> str:
        """`name`, or the usual format. Raises BadInput."""
        return (
            self.formats[0]
            if name is None
            else _known(f"{self.name} has no format", name, dict.fromkeys(self.formats, name))
        )


PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer(
            name="transformers",
            worker="transformers_worker.py",
            modules=("torch", "transformers"),
            install="pip install transformers torch",
            form="checkpoint",
            formats=("bfloat16", "float32"),
            modes=(
                Mode(PLAIN),
                Mode("assisted", draft=True, draft_lengths=(4, 10)),
                Mode("prompt-lookup", draft_lengths=(4, 10)),
            ),
        ),
        Peer(
            name="onnxruntime-genai",
            worker="genai_worker.py",
            modules=("onnxruntime_genai",),
            install="pip install onnxruntime-genai",
            form="artifact",
            formats=("int4", "int8", "fp32"),
            modes=(
                Mode(PLAIN),
                Mode("speculative", draft=True, draft_lengths=LENGTHS),
                Mode("prompt-lookup", draft_lengths=LENGTHS, settings={"ngram_size": 3, "ngram_chained_lookup": True}),
            ),
        ),
        Peer(
            name="optimum",
            worker="optimum_worker.py",
            modules=("optimum.onnxruntime",),
            install='pip install "optimum-onnx[onnxruntime]" torch, in an environment of its own',
            form="optimum",
            formats=("int8", "fp32"),
            modes=(Mode(PLAIN),),
        ),
        Peer(
            name="llama.cpp",
            worker="llama_cpp_worker.py",
            modules=("llama_cpp",),
            install="pip install llama-cpp-python",
            form="gguf",
            formats=("q4_0", "q8_0", "f32"),
            modes=(
                Mode(PLAIN),
                # the draft stops where it is less sure than that
                Mode("speculative", draft=True, draft_lengths=LENGTHS, settings={"sure": 0.5}),
                Mode("prompt-lookup", draft_lengths=LENGTHS),
            ),
        ),
        Peer(
            name="openvino",
            worker="openvino_worker.py",
            modules=("openvino_genai",),
            install="pip install openvino-genai",
            form="openvino",
            formats=("q4_0", "q8_0"),
            modes=(
                Mode(PLAIN),
                Mode("speculative", draft=True, draft_lengths=LENGTHS),
                Mode("prompt-lookup", draft_lengths=LENGTHS),
            ),
        ),
    )
}


def named(name: str) -> Peer:
    """The peer of that name. Raises BadInput, with the known ones."""
    return _known("there is no peer", name, PEERS)


def _known(problem: str, name: str, known: Mapping[str, Value]) -> Value:
    if name in known:
        return known[name]
    nearest = nearest_name(name, known)
    hint = f"did you mean {nearest}? " if nearest else ""
    raise BadInput(f"{problem} {name!r}; {hint}known: {', '.join(known)}")
