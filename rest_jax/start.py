"""How a verb starts: its experiment is built and checked, and the job's processes are joined.

Floor 7. Nothing heavy is imported before it is needed, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rest_jax import errors

if TYPE_CHECKING:
    from rest_jax.phases.experiment import Experiment

Arguments = argparse.Namespace


def with_workspace(work: Callable[..., None], takes_shard: bool = False) -> Callable[[Arguments], None]:
    """Builds and checks the experiment, locks the run folder, then works.

    Several jobs (`SHARD`) may hold the folder at a time; config.gin is that of the whole runs.
    """

    def run(arguments: Arguments) -> None:
        from rest_jax import files, gin_setup, processes
        from rest_jax.phases import workspace as workspaces

        experiment = load_experiment(arguments, takes_shard)
        start_processes(arguments)
        workspace = workspaces.Workspace(experiment)
        if not processes.is_lead():
            work(workspace, arguments)
            return
        job = experiment.job
        with files.run_lock(workspace.run_dir, None if job is None else job.address):
            if job is None:
                files.write_text(workspace.run_dir / "config.gin", gin_setup.operative_config())
            work(workspace, arguments)

    return run


def load_experiment(arguments: Arguments, takes_shard: bool = False) -> Experiment:
    """The experiment of the gin settings; `SHARD` is refused where the verb cannot be shared out."""
    from rest_jax import gin_setup

    experiment = gin_setup.load_experiment(arguments.gin_file, arguments.bindings, arguments.gin_search_paths)
    if experiment.shard is not None and not takes_shard:
        raise errors.ConfigError(
            f"{arguments.verb} is not shared out among jobs, and SHARD = {experiment.shard!r}",
            where="SHARD",
            remedy="Leave SHARD out: only grow, annotate and sample take it",
        )
    return experiment


def start_processes(arguments: Arguments) -> None:
    """Joins the other processes of the job, and refuses a random number generator that is not addressable."""
    import jax

    if arguments.multiprocess:
        jax.distributed.initialize(
            arguments.coordinator_address, arguments.process_count, arguments.process_index
        )
    _keep_compiled_programs()
    names = ("jax_default_prng_impl", "jax_threefry_partitionable")
    settings = {name: getattr(jax.config, name) for name in names}
    if settings != {"jax_default_prng_impl": "threefry2x32", "jax_threefry_partitionable": True}:
        raise errors.ConfigError(
            f"the random number generator is not partitionable threefry: {settings}",
            where="JAX configuration",
            remedy="Unset JAX_DEFAULT_PRNG_IMPL and JAX_THREEFRY_PARTITIONABLE: samples must be reproducible",
        )


def _keep_compiled_programs() -> None:
    """Compiled programs are kept from one start to the next, unless the user says where or forbids it.

    JAX goes by a digest of the program, its own version and the machine, and compiles anew where the folder
    cannot be read or written.
    """
    import jax

    settings: Any = jax.config  # its attributes are made at run time
    if settings.jax_compilation_cache_dir is None and settings.jax_enable_compilation_cache:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        settings.update("jax_compilation_cache_dir", str(Path(home) / "rest_jax" / "programs"))
