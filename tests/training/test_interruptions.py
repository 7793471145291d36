"""Training in a process of its own that is killed, told to stop, or spread over devices and processes."""

from __future__ import annotations

import functools
import json
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from rest_jax.training.logbook import read_metrics
from rest_jax.training.trainer import read_fit
from tests.training import toys


def start(run_dir: Path, *options: str, devices: int = 1, failpoint: str = "") -> subprocess.Popen[str]:
    env = {**toys.environment(devices), "REST_JAX_FAILPOINT": failpoint}
    command = [sys.executable, "-m", "tests.training.toy_fit", str(run_dir), *options]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    out, err = process.communicate(timeout=240)
    assert process.returncode == code, err[-3000:]
    return out + err


def wait_for(process: subprocess.Popen[str], line: str) -> None:
    for found in process.stdout:
        if found.strip() == line:
            return
    raise AssertionError(process.stderr.read()[-3000:])


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """`fit.json` of a training that nothing interrupted, by optimiser."""

    @functools.cache
    def fit(optimizer):
        run_dir = tmp_path_factory.mktemp(optimizer)
        finish(start(run_dir, "--optimizer", optimizer))
        return read_fit(run_dir / "bc")

    return fit


AFTER_PARAMS, BEFORE_COMMIT = "between-params-and-optimizer", "before-verified"
IN_COMMIT, AT_THE_END = "before-rename:verified.json", "before-rename:fit.json"


@pytest.mark.parametrize(
    ("optimizer", "failpoints"),
    [
        ("adamw", [BEFORE_COMMIT]),
        pytest.param("adamw", [AFTER_PARAMS, IN_COMMIT, AT_THE_END], marks=pytest.mark.slow),
        pytest.param("adafactor", [AFTER_PARAMS, BEFORE_COMMIT, AT_THE_END], marks=pytest.mark.slow),
    ],
)
def test_sigkill_anywhere_ends_in_the_same_bits(tmp_path, unbroken, optimizer, failpoints):
    options = ("--optimizer", optimizer)
    process = start(tmp_path, *options, "--step-seconds", "0.05")
    wait_for(process, "batch 4")
    process.kill()
    finish(process, -signal.SIGKILL)
    for failpoint in failpoints:
        finish(start(tmp_path, *options, failpoint=failpoint), -signal.SIGKILL)
    finish(start(tmp_path, *options))
    assert read_fit(tmp_path / "bc") == unbroken(optimizer)


def test_sigterm_saves_the_step_and_asks_for_a_retry(tmp_path, unbroken):
    process = start(tmp_path, "--step-seconds", "0.2")
    wait_for(process, "batch 7")
    process.send_signal(signal.SIGTERM)
    said = finish(process, 42)
    step = int(re.search(r"told to stop; step (\d+) is saved", said)[1])
    assert step >= 7 and (tmp_path / "bc" / "checkpoints" / f"{step:06d}").is_dir()
    said = finish(start(tmp_path))
    assert f"from the checkpoint of step {step}" in said
    assert read_fit(tmp_path / "bc") == unbroken("adamw")


@pytest.mark.slow
def test_sigterm_cuts_an_evaluation_short(tmp_path, unbroken):
    process = start(tmp_path, "--slow-evaluation-at", "5")
    wait_for(process, "slow evaluation")
    process.send_signal(signal.SIGTERM)
    assert "step 5 is saved" in finish(process, 42)
    finish(start(tmp_path))
    assert read_fit(tmp_path / "bc") == unbroken("adamw")


@pytest.mark.slow
def test_ctrl_c_saves_too(tmp_path):
    process = start(tmp_path, "--step-seconds", "0.2")
    wait_for(process, "batch 7")
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=240)[1]
    assert process.returncode != 0 and "KeyboardInterrupt" in said and "is saved" in said


def curve(run_dir):
    names = ("train/loss", "train/grad_norm", "valid/loss")
    return [[line["metrics"].get(name, 0.0) for name in names] for line in read_metrics(run_dir)]


@pytest.mark.parametrize("microbatches", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_four_devices_lose_as_one_does(tmp_path, microbatches):
    options = ("--microbatches", str(microbatches))
    both = [start(tmp_path / str(devices), *options, devices=devices) for devices in (1, 4)]
    for process in both:
        finish(process)
    one, four = curve(tmp_path / "1"), curve(tmp_path / "4")
    assert len(one) == len(four) > 6
    for left, right in zip(one, four, strict=True):
        assert left == pytest.approx(right, rel=1e-4)


def start_two(run_dir: Path, *options: str) -> list[subprocess.Popen[str]]:
    """Two processes of one training that speak over the loopback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{probe.getsockname()[1]}"
    options = ("--coordinator", coordinator, *options)
    return [start(run_dir, *options, "--process", str(index)) for index in range(2)]


@pytest.mark.slow
def test_two_processes_train_together_and_write_once(tmp_path, unbroken):
    both = start_two(tmp_path)
    digests = {re.search(r"digest (\w+)", finish(process))[1] for process in both}
    assert len(digests) == 1
    history = read_fit(tmp_path / "bc")["history"]
    for row, expected in zip(history, unbroken("adamw")["history"], strict=True):
        assert row["valid/loss"] == pytest.approx(expected["valid/loss"], rel=1e-4)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    written = [(line["step"], sorted(line["metrics"])) for line in lines]
    assert len({(step, tuple(names)) for step, names in written}) == len(written) > 9


@pytest.mark.slow
def test_sigterm_to_one_process_stops_both_at_one_step(tmp_path, unbroken):
    both = start_two(tmp_path, "--step-seconds", "0.2")
    wait_for(both[1], "batch 6")
    both[1].send_signal(signal.SIGTERM)
    step = re.search(r"step (\d+) is saved", finish(both[0], 42))[1]
    finish(both[1], 42)
    said = [finish(process) for process in start_two(tmp_path)]
    assert f"from the checkpoint of step {step}" in said[0]
    history = read_fit(tmp_path / "bc")["history"]
    for row, expected in zip(history, unbroken("adamw")["history"], strict=True):
        assert row["valid/loss"] == pytest.approx(expected["valid/loss"], rel=1e-4)
