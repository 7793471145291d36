"""What tests/launch runs on several processes: joins them, sums over them, and ends as it is told to."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

parser = argparse.ArgumentParser()
parser.add_argument("task", choices=["sum", "fail", "kill_once", "sleep"])
parser.add_argument("folder", type=Path)
parser.add_argument("--multiprocess", action="store_true")
parser.add_argument("--coordinator_address")
parser.add_argument("--process_count", type=int)
parser.add_argument("--process_index", type=int)
arguments = parser.parse_args()
index, folder = arguments.process_index, arguments.folder


def sum_over_processes() -> None:
    """Process i brings i + 1 on each of its devices; every process writes the sum that it sees."""
    jax.distributed.initialize(arguments.coordinator_address, arguments.process_count, index)
    devices = jax.devices()
    sharding = NamedSharding(jax.sharding.Mesh(np.array(devices), ("data",)), PartitionSpec("data"))
    mine = np.full(jax.local_device_count(), index + 1, np.float32)
    whole = jax.make_array_from_process_local_data(sharding, mine)
    total = float(jax.jit(jnp.sum)(whole))
    (folder / f"sum_{index}").write_text(
        f"{total} over {len(devices)} devices of {jax.process_count()} processes"
    )
    multihost_utils.sync_global_devices("done")


if arguments.task == "sum":
    sum_over_processes()
elif arguments.task == "sleep" or (arguments.task == "fail" and index == 0):
    (folder / f"pid_{index}").write_text(str(os.getpid()))
    time.sleep(120)
elif arguments.task == "fail":
    while not (folder / "pid_0").exists():
        time.sleep(0.05)
    print("the reason is written here", flush=True)
    sys.exit(65)
elif arguments.task == "kill_once":
    mark = folder / f"started_{index}"
    if not mark.exists():
        mark.touch()
        if index == 1:
            # Only when the other has left its mark, too: it would take its second start for the first.
            while not (folder / "started_0").exists():
                time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(120)
    (folder / f"second_{index}").touch()
