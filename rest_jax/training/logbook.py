"""The log of a run: metrics as lines of JSON first, TensorBoard beside them, progress for whoever watches.

Floor 5. Only process 0 writes.
"""

from __future__ import annotations

import abc
import contextlib
import datetime
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import jax
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

METRICS_NAME = "metrics.jsonl"
TENSORBOARD_NAME = "tensorboard"


class Logbook:
    """Metrics and messages of a run.

    Args:
      run_dir: the run's folder, or None to write no files.
      stream: where messages and progress go; None is standard error.
      line_seconds: pause between two progress lines when the stream is no terminal.
    """

    def __init__(self, run_dir: str | Path | None, stream: TextIO | None = None, line_seconds: float = 10.0):
        self.run_dir = None if run_dir is None else Path(run_dir)
        self._active = jax.process_index() == 0
        self._console = Console(file=stream or sys.stderr, highlight=False, soft_wrap=True)
        self._line_seconds = line_seconds
        self._boards: dict[str, Any] = {}
        if self._active and self.run_dir is not None:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            _end_torn_line(self.run_dir / METRICS_NAME)

    def log(self, phase: str, step: int, metrics: Mapping[str, float]) -> None:
        """Appends one line of metrics; a value that is not finite is written as null.

        Args:
          phase: what the numbers are of, such as "policy/bc"; one curve of TensorBoard each.
          step: steps done in this phase.
          metrics: plain numbers by name.
        """
        if not self._active or self.run_dir is None:
            return
        values = {key: float(value) for key, value in metrics.items()}
        line = {
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
            "phase": phase,
            "step": int(step),
            "metrics": {key: value if math.isfinite(value) else None for key, value in values.items()},
        }
        with open(self.run_dir / METRICS_NAME, "a", encoding="utf-8") as handle:
            handle.write(json.dumps(line, ensure_ascii=False) + "\n")
        board = self._board(phase)
        for key, value in values.items():
            board.add_scalar(key, value, int(step))

    def _board(self, phase: str) -> Any:
        if phase not in self._boards:
            from tensorboardX import SummaryWriter  # slow to import, and many commands log nothing

            assert self.run_dir is not None
            self._boards[phase] = SummaryWriter(str(self.run_dir / TENSORBOARD_NAME / phase), flush_secs=10)
        return self._boards[phase]

    def say(self, message: str) -> None:
        """Prints one line for the user."""
        if self._active:
            self._console.print(Text(message))

    @contextlib.contextmanager
    def progress(
        self, description: str, total: int, completed: int = 0, unit: str = "steps"
    ) -> Iterator[Meter]:
        """Shows how far a piece of work is, its rate and the time left: a bar in a terminal, else lines.

        Args:
          description: what is going on.
          total: units of work in all.
          completed: units done before, by an earlier run.
          unit: what is counted.
        """
        if self._active and self._console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.completed:.0f}/{task.total:.0f} {task.fields[unit]}"),
                TextColumn("{task.fields[note]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
            )
            with Progress(*columns, console=self._console, transient=False) as bars:
                task = bars.add_task(description, total=total, completed=completed, unit=unit, note="")
                yield _BarMeter(bars, task, completed)
        else:
            meter = _LineMeter(self, description, total, completed, unit, self._line_seconds)
            yield meter
            meter.close()

    def close(self) -> None:
        """Writes out what TensorBoard still holds."""
        for board in self._boards.values():
            board.close()
        self._boards.clear()

    def __enter__(self) -> Logbook:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class Meter(abc.ABC):
    """Counts units of work done; `Logbook.progress` yields one."""

    def __init__(self, completed: int):
        self.completed = completed

    def advance(self, count: int = 1, note: str = "") -> None:
        """Adds units done.

        Args:
          count: how many.
          note: what to show beside the bar, such as the loss; empty keeps the last one.
        """
        self.completed += count
        self._show(note)

    @abc.abstractmethod
    def _show(self, note: str) -> None: ...


class _BarMeter(Meter):
    def __init__(self, bars: Progress, task: TaskID, completed: int):
        super().__init__(completed)
        self._bars, self._task = bars, task
        self._start, self._first = time.monotonic(), completed

    def _show(self, note: str) -> None:
        rate = (self.completed - self._first) / max(time.monotonic() - self._start, 1e-9)
        text = f"{rate:.3g}/s {note}" if note else f"{rate:.3g}/s"
        self._bars.update(self._task, completed=self.completed, note=text)


class _LineMeter(Meter):
    def __init__(
        self, logbook: Logbook, description: str, total: int, completed: int, unit: str, line_seconds: float
    ):
        super().__init__(completed)
        self._logbook, self._description, self._total, self._unit = logbook, description, total, unit
        self._line_seconds, self._first, self._note = line_seconds, completed, ""
        self._start = self._last = time.monotonic()
        self._shown = completed

    def _show(self, note: str) -> None:
        self._note = note or self._note
        if time.monotonic() - self._last >= self._line_seconds:
            self._line()

    def _line(self) -> None:
        self._last, self._shown = time.monotonic(), self.completed
        rate = (self.completed - self._first) / max(self._last - self._start, 1e-9)
        left = (self._total - self.completed) / rate if rate > 0 else math.inf
        share = 100 * self.completed / self._total if self._total else 100.0
        parts = [
            f"{self._description}: {self.completed}/{self._total} {self._unit} ({share:.0f} %)",
            f"{rate:.3g}/s",
            f"{duration(left)} left",
            self._note,
        ]
        self._logbook.say(", ".join(part for part in parts if part))

    def close(self) -> None:
        """Says where the work ended, unless that was just said."""
        if self._shown != self.completed:
            self._line()


def duration(seconds: float) -> str:
    """A length of time as h:mm:ss or m:ss; "?" when unknown."""
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _end_torn_line(path: Path) -> None:
    """Ends a line that a killed process left half written, so that the next one stands alone."""
    if path.exists() and path.stat().st_size:
        with open(path, "rb+") as handle:
            handle.seek(-1, 2)
            if handle.read(1) != b"\n":
                handle.write(b"\n")


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`: {"time", "phase", "step", "metrics"}, with null read as NaN.

    A half-written line is passed over. Where a resumed training wrote a metric of a step again, the later
    value is kept, in the place of the first line of that step.
    """
    path = Path(run_dir) / METRICS_NAME
    if not path.exists():
        return []
    lines: dict[tuple[str, int], dict[str, Any]] = {}
    with open(path, encoding="utf-8", errors="replace") as handle:
        for text in handle:
            try:
                line = json.loads(text)
                address = (line["phase"], line["step"])
                metrics = {name: math.nan if x is None else x for name, x in line["metrics"].items()}
                known = lines.setdefault(address, {**line, "metrics": {}})
                known["time"] = line["time"]
            except (ValueError, KeyError, TypeError, AttributeError):
                continue
            known["metrics"] |= metrics
    return list(lines.values())
