from __future__ import annotations

import os

import jax
import pytest


@pytest.fixture(scope="package", autouse=True)
def compile_cache(tmp_path_factory):
    """Programs that several tests compile are compiled once, in subprocesses too."""
    folder = str(tmp_path_factory.mktemp("compile_cache"))
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    patch = pytest.MonkeyPatch()
    for name, value in zip(names, (folder, 0.1), strict=True):
        jax.config.update(name, value)
        patch.setitem(os.environ, name.upper(), str(value))
    yield
    patch.undo()
    for name, value in before.items():
        jax.config.update(name, value)
