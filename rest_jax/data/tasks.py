"""seqio Tasks: rows of text in, token ids out. The only module that imports seqio and TensorFlow.

Floor 3. Importing it takes seconds, so only the phase that prepares text does, and does it late.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import itertools
import logging
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from rest_jax import errors
from rest_jax.data.corpora import SeqioCorpus, TfdsCorpus, arrange, to_pairs
from rest_jax.data.splits import TEST, TRAIN, VALID, Splits
from rest_jax.data.vocabulary import Vocabulary
from rest_jax.types import EOS_ID, Examples, RaggedTokens, TokenPairs


@contextlib.contextmanager
def _without_stderr() -> Iterator[None]:
    """Closes the standard error of the process, where TensorFlow's C++ talks before it can be told not to."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
with _without_stderr():
    import seqio
    import tensorflow as tf
    import tensorflow_datasets as tfds

    # The accelerators are JAX's; TensorFlow would take a GPU's whole memory at its first operation.
    for _kind in ("GPU", "TPU"):
        tf.config.set_visible_devices([], _kind)
tf.get_logger().setLevel(logging.ERROR)
logging.getLogger("absl").setLevel(logging.ERROR)
tfds.disable_progress_bar()

_ROWS_A_CALL = 1024
_FEATURES = ("inputs", "targets")
_PROBE = "https://storage.googleapis.com"
_PROBE_SECONDS = 10


@dataclasses.dataclass(frozen=True)
class TokenizedSplit(Examples):
    """A tokenised split, with counts of what the length limits did.

    Attributes:
      dropped: rows left out because a side was too long (training).
      trimmed_sources: sources cut to the limit, EOS included (evaluation).
      trimmed_targets: references whose tokens were cut to the limit, without EOS (evaluation); their text
        is whole.
    """

    dropped: int = 0
    trimmed_sources: int = 0
    trimmed_targets: int = 0


def make_task(
    name: str,
    splits: Mapping[str, Sequence[tuple[int, str, str]]],
    vocabulary: Vocabulary,
    *,
    in_batches: bool = False,
) -> seqio.Task:
    """A Task over rows in memory, in their order, with features `id`, `inputs` and `targets`.

    The text is tokenised with the vocabulary, shared by both sides, and EOS is appended after trimming. With
    `in_batches` an element is many rows in ragged features: a third of the time for who wants all of them.
    """

    def dataset_fn(split: str, shuffle_files: bool = False) -> tf.data.Dataset:
        del shuffle_files  # there are no files, and batches are shuffled where their order is an address
        rows = splits[split]
        columns = {
            "id": np.array([row[0] for row in rows], np.int64),
            "inputs": np.array([row[1] for row in rows], object),
            "targets": np.array([row[2] for row in rows], object),
        }
        return tf.data.Dataset.from_tensor_slices(columns)

    spm = seqio.SentencePieceVocabulary(str(vocabulary.path), extra_ids=0)
    feature = seqio.Feature(spm, add_eos=True, rank=2 if in_batches else 1)
    sizes = {split: len(rows) for split, rows in splits.items()}
    # One call of the tokeniser for many rows takes half the time of a call for each.
    preprocessors = [_batch_rows, _tokenize_rows, seqio.preprocessors.append_eos_after_trim, _unbatch_rows]
    return seqio.Task(
        name,
        source=seqio.FunctionDataSource(dataset_fn, splits=tuple(splits), num_input_examples=sizes),
        preprocessors=preprocessors[:-1] if in_batches else preprocessors,
        output_features=dict.fromkeys(_FEATURES, feature),
        metric_fns=[],
    )


def _batch_rows(dataset: tf.data.Dataset) -> tf.data.Dataset:
    return dataset.batch(_ROWS_A_CALL)


def _tokenize_rows(dataset: tf.data.Dataset, output_features: Mapping[str, seqio.Feature]) -> tf.data.Dataset:
    return seqio.preprocessors.tokenize(dataset, output_features, copy_pretokenized=False)


def _unbatch_rows(dataset: tf.data.Dataset) -> tf.data.Dataset:
    return dataset.unbatch()


def register_task(
    name: str, splits: Mapping[str, Sequence[tuple[int, str, str]]], vocabulary: Vocabulary
) -> seqio.Task:
    """Puts `make_task` into seqio's registry, in the place of an earlier one of this name."""
    task = make_task(name, splits, vocabulary)
    seqio.TaskRegistry.remove(name)
    seqio.TaskRegistry.add_provider(name, task)
    return task


def tokenize_split(
    rows: Sequence[tuple[int, str, str]],
    vocabulary: Vocabulary,
    max_source_length: int,
    max_target_length: int,
    *,
    train: bool = True,
) -> TokenizedSplit:
    """Tokenises rows through a seqio Task, in their order.

    A training pair with a side above its limit is left out: a cut target would teach the model to stop, or
    never to. For evaluation every row is kept, sources cut before their EOS, targets without one.

    Args:
      rows: (id, source, target).
      vocabulary: of both sides.
      max_source_length: most source tokens, EOS included.
      max_target_length: most target tokens, EOS included.
      train: which of the two rules.

    Raises:
      DataError: there are no rows, or none within the limits.
    """
    task = make_task("rows", {"rows": rows}, vocabulary, in_batches=True)
    ids, sources, targets = _collect(task, "rows")
    long_sources, long_targets = sources.lengths > max_source_length, targets.lengths > max_target_length
    kept = np.flatnonzero(~(long_sources | long_targets)) if train else np.arange(len(ids))
    if not len(kept):
        raise errors.DataError(
            f"0 of {len(ids)} rows are within {max_source_length} source tokens "
            f"and {max_target_length} target tokens",
            remedy="Raise TASK_FEATURE_LENGTHS, or check the corpus",
        )
    if not train:
        sources = _trimmed(sources, max_source_length, keep_eos=True)
        targets = _trimmed(targets, max_target_length, keep_eos=False)
    return TokenizedSplit(
        sources=[rows[index][1] for index in kept.tolist()],
        targets=[rows[index][2] for index in kept.tolist()],
        tokens=TokenPairs(ids, sources, targets).take(kept),
        dropped=len(ids) - len(kept),
        trimmed_sources=0 if train else int(long_sources.sum()),
        trimmed_targets=0 if train else int(long_targets.sum()),
    )


def _collect(task: seqio.Task, split: str) -> tuple[np.ndarray, RaggedTokens, RaggedTokens]:
    """The whole of a split of a Task that goes in batches, as flat arrays: ids, inputs, targets."""
    batches = list(task.get_dataset(sequence_length=None, split=split, shuffle=False))
    ids = np.concatenate([np.zeros(0, np.int64), *(batch["id"].numpy() for batch in batches)])

    def flat(feature: str) -> RaggedTokens:
        values = [batch[feature].values.numpy() for batch in batches]
        lengths = [batch[feature].row_lengths().numpy() for batch in batches]
        offsets = np.cumsum(np.concatenate([np.zeros(1, np.int64), *lengths]))
        return RaggedTokens(np.concatenate([np.zeros(0, np.int32), *values]), offsets)

    return ids, flat("inputs"), flat("targets")


def _trimmed(tokens: RaggedTokens, limit: int, keep_eos: bool) -> RaggedTokens:
    """Each sequence cut to `limit` tokens, the last of them EOS again if that is wanted."""
    lengths = np.minimum(tokens.lengths, limit)
    position = np.arange(len(tokens.values)) - np.repeat(tokens.offsets[:-1], tokens.lengths)
    values = tokens.values[position < limit]
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    if keep_eos:
        values[offsets[1:] - 1] = EOS_ID
    return RaggedTokens(values, offsets)


def load_corpus(corpus: Any) -> Splits:
    """The rows of any corpus of `corpora.py`, by split.

    Raises:
      MissingInputError: the corpus, or the Task it names, cannot be had; the message says how to get it.
      DataError: it is empty, damaged, or its splits share a sentence.
    """
    if isinstance(corpus, TfdsCorpus):
        return _load_tfds(corpus)
    if isinstance(corpus, SeqioCorpus):
        return _load_seqio(corpus)
    return corpus.load()


def _wanted_splits(corpus: TfdsCorpus | SeqioCorpus) -> dict[str, str]:
    names = {TRAIN: corpus.train_split, VALID: corpus.valid_split, TEST: corpus.test_split}
    return {split: name for split, name in names.items() if name is not None}


def _load_tfds(corpus: TfdsCorpus) -> Splits:
    builder = _tfds_builder(corpus)
    languages = (corpus.source_language, corpus.target_language)
    if missing := [language for language in languages if language not in builder.info.features]:
        raise errors.ConfigError(
            f"{corpus.name} has no text in {missing[0]!r}; it has {', '.join(sorted(builder.info.features))}",
            remedy="Set TfdsCorpus.source_language and target_language to two of these",
        )
    names = _wanted_splits(corpus)
    source = seqio.TfdsDataSource(corpus.name, tfds_data_dir=corpus.data_dir, splits=names, read_only=True)

    def texts(split: str) -> Iterator[tuple[str, str]]:
        for row in source.get_dataset(split, shuffle=False).as_numpy_iterator():
            yield _text(row[languages[0]]), _text(row[languages[1]])

    given = {}
    for split, name in names.items():
        if name.split("[")[0] not in builder.info.splits:
            raise errors.ConfigError(
                f"{corpus.name} has no split {name!r}; it has {', '.join(builder.info.splits)}",
                remedy=f"Set TfdsCorpus.{split}_split to one of these"
                + ("" if split == TRAIN else " or to None, which holds it out of train"),
            )
        given[split] = to_pairs(texts(split), f"{corpus.name}/{name}")
    return arrange(corpus, corpus.name, given)


def _text(value: bytes) -> str:
    return value.decode("utf-8", errors="replace")


def _tfds_builder(corpus: TfdsCorpus) -> Any:
    """The builder of a data set that is on disk, after fetching it if that is allowed and possible."""
    try:
        builder = tfds.builder(corpus.name, data_dir=corpus.data_dir, try_gcs=False)
    except (tfds.core.registered.DatasetNotFoundError, ValueError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise errors.MissingInputError(
            f"TFDS has no {corpus.name}: {reason}",
            remedy="Check TfdsCorpus.name, as in 'wmt19_translate/zh-en:1.0.0'",
        ) from error
    if builder.is_prepared():
        return builder
    remedy = f"Prepare it where there is a network (tfds build {corpus.name}), or use a ParallelCorpus"
    where = f"{corpus.name} is not prepared in {builder.data_path}"
    if not corpus.download:
        raise errors.MissingInputError(f"{where}, and TfdsCorpus.download is off", remedy=remedy)
    if not _online():
        raise errors.MissingInputError(f"{where}, and {_PROBE} cannot be reached", remedy=remedy)
    try:
        builder.download_and_prepare()
    except Exception as error:  # a builder runs its own code and the network's
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise errors.MissingInputError(f"{where}; preparing it failed: {reason}", remedy=remedy) from error
    return builder


def _online() -> bool:
    """Whether the network answers at all: TFDS would wait for it without end."""
    try:
        urllib.request.urlopen(_PROBE, timeout=_PROBE_SECONDS).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


def resolve_task(name: str, module: str | None = None) -> seqio.Task | seqio.Mixture:
    """A Task or Mixture of seqio's registry.

    Args:
      name: T5X's MIXTURE_OR_TASK_NAME.
      module: T5X's MIXTURE_OR_TASK_MODULE; it is imported first, and registers the name.

    Raises:
      MissingInputError: there is no such module or name.
    """
    if module is not None:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            raise errors.MissingInputError(
                f"no module {error.name!r} to register the task {name!r}",
                remedy="Install it or put its folder on PYTHONPATH, or mend MIXTURE_OR_TASK_MODULE",
            ) from error
    try:
        return seqio.get_mixture_or_task(name)
    except ValueError as error:
        known = sorted({*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()})
        raise errors.MissingInputError(
            f"seqio has no task or mixture {name!r}; registered are: {', '.join(known) or 'none'}",
            remedy="Mend MIXTURE_OR_TASK_NAME, or name the module that registers it",
        ) from error


def _load_seqio(corpus: SeqioCorpus) -> Splits:
    task = resolve_task(corpus.mixture_or_task_name, corpus.module)
    read = {feature: _reader(task, feature) for feature in _FEATURES}

    def texts(name: str) -> Iterator[tuple[str, str]]:
        rows = task.get_dataset(
            sequence_length=None, split=name, shuffle=False, seed=corpus.seed, num_epochs=1
        )
        for row in itertools.islice(rows.as_numpy_iterator(), corpus.max_rows):
            yield read["inputs"](row), read["targets"](row)

    given = {}
    for split, name in _wanted_splits(corpus).items():
        if name not in task.splits:
            raise errors.ConfigError(
                f"{task.name} has no split {name!r}; it has {', '.join(sorted(task.splits))}",
                remedy=f"Set SeqioCorpus.{split}_split to one of these"
                + ("" if split == TRAIN else " or to None, which holds it out of train"),
            )
        given[split] = to_pairs(texts(name), f"{corpus.mixture_or_task_name}/{name}")
    return arrange(corpus, corpus.mixture_or_task_name, given)


def _reader(task: seqio.Task | seqio.Mixture, feature: str) -> Callable[[Mapping[str, Any]], str]:
    """Reads a feature's text: as it was before tokenisation if the Task kept that, else decoded."""
    if feature not in task.output_features:
        raise errors.ConfigError(
            f"{task.name} has no feature {feature!r}; it has {', '.join(task.output_features)}",
            remedy="Give a task with the features inputs and targets",
        )
    vocabulary = task.output_features[feature].vocabulary

    def read(row: Mapping[str, Any]) -> str:
        kept = row.get(f"{feature}_pretokenized")
        return _text(kept) if isinstance(kept, bytes) else vocabulary.decode(row[feature].tolist())

    return read
