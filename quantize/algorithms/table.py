"""How weights are rounded: a table. Another algorithm is another entry, and its own file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from pard_onnx.models.precision import Format
from pard_onnx.quantize.packing.pack import Float, Packed, pack

from .grid import searched
from .hqq import hqq
from .kquant import kquant

if TYPE_CHECKING:
    from torch import Tensor

Round = Callable[[Float, Format], Packed]  # rows [n, in], each on its own


@dataclass(frozen=True, slots=True)
class Algorithm:
    """free: rounds a matrix that nothing else is known of; given: the same, told the X X^T [in, in] of the inputs."""

    free: Round
    given: Callable[[Tensor], Round] | None = None


def _gptq(gram: Tensor) -> Round:
    from . import gptq  # torch takes seconds to import, and most algorithms do without

    return partial(gptq.gptq, gptq.Feedback.of(gram))


ALGORITHMS: dict[str, Algorithm] = {
    "rtn": Algorithm(pack),
    "kquant": Algorithm(kquant),
    "hqq": Algorithm(hqq),
    "search": Algorithm(searched),
    "gptq": Algorithm(searched, _gptq),
}
