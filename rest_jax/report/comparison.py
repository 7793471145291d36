"""Several runs side by side: one table of all their policies, and which of the paper's orderings hold.

Floor 7. Runs are comparable if their policies were measured on the same sources with the same reward; what is
not is refused, since a table of unlike numbers misleads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.table import Table

from rest_jax import errors, files
from rest_jax.report import numbers, orderings
from rest_jax.report.run_files import Json, RunFiles, is_rival, read_run
from rest_jax.report.summary import step_row, threshold_text

# The one thing in which the identities of two evaluations may differ.
_DIFFERS = "policy"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Policies of several runs that were measured alike.

    Attributes:
      rows: one a policy, as in summary.json, with "run", "sampled" (translations that were sampled in
        training it, None where its run does not say) and "difference" (of its mean reward from BC's, source
        by source).
      findings: the paper's orderings among them.
    """

    rows: list[Json]
    findings: list[orderings.Finding]


def compare(run_dirs: Sequence[Path]) -> Comparison:
    """Reads the evaluations of all runs; a policy that several runs share is listed once.

    Where runs have different policies of one name, the later ones have their run's name behind it, and are
    not among those that the paper's orderings speak of.

    Raises:
      MissingInputError: a folder is no run, or has no evaluation, or one of an older version.
      DataError: two runs were measured differently.
    """
    rows: list[Json] = []
    source_rewards: dict[str, np.ndarray] = {}
    seals: dict[str, str] = {}
    first: tuple[Path, Json] | None = None
    for run_dir in run_dirs:
        run = read_run(run_dir)
        for evaluation in run.evaluations:
            name, folder = str(evaluation["name"]), _evaluation_folder(run_dir, evaluation)
            seal = files.verify_seal(folder)
            if seals.get(name) == seal.digest:
                continue
            if name in seals:  # another policy that the paper would give the same name
                name = f"{name} ({run.name})"
            first = _check_alike(first, folder)
            row = {**step_row(evaluation), "name": name, "run": run.name}
            rows.append({**row, "sampled": _sampled(run, evaluation)})
            seals[name] = seal.digest
            source_rewards[name] = _source_rewards(folder)
    baseline = next((row["name"] for row in rows if row["grow"] == 0 and not is_rival(row)), None)
    for row in rows:
        row["difference"] = None
        if baseline is not None and row["name"] != baseline:
            (found,) = orderings.check([orderings.Ordering(row["name"], baseline, "")], source_rewards)
            row["difference"] = {"mean": found.difference, "ci95": found.ci95}
    wanted = orderings.paper_orderings([row["name"] for row in rows])
    return Comparison(rows, orderings.check(wanted, source_rewards))


def _evaluation_folder(run_dir: Path, evaluation: Json) -> Path:
    return Path(run_dir) / "eval" / str(evaluation["policy"])


def _source_rewards(folder: Path) -> np.ndarray:
    path = folder / "source_rewards.npy"
    if not path.is_file():
        raise errors.MissingInputError(
            f"{folder} has no rewards by source: an older version measured it",
            remedy=f"Delete {folder} and run evaluate again",
        )
    return np.load(path, allow_pickle=False)


def _check_alike(first: tuple[Path, Json] | None, folder: Path) -> tuple[Path, Json]:
    """Compares what an evaluation depends on with that of the first one, and returns the first one."""
    identity = files.read_json(folder / files.IDENTITY_NAME)
    identity.pop(_DIFFERS)
    if first is None:
        return folder, identity
    unlike = sorted(
        key for key in first[1].keys() | identity.keys() if first[1].get(key) != identity.get(key)
    )
    if unlike:
        raise errors.DataError(
            f"{folder} was measured otherwise than {first[0]}; differing: {', '.join(unlike)}",
            remedy="Evaluate both with the same settings, data, seed and reward: start one with BASE_RUN",
        )
    return first


def _sampled(run: RunFiles, evaluation: Json) -> int | None:
    """Translations that were sampled until this policy was there: the sum over Grow steps, or PPO's own."""
    entries = {str(line.get("step")): line.get("facts") or {} for line in run.ledger}
    own = entries.get(f"policy/{evaluation['policy']}", {}).get("sampled")
    if own is not None:
        return int(own)
    grows = [entries.get(f"grow/g{g}", {}).get("rows") for g in range(1, int(evaluation["grow"]) + 1)]
    return None if None in grows else sum(int(rows) for rows in grows if rows is not None)


def write(comparison: Comparison, folder: Path) -> Path:
    """Writes comparison.json and comparison.md, and returns the path of the latter.

    Raises:
      OutputError: the folder cannot be written.
    """
    found = [dataclasses.asdict(finding) for finding in comparison.findings]
    files.write_json(folder / "comparison.json", {"policies": comparison.rows, "orderings": found})
    path = folder / "comparison.md"
    files.write_text(path, markdown(comparison))
    return path


HEADINGS = ("policy", "τ", "kept", "sampled", "reward ↑", "above BC", "BLEU ↑", "chrF ↑")


def cells(row: Json) -> tuple[str, ...]:
    """A row of the table as text."""
    return (
        str(row["name"]),
        threshold_text(row),
        numbers.count(row.get("kept")),
        numbers.count(row.get("sampled")),
        numbers.estimate(row["reward"]),
        numbers.estimate(row["difference"]) if row["difference"] else numbers.ABSENT,
        numbers.estimate(row.get("bleu"), 1),
        numbers.estimate(row.get("chrf"), 1),
    )


def said(finding: orderings.Finding) -> tuple[str, ...]:
    """An ordering and what became of it as text."""
    ordering = finding.ordering
    difference = {"mean": finding.difference, "ci95": finding.ci95}
    claim = f"{ordering.better} > {ordering.worse}"
    return (claim, ordering.source, finding.outcome, numbers.estimate(difference))


def markdown(comparison: Comparison) -> str:
    """Both tables as Markdown."""
    lines = [_line(HEADINGS), _line(["---"] + ["---:"] * (len(HEADINGS) - 1))]
    lines += [_line(cells(row)) for row in comparison.rows]
    lines += ["", _line(("the paper has", "where", "here it", "difference")), _line(["---"] * 4)]
    lines += [_line(said(finding)) for finding in comparison.findings]
    return "\n".join(lines) + "\n"


def _line(entries: Sequence[str]) -> str:
    return "| " + " | ".join(entries) + " |"


def tables(comparison: Comparison) -> list[Table]:
    """Both tables for a terminal."""
    policies = Table(title="policies", title_justify="left")
    policies.add_column(HEADINGS[0], no_wrap=True)
    for heading in HEADINGS[1:]:
        policies.add_column(heading, justify="right")
    for row in comparison.rows:
        policies.add_row(*cells(row))
    found = Table(title="the paper's orderings by mean reward, source by source", title_justify="left")
    for heading in ("the paper has", "where", "here it", "difference"):
        found.add_column(heading, no_wrap=True)
    for finding in comparison.findings:
        found.add_row(*said(finding))
    return [policies, found]
