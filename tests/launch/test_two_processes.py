"""The program itself on two processes, started by launch/loopback.sh as a user starts it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rest_jax import files
from rest_jax.training.logbook import read_metrics
from tests import tiny


def on_two_processes(verb: str, run_dir: Path, corpus: Path, *more: str) -> subprocess.CompletedProcess[str]:
    script = ["bash", "launch/loopback.sh", "--processes=2", f"--logs={run_dir.parent / 'logs'}"]
    settings = [f"--gin_file={tiny.GIN_FILE}", *tiny.bindings(run_dir, corpus), *more]
    return subprocess.run(
        [*script, verb, *settings],
        cwd=tiny.ROOT,
        env=tiny.environment(PYTHON=sys.executable),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def test_grow_on_two_processes_makes_the_bytes_of_one(finished_run, copied_run):
    shutil.rmtree(copied_run / "grow" / "g1")
    done = on_two_processes("grow", copied_run, finished_run.parent / "pairs.tsv", "--grow_step=1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert tiny.seals(copied_run)["grow/g1"] == tiny.seals(finished_run)["grow/g1"]


@pytest.mark.slow
def test_pretraining_on_two_processes_ends_near_that_on_one(finished_run, copied_run):
    shutil.rmtree(copied_run / "policy" / "bc")
    done = on_two_processes("pretrain", copied_run, finished_run.parent / "pairs.tsv")
    assert done.returncode == 0, done.stdout + done.stderr
    mine, theirs = (
        json.loads((run / "policy" / "bc" / "fit.json").read_text(encoding="utf-8"))["history"][0]
        for run in (copied_run, finished_run)
    )
    # The same batches in another order of addition, so near and not equal; far apart from another seed's.
    assert mine["valid/loss"] == pytest.approx(theirs["valid/loss"], rel=0.02)


@pytest.mark.slow
def test_ppo_on_two_processes_learns_from_the_rollout_of_one(finished_run, copied_run, tmp_path):
    corpus = finished_run.parent / "pairs.tsv"
    alone = shutil.copytree(finished_run, tmp_path / "alone")
    for done in (
        tiny.tiny("ppo", alone, corpus, *tiny.PPO),
        on_two_processes("ppo", copied_run, corpus, *tiny.PPO),
    ):
        assert done.returncode == 0, done.stdout + done.stderr
    theirs, mine = (
        {
            line["step"]: line["metrics"]["rollout/reward"]
            for line in read_metrics(run)
            if line["phase"] == "policy/ppo" and "rollout/reward" in line["metrics"]
        }
        for run in (alone, copied_run)
    )
    # The first rollout is of the BC policy, whose samples are the same bytes; the second is of a policy that
    # was trained with another order of addition.
    assert mine[0] == theirs[0]
    assert mine[4] == pytest.approx(theirs[4], abs=0.02)
    assert files.verify_seal(copied_run / "policy/ppo").facts["samples"] == 480
    assert not (copied_run / "policy/ppo/rollouts").exists()


@pytest.mark.slow
def test_the_whole_job_on_two_processes(finished_run, tmp_path):
    done = on_two_processes("rest", tmp_path / "run", finished_run.parent / "pairs.tsv")
    assert done.returncode == 0, done.stdout + done.stderr
    names = [step["name"] for step in tiny.steps_of(tmp_path / "run")]
    assert names == [step["name"] for step in tiny.steps_of(finished_run)]
