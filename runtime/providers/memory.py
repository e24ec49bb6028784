"""Buffers in the memory of a provider's device, copied to it and from it.

Not every build of ONNX Runtime can allocate memory on a device by the device's name, but every build can leave the
output of a session there. So a session on a graph of one Identity node makes the buffers. A provider that cannot open
this graph does not start.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pard_onnx.models.errors import BadInput
from pard_onnx.models.protobuf import BYTES, VARINT, message, text
from pard_onnx.models.system_errors import is_out_of_memory

from .opening import cannot_start, create_session, session_options
from .table import Provider, first_line
from .threads import Threads

IR_VERSION, OPSET = 8, 17
ELEMENTS = {"float32": 1, "int8": 3, "float16": 10}  # the numbers of the types in ONNX's TensorProto


class OutOfMemory(Exception):
    """The device has no memory left for another buffer."""

    def __init__(self, made: int) -> None:
        """made: the number of buffers that were made before."""
        super().__init__(made)
        self.made = made


class Buffer:
    """A tensor on the device.

    ONNX Runtime's objects do not keep alive the objects that they need. This object does, and frees them in the order
    that ONNX Runtime needs.
    """

    def __init__(self, session: Any, array: NDArray[Any], provider: Provider) -> None:
        self._session = session
        self._binding = session.io_binding()
        self._binding.bind_cpu_input("x", array)
        self._binding.bind_output("y", provider.memory, provider.device)
        session.run_with_iobinding(self._binding)
        self.value = self._binding.get_outputs()[0]

    def read(self) -> NDArray[Any]:
        """A copy of the tensor in the host's memory."""
        return np.asarray(self.value.numpy())

    def __del__(self) -> None:
        for name in ("value", "_binding", "_session"):
            self.__dict__.pop(name, None)


@cache
def start_provider(provider: Provider, element_type: str = "float32") -> Any:
    """The session that makes buffers of this type, one per process; BadProvider if the provider does not start."""
    try:
        return create_session(identity_graph(element_type), provider, session_options(Threads(1)))
    except BadInput:
        raise
    except Exception as error:  # ONNX Runtime's exceptions share no base class
        raise cannot_start(provider, first_line(error)) from error


def make_buffers(provider: Provider, arrays: Sequence[NDArray[Any]]) -> list[Buffer]:
    """Copies of the arrays on the device; OutOfMemory if the device has no memory left."""
    out: list[Buffer] = []
    for array in arrays:
        try:
            out.append(Buffer(start_provider(provider, array.dtype.name), array, provider))
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            if is_out_of_memory(error):
                raise OutOfMemory(len(out)) from error
            raise
    return out


def identity_graph(element_type: str) -> bytes:
    """A model whose output is its input, [a, b, c, d] of this type; the field numbers are those of onnx.proto."""
    shape = message([(1, BYTES, message([text(2, name)])) for name in "abcd"])
    tensor = message([(1, VARINT, ELEMENTS[element_type]), (2, BYTES, shape)])
    tensor_type = (2, BYTES, message([(1, BYTES, tensor)]))
    node = message([text(1, "x"), text(2, "y"), text(4, "Identity")])
    ends = [(number, BYTES, message([text(1, name), tensor_type])) for number, name in ((11, "x"), (12, "y"))]
    graph = message([(1, BYTES, node), text(2, "identity"), *ends])
    opset = message([text(1, ""), (2, VARINT, OPSET)])
    return message([(1, VARINT, IR_VERSION), (7, BYTES, graph), (8, BYTES, opset)])
