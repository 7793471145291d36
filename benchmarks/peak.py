"""The most memory that a process has held."""

from __future__ import annotations

import re
import resource
from pathlib import Path


def peak_bytes() -> int:
    """Resident bytes of this process at their peak.

    Linux states it for the program itself. `ru_maxrss` there begins with what the process held that started
    the program, so it is used where nothing better is known.
    """
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s*(\d+) kB", status.read_text()) if status.exists() else None
    return 1024 * int(found[1]) if found else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
