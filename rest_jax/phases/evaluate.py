"""The evaluate phase: what a policy is worth on held-out text.

Floor 6. The paper's metric is the mean reward of samples (section 4). Beside it stand the reward of
greedy output, BLEU and chrF with signatures, and signs of reward hacking, each number with its interval.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rest_jax import files, keys, processes
from rest_jax.generation.translator import Translations
from rest_jax.metrics import bootstrap, corpus, diagnostics
from rest_jax.phases import reward_model
from rest_jax.phases.lineage import BC, PolicyName
from rest_jax.phases.texts import decode_rows, repeat_each
from rest_jax.phases.workspace import Workspace
from rest_jax.rewards.protocol import Reward, checked_scores
from rest_jax.types import Examples

RESULT_NAME = "result.json"
SOURCE_REWARDS_NAME = "source_rewards.npy"


def evaluate(workspace: Workspace, name: PolicyName) -> None:
    """Measures a policy into `eval/NAME/result.json`.

    Beside it stands the mean reward of the samples of each source, float64 [sources], NaN where there is
    none: policies of different runs can be compared source by source.
    """
    experiment = workspace.experiment
    workspace.run_step(
        workspace.evaluation_folder(name),
        "evaluate",
        {
            "evaluation": experiment.evaluation,
            "decoding": experiment.decoding,
            "policy": workspace.digest(workspace.policy_folder(name), name.phase),
            "reward": reward_model.reward_digest(workspace),
            "data": workspace.digest(workspace.text_folder, "vocab"),
        },
        lambda: _measure(workspace, name),
    )


def _measure(workspace: Workspace, name: PolicyName) -> Mapping[str, Any]:
    experiment, settings = workspace.experiment, workspace.experiment.evaluation
    examples = workspace.split(settings.split)
    examples = examples.take(np.arange(len(examples))[: settings.sources])
    translator = workspace.translator(workspace.policy_params(name))
    sources = examples.tokens.sources
    with workspace.logbook.progress(f"sampling for {name.folder}", len(examples), unit="sources") as bar:
        sampled = translator.sample(
            sources,
            examples.ids,
            settings.samples_per_source,
            keys.stream_key(experiment.seed, keys.Stream.EVALUATE),
            settings.sampling,
            progress=bar.advance,
        )
    with workspace.logbook.progress(f"greedy search for {name.folder}", len(examples), unit="sources") as bar:
        greedy = translator.greedy(sources, settings.sampling.max_length, progress=bar.advance)
    result, source_rewards = _describe(workspace, name, examples, sampled, greedy)
    if settings.beam is not None:
        beam = translator.beam(sources, settings.beam)
        best = decode_rows(workspace.vocabulary, beam.tokens)[:: settings.beam.beam_size]
        found = _corpus_metrics(workspace, best, examples.targets)
        result |= {"bleu_beam": found["bleu"], "chrf_beam": found["chrf"]}
    if processes.is_lead():
        path = workspace.evaluation_folder(name) / SOURCE_REWARDS_NAME
        with files.atomic_path(path) as temporary, open(temporary, "wb") as handle:
            np.save(handle, source_rewards, allow_pickle=False)
        files.write_json(workspace.evaluation_folder(name) / RESULT_NAME, result)
    means = {key: round(result[key]["mean"], 4) for key in ("reward", "bleu", "chrf")}
    workspace.logbook.say(f"{result['name']}: " + ", ".join(f"{k} {v}" for k, v in means.items()))
    return means


def _describe(
    workspace: Workspace, name: PolicyName, examples: Examples, sampled: Translations, greedy: Translations
) -> tuple[dict[str, Any], np.ndarray]:
    """What is written of a policy, and the mean reward of each source's samples, float64 [sources]."""
    settings, seed = workspace.experiment.evaluation, workspace.experiment.seed
    times = settings.samples_per_source
    texts, greedy_texts = (
        decode_rows(workspace.vocabulary, sampled.tokens),
        decode_rows(workspace.vocabulary, greedy.tokens),
    )
    reward = reward_model.load_reward(workspace)
    sources_N, targets_N = repeat_each(examples.sources, times), repeat_each(examples.targets, times)
    groups = np.repeat(examples.ids, times)
    rewards = checked_scores(reward, sources_N, texts, targets_N)
    greedy_rewards = checked_scores(reward, examples.sources, greedy_texts, examples.targets)

    def mean(values: np.ndarray, by: np.ndarray) -> dict[str, Any]:
        return bootstrap.mean_interval(values, seed, settings.resamples, by, reward.signature())

    of_greedy = _corpus_metrics(workspace, greedy_texts, examples.targets)
    of_samples = _corpus_metrics(workspace, texts, targets_N, groups)
    result = {
        "name": name.title(workspace.experiment.improve.loss.name),
        **_origin(workspace, name),
        "split": settings.split,
        "sources": len(examples),
        "samples_per_source": times,
        "reward": mean(rewards, groups),
        "reward_greedy": mean(greedy_rewards, examples.ids),
        "bleu": of_greedy["bleu"],
        "chrf": of_greedy["chrf"],
        "bleu_samples": of_samples["bleu"],
        "chrf_samples": of_samples["chrf"],
        "diagnostics": diagnostics.diagnostics(texts, targets_N, sources_N, ~sampled.finished.reshape(-1)),
        "examples": _examples(settings.examples, examples, greedy_texts, greedy_rewards, texts, rewards),
    }
    return result, _source_means(rewards.reshape(len(examples), times))


def _source_means(rewards_SxN: np.ndarray) -> np.ndarray:
    present_SxN = np.isfinite(rewards_SxN)
    counts_S = present_SxN.sum(axis=1)
    sums_S = np.where(present_SxN, rewards_SxN, 0.0).sum(axis=1)
    return np.where(counts_S > 0, sums_S / np.maximum(counts_S, 1), np.nan)


def _corpus_metrics(
    workspace: Workspace, texts: Sequence[str], references: Sequence[str], groups: np.ndarray | None = None
) -> dict[str, dict[str, Any]]:
    experiment = workspace.experiment
    return corpus.corpus_metrics(
        texts,
        references,
        experiment.corpus.target_language,
        experiment.seed,
        experiment.evaluation.resamples,
        groups,
    )


def _origin(workspace: Workspace, name: PolicyName) -> dict[str, Any]:
    """How the policy came to be: its steps, the filter of its Improve step, and how many samples it took."""
    origin: dict[str, Any] = {
        "policy": name.folder,
        "grow": name.grow,
        "improve": name.improve,
        "loss": name.loss(workspace.experiment.improve.loss.name),
        "selection": None,
        "selection_value": None,
        "threshold": None,
        "threshold_quantile": None,
        "kept": None,
        "samples": None,
    }
    if name != BC:
        path = workspace.policy_folder(name) / f"{name.phase}.json"
        story = json.loads(path.read_text(encoding="utf-8"))
        kept = ("selection", "selection_value", "threshold", "threshold_quantile", "kept", "samples")
        origin |= {key: story.get(key) for key in kept}
    return origin


def _examples(
    number: int,
    examples: Examples,
    greedy_texts: list[str],
    greedy_rewards: np.ndarray,
    texts: list[str],
    rewards: np.ndarray,
) -> list[dict[str, Any]]:
    """A few sources, evenly spread over the split, with their outputs, best sample first."""
    times = len(texts) // len(examples)
    shown = []
    for row in np.linspace(0, len(examples) - 1, min(number, len(examples))).astype(int):
        rows = np.arange(row * times, (row + 1) * times)
        ranked = rows[np.argsort(-rewards[rows], kind="stable")]  # a missing reward (NaN) comes last
        shown.append(
            {
                "id": int(examples.ids[row]),
                "source": examples.sources[row],
                "reference": examples.targets[row],
                "greedy": greedy_texts[row],
                "greedy_reward": _number(greedy_rewards[row]),
                "samples": [{"text": texts[k], "reward": _number(rewards[k])} for k in ranked],
            }
        )
    return shown


def _number(value: float) -> float | None:
    """A reward as JSON can hold it: None where it is missing."""
    return float(value) if np.isfinite(value) else None


def mean_reward(
    workspace: Workspace, reward: Reward, examples: Examples, translations: Translations
) -> float:
    """Mean reward over all samples of all examples; a missing reward is left out."""
    times = translations.num_samples
    rewards = checked_scores(
        reward,
        repeat_each(examples.sources, times),
        decode_rows(workspace.vocabulary, translations.tokens),
        repeat_each(examples.targets, times),
    )
    return float(np.nanmean(rewards))
