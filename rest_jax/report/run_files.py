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
from rest_jax.training import logbook

Json = dict[str, Any]
ESTIMATES = ("reward", "bleu", "chrf", "reward_greedy", "bleu_samples", "chrf_samples")
RIVALS = ("PPO",)  # losses of what ReST is compared with, as evaluations name them
_IMPROVE_NAME = re.compile(r"g(\d+)_i(\d+)$")
_MESH_BINDING = re.compile(r"^MeshConfig\.(\w+) = (.+)$", re.MULTILINE)


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
      evaluations: eval/*.json, the BC policy first, then by Grow and Improve step, what ReST is compared with
        last.
      grows: grow/*/summary.json by Grow step, with the thresholds of its Improve steps.
      validation: reward/model/validation.json, or None.
      curves: phase -> metric -> curve, from metrics.jsonl or, where that has nothing of a phase, fit.json.
      fits: fit.json of the policies, the reward model and value functions by phase ("policy/bc").
      ledger: lines of ledger.jsonl, in order.
      corpus: settings of the corpus with "__class__", from the identity of the data folder, or {}.
      seed: of the run, or None.
      mesh: its axes from config.gin, or {}; -1 stands for "what is left".
      config: text of config.gin, or "".
      best_of_n: best_of_n/*/result.json, the BC policy first, then by Grow and Improve step.
      missing: sentences that say what is not there and which phase writes it.
    """

    name: str
    evaluations: list[Json]
    grows: list[Json]
    validation: Json | None
    curves: dict[str, dict[str, Curve]]
    fits: dict[str, Json]
    ledger: list[Json]
    corpus: Json
    seed: int | None
    mesh: dict[str, str]
    config: str
    best_of_n: list[Json]
    missing: list[str]

    @property
    def baseline(self) -> Json | None:
        """Evaluation of the policy before any Improve step ("BC G=0 I=0"), or None."""
        return next((e for e in self.evaluations if e["grow"] == 0 and not is_rival(e)), None)

    @property
    def last(self) -> Json:
        """Evaluation of ReST's last step that there is; of what it is compared with if that is all."""
        steps = [e for e in self.evaluations if not is_rival(e)]
        return (steps if any(e["grow"] for e in steps) else self.evaluations)[-1]

    @property
    def versions(self) -> Json:
        """Versions and device as the last sealed step recorded them."""
        return next((v for v in (_facts(line).get("versions") for line in reversed(self.ledger)) if v), {})

    @property
    def languages(self) -> tuple[str | None, str | None]:
        """Codes of the source and the target language, None where they are not recorded."""
        return self.corpus.get("source_language"), self.corpus.get("target_language")

    @property
    def pairs(self) -> dict[str, int]:
        """Sentence pairs of each split, from the ledger's line of the data."""
        return {
            split: found["pairs"]
            for line in self.ledger
            for split, found in _facts(line).items()
            if isinstance(found, dict) and "pairs" in found
        }

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
    validation_path = run_dir / "reward/model/validation.json"
    config_path = run_dir / "config.gin"
    config = config_path.read_text(encoding="utf-8") if config_path.exists() else ""
    fits = {
        path.parent.relative_to(run_dir).as_posix(): _read(path)
        for kind in ("policy", "reward", "value")
        for path in sorted(run_dir.glob(f"{kind}/*/fit.json"))
    }
    identities = [_read(path) for path in sorted(run_dir.glob(f"*/{files.IDENTITY_NAME}"))]
    run = RunFiles(
        name=run_dir.resolve().name,
        evaluations=_read_evaluations(run_dir),
        grows=_read_grows(run_dir),
        validation=_read(validation_path) if validation_path.exists() else None,
        curves=_curves(logbook.read_metrics(run_dir), fits),
        fits=fits,
        ledger=_read_ledger(run_dir / "ledger.jsonl"),
        corpus=next((i["corpus"] for i in identities if isinstance(i.get("corpus"), dict)), {}),
        seed=next((i["seed"] for i in identities if "seed" in i), None),
        mesh={axis: _resolved(value, config) for axis, value in _MESH_BINDING.findall(config)},
        config=config,
        best_of_n=_read_best_of_n(run_dir),
        missing=[],
    )
    return dataclasses.replace(run, missing=_missing(run_dir, run))


def _resolved(value: str, config: str) -> str:
    """The value of a binding; where it is a macro, what the macro stands for."""
    if not value.startswith("%"):
        return value
    macro = re.search(rf"^{re.escape(value[1:])} = (.+)$", config, re.MULTILINE)
    return macro[1] if macro else value


def improve_of(name: str) -> tuple[int, int] | None:
    """(grow, improve) of a phase or policy called "…g1_i2", else None."""
    found = _IMPROVE_NAME.search(name)
    return (int(found[1]), int(found[2])) if found else None


def is_rival(evaluation: Mapping[str, Any]) -> bool:
    """Whether an evaluation is of a policy that ReST is compared with, and not one of its own."""
    return evaluation.get("loss") in RIVALS


def _read_evaluations(run_dir: Path) -> list[Json]:
    if not run_dir.is_dir():
        raise errors.MissingInputError(f"no run folder {run_dir}", remedy="Name the MODEL_DIR of a run")
    paths = [*run_dir.glob("eval/*.json"), *run_dir.glob("eval/*/result.json")]
    evaluations = []
    for path in sorted(paths):
        evaluation = _read(path)
        evaluation |= {key: _estimate(evaluation.get(key)) for key in ESTIMATES}
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
    return sorted(evaluations, key=lambda e: (is_rival(e), e["grow"], e["improve"], e["name"]))


def _read_best_of_n(run_dir: Path) -> list[Json]:
    found = [_read(path) for path in sorted(run_dir.glob("best_of_n/*/result.json"))]
    return sorted(found, key=lambda result: (result["grow"], result["improve"], result["split"]))


def _estimate(found: Json | None) -> Json | None:
    """An estimate with a mean; one without is None, and bounds that are not both numbers are left out."""
    if not found or found.get("mean") is None:
        return None
    bounds = found.get("ci95")
    return {**found, "ci95": bounds if bounds and None not in bounds else None}


def _read_grows(run_dir: Path) -> list[Json]:
    """Summaries by Grow step, wherever below the Grow's folder they lie."""
    found = (_read(path) for path in sorted(run_dir.glob("grow/**/summary.json")))
    by_grow = {int(summary["grow"]): summary for summary in found}
    for grow, summary in by_grow.items():
        summary["thresholds"] = summary.get("thresholds") or _thresholds(run_dir, grow)
    return [by_grow[grow] for grow in sorted(by_grow)]


def _thresholds(run_dir: Path, grow: int) -> list[Json]:
    """The thresholds of a Grow step from the stories of its Improve steps."""
    stories = []
    for path in run_dir.glob(f"policy/g{grow}_i*/improve.json"):
        step, story = improve_of(path.parent.name), _read(path)
        if step is not None:
            stories.append({**story, "improve": step[1], "quantile": story.get("threshold_quantile")})
    return sorted(stories, key=lambda story: story["improve"])


def _read_ledger(path: Path) -> list[Json]:
    if not path.exists():
        return []
    try:
        return [
            _finite(json.loads(line))
            for line in path.read_text(encoding="utf-8").splitlines()
            if line.strip()
        ]
    except ValueError as error:
        raise errors.IntegrityError(
            f"{path} has a line that is not JSON: {error}", remedy="Delete that line"
        ) from error


def _facts(line: Mapping[str, Any]) -> Json:
    return line.get("facts") or {}


def _read(path: Path) -> Any:
    return _finite(files.read_json(path))


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
            if isinstance(value, int | float) and math.isfinite(value):
                points.setdefault(phase, {}).setdefault(metric, {})[step] = float(value)

    for line in lines:
        add(str(line["phase"]), int(line["step"]), line.get("metrics") or {})
    for phase, fit in fits.items():
        if phase not in points:
            for row in fit.get("history") or []:
                add(phase, int(row["step"]), {key: value for key, value in row.items() if key != "step"})
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
        notes.append("No evaluation of the BC policy: gains cannot be stated. Run evaluate on it.")
    evaluated = {(e["grow"], e["improve"]) for e in run.evaluations}
    for folder in sorted(run_dir.glob("policy/g*_i*")):
        step = improve_of(folder.name)
        if step is not None and step not in evaluated:
            notes.append(
                f"policy/{folder.name} is not evaluated yet: its row is missing. Run evaluate on it."
            )
    if (run_dir / "policy" / "ppo").is_dir() and not any(is_rival(e) for e in run.evaluations):
        notes.append("policy/ppo is not evaluated yet: its row is missing. Run evaluate on it.")
    if all(e["grow"] == 0 for e in run.evaluations):
        notes.append("No Improve step is evaluated yet: the table has only the policy that ReST starts from.")
    if not run.grows:
        notes.append(
            "No grow/*/summary.json: reward histograms, thresholds and samples are missing. Run grow and "
            "annotate."
        )
    if run.validation is None:
        notes.append(
            "No reward/model/validation.json: the reward model is not trained yet, or the reward is a "
            "fixed metric."
        )
    if not run.curves:
        notes.append("No metrics.jsonl: learning curves are missing.")
    if not run.ledger:
        notes.append("No ledger.jsonl: seed, versions, devices and wall times are not recorded.")
    return notes
