"""The ratings file, and the automatic rater's rules."""

import gzip
from collections import Counter

import numpy as np
import pytest
import sacrebleu
from hypothesis import given
from hypothesis import strategies as st

from rest_jax import errors
from rest_jax.rewards import ratings as r
from rest_jax.rewards.corruptions import Corruption
from rest_jax.rewards.ratings import RaterConfig, Rating, read_ratings, write_ratings

SOURCES = ["Die Katze sitzt auf der Matte", "Ich gehe heute nach Hause", "Wo ist der Bahnhof der Stadt?"] * 20
REFERENCES = ["The cat sits on the mat", "I am going home today", "Where is the station in this town?"] * 20
SAMPLES = [
    ["The cat is on a mat", "A dog", "A dog"],
    ["I go home", "Ich gehe heute nach Hause"],
    ["Where station?", ""],
] * 20
IDS = list(range(100, 160))


def _rated(seed=0, **fields):
    return r.rate_automatically(SOURCES, REFERENCES, SAMPLES, IDS, seed, RaterConfig(**fields))


def test_natural_scores_are_sacrebleus_chrf():
    natural = [x for x in _rated() if x.kind in ("sample", "reference")]
    for rating in natural:
        reference = REFERENCES[IDS.index(rating.example_id)]
        expected = sacrebleu.sentence_chrf(rating.hypothesis, [reference]).score / 100
        if rating.hypothesis in ("", rating.source):
            assert rating.score == 0.0
        else:
            assert rating.score == pytest.approx(expected)
    assert {x.score for x in natural if x.kind == "reference"} == {1.0}


def test_equal_samples_are_rated_once_and_no_more_than_asked():
    samples = [x for x in _rated() if x.kind == "sample"]
    assert len(samples) == 6 * 20
    assert len({(x.example_id, x.hypothesis) for x in samples}) == len(samples)
    assert len([x for x in _rated(samples_per_source=1) if x.kind == "sample"]) == 60
    assert not [x for x in _rated(samples_per_source=0) if x.kind == "sample"]


def test_a_sample_equal_to_the_reference_counts_as_the_reference():
    found = r.rate_automatically(
        ["ja"], ["yes"], [["yes", "no"]], [1], 0, RaterConfig(reference_share=1.0, corruptions_per_source=0)
    )
    assert [(x.kind, x.hypothesis) for x in found] == [("reference", "yes"), ("sample", "no")]


def test_every_corruption_lies_below_what_it_was_made_from():
    rated = _rated(corruptions_per_source=5, reference_share=1.0)
    kinds = Counter(x.kind for x in rated)
    assert all(kinds[kind] >= 50 for kind in Corruption)
    by_source = {}
    for rating in rated:
        by_source.setdefault(rating.example_id, []).append(rating)
    for rows in by_source.values():
        best = max(x.score for x in rows if x.kind in ("sample", "reference"))
        for row in rows:
            if row.kind in list(Corruption):
                assert row.score <= 0.5 * best
            if row.kind in ("empty", "copied"):
                assert row.score == 0.0


def test_a_corruption_scores_no_more_than_its_own_chrf_and_half_its_original():
    config = RaterConfig(corruption_kinds=("permuted",), corruptions_per_source=1, reference_share=1.0)
    found = r.rate_automatically(["x y"], ["one two three four"], [[]], [3], 0, config)
    assert [x.kind for x in found] == ["reference", "permuted"]
    assert sacrebleu.sentence_chrf(found[1].hypothesis, ["one two three four"]).score > 50
    assert found[1].score == 0.5
    cut = RaterConfig(corruption_kinds=("truncated",), corruptions_per_source=1, corruption_factor=0.99)
    found = r.rate_automatically(["x y"], ["one two three four five six"], [[]], [3], 0, cut)
    chrf = sacrebleu.sentence_chrf(found[-1].hypothesis, ["one two three four five six"]).score / 100
    assert found[-1].kind == "truncated"
    assert found[-1].score == pytest.approx(chrf)
    assert chrf < 0.9


def test_the_kinds_take_turns_and_references_and_samples_are_both_damaged():
    rated = _rated(corruptions_per_source=2)
    kinds = Counter(x.kind for x in rated if x.kind in list(Corruption))
    assert kinds.total() == 120
    assert min(kinds.values()) > 120 / 5 / 2
    permuted = [x for x in rated if x.kind == "permuted"]
    of_reference = [
        sorted(x.hypothesis.split()) == sorted(REFERENCES[IDS.index(x.example_id)].split()) for x in permuted
    ]
    assert 0 < sum(of_reference) < len(permuted)


def test_nothing_is_made_from_an_original_that_scores_zero():
    config = RaterConfig(corruptions_per_source=5, reference_share=1.0)
    found = r.rate_automatically(["a b c"], ["x"], [["a b c", "", "q w"]], [0], 0, config)
    damaged = {x.hypothesis for x in found if x.kind in list(Corruption)}
    assert damaged == {"x x", "a b c", ""}


def test_a_name_may_be_translated_by_itself():
    config = RaterConfig(corruptions_per_source=0, reference_share=0.0)
    found = r.rate_automatically(["Tom Jones!"], ["Tom Jones!!"], [["Tom Jones!"]], [0], 0, config)
    assert found[0].score == 0.0  # not the reference's spelling: a copy
    found = r.rate_automatically(["Tom  Jones"], ["Tom Jones"], [["Tom jones"]], [0], 0, config)
    assert found[0].score == pytest.approx(sacrebleu.sentence_chrf("Tom jones", ["Tom Jones"]).score / 100)


def test_the_share_of_references_is_kept_about():
    assert len([x for x in _rated(reference_share=1.0) if x.kind == "reference"]) == 60
    assert 20 <= len([x for x in _rated(reference_share=0.5) if x.kind == "reference"]) <= 40
    assert not [x for x in _rated(reference_share=0.0) if x.kind == "reference"]


def test_ratings_depend_on_seed_and_example_alone():
    whole = _rated(seed=4)
    assert whole == _rated(seed=4)
    assert whole != _rated(seed=5)
    tail = r.rate_automatically(SOURCES[30:], REFERENCES[30:], SAMPLES[30:], IDS[30:], 4, RaterConfig())
    of_the_example = [x for x in tail if x.kind != "unrelated"]
    assert of_the_example == [x for x in whole if x.example_id >= IDS[30] and x.kind != "unrelated"]


def test_unrelated_references_score_their_chrf_and_are_never_the_own_one():
    unrelated = [x for x in _rated(unrelated_per_source=3) if x.kind == "unrelated"]
    assert len(unrelated) > 60
    for rating in unrelated:
        own = REFERENCES[IDS.index(rating.example_id)]
        assert rating.hypothesis in REFERENCES
        assert rating.hypothesis != own
        assert rating.score == pytest.approx(sacrebleu.sentence_chrf(rating.hypothesis, [own]).score / 100)
    assert not [x for x in _rated(unrelated_per_source=0) if x.kind == "unrelated"]


def test_rank_keeps_the_order_and_spreads_the_scores():
    plain, ranked = _rated(), _rated(score_transform="rank")
    assert [(x.hypothesis, x.kind) for x in plain] == [(x.hypothesis, x.kind) for x in ranked]
    a, b = (np.array([x.score for x in rows]) for rows in (plain, ranked))
    np.testing.assert_array_equal(np.sign(a[:, None] - a), np.sign(np.round(b[:, None] - b, 12)))
    assert b.mean() == pytest.approx(0.5)
    assert b.min() >= 0
    assert b.max() <= 1


@given(st.lists(st.floats(0, 1), min_size=2, max_size=30, unique=True))
def test_ranks_of_different_scores_are_evenly_spread(scores):
    ranks = r.rank_scores(np.array(scores))
    np.testing.assert_allclose(np.sort(ranks), np.linspace(0, 1, len(scores)))
    np.testing.assert_array_equal(np.argsort(ranks), np.argsort(scores))


def test_ranks_by_hand_with_ties():
    ranks = r.rank_scores(np.array([0.0, 0.0, 0.3, 1.0, 1.0]))
    np.testing.assert_allclose(ranks, [0.125, 0.125, 0.5, 0.875, 0.875])
    np.testing.assert_array_equal(r.rank_scores(np.array([0.7])), [0.5])


@pytest.mark.parametrize(
    "fields",
    [
        {"samples_per_source": -1},
        {"corruptions_per_source": -1},
        {"unrelated_per_source": -1},
        {"corruption_kinds": ("burnt",)},
        {"corruption_kinds": ()},
        {"corruption_factor": 1.0},
        {"reference_share": 1.5},
        {"score_transform": "log"},
    ],
)
def test_bad_settings_name_themselves(fields):
    with pytest.raises(errors.ConfigError, match=f"RaterConfig.{next(iter(fields))}"):
        RaterConfig(**fields)


def test_lists_that_do_not_match_cannot_be_rated():
    with pytest.raises(errors.DataError, match="2 sources with 1 references"):
        r.rate_automatically(["a", "b"], ["c"], [[], []], [1, 2], 0, RaterConfig())
    with pytest.raises(errors.DataError, match="0 sources"):
        r.rate_automatically([], [], [], [], 0, RaterConfig())


@pytest.mark.parametrize("name", ["ratings.tsv", "ratings.tsv.gz"])
def test_what_is_written_is_read(tmp_path, name):
    rows = [Rating("ein Haus", "a house", 1 / 3, "sample", 7), Rating("我", "", 0.0, "empty", 2**62)]
    write_ratings(tmp_path / name, rows)
    assert read_ratings(tmp_path / name) == rows
    again = tmp_path / f"again-{name}"
    write_ratings(again, rows)
    assert again.read_bytes() == (tmp_path / name).read_bytes()


@given(
    st.lists(
        st.builds(
            Rating,
            source=st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\0")).filter(
                lambda text: text.strip()
            ),
            hypothesis=st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\0")),
            score=st.floats(0, 1),
            kind=st.sampled_from(["sample", "rated"]),
            example_id=st.integers(-1, 2**63 - 1),
        ),
        min_size=1,
        max_size=5,
    )
)
def test_any_text_survives_the_file_but_for_line_breaks(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("ratings") / "r.tsv"
    write_ratings(path, rows)
    found = read_ratings(path)
    assert [(x.score, x.kind, x.example_id) for x in found] == [(x.score, x.kind, x.example_id) for x in rows]
    for before, after in zip(rows, found, strict=True):
        assert "".join(after.hypothesis.split()) == "".join(before.hypothesis.split())
        if "\t" not in before.source and len(before.source.splitlines()) == 1:
            assert after.source == before.source.splitlines()[0]


def test_a_bare_file_of_three_columns_is_read_and_scaled(tmp_path):
    path = tmp_path / "da.tsv"
    path.write_bytes(b"\xef\xbb\xbfQuelle\tsource\t75\r\nHaus\thouse\t100\n")
    found = read_ratings(path, maximum=100)
    assert found == [Rating("Quelle", "source", 0.75), Rating("Haus", "house", 1.0)]


def test_error_counts_are_turned(tmp_path):
    path = tmp_path / "mqm.tsv"
    path.write_text("a\tb\t0\nc\td\t25\n")
    assert [x.score for x in read_ratings(path, maximum=25, higher_is_better=False)] == [1.0, 0.0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no ratings"),
        (b"source\thypothesis\tscore\n", "holds no ratings"),
        (b"a\tb\t0.5\nonly one\n", r"1 of the columns.*bad.tsv:2"),
        (b"a\tb\n", r"2 of the columns.*bad.tsv:1"),
        (b"a\tb\thigh\n", r"score 'high' is not a number.*bad.tsv:1"),
        (b"a\tb\tnan\n", r"score 'nan' is not a number"),
        (b"a\tb\t0.5\nc\td\t1.5\n", r"score 1.5 is not within \[0.0, 1.0\].*bad.tsv:2"),
        (b"source\thypothesis\tscore\na\tb\t-1\n", r"bad.tsv:2"),
        (b"a\tb\t0.5\n\tb\t0.5\n", r"empty source.*bad.tsv:2"),
        (b"a\tb\t0.5\n\xff\tb\t0.5\n", r"not UTF-8.*bad.tsv:2"),
        (b"a\tb\0\t0.5\n", r"NUL.*bad.tsv:1"),
        (b"a\tb\t0.5\trated\tseven\n", r"example_id 'seven' is not a number"),
        (b"a\tb\t0.5\n\na\tb\t0.5\n", r"bad.tsv:2"),
    ],
)
def test_bad_files_name_the_line(tmp_path, content, message):
    path = tmp_path / "bad.tsv"
    path.write_bytes(content)
    with pytest.raises(errors.DataError) as caught:
        read_ratings(path)
    assert caught.match(message)
    assert "\n" not in str(caught.value)


def test_missing_damaged_and_wrongly_scaled_files(tmp_path):
    with pytest.raises(errors.MissingInputError, match="none.tsv"):
        read_ratings(tmp_path / "none.tsv")
    cut = tmp_path / "cut.tsv.gz"
    cut.write_bytes(gzip.compress(b"a\tb\t0.5\n" * 100)[:-9])
    with pytest.raises(errors.DataError, match="cannot read"):
        read_ratings(cut)
    with pytest.raises(errors.ConfigError, match="scale"):
        read_ratings(cut, minimum=1.0, maximum=0.0)
