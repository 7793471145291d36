"""One Grow step, made in many ways: the sealed dataset has the same digest.

Devices 1, 2 and 4; processes 1 and 2; sources in another order; killed three times; made by separate jobs.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rest_jax import files, gin_setup
from rest_jax.phases import grow
from rest_jax.phases.workspace import Workspace
from tests import tiny

# Queues of two sources, so that every device has some of its own in each call.
QUEUES = ("--gin.DecodeBatching.source_batch=2", "--gin.DecodeBatching.queue_samples=1")


def without_grow(finished_run: Path, folder: Path) -> Path:
    """What a run has when its first Grow step is about to start."""
    run_dir = folder / "run"
    shutil.copytree(finished_run, run_dir, ignore=shutil.ignore_patterns("grow", "report", "eval"))
    return run_dir


def digest(run_dir: Path) -> str:
    return files.verify_seal(run_dir / "grow" / "g1").digest


@pytest.fixture(scope="module")
def corpus(finished_run) -> Path:
    return finished_run.parent / "pairs.tsv"


@pytest.fixture(scope="module")
def reference(finished_run, corpus, tmp_path_factory) -> str:
    """The digest of one process on one device that nothing disturbs."""
    run_dir = without_grow(finished_run, tmp_path_factory.mktemp("reference"))
    done = tiny.tiny("grow", run_dir, corpus, *QUEUES)
    assert done.returncode == 0, done.stderr
    assert "sampling takes up to" in done.stderr and "MiB a device" in done.stderr
    return digest(run_dir)


@pytest.fixture
def run_dir(finished_run, tmp_path) -> Path:
    return without_grow(finished_run, tmp_path)


@pytest.mark.parametrize("devices", [2, 4])
def test_several_devices(reference, run_dir, corpus, devices):
    done = tiny.tiny("grow", run_dir, corpus, *QUEUES, env=tiny.on_devices(devices))
    assert done.returncode == 0, done.stderr
    assert digest(run_dir) == reference


@pytest.mark.parametrize("devices", [1, 2])
def test_two_processes(reference, run_dir, corpus, devices):
    script = ["bash", "launch/loopback.sh", f"--devices={devices}", f"--logs={run_dir.parent / 'logs'}"]
    flags = [f"--gin_file={tiny.GIN_FILE}", *tiny.bindings(run_dir, corpus), *QUEUES]
    done = subprocess.run(
        [*script, "grow", *flags], cwd=tiny.ROOT, env=tiny.environment(PYTHON=sys.executable),
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert digest(run_dir) == reference


def test_three_kills_and_other_devices_each_time(reference, run_dir, corpus):
    points = ("before-rename:samples-00001-of-00008.parquet", "after-shard:samples-00003-of-00008.parquet",
              "before-seal:grow")  # fmt: skip
    for devices, point in zip((1, 4, 2), points, strict=True):
        environment = {**tiny.on_devices(devices), "REST_JAX_FAILPOINT": point}
        assert tiny.tiny("grow", run_dir, corpus, *QUEUES, env=environment).returncode == -signal.SIGKILL
    assert tiny.tiny("grow", run_dir, corpus, *QUEUES).returncode == 0
    assert digest(run_dir) == reference


def test_jobs_on_different_devices(reference, run_dir, corpus):
    for devices, job in ((1, "2/2"), (4, "1/2")):
        share = f'--gin.SHARD="{job}"'
        done = tiny.tiny("grow", run_dir, corpus, *QUEUES, share, env=tiny.on_devices(devices))
        assert done.returncode == 0, done.stderr
    assert tiny.tiny("grow", run_dir, corpus, *QUEUES).returncode == 0
    assert digest(run_dir) == reference


def test_sources_in_another_order(reference, run_dir, corpus, monkeypatch):
    """In this process, whose XLA optimises more: compared with an undisturbed run of this process."""

    def grown(folder: Path, shuffled: bool) -> str:
        settings = [b.removeprefix("--gin.") for b in (*tiny.bindings(folder, corpus), *QUEUES)]
        workspace = Workspace(gin_setup.load_experiment([str(tiny.GIN_FILE)], settings, []))
        if shuffled:
            examples = workspace.split("train")
            order = np.random.default_rng(0).permutation(len(examples))
            assert not np.array_equal(examples.ids[order], np.sort(examples.ids))
            chosen = grow.grow_sources(workspace, 1).ids
            # The same sources: the draw of a subset is not what is compared.
            few = examples.take(order[np.isin(examples.ids[order], chosen)])
            monkeypatch.setattr(Workspace, "split", lambda self, name: few)
        grow.grow(workspace, 1)
        return digest(folder)

    assert reference
    plain = run_dir.parent / "plain"
    shutil.copytree(run_dir, plain)
    assert grown(plain, shuffled=False) == grown(run_dir, shuffled=True)
