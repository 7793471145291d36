"""What an Improve step trains on: the candidates of D_g ∪ D that pass its filter, in their shares.

Floor 6. Guards take samples out, the filter judges what is left together with the pairs of D, a cap bounds
what is kept of a source, and the two sides are brought to the wanted shares.
"""

from __future__ import annotations

import dataclasses
import fractions
from collections.abc import Mapping
from typing import Any

import numpy as np

from rest_jax import errors, keys
from rest_jax.data.whole_sources import concatenated
from rest_jax.objectives import filters, rules, statistics
from rest_jax.objectives.rules import Rule
from rest_jax.phases.grow_set import GrowSet, Sieve, open_grow_set
from rest_jax.phases.lineage import PolicyName
from rest_jax.phases.workspace import Workspace
from rest_jax.types import TokenPairs


@dataclasses.dataclass(frozen=True)
class Selected:
    """The training pairs of an Improve step: samples first, then pairs of D.

    Attributes:
      pairs: n pairs.
      rewards: float64 [n], R of each; NaN only for a pair of D that has none and was kept whole.
      is_sample: bool [n], whether the target was sampled; else the pair is of D.
      story: what was kept of what, for improve.json.
    """

    pairs: TokenPairs
    rewards: np.ndarray
    is_sample: np.ndarray
    story: Mapping[str, Any]


def select(workspace: Workspace, name: PolicyName) -> Selected:
    """Applies the filter of an Improve step.

    Raises:
      ConfigError: τ1 is not above the mean reward of the Grow set, where there is such a τ.
      DataError: nothing passes, or a side that `ImproveConfig.model_share` wants is empty.
    """
    settings = workspace.experiment.improve
    numbers = range(1, name.grow + 1) if settings.accumulate else [name.grow]
    grow_set = open_grow_set(workspace, *numbers)
    rule = rules.unfiltered() if name.improve == 0 else rule_of(workspace, grow_set, name)
    return survivors(workspace, grow_set, rule)


def earlier_rewards(workspace: Workspace, grow: int) -> dict[str, list[str]]:
    """Digests of the rewards of earlier Grow steps, where an Improve step depends on them."""
    if not workspace.experiment.improve.accumulate:
        return {}
    folders = [workspace.grow_rewards_folder(number) for number in range(1, grow)]
    return {"earlier_rewards": [workspace.digest(folder, "annotate") for folder in folders]}


def rule_of(workspace: Workspace, grow_set: GrowSet, name: PolicyName) -> Rule:
    """The filter of this step; τ of the first must exceed the mean reward of the Grow set (Algorithm 1)."""
    settings = workspace.experiment.improve
    usable = grow_set.usable_rewards(settings.guards, with_dataset=settings.dataset != "none")
    schedule = settings.selection_of(name.grow).rules(usable)
    if schedule[0].threshold is not None:
        seen = statistics.Summary()
        for rewards in usable:
            seen.add(rewards)
        try:
            filters.check_above_mean(schedule[0].threshold, seen.mean)
        except errors.ConfigError as error:
            if settings.require_above_mean:
                raise
            workspace.logbook.say(f"warning: {error}")
    return schedule[name.improve - 1]


def survivors(workspace: Workspace, grow_set: GrowSet, rule: Rule) -> Selected:
    """The pairs of D_g ∪ D that pass a rule, in the wanted shares, and the numbers to tell of it.

    Raises:
      DataError: nothing passes, or a side that `ImproveConfig.model_share` wants is empty.
    """
    experiment, settings = workspace.experiment, workspace.experiment.improve
    examples = workspace.split("train")
    # I=0 is all of D_g: neither a cap nor a share takes anything from it.
    whole = rule.kind == "unfiltered"
    max_per_source = None if whole else settings.max_per_source
    model_share = None if whole else settings.model_share
    sieve = Sieve(
        rule,
        settings.guards,
        max_per_source,
        keys.derived_seed(experiment.seed, "max_per_source"),
        dataset_competes=settings.dataset == "filtered",
    )
    found = grow_set.survivors(sieve, grow_set.reward_bands(settings.guards))
    kept_dataset = found.kept_dataset if settings.dataset != "whole" else np.ones(len(examples), bool)
    counts, of_dataset = found.counts, np.flatnonzero(kept_dataset)
    if not counts.kept and not len(of_dataset):
        with_dataset = settings.dataset == "filtered"
        raise filters.nothing_kept(grow_set.usable_rewards(settings.guards, with_dataset), rule)
    sources = examples.tokens.sources.take(grow_set.dataset.rows_of(found.example_ids))
    samples = TokenPairs(found.example_ids, sources, found.tokens)
    pairs = _joined(samples, examples.tokens.take(of_dataset))
    seed = keys.derived_seed(experiment.seed, "model_share", *grow_set.readers)
    rows = rows_in_shares(counts.kept, len(of_dataset), model_share, seed)
    is_sample = np.arange(len(pairs)) < counts.kept
    story = {
        "selection": rule.kind,
        "selection_value": rule.value,
        "threshold": rule.threshold,
        "threshold_quantile": rule.quantile,
        "kept": counts.kept + len(of_dataset),
        **counts.facts(),
        "dataset": len(examples),
        "kept_dataset": len(of_dataset),
        "guarded": dict(found.guarded),
        "truncated_left_out": found.guarded.get("truncated", 0),
        "grow_steps": list(grow_set.readers),
        "max_per_source": max_per_source,
        "model_share": model_share,
        "pairs": len(rows),
        "pairs_of_samples": int(is_sample[rows].sum()),
    }
    rewards = np.concatenate([found.rewards, grow_set.dataset.rewards[of_dataset]])
    return Selected(pairs.take(rows), rewards[rows], is_sample[rows], story)


def rows_in_shares(samples: int, dataset: int, model_share: float | None, seed: int) -> np.ndarray:
    """The rows of the union, samples first, that bring samples to their share λ: int64 [n].

    The side that has more than its share is kept whole. Of the other all are repeated as often as they fit,
    and a remainder is drawn without replacement; so no pair is lost.

    Args:
      samples: how many samples there are, rows 0, 1, …
      dataset: how many pairs of D there are, the rows after them.
      model_share: λ in [0, 1]; None takes each row once, and 0 or 1 drop one side.
      seed: of the remainder.

    Raises:
      DataError: a side that is wanted is empty.
    """
    if model_share is None:
        return np.arange(samples + dataset)
    for side, number, wanted in (
        ("sample", samples, model_share > 0),
        ("pair of D", dataset, model_share < 1),
    ):
        if wanted and not number:
            raise errors.DataError(
                f"no {side} passes the filter, and a model share of {model_share:g} needs some",
                where="ImproveConfig.model_share",
                remedy="Loosen the filter, or give None for the natural union",
            )
    share = fractions.Fraction(repr(float(model_share)))
    shares, sizes = (share, 1 - share), (samples, dataset)
    total = max(size / part for size, part in zip(sizes, shares, strict=True) if part)
    generator = np.random.Generator(np.random.Philox(key=seed))
    rows = []
    for first, size, part in zip((0, samples), sizes, shares, strict=True):
        if not part:
            continue
        copies, rest = divmod(round(total * part), size)
        drawn = np.sort(generator.choice(size, rest, replace=False))
        rows.append(first + np.concatenate([np.tile(np.arange(size), copies), drawn]))
    return np.concatenate(rows)


def told(story: Mapping[str, Any]) -> str:
    """The story in a sentence or two, for the log."""
    kind, value = story["selection"], story["selection_value"]
    said = {
        "threshold": f"threshold {value:.4f}",
        "percentile": f"percentile {value:g} of each source",
        "mean_max": f"gamma {value:g} between mean and maximum of each source",
        "top_k": f"the best {value:g} of each source",
        "unfiltered": "no filter",
    }[kind]
    said += (
        f" keeps {story['kept_samples']} of {story['samples']} samples and {story['kept_dataset']} of "
        f"{story['dataset']} pairs of D; {story['sources_with_none']} of {story['sources']} sources have no "
        "sample left"
    )
    guarded = {guard: number for guard, number in story["guarded"].items() if number}
    if guarded:
        said += "; guards took " + ", ".join(f"{number} ({guard})" for guard, number in guarded.items())
    if story["model_share"] is not None:
        said += f"; {story['pairs_of_samples']} of {story['pairs']} training pairs are samples"
    return said


def _joined(first: TokenPairs, second: TokenPairs) -> TokenPairs:
    return TokenPairs(
        np.concatenate([first.ids, second.ids]),
        concatenated([first.sources, second.sources]),
        concatenated([first.targets, second.targets]),
    )
