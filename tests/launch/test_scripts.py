from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "launch"
PROGRAM = Path(__file__).with_name("loopback_program.py")
SCRIPTS = ("local_cpu.sh", "gpu_host.sh", "loopback.sh", "tpu_vm.sh")
BASH_FILES = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("env/*.env")])
HARMLESS = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), "PYTHON": "python3"}


def run(
    script: str, *arguments: str, timeout: float = 120, **environment: str
) -> subprocess.CompletedProcess:
    return subprocess.run(
        [LAUNCH / script, *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**HARMLESS, **environment},
    )


def dry(script: str, *arguments: str, **environment: str) -> list[str]:
    """The printed commands, in a PATH in which none but the shell's own tools could be run."""
    done = run(script, "--dry-run", *arguments, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("path", BASH_FILES, ids=lambda path: path.name)
def test_bash_parses(path):
    done = subprocess.run(["bash", "-n", path], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_shellcheck_finds_nothing():
    shellcheck = shutil.which("shellcheck") or shutil.which("shellcheck", path=Path(sys.executable).parent)
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run([shellcheck, *BASH_FILES], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_strict_executable_and_explained(script):
    path = LAUNCH / script
    assert os.access(path, os.X_OK)
    assert "\nset -euo pipefail\n" in path.read_text()
    done = run(script, "--help")
    assert done.returncode == 0
    assert "--dry-run" in done.stdout and f"launch/{script}" in done.stdout
    assert "set -euo" not in done.stdout
    assert f"`{script}`" in (LAUNCH / "README.md").read_text()


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_option_is_in_the_help(script):
    options = set(re.findall(r"^ +(--[a-z-]+)", (LAUNCH / script).read_text(), re.M))
    assert options - {"--exclude"} >= {"--dry-run", "--help"}
    told = run(script, "--help").stdout
    assert not [option for option in options - {"--exclude", "--"} if option not in told]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["local_cpu.sh"], "no verb"),
        (["local_cpu.sh", "--gin_file=x", "rest"], "unknown option --gin_file=x"),
        (["local_cpu.sh", "--devices=0", "rest"], "--devices=0"),
        (["gpu_host.sh", "--gpus=a", "rest"], "--gpus=a"),
        (["loopback.sh", "--processes=two", "rest"], "two is not a number"),
        (["loopback.sh", "--"], "no verb and no command"),
        (["tpu_vm.sh"], "no action"),
        (["tpu_vm.sh", "create"], "--name="),
        (["tpu_vm.sh", "--dry-run", "create", "--name=a"], "--accelerator-type is needed"),
        (["tpu_vm.sh", "--dry-run", "run", "--name=a"], "run: no verb"),
        (["tpu_vm.sh", "--dry-run", "explode", "--name=a"], "unknown action explode"),
        (["tpu_vm.sh", "--dry-run", "delete", "--name=a", "rest"], "only run takes a verb"),
        (["tpu_vm.sh", "--dry-run", "delete", "--name=a; rm -rf b"], "is not a name"),
    ],
)
def test_wrong_calls_are_named_and_do_nothing(arguments, message):
    done = run(*arguments)
    assert done.returncode == 64
    assert message in done.stderr
    assert done.stdout == ""


def test_local_cpu_dry_run():
    commands = dry("local_cpu.sh", "--devices=4", "rest", "--gin_file=a.gin", '--gin.MODEL_DIR="my run"')
    assert commands == [
        f"source {LAUNCH}/env/cpu.env",
        "export XLA_FLAGS=--xla_force_host_platform_device_count=4",
        """python3 -m rest_jax.main rest --gin_file=a.gin '--gin.MODEL_DIR="my run"'""",
    ]


def test_gpu_host_dry_run():
    assert dry("gpu_host.sh", "--gpus=0,1", "grow", "--grow_step=2") == [
        f"source {LAUNCH}/env/gpu.env",
        "export CUDA_VISIBLE_DEVICES=0,1",
        "nvidia-smi --list-gpus",
        "python3 -m rest_jax.main grow --grow_step=2",
    ]


def test_loopback_dry_run():
    flags = "--multiprocess --coordinator_address=127.0.0.1:7777 --process_count=3 --process_index="
    assert dry("loopback.sh", "--processes=3", "--port=7777", "rest", "--gin_file=a.gin") == [
        f"source {LAUNCH}/env/cpu.env",
        *[f"python3 -m rest_jax.main rest --gin_file=a.gin {flags}{index} &" for index in range(3)],
        "wait",
    ]
    assert dry("loopback.sh", "--", "echo", "it's")[1].startswith(r"echo 'it'\''s' --multiprocess ")


def test_tpu_dry_run_of_a_whole_life():
    where = ("--name=rest", "--zone=us-east5-b", "--project=lab")
    place = "--zone=us-east5-b --project=lab"
    up = dry("tpu_vm.sh", "up", *where, "--accelerator-type=v6e-16", "--spot", "--valid-until=6h")
    assert up[0] == (
        f"gcloud compute tpus queued-resources create rest --node-id=rest {place} --accelerator-type=v6e-16"
        " --runtime-version=v2-alpha-tpuv6e --spot --valid-until-duration=6h"
    )
    assert (
        up[1] == f"gcloud compute tpus queued-resources describe rest {place} '--format=value(state.state)'"
    )
    assert "until it says ACTIVE" in up[2]
    assert up[3].startswith("tar --create --gzip") and up[3].endswith(
        "setup.py pyproject.toml README.md LICENSE"
    )
    assert up[4].endswith(f"rest:rest_jax.tar.gz {place} --worker=all")
    assert up[6].startswith(f"gcloud compute tpus tpu-vm ssh rest {place} --worker=all '--command=")
    assert "--python 3.12" in up[6] and "[tpu]" in up[6]
    (start,) = dry("tpu_vm.sh", "run", *where, "rest", "--gin_file=a.gin", '--gin.MODEL_DIR="/mnt/run"')
    assert start == (
        f"gcloud compute tpus tpu-vm ssh rest {place} --worker=all '--command=cd ~/rest_jax && source"
        " launch/env/tpu.env && ../rest_jax_env/bin/python -m rest_jax.main rest --gin_file=a.gin"
        r""" '\''--gin.MODEL_DIR="/mnt/run"'\'' --multiprocess'"""
    )
    (detached,) = dry("tpu_vm.sh", "run", *where, "--detach", "rest")
    assert "nohup ../rest_jax_env/bin/python -m rest_jax.main rest --multiprocess >run.log" in detached
    assert "--worker=all" in dry("tpu_vm.sh", "stop", *where)[0]
    assert dry("tpu_vm.sh", "delete", *where) == [
        f"gcloud compute tpus queued-resources delete rest {place} --force --quiet"
    ]


def _fake(folder: Path, name: str, body: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def test_tpu_commands_reach_the_host_as_written(tmp_path):
    # A gcloud that runs --command here, as a host would: what arrives must be the arguments that were typed.
    _fake(tmp_path, "gcloud", 'for last; do :; done; exec bash -c "${last#--command=}"')
    home = tmp_path / "home"
    (home / "rest_jax_env/bin").mkdir(parents=True)
    shutil.copytree(LAUNCH, home / "rest_jax/launch")
    _fake(home / "rest_jax_env/bin", "python", 'printf "%s\\n" "$JAX_PLATFORMS" "$@"; exit 42')
    typed = ["rest", '--gin.MODEL_DIR="a b"', "--gin.X='it\\'s $HOME'"]
    path = f"{tmp_path}:{HARMLESS['PATH']}"
    done = run("tpu_vm.sh", "run", "--name=a", *typed, PATH=path, HOME=str(home))
    assert done.stdout.splitlines() == ["tpu,cpu", "-m", "rest_jax.main", *typed, "--multiprocess"]
    assert done.returncode == 42
    done = run("tpu_vm.sh", "run", "--name=a", "--detach", *typed, PATH=path, HOME=str(home))
    assert done.returncode == 0
    log = home / "rest_jax/run.log"
    deadline = time.monotonic() + 20
    while log.read_text().count("\n") < 6 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert log.read_text().splitlines()[3:] == [*typed, "--multiprocess"]
    assert (home / "rest_jax/run.pid").read_text().strip().isdigit()


@pytest.mark.parametrize(
    ("states", "code"), [("WAITING_FOR_RESOURCES ACTIVE", 0), ("PROVISIONING FAILED", 42)]
)
def test_tpu_waits_until_active_or_hopeless(tmp_path, states, code):
    (tmp_path / "states").write_text(states.replace(" ", "\n") + "\n")
    _fake(tmp_path, "gcloud", f"cd {tmp_path}; head -n 1 states; sed -i 1d states")
    path = f"{tmp_path}:{HARMLESS['PATH']}"
    done = run("tpu_vm.sh", "wait", "--name=a", "--poll=0", PATH=path)
    assert done.returncode == code
    assert all(state in done.stderr for state in states.split())


@pytest.mark.parametrize(("code", "runs"), [(0, 1), (42, 3), (137, 3), (65, 1), (78, 1)])
def test_only_a_preemption_or_a_kill_is_followed_by_a_restart(tmp_path, code, runs):
    _fake(tmp_path, "python", f"echo run >>{tmp_path}/runs; exit {code}")
    done = run("local_cpu.sh", "--restarts=2", "rest", PYTHON=str(tmp_path / "python"))
    assert done.returncode == code
    assert (tmp_path / "runs").read_text().count("run") == runs


def test_settings_that_are_there_are_kept(tmp_path):
    _fake(tmp_path, "python", 'echo "$JAX_PLATFORMS $XLA_FLAGS"')
    python = str(tmp_path / "python")
    done = run("local_cpu.sh", "--devices=2", "rest", PYTHON=python, JAX_PLATFORMS="mine", XLA_FLAGS="--a")
    assert done.stdout.strip() == "mine --a --xla_force_host_platform_device_count=2"


def loopback(*arguments: str, task: str, folder: Path, timeout: float = 120) -> subprocess.CompletedProcess:
    command = ("--", sys.executable, str(PROGRAM), task, str(folder))
    return run(
        "loopback.sh", f"--logs={folder}/logs", *arguments, *command, timeout=timeout, PYTHON=sys.executable
    )


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_two_processes_find_each_other_and_sum(tmp_path):
    done = loopback("--processes=2", "--devices=2", task="sum", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    for index in range(2):
        assert (tmp_path / f"sum_{index}").read_text() == "6.0 over 4 devices of 2 processes"


def test_one_dead_process_ends_the_others_with_its_code(tmp_path):
    done = loopback(task="fail", folder=tmp_path, timeout=60)
    assert done.returncode == 65
    assert "process 1 ended with exit code 65" in done.stderr
    assert "the reason is written here" in done.stderr
    assert not _is_alive(int((tmp_path / "pid_0").read_text()))


def test_a_killed_process_is_followed_by_a_restart_of_all(tmp_path):
    done = loopback("--restarts=1", "--grace=2", task="kill_once", folder=tmp_path, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "exit code 137: starting again (1 of 1)" in done.stderr
    assert (tmp_path / "second_0").exists() and (tmp_path / "second_1").exists()


def test_sigterm_to_the_launcher_reaches_all_and_is_final(tmp_path):
    command = [LAUNCH / "loopback.sh", f"--logs={tmp_path}/logs", "--restarts=3", "--"]
    launcher = subprocess.Popen(
        [*command, sys.executable, str(PROGRAM), "sleep", str(tmp_path)],
        env={**HARMLESS, "PYTHON": sys.executable},
        stderr=subprocess.PIPE,
    )
    marks = [tmp_path / "pid_0", tmp_path / "pid_1"]
    deadline = time.monotonic() + 60
    while not all(mark.exists() and mark.read_text() for mark in marks) and time.monotonic() < deadline:
        time.sleep(0.05)
    launcher.send_signal(signal.SIGTERM)
    _, told = launcher.communicate(timeout=30)
    assert launcher.returncode == 143
    assert b"starting again" not in told
    assert not any(_is_alive(int(mark.read_text())) for mark in marks)
