"""The most memory that this process has held."""

from __future__ import annotations

import sys
from pathlib import Path

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")
PEAK_ONLY = "5"  # proc(5): resets the peak resident set size, and nothing else


def reset() -> bool:
    """Begin anew; False where the system cannot, and the peak stays that of the whole process."""
    try:
        CLEAR.write_text(PEAK_ONLY)
    except OSError:
        return False
    return True


def peak_bytes() -> int:
    """Resident bytes at the peak."""
    if STATUS.exists():
        fields = dict(line.split(":", 1) for line in STATUS.read_text().splitlines() if ":" in line)
        return 1024 * int(fields["VmHWM"].split()[0])
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
