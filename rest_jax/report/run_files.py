"""Reads what a run has written so far, and notes what it has not.

Floor 7. Only the evaluations are required; everything else may be missing in a run that is not finished.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rest_jax import errors, files

Json = dict[str, Any]
_IMPROVE_NAME = re.compile(r"g(\d+)_i(\d+)$")


@dataclasses.dataclass(frozen=True)
class Curve:
    """One metric of one phase over its training steps, in rising order of steps."""

    steps: list[int]
    values: list[float]


@dataclasses.dataclass(frozen=True)
class RunFiles:
    """The contents of a run folder that the report shows.

    Attributes:
      name: name of the run folder.
      evaluations: eval/*.json, the BC policy first, then by Grow and Improve step.
      grows: grow/*/summary.json by Grow step.
      validation: reward/model/validation.json, or None.
      curves: phase -> metric -> curve, from metrics.jsonl and, where that has no such metric, fit.json.
      fits: policy/*/fit.json and reward/model/fit.json by phase ("policy/bc").
      ledger: lines of ledger.jsonl, in order.
      config: text of config.gin, or "".
      missing: sentences that say what is not there and which phase writes it.
    """

    name: str
    evaluations: list[Json]
    grows: list[Json]
    validation: Json | None
    curves: dict[str, dict[str, Curve]]
    fits: dict[str, Json]
    ledger: list[Json]
    config: str
    missing: list[str]

    @property
    def baseline(self) -> Json | None:
        """Evaluation of the policy before any Improve step ("BC G=0 I=0"), or None."""
        return next((e for e in self.evaluations if e["grow"] == 0 and e["improve"] == 0), None)

    @property
    def last(self) -> Json:
        """Evaluation of the last step that there is."""
        return self.evaluations[-1]

    @property
    def facts(self) -> Json:
        """The facts of all ledger lines in one mapping; a later line wins."""
        return {key: value for line in self.ledger for key, value in (line.get("facts") or {}).items()}

    @property
    def seconds_by_phase(self) -> dict[str, float]:
        """Wall time of each phase, s, in order of first appearance in the ledger."""
        totals: dict[str, float] = {}
        for line in self.ledger:
            phase = str(line.get("phase") or line.get("step") or "?")
            totals[phase] = totals.get(phase, 0.0) + float(line.get("seconds") or 0.0)
        return totals


def read_run(run_dir: Path) -> RunFiles:
    """Reads a run folder.

    Raises:
      MissingInputError: there is no folder, or no evaluation in it.
      IntegrityError: a file is not JSON or lacks what every report needs.
    """
    run_dir = Path(run_dir)
    evaluations = _read_evaluations(run_dir)
    grows = [_finite(files.read_json(path)) for path in run_dir.glob("grow/*/summary.json")]
    grows.sort(key=lambda summary: summary["grow"])
    validation_path = run_dir / "reward/model/validation.json"
    validation = _finite(files.read_json(validation_path)) if validation_path.exists() else None
    fits = {
        path.parent.relative_to(run_dir).as_posix(): _finite(files.read_json(path))
        for path in sorted([*run_dir.glob("policy/*/fit.json"), *run_dir.glob("reward/*/fit.json")])
    }
    curves = _curves(_read_lines(run_dir / "metrics.jsonl"), fits)
    ledger = _read_lines(run_dir / "ledger.jsonl")
    config_path = run_dir / "config.gin"
    config = config_path.read_text(encoding="utf-8") if config_path.exists() else ""
    run = RunFiles(
        run_dir.resolve().name, evaluations, grows, validation, curves, fits, ledger, config, missing=[]
    )
    return dataclasses.replace(run, missing=_missing(run_dir, run))


def improve_of(name: str) -> tuple[int, int] | None:
    """(grow, improve) of a phase or policy called "…g1_i2", else None."""
    found = _IMPROVE_NAME.search(name)
    return (int(found[1]), int(found[2])) if found else None


def _read_evaluations(run_dir: Path) -> list[Json]:
    if not run_dir.is_dir():
        raise errors.MissingInputError(f"no run folder {run_dir}", remedy="Name the MODEL_DIR of a run")
    evaluations = []
    for path in sorted(run_dir.glob("eval/*.json")):
        evaluation = _finite(files.read_json(path))
        wanting = [key for key in ("name", "grow", "improve", "reward") if evaluation.get(key) is None]
        if wanting:
            raise errors.IntegrityError(
                f"{path} lacks {', '.join(wanting)}", remedy="Delete it and run evaluate again"
            )
        evaluations.append(evaluation)
    if not evaluations:
        raise errors.MissingInputError(
            f"no evaluation in {run_dir / 'eval'}", remedy="Run evaluate first: a report needs one at least"
        )
    return sorted(evaluations, key=lambda e: (e["grow"], e["improve"], e["name"]))


def _read_lines(path: Path) -> list[Json]:
    """Objects of a JSON-lines file; a last line torn by a kill is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            found.append(_finite(json.loads(line)))
        except ValueError as error:
            if number == len(lines):
                break
            raise errors.IntegrityError(
                f"line {number} of {path} is not JSON: {error}", remedy="Delete that line"
            ) from error
    return found


def _finite(value: Any) -> Any:
    """The same value with NaN and infinity as None: neither has a place in a table or in JSON."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _curves(lines: Iterable[Json], fits: Mapping[str, Json]) -> dict[str, dict[str, Curve]]:
    points: dict[str, dict[str, dict[int, float]]] = {}

    def add(phase: str, step: int, metrics: Mapping[str, Any]) -> None:
        for metric, value in metrics.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                # A step that a resumed run made again replaces its first trace.
                points.setdefault(phase, {}).setdefault(metric, {})[step] = float(value)

    for line in lines:
        add(str(line["phase"]), int(line["step"]), line.get("metrics") or {})
    for phase, fit in fits.items():
        logged = set(points.get(phase, {}))
        for row in fit.get("history") or []:
            add(phase, int(row["step"]), {k: v for k, v in row.items() if k != "step" and k not in logged})
    return {
        phase: {
            metric: Curve(steps=sorted(by_step), values=[by_step[step] for step in sorted(by_step)])
            for metric, by_step in metrics.items()
        }
        for phase, metrics in points.items()
    }


def _missing(run_dir: Path, run: RunFiles) -> list[str]:
    notes = []
    if run.baseline is None:
        notes.append("No evaluation of the BC policy (eval/bc.json): gains cannot be stated. Run evaluate on it.")
    evaluated = {(e["grow"], e["improve"]) for e in run.evaluations}
    for folder in sorted(run_dir.glob("policy/g*_i*")):
        step = improve_of(folder.name)
        if step is not None and step not in evaluated:
            notes.append(f"policy/{folder.name} is not evaluated yet: its row is missing. Run evaluate on it.")
    if all(e["grow"] == 0 for e in run.evaluations):
        notes.append("No Improve step is evaluated yet: the table has only the policy that ReST starts from.")
    if not run.grows:
        notes.append("No grow/*/summary.json: reward histograms, thresholds and samples are missing. Run grow and annotate.")
    if run.validation is None:
        notes.append("No reward/model/validation.json: how far the reward can be trusted is not shown. Run reward_model.")
    if not run.curves:
        notes.append("No metrics.jsonl: learning curves are missing.")
    if not run.ledger:
        notes.append("No ledger.jsonl: seed, versions, devices and wall times are not recorded.")
    return notes
