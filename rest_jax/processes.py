"""One program on several processes: who writes, and where all meet.

Floor 0. Every process of a multi-process run computes the same host values (batches are functions of seed and
step), so only the lead process writes files, and the others wait for it at a named barrier.
"""

from __future__ import annotations

import jax
from jax.experimental import multihost_utils


def is_lead() -> bool:
    """True on the process that writes files and talks to the user (process 0)."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits until every process has come to the barrier of this name; returns at once in a single process."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
