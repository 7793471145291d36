"""What `inspect` counts in a Grow step: samples, rewards, survivors of the thresholds, flags, duplicates.

Floor 7. It goes through the row groups once and holds one of them at a time, so a Grow step of any size can
be looked at. It reads files only, samples that have no rewards yet as well as those that have several.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from rest_jax import errors, files
from rest_jax.data import candidates
from rest_jax.data.candidate_shard import CandidateShard, from_table
from rest_jax.report import numbers
from rest_jax.report.run_files import improve_of

BINS = 50
EDGES = np.linspace(0.0, 1.0, BINS + 1)
# Flags that tell a degenerate sample, and what each says of it; `round_trip` is good where it is set.
FLAGS = {
    "truncated": "cut off at the maximum length",
    "empty": "empty",
    "copy_of_source": "a copy of its source",
    "repeated_ngram": "repeats a phrase within itself",
    "no_round_trip": "its text encodes to other tokens",
}
_REWARD = "reward of "  # and its name: a column beside those of the samples
FLAG_COLUMNS = ("truncated", "empty", "copy_of_source", "repeated_ngram", "round_trip")


class Piece(NamedTuple):
    """Samples of whole sources, sorted by (example_id, sample), and each reward of them, float64 [n]."""

    samples: CandidateShard
    rewards: dict[str, np.ndarray]


@dataclasses.dataclass
class RewardCounts:
    """One reward over the samples of a Grow step.

    Attributes:
      histogram: int64 [BINS], how many lie between each two of `EDGES`.
      outside: how many lie outside [0, 1].
      missing: how many samples have no finite reward.
      count: how many have one.
      total: their sum.
      low: the lowest.
      high: the highest.
    """

    histogram: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(BINS, np.int64))
    outside: int = 0
    missing: int = 0
    count: int = 0
    total: float = 0.0
    low: float = math.inf
    high: float = -math.inf

    @property
    def mean(self) -> float | None:
        """Mean reward; None where no sample has one."""
        return self.total / self.count if self.count else None

    def add(self, rewards: np.ndarray) -> None:
        """Takes in rewards, float64 [n]."""
        present = rewards[np.isfinite(rewards)]
        self.missing += len(rewards) - len(present)
        if len(present):
            inside = np.histogram(present, EDGES)[0]
            self.histogram += inside
            self.outside += len(present) - int(inside.sum())
            self.count += len(present)
            self.total += float(present.sum())
            self.low, self.high = min(self.low, float(present.min())), max(self.high, float(present.max()))


@dataclasses.dataclass
class Threshold:
    """The filter of an Improve step and who passes it.

    Attributes:
      improve: i, from 1.
      value: τ; a sample passes with a reward strictly above. None where each source is judged on its own.
      quantile: which quantile τ was taken from, or None.
      reward: name of the reward that it is of.
      drops_truncated: whether truncated samples were left out whatever their reward.
      words: how each source is judged, where it is.
      is_counted: whether the samples are counted here; else the numbers are those of the Improve step's
        story, since other guards, a cap or earlier Grow steps had a part in them.
      kept: samples that pass.
      sources_with_none: sources of which no sample does.
    """

    improve: int
    value: float | None
    quantile: float | None
    reward: str
    drops_truncated: bool
    kept: int = 0
    sources_with_none: int = 0
    words: str = ""
    is_counted: bool = True

    def add(self, piece: Piece, starts: np.ndarray) -> None:
        """Takes in samples; `starts`, int64 [m], are the first rows of their sources."""
        if not self.is_counted:
            return
        with np.errstate(invalid="ignore"):
            passed = piece.rewards[self.reward] > self.value
        if self.drops_truncated:
            passed &= ~piece.samples.truncated
        self.kept += int(passed.sum())
        self.sources_with_none += int((np.add.reduceat(passed.astype(np.int64), starts) == 0).sum())


@dataclasses.dataclass
class GrowCounts:
    """A Grow step in numbers.

    Attributes:
      number: g.
      folder: where it is.
      samples: how many there are.
      sources: of how many sources.
      duplicates: samples whose text another sample of the same source has before them.
      flags: how many samples have each of `FLAGS`.
      rewards: by the reward's name; the one that the Improve steps go by comes first.
      thresholds: of the Improve steps that were begun, rising.
    """

    number: int
    folder: Path
    samples: int = 0
    sources: int = 0
    duplicates: int = 0
    flags: dict[str, int] = dataclasses.field(default_factory=lambda: dict.fromkeys(FLAGS, 0))
    rewards: dict[str, RewardCounts] = dataclasses.field(default_factory=dict)
    thresholds: list[Threshold] = dataclasses.field(default_factory=list)

    def add(self, piece: Piece) -> None:
        """Takes in samples of whole sources."""
        samples = piece.samples
        if not len(samples):
            return
        starts = source_starts(samples)
        self.samples += len(samples)
        self.sources += len(starts)
        self.duplicates += len(samples) - len(
            set(zip(samples.example_id.tolist(), samples.text, strict=True))
        )
        for flag, where in flags_of(samples).items():
            self.flags[flag] += int(where.sum())
        for name, rewards in piece.rewards.items():
            self.rewards[name].add(rewards)
        for threshold in self.thresholds:
            threshold.add(piece, starts)


def grow_folders(run_dir: Path, grow_step: int | None) -> list[tuple[int, Path]]:
    """(g, folder) of the Grow steps of a run, sealed or not, rising; of one alone if it is given.

    Raises:
      MissingInputError: there is none.
    """
    found = []
    for path in run_dir.glob("grow/g*"):
        match = re.fullmatch(r"g([1-9]\d*)", path.name)
        if match and path.is_dir() and grow_step in (None, int(match[1])):
            found.append((int(match[1]), path))
    if not found:
        named = "no Grow step" if grow_step is None else f"no Grow step {grow_step}"
        raise errors.MissingInputError(
            f"there is {named} in {run_dir}", remedy="Run grow first, or choose another --grow_step"
        )
    return sorted(found)


def committed(folder: Path) -> tuple[int, int]:
    """How many shards of a Grow step are committed, and of how many; (0, 0) before the first."""
    names = [path.name for path in folder.glob("samples-*-of-*.json")]
    return len(names), int(Path(names[0]).stem.rsplit("-", 1)[1]) if names else 0


def heads(number: int, folder: Path) -> GrowCounts:
    """A Grow step with its rewards and thresholds by name, before anything is counted."""
    thresholds = _thresholds(folder, number)
    leading = {threshold.reward for threshold in thresholds}
    names = sorted(reward_names(folder), key=lambda name: name not in leading)
    return GrowCounts(number, folder, rewards={name: RewardCounts() for name in names}, thresholds=thresholds)


def count(number: int, folder: Path) -> GrowCounts:
    """Goes through a sealed Grow step once.

    Raises:
      MissingInputError: it is not sealed.
      IntegrityError: a shard is damaged.
    """
    counts = heads(number, folder)
    for piece in pieces(folder, list(counts.rewards), ("text", *FLAG_COLUMNS)):
        counts.add(piece)
    return counts


def pieces(folder: Path, names: Sequence[str], columns: Sequence[str]) -> Iterator[Piece]:
    """The samples of a sealed Grow step with these rewards, about a row group at a time and verified.

    The samples of a source may lie in two row groups; those at the end of one wait for the next.
    """
    held: pa.Table | None = None
    for batch in candidates.CandidateReader(folder, names).batches(columns):
        table = batch.table
        for name in names:
            table = table.append_column(_REWARD + name, pa.array(batch.rewards[name], pa.float64()))
        table = table if held is None else pa.concat_tables([held, table])
        ids = table["example_id"].to_numpy()
        complete = int(np.searchsorted(ids, ids[-1])) if len(ids) else 0
        held = table.slice(complete)
        if complete:
            yield _piece(table.slice(0, complete), names)
    if held is not None and held.num_rows:
        yield _piece(held, names)


def _piece(table: pa.Table, names: Sequence[str]) -> Piece:
    rewards = {name: table[_REWARD + name].to_numpy() for name in names}
    return Piece(from_table(table.drop_columns([_REWARD + name for name in names])), rewards)


def reward_names(folder: Path) -> list[str]:
    """The rewards that a Grow step has been given and that are sealed."""
    seals = folder.glob(f"{candidates.REWARDS_FOLDER}/*/{files.SEAL_NAME}")
    return sorted(path.parent.name for path in seals)


def source_starts(samples: CandidateShard) -> np.ndarray:
    """The first row of each source in samples that are sorted, int64."""
    ids = samples.example_id
    return (
        np.flatnonzero(np.concatenate([[True], ids[1:] != ids[:-1]])) if len(ids) else np.zeros(0, np.int64)
    )


def flags_of(samples: CandidateShard) -> dict[str, np.ndarray]:
    """Which samples have each of `FLAGS`, bool [n]."""
    found = {name: getattr(samples, name) for name in FLAG_COLUMNS[:-1]}
    return {**found, "no_round_trip": ~samples.round_trip}


def _thresholds(folder: Path, number: int) -> list[Threshold]:
    """The thresholds that the Improve steps of a Grow step went by, from their stories."""
    names = reward_names(folder)
    by_digest = {_digest(candidates.rewards_folder(folder, name)): name for name in names}
    found = []
    for path in folder.parents[1].glob(f"policy/g{number}_i*/improve.json"):
        step, story = improve_of(path.parent.name), files.read_json(path)
        identity_path = path.parent / files.IDENTITY_NAME
        identity = files.read_json(identity_path) if identity_path.exists() else {}
        name = by_digest.get(str(identity.get("rewards")), names[0] if len(names) == 1 else "")
        if step is not None and name:
            settings = identity.get("settings", {})
            found.append(_threshold(step[1], name, story, settings))
    return sorted(found, key=lambda threshold: threshold.improve)


def _threshold(improve: int, reward: str, story: Mapping[str, Any], settings: Mapping[str, Any]) -> Threshold:
    tau, quantile = story.get("threshold"), story.get("threshold_quantile")
    guards = dict(settings.get("guards") or {"truncated": settings.get("drop_truncated", True)})
    drops_truncated = bool(guards.pop("truncated", True))
    others = (
        any(on for guard, on in guards.items() if guard != "__class__")
        or settings.get("max_per_source")
        or settings.get("accumulate")
    )
    found = Threshold(improve, tau, quantile, reward, drops_truncated)
    found.words = numbers.source_filter(story.get("selection"), story.get("selection_value"))
    if tau is None or others:
        found.is_counted = False
        found.kept, found.sources_with_none = story.get("kept_samples", 0), story.get("sources_with_none", 0)
    return found


def _digest(folder: Path) -> str:
    seal = files.read_seal(folder)
    return seal.digest if seal is not None else ""
