"""Splits that share no sentence, however often the corpus repeats one.

Floor 3. Two rows belong together when they have the same source or the same target, up to case, spaces and
punctuation; whole groups of such rows go to one split. Which group goes where depends on a hash of its
smallest sentence, so that a few rows more or less in the corpus leave most of a split as it was.
"""

from __future__ import annotations

import dataclasses
import hashlib
import unicodedata
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from rest_jax import errors

TRAIN, RATER, VALID, TEST = "train", "rater", "valid", "test"
# From the split that gives way to the one that must not change.
PRECEDENCE = (TRAIN, RATER, VALID, TEST)


class Row(NamedTuple):
    """One pair of a parallel corpus. Ids are unique over all splits and stable over runs."""

    id: int
    source: str
    target: str


class Splits(dict[str, list[Row]]):
    """Rows by split, with counts of what was left out and why in `facts`."""

    def __init__(self, rows: Mapping[str, list[Row]], facts: Mapping[str, int] | None = None):
        super().__init__(rows)
        self.facts = dict(facts or {})


@dataclasses.dataclass(frozen=True)
class SplitSizes:
    """How many rows to hold out of the training rows; 0 holds none out."""

    rater: int = 0
    valid: int = 0
    test: int = 0


class _Folding(dict[int, int | None]):
    """A table for `str.translate` that drops punctuation, separators and control characters."""

    def __missing__(self, code: int) -> int | None:
        kept = None if unicodedata.category(chr(code))[0] in "PZC" else code
        self[code] = kept
        return kept


_FOLDING = _Folding()


def sentence_key(text: str) -> str:
    """What two sentences share when they count as the same: NFKC, no case, spaces or punctuation."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return folded.translate(_FOLDING) or folded.strip()


def _group_labels(keys: Sequence[tuple[str, str]]) -> list[str]:
    """For each row the smallest sentence of its group (connected rows of shared sentences)."""
    parents: dict[str, str] = {}

    def root(node: str) -> str:
        while (parent := parents.setdefault(node, node)) != node:
            parents[node] = parents.setdefault(parent, parent)
            node = parents[node]
        return node

    for source, target in keys:
        left, right = root("s" + source), root("t" + target)
        if left != right:
            parents[max(left, right)] = min(left, right)
    return [root("s" + source) for source, _ in keys]


def hold_out(rows: Sequence[Row], sizes: SplitSizes, seed: int, name: str) -> dict[str, list[Row]]:
    """Splits rows into train and the held-out splits, whole groups at a time.

    Held-out splits have exactly the sizes asked for, at most one row a source, so that evaluation and
    rating see distinct sources; the other rows of their groups are left out altogether.

    Args:
      rows: all rows, of distinct ids.
      sizes: rows of each held-out split.
      seed: another seed is another choice of groups.
      name: what to call the corpus in an error.

    Raises:
      DataError: the corpus is too small for these sizes.
    """
    keys = [(sentence_key(row.source), sentence_key(row.target)) for row in rows]
    groups: dict[str, list[int]] = {}
    for index, label in enumerate(_group_labels(keys)):
        groups.setdefault(label, []).append(index)
    order = sorted(groups, key=lambda label: hashlib.sha256(f"{seed}:{label}".encode()).digest())
    found: dict[str, list[Row]] = {}
    place = 0
    for split, wanted in ((TEST, sizes.test), (VALID, sizes.valid), (RATER, sizes.rater)):
        picked: list[Row] = []
        while len(picked) < wanted and place < len(order):
            distinct = {keys[index][0]: rows[index] for index in reversed(groups[order[place]])}
            picked += sorted(distinct.values())[: wanted - len(picked)]
            place += 1
        if wanted:
            found[split] = sorted(picked)
    found[TRAIN] = sorted(rows[index] for label in order[place:] for index in groups[label])
    if not found[TRAIN]:
        raise errors.DataError(
            f"{name} has {len(rows)} usable rows in {len(order)} groups of shared sentences, too few to hold "
            f"out {sizes.test} for test, {sizes.valid} for valid and {sizes.rater} for the rater",
            remedy="Lower test_size, valid_size or rater_size, or give more rows",
        )
    return {split: found[split] for split in PRECEDENCE if split in found}


def _sentences(rows: Sequence[Row]) -> dict[tuple[str, str], Row]:
    """The first row of each (side, sentence) of a split."""
    found: dict[tuple[str, str], Row] = {}
    for row in rows:
        found.setdefault(("source", sentence_key(row.source)), row)
        found.setdefault(("target", sentence_key(row.target)), row)
    return found


def check_disjoint(splits: Mapping[str, Sequence[Row]]) -> None:
    """Checks that no sentence of a side is in two splits, and that no id is used twice.

    Raises:
      DataError: one is; the message names the sentence and both splits.
    """
    seen: dict[tuple[str, str], tuple[str, Row]] = {}
    owners: dict[int, str] = {}
    for split, rows in splits.items():
        for row in rows:
            if row.id in owners:
                raise errors.DataError(
                    f"id {row.id} is in {owners[row.id]} and again in {split}",
                    remedy="Give every row its own id",
                )
            owners[row.id] = split
        for (side, key), row in _sentences(rows).items():
            if (side, key) in seen:
                other, other_row = seen[(side, key)]
                text = row.source if side == "source" else row.target
                raise errors.DataError(
                    f"the {side} sentence {text!r} is in {other} (row {other_row.id}) "
                    f"and in {split} (row {row.id})",
                    remedy="Take it out of one of them, or set drop_overlap = True to leave out the former",
                )
            seen[(side, key)] = (split, row)


def drop_overlap(splits: Mapping[str, list[Row]]) -> tuple[dict[str, list[Row]], dict[str, int]]:
    """Takes out of each split the rows that share a sentence with a later one of `PRECEDENCE`.

    Returns:
      The splits without those rows, and how many each lost.
    """
    taken: set[tuple[str, str]] = set()
    kept: dict[str, list[Row]] = {}
    dropped: dict[str, int] = {}
    for split in reversed(PRECEDENCE):
        if split not in splits:
            continue
        kept[split] = [row for row in splits[split] if taken.isdisjoint(_sentences([row]))]
        dropped[split] = len(splits[split]) - len(kept[split])
        taken.update(_sentences(kept[split]))
    return {split: kept[split] for split in splits}, dropped
