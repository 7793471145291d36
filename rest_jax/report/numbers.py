"""How the report writes numbers: as many digits as they can carry, and an en dash where there is none.

Floor 7.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ABSENT = "–"


def number(value: float | None, digits: int = 3) -> str:
    """A number with fixed digits after the point."""
    return ABSENT if value is None else f"{value:.{digits}f}"


def count(value: float | None) -> str:
    """A count with thousands separated: 12,345."""
    return ABSENT if value is None else f"{round(value):,}"


def percent(share: float | None, digits: int = 1) -> str:
    """A share in [0, 1] as a percentage."""
    return ABSENT if share is None else f"{100 * share:.{digits}f} %"


def interval(estimate: Mapping[str, Any] | None, digits: int = 3) -> str:
    """The 95 % interval of an estimate: [0.601, 0.619]."""
    bounds = (estimate or {}).get("ci95")
    return f"[{bounds[0]:.{digits}f}, {bounds[1]:.{digits}f}]" if bounds else ""


def estimate(value: Mapping[str, Any] | None, digits: int = 3) -> str:
    """Mean and interval: 0.610 [0.601, 0.619]."""
    return f"{number((value or {}).get('mean'), digits)} {interval(value, digits)}".strip()


def source_filter(kind: str | None, value: float | None) -> str:
    """A filter that judges each source on its own, in few words: percentile 0.9, mean-max 0.5, best 4."""
    words = {"percentile": "percentile", "mean_max": "mean-max", "top_k": "best"}
    return ABSENT if kind not in words or value is None else f"{words[kind]} {value:g}"


def duration(seconds: float | None) -> str:
    """Wall time in the two largest units that matter: 14 s, 3 min 12 s, 2 h 05 min."""
    if seconds is None:
        return ABSENT
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"
