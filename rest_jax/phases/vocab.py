"""The vocab phase: reads the corpus, trains the vocabulary, writes the tokenised splits.

Floor 6.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rest_jax import errors, files
from rest_jax.data import corpora, examples, vocabulary
from rest_jax.phases.workspace import SPLITS, Workspace, check_vocabulary_fits

Rows = corpora.Splits


def prepare_text(workspace: Workspace) -> None:
    """Makes `vocab/` and `data/` of a run.

    Raises:
      MissingInputError: the corpus cannot be had; the message says how to get it.
      DataError: it is empty, has bad rows, or its splits share a sentence.
    """
    experiment = workspace.experiment
    for folder in (workspace.vocabulary_folder, workspace.text_folder):
        made = files.read_seal(folder)
        _check_unchanged(made.facts["input_files"] if made is not None else {})
    sealed = files.read_seal(workspace.text_folder)
    rows: Rows | None = _load(workspace) if sealed is None else None
    identity: dict[str, Any] = {"corpus": experiment.corpus, "vocabulary": experiment.vocabulary}
    workspace.run_step(
        workspace.vocabulary_folder,
        "vocab",
        identity,
        lambda: _make_vocabulary(workspace, rows or _load(workspace)),
    )
    identity = {
        "corpus": experiment.corpus,
        "lengths": experiment.task_feature_lengths,
        "vocabulary": workspace.digest(workspace.vocabulary_folder, "vocab"),
    }
    workspace.run_step(
        workspace.text_folder, "vocab", identity, lambda: _tokenise(workspace, rows or _load(workspace))
    )


def _load(workspace: Workspace) -> Rows:
    from rest_jax.data import tasks  # brings TensorFlow, which only this phase needs

    rows = tasks.load_corpus(workspace.experiment.corpus)
    for split in ("train", "valid", workspace.experiment.evaluation.split):
        if not rows.get(split):
            raise errors.DataError(
                f"0 usable rows in the {split} split",
                where=type(workspace.experiment.corpus).__name__,
                remedy="Give the corpus such rows",
            )
    corpora.check_disjoint(rows)
    return rows


def _input_digests(workspace: Workspace) -> dict[str, str]:
    """SHA-256 of the files that the corpus is read from; corpora that are no files have none."""
    find_files: Callable[[], list[Path]] = getattr(workspace.experiment.corpus, "input_files", list)
    return {str(path): files.file_digest(path) for path in find_files()}


def _check_unchanged(digests: Mapping[str, str]) -> None:
    """A corpus that is gone is no matter once it is tokenised; one that has changed would be ignored."""
    for path, digest in digests.items():
        if Path(path).is_file() and files.file_digest(path) != digest:
            raise errors.ConfigError(
                f"{path} has changed since this run tokenised it",
                where="vocab",
                remedy="Use a new MODEL_DIR, or restore the file",
            )


def _sentences(rows: Rows) -> Iterator[str]:
    for _, source, target in rows["train"]:
        yield source
        yield target


def _make_vocabulary(workspace: Workspace, rows: Rows) -> Mapping[str, Any]:
    config = workspace.experiment.vocabulary
    path = workspace.vocabulary_file
    path.parent.mkdir(parents=True, exist_ok=True)
    if config.path is None:
        vocabulary.train_vocabulary(_sentences(rows), config, path)
    else:
        _copy_vocabulary(Path(config.path), path)
    loaded = vocabulary.Vocabulary.from_file(path)
    check_vocabulary_fits(loaded.size, workspace.experiment.policy.vocab_size)
    return {"size": loaded.size, "digest": loaded.digest, "input_files": _input_digests(workspace)}


def _copy_vocabulary(source: Path, target: Path) -> None:
    if not source.is_file():
        raise errors.MissingInputError(
            f"no vocabulary {source}",
            where="VocabularyConfig.path",
            remedy="Give an existing SentencePiece model, or None to train one",
        )
    with files.atomic_path(target) as temporary:
        shutil.copyfile(source, temporary)


def _tokenise(workspace: Workspace, rows: Rows) -> Mapping[str, Any]:
    from rest_jax.data import tasks

    facts: dict[str, Any] = {"input_files": _input_digests(workspace), "rows": rows.facts}
    for split in SPLITS:
        if not rows.get(split):
            continue
        experiment = workspace.experiment
        tokenised = tasks.tokenize_split(
            rows[split],
            workspace.vocabulary,
            experiment.source_length,
            experiment.target_length,
            train=split in ("train", "rater"),
        )
        examples.write_examples(workspace.text_folder / f"{split}.parquet", tokenised)
        facts[split] = {
            "pairs": len(tokenised),
            "source_tokens": int(tokenised.tokens.sources.lengths.sum()),
            "target_tokens": int(tokenised.tokens.targets.lengths.sum()),
            "too_long": tokenised.dropped,
            "cut_sources": tokenised.trimmed_sources,
        }
    return facts
