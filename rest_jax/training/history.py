"""What the evaluations of one training said, and which was best.

Floor 5. A history is a list of rows {"step": int, metric: float, …} in order of steps. Everything that
training decides from evaluations (the best step, patience) is a function of it, so it is the same after a
restart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rest_jax import errors

MODES = ("min", "max")

Row = Mapping[str, Any]


def check_mode(mode: str, where: str) -> None:
    """Raises ConfigError unless `mode` is "min" or "max"."""
    if mode not in MODES:
        raise errors.ConfigError(f'unknown best_mode "{mode}"', where=where, remedy='Choose "min" or "max"')


def best_row(history: Sequence[Row], metric: str, mode: str) -> Row | None:
    """The best row by a metric: the earliest of equals. Rows where it is missing or not finite never win."""
    best: Row | None = None
    for row in history:
        value = row.get(metric)
        if value is None or not math.isfinite(value):
            continue
        if best is None or (value < best[metric] if mode == "min" else value > best[metric]):
            best = row
    return best


def evaluations_since_best(history: Sequence[Row], metric: str, mode: str) -> int:
    """How many evaluations came after the best one; all of them if none has a finite value."""
    best = best_row(history, metric, mode)
    return len(history) if best is None else sum(row["step"] > best["step"] for row in history)


def to_json(row: Row) -> dict[str, Any]:
    """A row as JSON holds it: what is not finite becomes null."""
    return {key: value if math.isfinite(value) else None for key, value in row.items()}


def from_json(row: Row) -> dict[str, Any]:
    """The inverse of `to_json`; an infinite value comes back as NaN."""
    return {key: math.nan if value is None else value for key, value in row.items()}
