"""What all tests share: the CPU, and programs that are compiled once for this session and its subprocesses.

It is set in the environment before JAX is imported, so that subprocesses and the workers of xdist have it
too. The cache is new in each session: nothing that an earlier state of the code compiled is ever loaded.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import tiny

os.environ.setdefault("JAX_PLATFORMS", "cpu")
_CACHE = "JAX_COMPILATION_CACHE_DIR"
_made_here: list[str] = []
if _CACHE not in os.environ:
    _made_here.append(tempfile.mkdtemp(prefix="rest_jax_tests_"))
    os.environ[_CACHE] = _made_here[0]
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"


def pytest_unconfigure(config: pytest.Config) -> None:
    del config
    for folder in _made_here:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def quick_compilation() -> Iterator[None]:
    """For a module whose programs are small and run a few times: to compile them well would take longer.

    Not for tests of bits: they are to have the programs that a user has.
    """
    import jax

    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole tiny run, done once for all tests and workers. Read it; copy it to change it.

    Beside it lie `pairs.tsv`, its corpus, and `stdout.txt` and `stderr.txt`, what it said.
    """
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder = shared / "finished_run"
    folder.mkdir(exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the first worker does it, the others wait
        if not (folder / "stdout.txt").exists():
            corpus = tiny.write_corpus(folder / "pairs.tsv")
            done = tiny.tiny("rest", folder / "run", corpus)
            assert done.returncode == 0, done.stderr
            (folder / "stderr.txt").write_text(done.stderr, encoding="utf-8")
            (folder / "stdout.txt").write_text(done.stdout, encoding="utf-8")
    return folder / "run"


@pytest.fixture
def copied_run(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of the finished run that a test may change; its corpus is that of the original."""
    shutil.copytree(finished_run, tmp_path / "run")
    return tmp_path / "run"
