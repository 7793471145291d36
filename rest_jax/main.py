"""The program: `rest-jax VERB --gin_file=F --gin.KEY=value`.

Floor 7. Flags and binding names are T5X's where it has them. A failure the user can mend prints one line that
names the thing and the remedy, and exits with the code of its kind (`rest_jax.errors`).
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # TensorFlow and TensorStore speak only of errors

from rest_jax import errors, flags  # noqa: E402

if TYPE_CHECKING:
    from rich.console import Console

    from rest_jax.phases.experiment import Experiment

Arguments = argparse.Namespace
_COLUMNS = 120  # of the table where no terminal says how wide it is
EPILOG = """\
settings:
  --gin_file=F            a gin file; may be given several times, later ones override
  --gin.KEY=value         one binding, for instance '--gin.MODEL_DIR="run"' --gin.SEED=1
  --gin_search_paths=A,B  further folders to look for gin files in
"""


class Verb(NamedTuple):
    """A verb: what it does, reads and writes, its flags, and how it is run."""

    does: str
    reads: str
    writes: str
    run: Callable[[Arguments], None]
    flags: Callable[[argparse.ArgumentParser], None] = lambda parser: None


def _with_workspace(work: Callable[..., None], takes_shard: bool = False) -> Callable[[Arguments], None]:
    """Builds and checks the experiment, locks the run folder, then works.

    Several jobs (`SHARD`) may hold the folder at a time; config.gin is that of the whole runs.
    """

    def run(arguments: Arguments) -> None:
        from rest_jax import files, gin_setup, processes
        from rest_jax.phases import workspace as workspaces

        experiment = _load_experiment(arguments, takes_shard)
        _start_processes(arguments)
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


def _load_experiment(arguments: Arguments, takes_shard: bool = False) -> Experiment:
    """The experiment of the gin settings; `SHARD` is refused where the verb cannot be shared out."""
    from rest_jax import gin_setup

    experiment = gin_setup.load_experiment(arguments.gin_file, arguments.bindings, arguments.gin_search_paths)
    if experiment.shard is not None and not takes_shard:
        raise errors.ConfigError(
            f"{arguments.verb} is not shared out among jobs, and SHARD = {experiment.shard!r}",
            where="SHARD",
            remedy="Leave SHARD out: only grow and annotate take it",
        )
    return experiment


def _start_processes(arguments: Arguments) -> None:
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


# Each verb imports what it needs when it runs, so that `--help`, `report` and `doctor` start at once and
# nothing but `vocab` brings TensorFlow.


def _vocab(workspace, arguments: Arguments) -> None:
    from rest_jax.phases import vocab

    vocab.prepare_text(workspace)


def _pretrain(workspace, arguments: Arguments) -> None:
    from rest_jax.phases import pretrain

    pretrain.pretrain(workspace)


def _reward_model(workspace, arguments: Arguments) -> None:
    from rest_jax.phases import reward_model

    reward_model.make_reward(workspace)


def _grow(workspace, arguments: Arguments) -> None:
    from rest_jax.phases import grow

    grow.grow(workspace, arguments.grow_step)


def _annotate(workspace, arguments: Arguments) -> None:
    from rest_jax.phases import annotate

    annotate.annotate(workspace, arguments.grow_step)


def _improve(workspace, arguments: Arguments) -> None:
    from rest_jax.phases import improve
    from rest_jax.phases.lineage import PolicyName

    improve.improve(workspace, PolicyName(arguments.grow_step, arguments.improve_step))


def _evaluate(workspace, arguments: Arguments) -> None:
    from rest_jax.phases import evaluate
    from rest_jax.phases.lineage import PolicyName

    evaluate.evaluate(workspace, PolicyName.parse(arguments.policy))


def _rest(workspace, arguments: Arguments) -> None:
    from rest_jax import processes, rest

    rest.run(workspace)
    if processes.is_lead():
        _print_report(workspace.run_dir)


def _report(arguments: Arguments) -> None:
    _print_report(_run_folder(arguments))


def _verify(arguments: Arguments) -> None:
    import dataclasses
    import secrets

    from rest_jax import processes
    from rest_jax.phases import verify
    from rest_jax.phases.workspace import Workspace

    if arguments.run is not None and not arguments.gin_file:
        config = _run_folder(arguments) / "config.gin"
        if not config.is_file():
            raise errors.MissingInputError(
                f"no file {config}", where="verify", remedy="Give the settings of the run with --gin_file"
            )
        arguments.gin_file = [str(config)]
    experiment = _load_experiment(arguments)
    _start_processes(arguments)
    # The folder may have been moved since, or be named from another working folder.
    run_dir = arguments.run or experiment.model_dir
    seed = secrets.randbelow(2**32) if arguments.seed is None else arguments.seed
    workspace = Workspace(dataclasses.replace(experiment, model_dir=str(run_dir)))
    for line in verify.verify(workspace, arguments.grow_step, arguments.share, seed):
        if processes.is_lead():
            print(line, flush=True)
    if processes.is_lead():
        print(f"verified {workspace.run_dir}; --seed={seed} chooses the same sources again")


def _run_folder(arguments: Arguments) -> Path:
    """The run folder from the command line, else from the gin settings."""
    folder = Path(_load_experiment(arguments).model_dir if arguments.run is None else arguments.run)
    if not folder.is_dir():
        raise errors.MissingInputError(
            f"no run folder {folder}", where=arguments.verb, remedy="Name the MODEL_DIR of a run"
        )
    return folder


def _inspect(arguments: Arguments) -> None:
    from rest_jax.report import inspection

    run_dir = _run_folder(arguments)
    wanted = inspection.Wanted(arguments.grow_step, arguments.source, arguments.search, arguments.limit)
    console = _console()
    if arguments.html is not None:
        inspection.write_page(run_dir, wanted, Path(arguments.html))
        console.print(f"page: {arguments.html}", soft_wrap=True, markup=False, highlight=False)
        return
    for view in inspection.views(run_dir, wanted, console.width):
        console.print(view, highlight=False)


def _console() -> Console:
    """Standard output, wide enough for a table where no terminal says how wide it is."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=_COLUMNS)


def _print_report(run_dir: Path) -> None:
    from rest_jax.report import build

    paths = build.build_report(run_dir)
    console = _console()
    console.print(build.steps_table(run_dir))
    console.print(f"report: {paths.index_html}", soft_wrap=True)


def _translate(workspace, arguments: Arguments) -> None:
    from rest_jax.phases import translate

    translate.translate(workspace, arguments.policy, arguments.input, arguments.output, arguments.decoder)


def _doctor(arguments: Arguments) -> None:
    from rest_jax import doctor

    if arguments.multiprocess:
        _start_processes(arguments)
    if not doctor.print_findings():
        raise errors.MissingInputError(
            "something that rest_jax needs is missing", remedy="Do what the lines marked missing say"
        )


def _export(workspace, arguments: Arguments) -> None:
    from rest_jax.interop import exchange

    exchange.export_policy(workspace, arguments.policy, Path(arguments.output))


def _import(workspace, arguments: Arguments) -> None:
    from rest_jax.interop import exchange

    exchange.import_policy(workspace, arguments.format, Path(arguments.input))


VERBS: dict[str, Verb] = {
    "vocab": Verb(
        "trains the vocabulary and tokenises the corpus",
        "the corpus",
        "RUN/vocab, RUN/data",
        _with_workspace(_vocab),
    ),
    "pretrain": Verb(
        "trains the BC policy (G=0 I=0)",
        "RUN/vocab, RUN/data",
        "RUN/policy/bc",
        _with_workspace(_pretrain),
    ),
    "reward_model": Verb(
        "rates translations and trains the reward model",
        "RUN/data, RUN/policy/bc, a ratings file if one is set",
        "RUN/reward",
        _with_workspace(_reward_model),
    ),
    "grow": Verb(
        "samples N translations of each source from the latest policy",
        "RUN/data, RUN/policy",
        "RUN/grow/gG",
        _with_workspace(_grow, takes_shard=True),
        flags.grow,
    ),
    "annotate": Verb(
        "scores the samples of a Grow step with the reward",
        "RUN/grow/gG, RUN/reward",
        "RUN/grow/gG/rewards",
        _with_workspace(_annotate, takes_shard=True),
        flags.grow,
    ),
    "improve": Verb(
        "filters by the threshold and fine-tunes on what is left",
        "RUN/grow/gG, RUN/policy",
        "RUN/policy/gG_iI",
        _with_workspace(_improve),
        flags.improve,
    ),
    "evaluate": Verb(
        "measures a policy: mean reward, BLEU and chrF with intervals",
        "RUN/data, RUN/policy, RUN/reward",
        "RUN/eval",
        _with_workspace(_evaluate),
        flags.policy,
    ),
    "rest": Verb(
        "does all of the above: Algorithm 1 with G Grow and I Improve steps, then the report",
        "the corpus",
        "the whole of RUN",
        _with_workspace(_rest),
    ),
    "report": Verb(
        "draws the report of a run",
        "RUN",
        "RUN/report/index.html, RUN/report/summary.json",
        _report,
        flags.report,
    ),
    "inspect": Verb(
        "shows the samples of Grow: rewards, thresholds, flags, and the sources themselves",
        "RUN/grow, RUN/policy/*/improve.json",
        "nothing, or the page that --html names",
        _inspect,
        flags.inspect,
    ),
    "verify": Verb(
        "compares every sealed file with its seal, and draws a share of the samples again",
        "RUN; its settings from RUN/config.gin, unless --gin_file gives others",
        "nothing",
        _verify,
        flags.verify,
    ),
    "translate": Verb(
        "translates text, a sentence a line",
        "RUN/vocab, RUN/policy, text",
        "text",
        _with_workspace(_translate),
        flags.translate,
    ),
    "export": Verb(
        "writes a policy as a Hugging Face T5 checkpoint",
        "RUN/vocab, RUN/policy",
        "a folder that transformers loads",
        _with_workspace(_export),
        flags.export,
    ),
    "import": Verb(
        "takes a Hugging Face or T5X checkpoint as the BC policy of a run",
        "a Hugging Face or T5X folder",
        "RUN/policy/bc",
        _with_workspace(_import),
        flags.import_,
    ),
    "doctor": Verb("says what was found here and what is missing", "this machine", "nothing", _doctor),
}


def make_parser() -> argparse.ArgumentParser:
    """The command line: verbs, and the flags that all of them take."""
    parser = argparse.ArgumentParser(
        prog="rest-jax",
        description="ReST (Reinforced Self-Training, arXiv:2308.08998) for machine translation",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, verb in VERBS.items():
        sub = verbs.add_parser(
            name,
            help=verb.does,
            description=f"{verb.does}\n\nreads:  {verb.reads}\nwrites: {verb.writes}",
            epilog=EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        sub.add_argument("--gin_file", action="append", default=[], help=argparse.SUPPRESS)
        sub.add_argument(
            "--gin_search_paths", default=[], type=lambda text: text.split(","), help=argparse.SUPPRESS
        )
        group = sub.add_argument_group("several processes (found by itself on a TPU pod)")
        group.add_argument("--multiprocess", action="store_true", help="join the job's other processes")
        group.add_argument("--coordinator_address", default=None, help="host:port of process 0")
        group.add_argument("--process_count", type=int, default=None)
        group.add_argument("--process_index", type=int, default=None)
        verb.flags(sub)
    return parser


def parse(arguments: Sequence[str]) -> Arguments:
    """Reads the command line; `--gin.KEY=value` flags are collected in `bindings`."""
    bindings = [a[len("--gin.") :] for a in arguments if a.startswith("--gin.")]
    parsed = make_parser().parse_args([a for a in arguments if not a.startswith("--gin.")])
    parsed.bindings = bindings
    return parsed


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a verb and returns the exit code."""
    parsed = parse(sys.argv[1:] if arguments is None else arguments)
    try:
        VERBS[parsed.verb].run(parsed)
    except errors.RestError as error:
        print(f"rest_jax: E{error.exit_code} {parsed.verb}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"rest_jax: {parsed.verb} was interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    except Exception as error:
        traceback.print_exc()
        print(f"rest_jax: E70 {parsed.verb}: {type(error).__name__}: {error}", file=sys.stderr)
        return 70
    return 0


if __name__ == "__main__":
    sys.exit(main())
