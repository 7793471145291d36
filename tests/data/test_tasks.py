from __future__ import annotations

import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rest_jax import errors
from rest_jax.data import tasks
from rest_jax.data.corpora import SeqioCorpus, TfdsCorpus, TsvCorpus
from rest_jax.data.splits import Row
from rest_jax.data.vocabulary import Vocabulary, VocabularyConfig, train_vocabulary
from tests.data.test_vocabulary import sentences

tf, tfds, seqio = tasks.tf, tasks.tfds, tasks.seqio
DE_EN: dict[str, Any] = {"source_language": "de", "target_language": "en"}
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    path = tmp_path_factory.mktemp("vocab") / "spm.model"
    return train_vocabulary(sentences(), VocabularyConfig(size=320), path)


def rows(count: int = 2500) -> list[Row]:
    """More than two batches, ids out of order, with text that needs bytes and normalisation."""
    texts = sentences(count)
    odd = ["狗 ｄｏｇ", "a  b", "</s> the", "don\u2019t \u2014 ﬁne", "é"]
    return [Row(7 * count - i, f"{text} {odd[i % 5]}", text.upper()) for i, text in enumerate(texts)]


def listed(tokens: Any) -> list[list[int]]:
    return [tokens[i].tolist() for i in range(len(tokens))]


def test_ids_are_sentencepiece_ids_and_eos_in_order(vocabulary: Vocabulary):
    examples = tasks.tokenize_split(rows(), vocabulary, 500, 500)
    assert examples.ids.tolist() == [row.id for row in rows()]
    assert examples.sources == [row.source for row in rows()]
    assert examples.targets == [row.target for row in rows()]
    assert listed(examples.tokens.sources) == [[*ids, 1] for ids in vocabulary.encode_batch(examples.sources)]
    assert listed(examples.tokens.targets) == [[*ids, 1] for ids in vocabulary.encode_batch(examples.targets)]
    assert examples.tokens.sources.values.dtype == np.int32
    assert (examples.dropped, examples.trimmed_sources, examples.trimmed_targets) == (0, 0, 0)


def test_a_task_of_single_rows_gives_the_same(vocabulary: Vocabulary):
    task = tasks.register_task("rest_jax_test_rows", {"train": rows(50), "valid": rows(20)}, vocabulary)
    assert tasks.resolve_task("rest_jax_test_rows") is task
    again = tasks.register_task("rest_jax_test_rows", {"train": rows(40)}, vocabulary)
    assert tasks.resolve_task("rest_jax_test_rows") is again
    dataset = again.get_dataset(sequence_length=None, split="train", shuffle=False)
    found = [(int(r["id"]), r["inputs"].tolist(), r["targets"].tolist()) for r in dataset.as_numpy_iterator()]
    examples = tasks.tokenize_split(rows(40), vocabulary, 500, 500)
    tokens = examples.tokens
    assert found == list(
        zip(examples.ids.tolist(), listed(tokens.sources), listed(tokens.targets), strict=True)
    )


def test_a_registered_task_trims_before_eos(vocabulary: Vocabulary):
    task = tasks.make_task("trim", {"train": rows(30)}, vocabulary)
    dataset = task.get_dataset(sequence_length={"inputs": 6, "targets": 4}, split="train", shuffle=False)
    for row in dataset.as_numpy_iterator():
        assert len(row["inputs"]) == 6 and row["inputs"][-1] == 1
        assert len(row["targets"]) == 4 and row["targets"][-1] == 1


def test_seqio_feeds_a_model_from_it(vocabulary: Vocabulary):
    tasks.register_task("rest_jax_test_feed", {"train": rows(60)}, vocabulary)
    batches = seqio.get_dataset(
        "rest_jax_test_feed",
        task_feature_lengths={"inputs": 256, "targets": 256},
        dataset_split="train",
        shuffle=False,
        feature_converter=seqio.EncDecFeatureConverter(pack=True),
        batch_size=2,
    )
    first = next(batches.as_numpy_iterator())
    assert first["encoder_input_tokens"].shape == (2, 256)
    assert (first["encoder_segment_ids"] > 1).any()


def lengths(texts: list[str], vocabulary: Vocabulary) -> np.ndarray:
    return np.array([len(ids) + 1 for ids in vocabulary.encode_batch(texts)])


def test_training_leaves_long_pairs_out(vocabulary: Vocabulary):
    every = rows(400)
    source = lengths([row.source for row in every], vocabulary)
    target = lengths([row.target for row in every], vocabulary)
    limits = int(np.quantile(source, 0.8)), int(np.quantile(target, 0.8))
    fits = (source <= limits[0]) & (target <= limits[1])
    examples = tasks.tokenize_split(every, vocabulary, *limits)
    assert 0 < examples.dropped == (~fits).sum() < 400
    assert examples.ids.tolist() == [row.id for row, fit in zip(every, fits, strict=True) if fit]
    assert examples.sources == [row.source for row, fit in zip(every, fits, strict=True) if fit]
    assert all(ids[-1] == 1 for ids in listed(examples.tokens.targets))
    assert examples.tokens.sources.lengths.max() == limits[0]


def test_evaluation_keeps_every_row_and_never_fakes_the_end_of_a_target(vocabulary: Vocabulary):
    every = rows(200)
    examples = tasks.tokenize_split(every, vocabulary, 40, 30, train=False)
    assert examples.ids.tolist() == [row.id for row in every] and examples.dropped == 0
    assert examples.targets == [row.target for row in every]
    trimmed = [0, 0]
    for row, source, target in zip(
        every, listed(examples.tokens.sources), listed(examples.tokens.targets), strict=True
    ):
        whole_source, whole_target = [*vocabulary.encode(row.source), 1], [*vocabulary.encode(row.target), 1]
        if len(whole_source) > 40:
            trimmed[0] += 1
            assert source == [*whole_source[:39], 1]
        else:
            assert source == whole_source
        trimmed[1] += len(whole_target) > 30
        assert target == whole_target[:30]
    assert trimmed == [examples.trimmed_sources, examples.trimmed_targets] and min(trimmed) > 0


@pytest.mark.parametrize(("some", "limit"), [([], 50), (rows(5), 2)])
def test_nothing_to_train_on_is_an_error(vocabulary: Vocabulary, some: list[Row], limit: int):
    with pytest.raises(errors.DataError, match=f"0 of {len(some)} rows are within {limit} source tokens"):
        tasks.tokenize_split(some, vocabulary, limit, limit)


def test_tokenisation_is_quick(vocabulary: Vocabulary):
    many = rows(20_000)
    started = time.process_time()
    tasks.tokenize_split(many, vocabulary, 500, 500)
    assert time.process_time() - started < 15


def test_local_corpora_load_through_the_same_door(tmp_path: Path):
    (tmp_path / "a.tsv").write_text("".join(f"Satz {i}\tsentence {i}\n" for i in range(20)))
    corpus = TsvCorpus(train=str(tmp_path / "a.tsv"), valid_size=3, test_size=2, **DE_EN)
    assert tasks.load_corpus(corpus) == corpus.load()


def test_import_is_silent_and_hides_accelerators_from_tensorflow():
    script = textwrap.dedent(
        """
        import rest_jax.data.tasks as tasks
        assert tasks.tf.config.get_visible_devices("GPU") == []
        print(tasks.tf.constant(3).numpy())
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert (done.stdout.strip(), done.stderr.strip()) == ("3", "")


# TensorFlow Datasets.


class RestJaxTinyPairs(tfds.core.GeneratorBasedBuilder):
    """Thirty pairs that need no download."""

    __module__ = (
        "__main__"  # of a package's builder TFDS reads the code, for which it wants importlib_resources
    )

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.Translation(languages=("de", "en")))

    def _split_generators(self, download_manager):
        return {"train": self._generate_examples(0, 24), "validation": self._generate_examples(24, 30)}

    def _generate_examples(self, start: int, stop: int):
        for i in range(start, stop):
            yield i, {"de": f"Satz {i}", "en": f"sentence {i}"}


def tiny(folder: Path, **changes: Any) -> TfdsCorpus:
    fields = {
        "name": "rest_jax_tiny_pairs:1.0.0",
        "data_dir": str(folder),
        "test_split": None,
        "test_size": 4,
    }
    return TfdsCorpus(**{**fields, **DE_EN, **changes})


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tfds")
    RestJaxTinyPairs(data_dir=str(folder)).download_and_prepare()
    return folder


def test_tfds_by_name(prepared: Path):
    splits = tasks.load_corpus(tiny(prepared, download=False))
    assert {split: len(some) for split, some in splits.items()} == {"train": 20, "valid": 6, "test": 4}
    assert {row.source for row in splits["valid"]} == {f"Satz {i}" for i in range(24, 30)}
    assert all(row.target == row.source.replace("Satz", "sentence") for row in splits["train"])
    assert tasks.load_corpus(tiny(prepared)) == splits
    back = tasks.load_corpus(tiny(prepared, source_language="en", target_language="de"))
    assert back["train"][0].source.startswith("sentence")


def test_tfds_slices(prepared: Path):
    splits = tasks.load_corpus(tiny(prepared, train_split="train[:10]", valid_split=None, valid_size=2))
    assert {split: len(some) for split, some in splits.items()} == {"train": 4, "valid": 2, "test": 4}


def test_tfds_names_that_do_not_exist(prepared: Path):
    with pytest.raises(errors.MissingInputError, match="TFDS has no no_such_pairs"):
        tasks.load_corpus(tiny(prepared, name="no_such_pairs:1.0.0"))
    with pytest.raises(errors.MissingInputError, match="TFDS has no wmt19_translate/xx-yy"):
        tasks.load_corpus(tiny(prepared, name="wmt19_translate/xx-yy:1.0.0"))
    with pytest.raises(errors.ConfigError, match="no split 'dev'; it has train, validation"):
        tasks.load_corpus(tiny(prepared, valid_split="dev"))
    with pytest.raises(errors.ConfigError, match="no text in 'fr'; it has de, en"):
        tasks.load_corpus(tiny(prepared, source_language="fr"))


def test_tfds_that_is_not_there_says_how_to_get_it_and_does_not_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    corpus = tiny(tmp_path, download=False)
    with pytest.raises(errors.MissingInputError, match="not prepared in .*tfds build rest_jax_tiny_pairs"):
        tasks.load_corpus(corpus)

    def unreachable(*_: Any, **__: Any) -> None:
        raise socket.gaierror("no network")

    monkeypatch.setattr(tasks.urllib.request, "urlopen", unreachable)
    with pytest.raises(errors.MissingInputError, match="googleapis.com cannot be reached"):
        tasks.load_corpus(tiny(tmp_path))


def test_tfds_is_prepared_when_the_network_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tasks, "_online", lambda: True)
    assert len(tasks.load_corpus(tiny(tmp_path))["train"]) == 20

    def broken(self: Any) -> None:
        raise ConnectionError("reset by peer\nand more")

    monkeypatch.setattr(RestJaxTinyPairs, "download_and_prepare", broken)
    with pytest.raises(errors.MissingInputError, match="preparing it failed: reset by peer") as caught:
        tasks.load_corpus(tiny(tmp_path / "other"))
    assert "\n" not in str(caught.value)


# Tasks and Mixtures of the user's own.

MODULE = """
import seqio, tensorflow as tf

vocabulary = seqio.SentencePieceVocabulary({model!r})
features = {{name: seqio.Feature(vocabulary, add_eos=True) for name in ("inputs", "targets")}}

def source(start, stop):
    def rows(split, shuffle_files=False, seed=None):
        first, last = (start, stop) if split == "train" else (stop, stop + 5)
        return tf.data.Dataset.range(first, last).map(
            lambda i: {{"inputs": tf.strings.join(["zan ", tf.strings.as_string(i)]),
                        "targets": tf.strings.join(["the dog ", tf.strings.as_string(i)])}})
    return seqio.FunctionDataSource(rows, splits=("train", "validation"))

def tokenize(dataset, output_features):
    return seqio.preprocessors.tokenize(dataset, output_features, copy_pretokenized=False)

def register(name, source, features, preprocessors):
    seqio.TaskRegistry.add(name, source, features, preprocessors=preprocessors, metric_fns=[])

register("own_text", source(0, 30), features, [seqio.preprocessors.tokenize, seqio.preprocessors.append_eos])
register("own_tokens", source(100, 130), features, [tokenize, seqio.preprocessors.append_eos])
register("own_without_inputs", source(0, 3), {{"targets": features["targets"]}}, [])
seqio.MixtureRegistry.add("own_mixture", [("own_text", 1), ("own_tokens", 1)])
"""


@pytest.fixture(scope="module")
def own_module(tmp_path_factory: pytest.TempPathFactory, vocabulary: Vocabulary):
    folder = tmp_path_factory.mktemp("own")
    (folder / "rest_jax_own_tasks.py").write_text(MODULE.format(model=str(vocabulary.path)))
    sys.path.insert(0, str(folder))
    yield "rest_jax_own_tasks"
    sys.path.remove(str(folder))


def own(name: str, module: str | None, **changes: Any) -> SeqioCorpus:
    fields = {"mixture_or_task_name": name, "module": module, "test_size": 3, **DE_EN}
    return SeqioCorpus(**{**fields, **changes})


@pytest.mark.parametrize(("name", "first"), [("own_text", 0), ("own_tokens", 100)])
def test_own_task_as_a_corpus(own_module: str, name: str, first: int):
    splits = tasks.load_corpus(own(name, own_module))
    assert {split: len(some) for split, some in splits.items()} == {"train": 27, "valid": 5, "test": 3}
    found = {(row.source, row.target) for row in [*splits["train"], *splits["test"]]}
    assert found == {(f"zan {i}", f"the dog {i}") for i in range(first, first + 30)}
    few = tasks.load_corpus(own(name, own_module, max_rows=10, valid_split=None, valid_size=1))
    assert few.facts["lines_train"] == 10 and few.facts["rows_train"] == 6


def test_own_mixture_as_a_corpus(own_module: str):
    splits = tasks.load_corpus(own("own_mixture", own_module, drop_overlap=True))
    found = {row.source for row in [*splits["train"], *splits["test"]]}
    assert found < {f"zan {i}" for i in [*range(30), *range(100, 130)]}
    assert len(found & {f"zan {i}" for i in range(30)}) > 10 and len(found) > 40
    assert splits == tasks.load_corpus(own("own_mixture", own_module, drop_overlap=True))


def test_own_names_that_do_not_exist(own_module: str):
    with pytest.raises(
        errors.MissingInputError, match="no module 'no_such_module' to register the task 'mine'"
    ):
        tasks.load_corpus(own("mine", "no_such_module"))
    with pytest.raises(
        errors.MissingInputError, match="no task or mixture 'mine'; registered are: .*own_mixture"
    ):
        tasks.load_corpus(own("mine", own_module))
    with pytest.raises(errors.ConfigError, match="no split 'dev'; it has train, validation"):
        tasks.load_corpus(own("own_text", own_module, valid_split="dev"))
    with pytest.raises(errors.ConfigError, match="no feature 'inputs'; it has targets"):
        tasks.load_corpus(own("own_without_inputs", own_module))
