from __future__ import annotations

import collections

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rest_jax import errors
from rest_jax.data.splits import (
    Row,
    SplitSizes,
    check_disjoint,
    drop_overlap,
    hold_out,
    sentence_key,
)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("Is it a dog?", "is it a  DOG"),
        ("这是什么？", "这是什么?"),
        ("ＡＢＣ １２３", "abc123"),
        ("Straße", "STRASSE"),
        ("it's", "it\u2019s"),
        ("well-known", "well known"),
    ],
)
def test_keys_fold_case_width_spaces_and_punctuation(left: str, right: str):
    assert sentence_key(left) == sentence_key(right)


@pytest.mark.parametrize(
    ("left", "right"), [("dog", "dogs"), ("？", "。"), ("1 + 1", "1 1"), ("é", "e"), ("狗", "犬")]
)
def test_keys_keep_words_symbols_and_lone_marks_apart(left: str, right: str):
    assert sentence_key(left) != sentence_key(right)


# Few distinct sentences, so that long chains of shared ones occur.
sides = st.integers(0, 40)
corpora = st.lists(st.tuples(sides, sides), min_size=30, max_size=80)


def rows_of(pairs: list[tuple[int, int]]) -> list[Row]:
    return [Row(index, f"source {left}", f"target {right}") for index, (left, right) in enumerate(pairs)]


def components(rows: list[Row]) -> list[set[int]]:
    """By repeated merging, with none of the code under test."""
    found: list[tuple[set[str], set[int]]] = []
    for row in rows:
        names, ids = {row.source, row.target}, {row.id}
        rest = []
        for other_names, other_ids in found:
            if names & other_names:
                names, ids = names | other_names, ids | other_ids
            else:
                rest.append((other_names, other_ids))
        found = [*rest, (names, ids)]
    return [ids for _, ids in found]


@given(corpora, st.integers(0, 3))
@settings(max_examples=100, deadline=None)
def test_whole_groups_go_to_one_split(pairs: list[tuple[int, int]], seed: int):
    rows = rows_of(pairs)
    try:
        splits = hold_out(rows, SplitSizes(rater=2, valid=1, test=2), seed, "c")
    except errors.DataError:
        return
    check_disjoint(splits)
    owner = {row.id: split for split, members in splits.items() for row in members}
    for group in components(rows):
        assert len({owner[i] for i in group if i in owner}) <= 1
        if any(owner.get(i) == "train" for i in group):
            assert all(owner.get(i) == "train" for i in group)
    assert [len(splits[s]) for s in ("rater", "valid", "test")] == [2, 1, 2]


def unconnected(count: int) -> list[Row]:
    return [Row(i, f"source {i}", f"target {i}") for i in range(count)]


def test_sizes_are_exact_and_rows_sorted():
    splits = hold_out(unconnected(100), SplitSizes(rater=20, valid=10, test=15), 0, "c")
    assert list(splits) == ["train", "rater", "valid", "test"]
    assert {split: len(rows) for split, rows in splits.items()} == {
        "train": 55,
        "rater": 20,
        "valid": 10,
        "test": 15,
    }
    assert all(rows == sorted(rows) for rows in splits.values())


def test_held_out_rows_have_distinct_sources():
    rows = [Row(i, f"source {i // 5}!", f"target {i}") for i in range(200)]
    splits = hold_out(rows, SplitSizes(rater=5, valid=5, test=10), 0, "c")
    for split in ("rater", "valid", "test"):
        assert max(collections.Counter(sentence_key(row.source) for row in splits[split]).values()) == 1
        assert all(row.id % 5 == 0 for row in splits[split]), "the first row of each source"
    assert len(splits["train"]) == 200 - 5 * 20


def test_choice_depends_on_seed_and_little_on_other_rows():
    sizes = SplitSizes(test=50)
    before = {row.source for row in hold_out(unconnected(500), sizes, 0, "c")["test"]}
    more = {row.source for row in hold_out(unconnected(510)[5:], sizes, 0, "c")["test"]}
    other_seed = {row.source for row in hold_out(unconnected(500), sizes, 1, "c")["test"]}
    assert len(before & more) >= 45
    assert len(before & other_seed) <= 15
    shuffled = hold_out(unconnected(500)[::-1], sizes, 0, "c")["test"]
    assert {row.source for row in shuffled} == before


def test_nothing_held_out_is_all_train():
    assert hold_out(unconnected(3), SplitSizes(), 0, "c") == {"train": unconnected(3)}


@pytest.mark.parametrize("sizes", [SplitSizes(test=10), SplitSizes(valid=6, test=6), SplitSizes(rater=99)])
def test_too_small_a_corpus_is_an_error(sizes: SplitSizes):
    with pytest.raises(errors.DataError, match="pairs.tsv has 10 usable rows in 10 groups") as caught:
        hold_out(unconnected(10), sizes, 0, "pairs.tsv")
    assert "test_size" in caught.value.remedy


def test_a_shared_sentence_is_named_with_both_splits():
    train, test = [Row(1, "ein Hund", "a dog")], [Row(2, "der Hund", "A dog!")]
    with pytest.raises(
        errors.DataError, match=r"target sentence 'A dog!' is in train \(row 1\) and in test \(row 2\)"
    ):
        check_disjoint({"train": train, "test": test})
    with pytest.raises(errors.DataError, match="source sentence"):
        check_disjoint({"valid": [Row(1, "x", "a")], "test": [Row(2, "X.", "b")]})
    check_disjoint({"train": [Row(1, "same", "a"), Row(2, "same", "b")], "test": [Row(3, "a", "same")]})


def test_a_repeated_id_is_an_error():
    with pytest.raises(errors.DataError, match="id 7 is in train and again in test"):
        check_disjoint({"train": [Row(7, "a", "b")], "test": [Row(7, "c", "d")]})


def test_overlap_is_dropped_from_the_split_that_gives_way():
    splits = {
        "train": [Row(1, "a", "A1"), Row(2, "b", "B1"), Row(3, "c", "C"), Row(4, "d", "D")],
        "valid": [Row(11, "b", "B2"), Row(12, "e", "E")],
        "test": [Row(21, "x", "a1."), Row(22, "e!", "F")],
    }
    kept, dropped = drop_overlap(splits)
    assert [row.id for row in kept["test"]] == [21, 22]
    assert [row.id for row in kept["valid"]] == [11]
    assert [row.id for row in kept["train"]] == [3, 4]
    assert dropped == {"train": 2, "valid": 1, "test": 0}
    check_disjoint(kept)
