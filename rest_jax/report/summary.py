"""The run in numbers: one row a step, the verdict against BC, and where reward and overlap diverge.

Floor 7. What is said here goes into summary.json, the terminal's table and the page alike.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from rest_jax.report import numbers
from rest_jax.report.run_files import ESTIMATES, Json, RunFiles, read_run

OVERLAP = {"bleu": "BLEU", "chrf": "chrF"}
_PLAIN = (
    "name", "grow", "improve", "loss", "selection", "selection_value",
    "threshold", "threshold_quantile", "kept", "samples",
    "split", "sources", "samples_per_source", "seconds",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Verdict:
    """How the last step's mean reward stands to BC's.

    Attributes:
      step: name of the last step, or None where there is nothing to compare.
      disjoint: whether the two 95 % intervals share no value.
      gain: difference of the means, last step minus BC.
      sentence: the same in words.
    """

    step: str | None
    disjoint: bool | None
    gain: float | None
    sentence: str


@dataclasses.dataclass(frozen=True)
class Divergence:
    """A step whose reward is above BC's while an overlap metric is below BC's interval."""

    step: str
    metrics: tuple[str, ...]


def step_row(evaluation: Mapping[str, Any]) -> Json:
    """A row of summary.json: every key is there, None where the run does not say."""
    row: Json = {key: evaluation.get(key) for key in _PLAIN}
    row |= {key: evaluation.get(key) for key in ESTIMATES}
    row["diagnostics"] = evaluation.get("diagnostics") or {}
    return row


def summarise(run: RunFiles) -> Json:
    """The content of summary.json."""
    verdict = compare_with_baseline(run)
    return {
        "run": run.name,
        "corpus": run.corpus.get("__class__"),
        "source_language": run.languages[0],
        "target_language": run.languages[1],
        "pairs": run.pairs,
        "seed": run.seed,
        "versions": run.versions,
        "mesh": run.mesh,
        "seconds": {phase: round(seconds, 3) for phase, seconds in run.seconds_by_phase.items()},
        "verdict": dataclasses.asdict(verdict),
        "reward_and_overlap_diverge": [
            {"step": divergence.step, "metrics": list(divergence.metrics)} for divergence in divergences(run)
        ],
        "best_of_n": run.best_of_n,
        "missing": run.missing,
        "steps": [step_row(evaluation) for evaluation in run.evaluations],
    }


def compare_with_baseline(run: RunFiles) -> Verdict:
    """Whether the last step's reward interval is disjoint from BC's, and on which side it lies."""
    last, baseline = run.last, run.baseline
    if baseline is None:
        return Verdict(None, None, None, "There is no evaluation of the BC policy to compare with.")
    if last is baseline:
        return Verdict(None, None, None, "Only the BC policy is evaluated so far.")
    gain = last["reward"]["mean"] - baseline["reward"]["mean"]
    last_mean, baseline_mean = numbers.estimate(last["reward"]), numbers.estimate(baseline["reward"])
    facing = f"{last['name']} has a mean reward of {last_mean}, {baseline['name']} one of {baseline_mean}"
    if not numbers.interval(last["reward"]) or not numbers.interval(baseline["reward"]):
        return Verdict(
            last["name"], None, gain, f"{facing}: without intervals, noise cannot be told from gain."
        )
    low, high = last["reward"]["ci95"]
    base_low, base_high = baseline["reward"]["ci95"]
    if low > base_high:
        outcome = "the 95 % intervals are disjoint, the reward has risen"
    elif high < base_low:
        outcome = "the 95 % intervals are disjoint, the reward has fallen"
    else:
        outcome = "the 95 % intervals overlap, so no gain is shown"
    return Verdict(last["name"], low > base_high or high < base_low, gain, f"{facing}: {outcome}.")


def divergences(run: RunFiles) -> list[Divergence]:
    """Steps at which reward and overlap with the references diverge: the mark of over-optimisation."""
    baseline = run.baseline
    if baseline is None:
        return []
    found = []
    for evaluation in run.evaluations:
        if evaluation["reward"]["mean"] <= baseline["reward"]["mean"]:
            continue
        fallen = tuple(key for key in OVERLAP if below_interval(evaluation.get(key), baseline.get(key)))
        if fallen:
            found.append(Divergence(evaluation["name"], fallen))
    return found


def below_interval(estimate: Mapping[str, Any] | None, baseline: Mapping[str, Any] | None) -> bool:
    """Whether an estimate's mean lies below the 95 % interval of the baseline's."""
    if not estimate or not baseline or not numbers.interval(baseline):
        return False
    return bool(estimate["mean"] < baseline["ci95"][0])


def divergence_sentence(run: RunFiles) -> str:
    """The over-optimisation check in words."""
    if run.baseline is None or len(run.evaluations) < 2:
        return "With a single policy evaluated, or without BC, reward and overlap cannot be compared."
    if not any(run.baseline.get(key) for key in OVERLAP):
        return "BLEU and chrF of the BC policy are not recorded, so over-optimisation cannot be checked."
    found = divergences(run)
    if not found:
        return "At no step does the reward rise while BLEU or chrF falls below the 95 % interval of BC's."
    said = "; ".join(f"{p.step} ({' and '.join(OVERLAP[key] for key in p.metrics)})" for p in found)
    return (
        "Reward and overlap diverge: the reward is above BC's while the overlap is below BC's 95 % "
        f"interval at {said}. Read the samples of these steps before trusting their reward."
    )


def threshold_text(row: Mapping[str, Any]) -> str:
    """The filter of a step: τ with the quantile of D_g that it was taken from, or what is asked a source."""
    if row.get("threshold") is None:
        return numbers.source_filter(row.get("selection"), row.get("selection_value"))
    quantile = row.get("threshold_quantile")
    return numbers.number(row["threshold"]) + (f" (q {quantile:g})" if quantile is not None else "")


def steps_table(run_dir: Path) -> Table:
    """The table of steps for a terminal; its caption compares the last step with BC.

    Raises:
      MissingInputError: there is no evaluation in the run folder.
      IntegrityError: a file of the run is damaged.
    """
    run = read_run(Path(run_dir))
    table = Table(title=f"ReST steps of {run.name}", title_justify="left", caption_justify="left")
    table.add_column("step", no_wrap=True)
    for heading in ("τ", "kept", "reward ↑", "BLEU ↑", "chrF ↑"):
        table.add_column(heading, justify="right")
    for evaluation in run.evaluations:
        table.add_row(
            str(evaluation["name"]),
            threshold_text(evaluation),
            numbers.count(evaluation.get("kept")),
            numbers.estimate(evaluation["reward"]),
            numbers.estimate(evaluation.get("bleu"), 1),
            numbers.estimate(evaluation.get("chrf"), 1),
        )
    lines = [compare_with_baseline(run).sentence]
    if run.baseline is not None and len(run.evaluations) > 1:
        lines.append(divergence_sentence(run))
    table.caption = "\n".join(lines)
    return table
