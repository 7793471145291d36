"""A run that is small enough for tests: a made-up language, one layer, G = I = 2.

`tests/testdata/tiny.gin` has the settings. The program is run as a user runs it, in a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
GIN_FILE = "tests/testdata/tiny.gin"
Done = subprocess.CompletedProcess[str]
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"

# Each word of the made-up language has one translation, and the order of words stays: a task that a tiny
# network learns in part, so that its samples are neither all right nor all wrong.
WORDS = {
    "one": "ein", "two": "zwei", "red": "rot", "blue": "blau", "old": "alt", "cat": "Katze", "dog": "Hund",
    "house": "Haus", "tree": "Baum", "sees": "sieht", "finds": "findet", "and": "und", "or": "oder",
    "small": "klein", "bread": "Brot", "today": "heute",
}  # fmt: skip


def pairs(number: int = 600) -> list[tuple[str, str]]:
    """Distinct sentence pairs of two to five words, the same at every call."""
    draw = np.random.Generator(np.random.Philox(key=2308))
    words = list(WORDS)
    sources: dict[str, None] = {}
    while len(sources) < number:
        chosen = draw.choice(len(words), size=draw.integers(2, 6))
        sources[" ".join(words[k] for k in chosen)] = None
    return [(source, " ".join(WORDS[word] for word in source.split())) for source in sources]


def write_corpus(path: Path, number: int = 600) -> Path:
    """Writes the pairs as TSV."""
    path.write_text("".join(f"{source}\t{target}\n" for source, target in pairs(number)), encoding="utf-8")
    return path


def bindings(run_dir: Path, corpus: Path) -> list[str]:
    """What every tiny run has to say on its command line."""
    return [f'--gin.MODEL_DIR="{run_dir}"', f'--gin.TRAIN_TSV="{corpus}"']


# Settings that let a tiny run go on with PPO: two rollouts, four steps on each.
PPO = (
    "--gin_file=gin_configs/objectives/ppo.gin",
    "--gin.PPOSettings.samples=480",
    "--gin.PPOSettings.sources_per_rollout=60",
    "--gin.PPOSettings.samples_per_source=4",
    "--gin.ppo/TrainerConfig.train_steps=8",
    "--gin.ppo/TrainerConfig.eval_period=4",
    "--gin.ppo/OptimizerConfig.learning_rate=1e-4",
    "--gin.ppo_value/OptimizerConfig.learning_rate=1e-3",
)


def environment(**changes: str) -> dict[str, str]:
    """The environment of a subprocess: one CPU device, and nothing inherited that aims a kill.

    Compiling takes longer than running what is compiled here, so XLA is told not to try hard.
    """
    inherited = {k: v for k, v in os.environ.items() if k != "REST_JAX_FAILPOINT"}
    return {**inherited, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": QUICK, "PYTHONUNBUFFERED": "1", **changes}


def on_devices(number: int, compiled: str = QUICK) -> dict[str, str]:
    """What to change in it for so many virtual CPU devices; compiled="" for the programs that a user has."""
    return {"XLA_FLAGS": f"{compiled} --xla_force_host_platform_device_count={number}".strip()}


def program(
    *arguments: str, env: Mapping[str, str] | None = None, stdin: str = "", timeout: float = 600.0
) -> Done:
    """Runs `python -m rest_jax.main` in the source tree."""
    return subprocess.run(
        command(*arguments),
        cwd=ROOT,
        env=environment(**(env or {})),
        input=stdin,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def command(*arguments: str) -> list[str]:
    """The command line of the program."""
    return [sys.executable, "-m", "rest_jax.main", *arguments]


def tiny(verb: str, run_dir: Path, corpus: Path, *more: str, **options: Any) -> Done:
    """Runs one verb of the tiny run."""
    return program(verb, f"--gin_file={GIN_FILE}", *bindings(run_dir, corpus), *more, **options)


def seals(run_dir: Path) -> dict[str, Mapping[str, Any]]:
    """Identity and files with digests of every sealed folder, by its path in the run."""
    found = {}
    for path in sorted(run_dir.rglob("SEAL.json")):
        seal = json.loads(path.read_text(encoding="utf-8"))
        name = path.parent.relative_to(run_dir).as_posix()
        found[name] = {"identity": seal["identity"], "files": seal["files"]}
    return found


def steps_of(run_dir: Path) -> Sequence[Mapping[str, Any]]:
    """The table of steps of a run's summary."""
    return json.loads((run_dir / "report" / "summary.json").read_text(encoding="utf-8"))["steps"]
