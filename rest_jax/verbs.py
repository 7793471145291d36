"""The verbs of the program: what each does, reads and writes, and how it is run.

Floor 7. Each verb imports what it needs when it runs, so that `--help`, `report` and `doctor` start at once
and nothing but `vocab` brings TensorFlow.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rest_jax import errors, flags
from rest_jax.start import Arguments, load_experiment, start_processes, with_workspace

if TYPE_CHECKING:
    from rich.console import Console

_COLUMNS = 120  # of the table where no terminal says how wide it is


class Verb(NamedTuple):
    """A verb: what it does, reads and writes, its flags, and how it is run."""

    does: str
    reads: str
    writes: str
    run: Callable[[Arguments], None]
    flags: Callable[[argparse.ArgumentParser], None] = lambda parser: None


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


def _value(workspace, arguments: Arguments) -> None:
    from rest_jax.phases import value

    value.make_value(workspace, arguments.grow_step)


def _improve(workspace, arguments: Arguments) -> None:
    from rest_jax.phases import improve
    from rest_jax.phases.lineage import PolicyName

    improve.improve(workspace, PolicyName(arguments.grow_step, arguments.improve_step))


def _ppo(workspace, arguments: Arguments) -> None:
    from rest_jax.phases import ppo

    ppo.train(workspace)


def _evaluate(workspace, arguments: Arguments) -> None:
    from rest_jax.phases import evaluate
    from rest_jax.phases.lineage import PolicyName

    evaluate.evaluate(workspace, PolicyName.parse(arguments.policy))


def _sample(workspace, arguments: Arguments) -> None:
    from rest_jax.phases import sample
    from rest_jax.phases.lineage import PolicyName

    sample.sample(workspace, PolicyName.parse(arguments.policy))


def _best_of_n(workspace, arguments: Arguments) -> None:
    from rest_jax import processes
    from rest_jax.phases import best_of_n
    from rest_jax.phases.lineage import PolicyName
    from rest_jax.report.best_of_n import terminal_table

    result = best_of_n.best_of_n(workspace, PolicyName.parse(arguments.policy))
    if processes.is_lead():
        _console().print(terminal_table(result))


def _rest(workspace, arguments: Arguments) -> None:
    from rest_jax import processes, rest

    rest.run(workspace)
    if processes.is_lead():
        _print_report(workspace.run_dir)


def _report(arguments: Arguments) -> None:
    _print_report(_run_folder(arguments))


def _compare(arguments: Arguments) -> None:
    from rest_jax.report import comparison

    found = comparison.compare([Path(run) for run in arguments.runs])
    path = comparison.write(found, Path(arguments.output))
    for table in comparison.tables(found):
        _console().print(table)
    _console().print(f"tables: {path}", soft_wrap=True, markup=False, highlight=False)


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
    experiment = load_experiment(arguments)
    start_processes(arguments)
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
    folder = Path(load_experiment(arguments).model_dir if arguments.run is None else arguments.run)
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
        start_processes(arguments)
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
        with_workspace(_vocab),
    ),
    "pretrain": Verb(
        "trains the BC policy (G=0 I=0)",
        "RUN/vocab, RUN/data",
        "RUN/policy/bc",
        with_workspace(_pretrain),
    ),
    "reward_model": Verb(
        "rates translations and trains the reward model",
        "RUN/data, RUN/policy/bc, a ratings file if one is set",
        "RUN/reward",
        with_workspace(_reward_model),
    ),
    "grow": Verb(
        "samples N translations of each source from the latest policy",
        "RUN/data, RUN/policy",
        "RUN/grow/gG",
        with_workspace(_grow, takes_shard=True),
        flags.grow,
    ),
    "annotate": Verb(
        "scores the samples of a Grow step with the reward",
        "RUN/grow/gG, RUN/reward",
        "RUN/grow/gG/rewards",
        with_workspace(_annotate, takes_shard=True),
        flags.grow,
    ),
    "value": Verb(
        "trains the value function that V-MPO, BVMPO and OAC read, on a Grow set",
        "RUN/grow/gG, RUN/policy",
        "RUN/value/gG",
        with_workspace(_value),
        flags.grow,
    ),
    "improve": Verb(
        "filters, and fine-tunes on what is left",
        "RUN/grow/gG, RUN/policy",
        "RUN/policy/gG_iI",
        with_workspace(_improve),
        flags.improve,
    ),
    "ppo": Verb(
        "trains the baseline of online RL, PPO from the BC policy",
        "RUN/data, RUN/policy/bc, RUN/reward",
        "RUN/policy/ppo",
        with_workspace(_ppo),
    ),
    "evaluate": Verb(
        "measures a policy: mean reward, BLEU and chrF with intervals",
        "RUN/data, RUN/policy, RUN/reward",
        "RUN/eval",
        with_workspace(_evaluate),
        flags.policy,
    ),
    "sample": Verb(
        "samples any policy on an evaluation split, with rewards beside the samples",
        "RUN/data, RUN/policy, RUN/reward",
        "RUN/samples",
        with_workspace(_sample, takes_shard=True),
        flags.policy,
    ),
    "best_of_n": Verb(
        "measures what choosing among n samples gains: by the reward, and by agreement (MBR)",
        "RUN/samples, which it makes where they are missing",
        "RUN/best_of_n",
        with_workspace(_best_of_n),
        flags.policy,
    ),
    "rest": Verb(
        "does all of the above: Algorithm 1 with G Grow and I Improve steps, PPO if set, then the report",
        "the corpus",
        "the whole of RUN",
        with_workspace(_rest),
    ),
    "report": Verb(
        "draws the report of a run",
        "RUN",
        "RUN/report/index.html, RUN/report/summary.json",
        _report,
        flags.report,
    ),
    "compare": Verb(
        "puts the policies of several runs side by side, and says which of the paper's orderings hold",
        "RUN/eval of each run",
        "comparison.md and comparison.json in the folder that --output names",
        _compare,
        flags.compare,
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
        with_workspace(_translate),
        flags.translate,
    ),
    "export": Verb(
        "writes a policy as a Hugging Face T5 checkpoint",
        "RUN/vocab, RUN/policy",
        "a folder that transformers loads",
        with_workspace(_export),
        flags.export,
    ),
    "import": Verb(
        "takes a Hugging Face or T5X checkpoint as the BC policy of a run",
        "a Hugging Face or T5X folder",
        "RUN/policy/bc",
        with_workspace(_import),
        flags.import_,
    ),
    "doctor": Verb("says what was found here and what is missing", "this machine", "nothing", _doctor),
}
