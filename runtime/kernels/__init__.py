"""The native CPU kernels, if they were built and this processor can run them.

They are built with the package if there is a compiler. Everything works without them, but slower. PARD_ONNX_KERNEL=off
switches them off; PARD_ONNX_KERNEL set to an instruction set of `ISAS` selects it instead of the best one.
"""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path

from pard_onnx.models.errors import BadInput

ISAS = ("avx512-vnni", "avx-vnni", "avx2", "reference")
PORTABLE = "reference"  # simple and slow code for any processor: used only if PARD_ONNX_KERNEL selects it
VARIABLE, OFF = "PARD_ONNX_KERNEL", "off"
LIBRARY = Path(__file__).with_name("_cpu.dll" if os.name == "nt" else "_cpu.so")


def library() -> Path | None:
    """The operator library to register with ONNX Runtime; None if there is none, or it is not used.

    BadInput if PARD_ONNX_KERNEL is neither `off` nor an instruction set that this processor has.
    """
    return None if isa() is None else LIBRARY


def isa() -> str | None:
    """The instruction set of kernels that are created from now on, such as "avx512-vnni"; None as for `library`."""
    wanted = os.environ.get(VARIABLE, "")
    if wanted and wanted not in (OFF, *ISAS):
        raise BadInput(f"{VARIABLE}={wanted}: takes {OFF}, {', '.join(ISAS)}")
    native = None if wanted == OFF else load()
    if native is None:
        return None
    if not native.pard_select_isa(wanted.encode() or None):
        raise BadInput(f"{VARIABLE}={wanted}: this processor has no such instructions; unset it")
    name: str = native.pard_isa().decode()
    return None if name == PORTABLE and not wanted else name


@functools.cache
def load() -> ctypes.CDLL | None:
    """The library's plain C functions; None if the library was not built, or not for this system."""
    try:
        native = ctypes.CDLL(str(LIBRARY))
    except OSError:
        return None
    native.pard_isa.restype = ctypes.c_char_p
    native.pard_select_isa.argtypes = [ctypes.c_char_p]
    return native
