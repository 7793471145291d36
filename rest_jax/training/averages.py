"""Averages of the numbers of several steps.

Floor 5.
"""

from __future__ import annotations

import math
import time

import numpy as np

from rest_jax.training.step import StepMetrics


def mean(total: float, weight: float) -> float:
    """A sum over its weight; NaN where there was no weight."""
    return float(total) / float(weight) if weight > 0 else math.nan


class StepAverages:
    """Averages of the steps since the last line of the log; steps that were left out do not count."""

    def __init__(self) -> None:
        self.note = ""
        self._clear()

    def _clear(self) -> None:
        self._sums: dict[str, np.ndarray] = {}
        self._grad_norms: list[float] = []
        self._weight, self._skipped, self._steps, self._rate = 0.0, 0, 0, math.nan
        self._first_read, self._last_read, self._timed_weight = math.nan, math.nan, 0.0

    def add(self, metrics: StepMetrics) -> None:
        """Takes in the numbers of one step."""
        self._steps += 1
        self._rate = float(metrics["learning_rate"])
        self._last_read = time.monotonic()
        # The clock starts when the first step is done, so that compiling and evaluating do not count.
        if self._steps == 1:
            self._first_read = self._last_read
        else:
            self._timed_weight += float(metrics["weight"])
        if metrics["skipped"]:
            self._skipped += 1
            return
        for name, pair in metrics["sums"].items():
            self._sums[name] = self._sums.get(name, np.zeros(2)) + np.asarray(pair, np.float64)
        self._grad_norms.append(float(metrics["grad_norm"]))
        self._weight += float(metrics["weight"])
        self.note = f"loss {mean(*metrics['sums']['loss']):.4g}"

    def close(self) -> dict[str, float]:
        """The line of the log; the next window begins."""
        line = {f"train/{name}": mean(*map(float, pair)) for name, pair in self._sums.items()}
        if self._grad_norms:
            line["train/grad_norm"] = sum(self._grad_norms) / len(self._grad_norms)
        line |= {
            "train/learning_rate": self._rate,
            "train/weight": self._weight / max(self._steps - self._skipped, 1),
        }
        seconds = self._last_read - self._first_read
        if self._steps > 1 and seconds > 0:
            line["train/steps_per_second"] = (self._steps - 1) / seconds
            line["train/weight_per_second"] = self._timed_weight / seconds
        if self._skipped:
            line["train/skipped"] = float(self._skipped)
        self._clear()
        return line
