"""Being told to stop: finish the step, save, and leave with the exit code that asks for a retry.

Floor 5.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

import jax
from jax.experimental import multihost_utils

PREEMPTED_EXIT_CODE = 42


class StopAsked(Exception):  # noqa: N818 (it is a request, not an error)
    """Raised inside `Interrupts.cut_short` when a signal arrives there."""


class Interrupts:
    """Catches SIGTERM and the first Ctrl-C while training runs.

    In several processes JAX's preemption service catches SIGTERM and agrees on a step at which all of them
    stop; in one process a handler of our own does, if this is the main thread.
    """

    def __init__(self) -> None:
        self._signal: int | None = None
        self._may_raise = False

    @contextlib.contextmanager
    def watch(self) -> Iterator[Interrupts]:
        """Installs the handlers, and puts back those there were."""
        if threading.current_thread() is not threading.main_thread() or jax.process_count() > 1:
            yield self
            return
        before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self._signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._signal = number
        if self._may_raise:
            raise StopAsked

    def asked(self, step: int) -> bool:
        """Whether to stop at this step; every process must ask at every step."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self._signal = signal.SIGTERM
        return self._signal is not None

    @contextlib.contextmanager
    def cut_short(self) -> Iterator[None]:
        """Lets a signal raise `StopAsked` at once: for long work that changes no state (an evaluation)."""
        self._may_raise = True
        try:
            if self._signal is not None:
                raise StopAsked
            yield
        finally:
            self._may_raise = False

    def leave(self) -> NoReturn:
        """Ends as the signal asks: exit code 42 for SIGTERM, KeyboardInterrupt for Ctrl-C."""
        if self._signal == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(PREEMPTED_EXIT_CODE)
