"""What all tests share: the CPU, and programs that are compiled once for this session and its subprocesses.

It is set in the environment before JAX is imported, so that subprocesses and the workers of xdist have it
too. The cache is new in each session: nothing that an earlier state of the code compiled is ever loaded.
"""

from __future__ import annotations

import os
import shutil
import tempfile

import pytest

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
