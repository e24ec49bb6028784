"""Hides from Python what Wine 8 lacks: Python has other ways for each, which it takes on older Windows."""

import _winapi
import sys

sys.modules["_wmi"] = None  # type: ignore[assignment]
if hasattr(_winapi, "CopyFile2"):
    del _winapi.CopyFile2
