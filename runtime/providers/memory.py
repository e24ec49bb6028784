"""Memory of a provider's device: buffers made there, and copied to and from there.

Not every build of ONNX Runtime can allocate on a device by name, but each can leave a session's output there. So a
graph of one node makes the buffers; a provider that cannot open it does not start.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pard_onnx.models.errors import BadInput
from pard_onnx.runtime.kernels.protobuf import BYTES, VARINT, message, text

from .opening import cannot_start, first_line, is_out_of_memory, opened, session_options
from .table import Provider
from .threads import Threads

IR_VERSION, OPSET = 8, 17
ELEMENTS = {"float32": 1, "int8": 3, "float16": 10}  # of ONNX's TensorProto


class OutOfMemory(Exception):
    """made: the buffers that fitted."""

    def __init__(self, made: int) -> None:
        super().__init__(made)
        self.made = made


class Buffer:
    """A tensor on the device. ONNX Runtime's objects do not keep one another alive: this one does, and lets them go
    in the order in which they may."""

    def __init__(self, session: Any, array: NDArray[Any], provider: Provider) -> None:
        self._session = session
        self._binding = session.io_binding()
        self._binding.bind_cpu_input("x", array)
        self._binding.bind_output("y", provider.memory, provider.device)
        session.run_with_iobinding(self._binding)
        self.value = self._binding.get_outputs()[0]

    def read(self) -> NDArray[Any]:
        """A copy in the host's memory."""
        return np.asarray(self.value.numpy())

    def __del__(self) -> None:
        for name in ("value", "_binding", "_session"):
            self.__dict__.pop(name, None)


@cache
def start_provider(provider: Provider, kind: str = "float32") -> Any:
    """The session that makes buffers of this type, one a process; BadProvider if the provider does not start."""
    try:
        return opened(identity(kind), provider, session_options(Threads(1)))
    except BadInput:
        raise
    except Exception as error:  # ONNX Runtime's exceptions share no base class
        raise cannot_start(provider, first_line(error)) from error


def buffers(provider: Provider, arrays: Sequence[NDArray[Any]]) -> list[Buffer]:
    """Copies of the arrays on the device; OutOfMemory if it is full."""
    out: list[Buffer] = []
    for array in arrays:
        try:
            out.append(Buffer(start_provider(provider, array.dtype.name), array, provider))
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            if is_out_of_memory(error):
                raise OutOfMemory(len(out)) from error
            raise
    return out


def identity(kind: str) -> bytes:
    """A graph that gives back what it is given, [a, b, c, d] of this type; the field numbers are onnx.proto's."""
    shape = message([(1, BYTES, message([text(2, name)])) for name in "abcd"])
    tensor = message([(1, VARINT, ELEMENTS[kind]), (2, BYTES, shape)])
    tensor_type = (2, BYTES, message([(1, BYTES, tensor)]))
    node = message([text(1, "x"), text(2, "y"), text(4, "Identity")])
    ends = [(number, BYTES, message([text(1, name), tensor_type])) for number, name in ((11, "x"), (12, "y"))]
    graph = message([(1, BYTES, node), text(2, "identity"), *ends])
    opset = message([text(1, ""), (2, VARINT, OPSET)])
    return message([(1, VARINT, IR_VERSION), (7, BYTES, graph), (8, BYTES, opset)])
