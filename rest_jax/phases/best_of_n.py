"""The best_of_n phase: what choosing among n samples of a policy gains (section 4, Figure 6).

Floor 6. A sample is chosen by a reward (best-of-n) or by agreement with the others (MBR decoding). What is
chosen by a metric and reported in the same metric is circular: it rises with n whatever the translations are
worth. So each choice is reported in all metrics: the run's reward and those against the references.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from rest_jax import files, processes
from rest_jax.data.candidates import CandidateReader
from rest_jax.metrics import best_of_n as estimator
from rest_jax.metrics import bootstrap, corpus, mbr, pairwise
from rest_jax.phases import reward_model, sample
from rest_jax.phases.lineage import PolicyName
from rest_jax.phases.sampling import policy_digest
from rest_jax.phases.workspace import Workspace
from rest_jax.rewards.protocol import checked_scores
from rest_jax.types import Examples

RESULT_NAME = "result.json"
REWARD = "reward"  # the name of the run's own reward, whatever its kind


def best_of_n(workspace: Workspace, name: PolicyName) -> dict[str, Any]:
    """Makes the samples where they are missing, then `best_of_n/POLICY_SPLIT/result.json`, which it returns.

    Args:
      workspace: the run.
      name: the policy.
    """
    sample.sample(workspace, name)
    folder, experiment = workspace.best_of_n_folder(name), workspace.experiment
    settings, samples = experiment.best_of_n, workspace.sample_folder(name)
    kinds = sample.reward_kinds(workspace)
    identity = {
        "counts": settings.numbers,
        "select_by": settings.select_by,
        "report_on": settings.report_on,
        "mbr": settings.mbr,
        "choose_truncated": settings.choose_truncated,
        "resamples": settings.resamples,
        "target_language": experiment.corpus.target_language,
        "policy": policy_digest(workspace, name),
        "samples": workspace.digest(samples, "sample"),
        "rewards": {kind: workspace.digest(samples / "rewards" / kind, "sample") for kind in kinds},
    }
    workspace.run_step(folder, "best_of_n", identity, lambda: _measure(workspace, name))
    return files.read_json(folder / RESULT_NAME)


@dataclasses.dataclass(frozen=True)
class _Source:
    """The samples of a source: texts [N], rewards by metric float64 [N], bool [N] which may be chosen."""

    target: str
    texts: Sequence[str]
    rewards: Mapping[str, np.ndarray]
    eligible_N: np.ndarray


@dataclasses.dataclass(frozen=True)
class _Choice:
    """A way to choose, and what it has chosen so far.

    Attributes:
      method: "best_of_n" or "mbr".
      by: the reward or the utility that chooses.
      values: (n, metric) -> one expected value a source.
      texts: n -> what is chosen from the first n samples, one a source.
    """

    method: str
    by: str
    values: dict[tuple[int, str], list[float]]
    texts: dict[int, list[str]]

    def add(self, numbers: Sequence[int], values: Mapping[str, np.ndarray], texts: Sequence[str]) -> None:
        """Adds a source: values float64 [numbers] of each metric, a text for each number."""
        for row, n in enumerate(numbers):
            self.texts.setdefault(n, []).append(texts[row])
            for metric, found in values.items():
                self.values.setdefault((n, metric), []).append(float(found[row]))


def _measure(workspace: Workspace, name: PolicyName) -> Mapping[str, Any]:
    settings = workspace.experiment.best_of_n
    utilities: dict[str, pairwise.Utility] = {by: _utility(workspace, by) for by in settings.mbr}
    best = [_Choice("best_of_n", by, {}, {}) for by in settings.select_by]
    agreeing = [_Choice("mbr", by, {}, {}) for by in settings.mbr]
    examples = sample.sampled_examples(workspace)
    targets, different, cut = [], 0, 0
    with workspace.logbook.progress(f"best of n, {name.folder}", len(examples), unit="sources") as bar:
        for source in _sources(workspace, name, examples):
            texts, numbers_N = mbr.distinct(source.texts)
            for choice in best:
                _choose_best(choice, source, settings.numbers)
            for choice in agreeing:
                matrix = utilities[choice.by].matrix(texts)
                _choose_by_agreement(choice, source, settings.numbers, matrix, numbers_N)
            targets.append(source.target)
            different, cut = different + len(texts), cut + int((~source.eligible_N).sum())
            bar.advance(1)
    choices = [*best, *agreeing]
    result = {
        **_origin(workspace, name, len(targets)),
        "distinct_per_source": different / len(targets),
        "not_eligible": cut,
        "references": {REWARD: _reward_of_references(workspace, examples)},
        "methods": [_described(workspace, choice, targets, utilities) for choice in choices],
    }
    if processes.is_lead():
        files.write_json(workspace.best_of_n_folder(name) / RESULT_NAME, result)
    first, last = (result["methods"][0]["rows"][row][REWARD]["mean"] for row in (0, -1))
    return {"sources": len(targets), "reward_of_first": first, "reward_of_last": last}


def _origin(workspace: Workspace, name: PolicyName, sources: int) -> dict[str, Any]:
    settings = workspace.experiment.best_of_n
    return {
        "name": name.title(workspace.experiment.improve.loss.name),
        "grow": name.grow,
        "improve": name.improve,
        "split": settings.split,
        "sources": sources,
        "samples_per_source": settings.samples_per_source,
        "temperature": settings.sampling.temperature,
        "choose_truncated": settings.choose_truncated,
        "reward_kind": workspace.experiment.reward.kind,
        "metrics": _metrics(workspace),
    }


def _metrics(workspace: Workspace) -> list[str]:
    """What is reported of each choice: the run's reward, then the held-out metrics."""
    return [REWARD, *dict.fromkeys(workspace.experiment.best_of_n.report_on)]


def _utility(workspace: Workspace, by: str) -> pairwise.Utility:
    if by == "chrf":
        return pairwise.PairwiseChrf()
    return pairwise.PairwiseBleu(workspace.experiment.corpus.target_language)


def _sources(workspace: Workspace, name: PolicyName, examples: Examples) -> Iterator[_Source]:
    """The samples source by source, sorted by id."""
    settings, own = workspace.experiment.best_of_n, workspace.experiment.reward.kind
    kinds = sample.reward_kinds(workspace)
    reader = CandidateReader(workspace.sample_folder(name), kinds)
    targets = dict(zip(examples.ids.tolist(), examples.targets, strict=True))
    for batch in reader.batches(("text", "truncated"), whole=True):
        ids, texts = batch.example_id, batch.table["text"].to_pylist()
        eligible = ~batch.samples().truncated | settings.choose_truncated
        columns = {REWARD: batch.rewards[own], **{kind: batch.rewards[kind] for kind in kinds}}
        starts = np.flatnonzero(np.diff(ids, prepend=ids[:1] - 1))
        for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
            rows = slice(start, end)
            rewards = {kind: values[rows] for kind, values in columns.items()}
            yield _Source(targets[int(ids[start])], texts[rows], rewards, eligible[rows])


def _choose_best(choice: _Choice, source: _Source, numbers: Sequence[int]) -> None:
    by_N = source.rewards[choice.by]
    weights_KxN = estimator.selection_weights(by_N, numbers, source.eligible_N)
    values = {
        metric: estimator.expected_value(weights_KxN, found) for metric, found in source.rewards.items()
    }
    firsts = [estimator.best_of_first(by_N, n, source.eligible_N) for n in numbers]
    choice.add(numbers, values, [source.texts[row] for row in firsts])


def _choose_by_agreement(
    choice: _Choice, source: _Source, numbers: Sequence[int], matrix: np.ndarray, numbers_N: np.ndarray
) -> None:
    chosen = [mbr.mbr_choices(matrix, numbers_N, n, source.eligible_N) for n in numbers]
    values = {
        metric: np.array([_mean_of_present(found[rows]) for rows in chosen])
        for metric, found in source.rewards.items()
    }
    choice.add(numbers, values, [source.texts[rows[0]] for rows in chosen])


def _mean_of_present(values: np.ndarray) -> float:
    present = values[~np.isnan(values)]
    return float(present.mean()) if len(present) else float("nan")


def _described(
    workspace: Workspace, choice: _Choice, targets: Sequence[str], utilities: Mapping[str, pairwise.Utility]
) -> dict[str, Any]:
    """A way to choose as JSON: a row for each n, each metric with its interval over sources."""
    experiment, settings = workspace.experiment, workspace.experiment.best_of_n
    signatures = {metric: _signature(workspace, metric) for metric in _metrics(workspace)}
    chooser = utilities[choice.by].signature() if choice.method == "mbr" else _signature(workspace, choice.by)
    rows = []
    for n in settings.numbers:
        row: dict[str, Any] = {"n": n}
        for metric, signature in signatures.items():
            values, seed = choice.values[n, metric], experiment.seed
            units = range(len(values))  # a value is a source's
            row[metric] = bootstrap.mean_interval(values, seed, settings.resamples, units, signature)
        language, chosen = experiment.corpus.target_language, choice.texts[n]
        found = corpus.corpus_metrics(chosen, targets, language, experiment.seed, settings.resamples)
        rows.append({**row, **{f"corpus_{metric}": value for metric, value in found.items()}})
    return {"method": choice.method, "by": choice.by, "signature": chooser, "rows": rows}


def _signature(workspace: Workspace, metric: str) -> str:
    return reward_model.load_reward(workspace, None if metric == REWARD else metric).signature()


def _reward_of_references(workspace: Workspace, examples: Examples) -> dict[str, Any]:
    """What the references of the same sources get: the paper's best-of-200 passes them."""
    reward, settings = reward_model.load_reward(workspace), workspace.experiment.best_of_n
    rewards = checked_scores(reward, examples.sources, examples.targets, examples.targets)
    seed = workspace.experiment.seed
    return bootstrap.mean_interval(rewards, seed, settings.resamples, examples.ids, reward.signature())
