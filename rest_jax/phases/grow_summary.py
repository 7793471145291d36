"""A scored Grow step in numbers and examples, for the report.

Floor 6. What is counted is counted while the row groups pass; what is shown are a few sources of the first
shard.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from rest_jax.data.candidates import FLAGS, CandidateReader
from rest_jax.objectives import statistics
from rest_jax.phases.grow_set import open_grow_set
from rest_jax.phases.workspace import Workspace

_BINS = 50
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_EXAMPLES, _EXTREMES = 8, 3


def summarise(workspace: Workspace, number: int) -> dict[str, Any]:
    """The reward of a Grow step in numbers and examples; JSON-able.

    Raises:
      DataError: no sample has a finite reward.
    """
    grow_set = open_grow_set(workspace, number)
    reader, of_dataset = grow_set.readers[number], grow_set.dataset.rewards
    samples = describe_samples(reader, grow_set.reward)
    edges = np.array(samples["histogram"]["edges"])
    histogram_of_dataset = np.histogram(of_dataset[np.isfinite(of_dataset)], edges)[0].tolist()
    return {
        "grow": number,
        **samples,
        "dataset_reward": {"mean": float(np.nanmean(of_dataset)), "pairs": len(of_dataset)},
        "histogram": {**samples["histogram"], "dataset": histogram_of_dataset},
        "examples": _examples(workspace, reader, grow_set.reward),
    }


def describe_samples(reader: CandidateReader, reward: str) -> dict[str, Any]:
    """What can be said of the samples of a Grow step without the data that they come from.

    Args:
      reader: of the samples and these rewards.
      reward: the rewards' name.

    Raises:
      DataError: no sample has a finite reward.
    """
    rewards, flags = statistics.Summary(), dict.fromkeys(FLAGS, 0)
    edges = np.linspace(0.0, 1.0, _BINS + 1)
    histogram = np.zeros(_BINS, np.int64)
    sources = distinct = 0
    for table, values, whole_sources in _with_whole_sources(reader, reward):
        rewards.add(values)
        histogram += np.histogram(values[np.isfinite(values)], edges)[0]
        for name in FLAGS:
            flags[name] += table[name].to_numpy().sum()
        sources += _count_distinct(whole_sources.select(["example_id"]))
        distinct += _count_distinct(whole_sources)
    quantiles = statistics.interpolated_quantiles(reader.reward_chunks(reward), _QUANTILES)
    return {
        "samples": rewards.total,
        "sources": sources,
        "duplicates": rewards.total - distinct,
        "truncated": int(flags["truncated"]),
        "empty": int(flags["empty"]),
        "copies_of_source": int(flags["copy_of_source"]),
        "repeated_ngram": int(flags["repeated_ngram"]),
        "missing_rewards": rewards.total - rewards.finite,
        "reward": {
            "mean": rewards.mean,
            "quantiles": dict(zip(map(str, _QUANTILES), quantiles, strict=True)),
        },
        "histogram": {"edges": edges.tolist(), "samples": histogram.tolist()},
    }


def _with_whole_sources(
    reader: CandidateReader, reward: str
) -> Iterator[tuple[pa.Table, np.ndarray, pa.Table]]:
    """(a batch, its rewards, ids and texts of sources that are complete): each source is in one of the last.

    The samples of a source may lie in two row groups; those at the end of a batch wait for the next.
    """
    held: pa.Table | None = None
    for batch in reader.batches(("text", *FLAGS)):
        texts = batch.table.select(["example_id", "text"])
        texts = texts if held is None else pa.concat_tables([held, texts])
        ids = texts["example_id"].to_numpy()
        complete = int(np.searchsorted(ids, ids[-1])) if len(ids) else 0
        held = texts.slice(complete)
        yield batch.table, batch.rewards[reward], texts.slice(0, complete)
    if held is not None:
        yield batch.table.slice(0, 0), np.zeros(0), held


def _count_distinct(table: pa.Table) -> int:
    return table.group_by(table.column_names).aggregate([]).num_rows


def _examples(workspace: Workspace, reader: CandidateReader, reward: str) -> list[dict[str, Any]]:
    """A few sources of the first shard with their best and worst samples."""
    examples = workspace.split("train")
    row_of_id = {example_id: row for row, example_id in enumerate(examples.ids.tolist())}
    shown = []
    for example_id, samples in _some_samples(reader, reward).items():
        ranked = sorted(samples, key=lambda sample: -sample[1])
        distinct = list({text: (text, value) for text, value in ranked}.values())
        described = [{"text": text, "reward": value} for text, value in distinct]
        shown.append(
            {
                "id": example_id,
                "source": examples.sources[row_of_id[example_id]],
                "reference": examples.targets[row_of_id[example_id]],
                "best": described[:_EXTREMES],
                "worst": described[_EXTREMES:][-_EXTREMES:],
            }
        )
    return shown


def _some_samples(reader: CandidateReader, reward: str) -> Mapping[int, list[tuple[str, float]]]:
    """(text, finite reward) of the samples of some sources that are spread over the first shard."""
    ids = np.zeros(0, np.int64)
    for batch in reader.batches((), shard=0):
        ids = np.union1d(ids, batch.example_id)
    places = np.linspace(0, len(ids) - 1, min(_EXAMPLES, len(ids))).astype(int)
    chosen: dict[int, list[tuple[str, float]]] = {example_id: [] for example_id in ids[places].tolist()}
    for batch in reader.batches(("text",), shard=0):
        values = batch.rewards[reward]
        rows = np.flatnonzero(np.isin(batch.example_id, list(chosen)) & np.isfinite(values))
        texts = batch.table["text"].take(rows).to_pylist()
        for example_id, text, value in zip(batch.example_id[rows].tolist(), texts, values[rows], strict=True):
            chosen[example_id].append((text, float(value)))
    return chosen
