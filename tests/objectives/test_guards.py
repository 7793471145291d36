from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rest_jax import errors
from rest_jax.objectives.guards import GuardConfig, GuardedColumns, taken_out
from rest_jax.objectives.kept import KeptCounts

_ROW = st.tuples(
    *[st.booleans()] * 5, st.integers(0, 12), st.integers(1, 6), st.integers(0, 3), st.sampled_from("abc")
)
_CONFIG = st.builds(
    GuardConfig,
    **{
        name: st.booleans()
        for name in ("truncated", "empty", "copy_of_source", "repeated_ngram", "no_round_trip", "distinct")
    },
    length_ratio=st.sampled_from([None, (0.5, 2.0), (0.0, 1.0), (0.89, 1.17)]),
)
_COLUMNS = ("truncated", "empty", "copy_of_source", "repeated_ngram", "round_trip")


def by_hand(config: GuardConfig, rows: list[tuple]) -> list[str | None]:
    """The guard that takes each row: the first that objects."""
    taken, seen = [], set()
    for *flags, tokens, source_tokens, source, text in rows:
        truncated, empty, copied, repeated, round_trip = flags
        objections = [
            ("truncated", config.truncated and truncated),
            ("empty", config.empty and empty),
            ("copy_of_source", config.copy_of_source and copied),
            ("repeated_ngram", config.repeated_ngram and repeated),
            ("no_round_trip", config.no_round_trip and not round_trip),
            (
                "length_ratio",
                config.length_ratio is not None
                and not config.length_ratio[0] * source_tokens
                <= tokens
                <= config.length_ratio[1] * source_tokens,
            ),
            ("distinct", config.distinct and (source, text) in seen),
        ]
        first = next((name for name, objects in objections if objects), None)
        if first is None:
            seen.add((source, text))
        taken.append(first)
    return taken


@settings(deadline=None)
@given(_CONFIG, st.lists(_ROW, max_size=30))
def test_a_sample_is_out_by_the_first_guard_that_objects(config, rows):
    rows.sort(key=lambda row: row[-2])
    columns = list(zip(*rows, strict=True)) if rows else [()] * 9
    given_ = GuardedColumns(
        {name: np.array(columns[k], bool) for k, name in enumerate(_COLUMNS) if name in config.flags},
        tokens=np.array(columns[5], np.int64),
        source_tokens=np.array(columns[6], np.int64),
        source_and_text=np.array([columns[7], [ord(text) for text in columns[8]]], np.int64).T.reshape(-1, 2),
    )
    taken = taken_out(config, given_, len(rows))
    assert tuple(taken) == config.names
    wanted = by_hand(config, rows)
    for name, mask in taken.items():
        assert mask.tolist() == [guard == name for guard in wanted], name
    assert {guard for guard in wanted if guard} <= set(taken)


def test_by_default_only_truncated_samples_are_out():
    assert GuardConfig().names == ("truncated",)
    assert GuardConfig(truncated=False).names == ()
    assert GuardConfig(no_round_trip=True).flags == ("truncated", "round_trip")
    assert GuardConfig(length_ratio=[0.5, 2]).length_ratio == (0.5, 2.0)


@pytest.mark.parametrize(
    "ratio", [(2.0, 0.5), (1.0, 1.0), (-0.1, 1.0), (0.5,), (0.5, "a"), 0.5, (0.5, float("nan"))]
)
def test_a_length_ratio_is_a_window(ratio):
    with pytest.raises(errors.ConfigError, match=r"GuardConfig\.length_ratio.*like \(0\.5, 2\.0\)"):
        GuardConfig(length_ratio=ratio)


# What is counted of what was kept.

_SOURCE = st.lists(
    st.tuples(st.sampled_from([0.1, 0.2, 0.5, 0.9, np.nan]), st.booleans()), min_size=1, max_size=130
)


@settings(deadline=None)
@given(st.lists(_SOURCE, min_size=1, max_size=8), st.data())
def test_counts_against_plain_python_however_sources_are_cut(sources, data):
    sources = [[(r, kept and not np.isnan(r)) for r, kept in source] for source in sources]
    edges = [(0.25, 0.1), (0.5, 0.2), (0.9, 0.5)]
    counts = KeptCounts(edges)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(sources)), max_size=3)))
    for first, last in itertools.pairwise([0, *cuts, len(sources)]):
        part = sources[first:last]
        rows = [row for source in part for row in source]
        starts = np.cumsum([0, *(len(source) for source in part)])[:-1]
        counts.add(np.array([r for r, _ in rows]), np.array([k for _, k in rows], bool), starts)
    rows = [row for source in sources for row in source]
    kept_rewards = [r for r, kept in rows if kept]
    kept = [sum(k for _, k in source) for source in sources]
    assert (counts.total, counts.kept, counts.sources) == (len(rows), sum(kept), len(sources))
    assert counts.missing == sum(np.isnan(r) for r, _ in rows)
    assert counts.sources_with_none == kept.count(0)
    assert counts.mean_kept == pytest.approx(np.mean(kept_rewards) if kept_rewards else np.nan, nan_ok=True)
    assert counts.by_source == {
        "0": kept.count(0), "1": kept.count(1), "2": kept.count(2),
        "3-5": sum(3 <= k <= 5 for k in kept), "6-10": sum(6 <= k <= 10 for k in kept),
        "11-20": sum(11 <= k <= 20 for k in kept), "21-50": sum(21 <= k <= 50 for k in kept),
        "51-100": sum(51 <= k <= 100 for k in kept), "101-": sum(k > 100 for k in kept),
    }  # fmt: skip
    bands = {0.1: 0, 0.2: 1, 0.5: 2, 0.9: 3}
    of_all = [bands[r] for r, _ in rows if not np.isnan(r)]
    of_kept = [bands[r] for r in kept_rewards]
    assert [(b["samples"], b["kept"]) for b in counts.by_quantile] == [
        (of_all.count(k), of_kept.count(k)) for k in range(4)
    ]
    assert [(b["from"], b["to"]) for b in counts.by_quantile] == [
        (0, 0.25),
        (0.25, 0.5),
        (0.5, 0.9),
        (0.9, 1),
    ]


def test_counts_of_nothing():
    counts = KeptCounts()
    counts.add(np.zeros(0), np.zeros(0, bool), np.zeros(0, np.int64))
    assert (counts.total, counts.sources, counts.by_quantile) == (0, 0, [])
    assert counts.facts()["mean_kept_reward"] is None
    with pytest.raises(ValueError, match=r"\(2,\) rewards for \(1,\)"):
        counts.add(np.zeros(2), np.zeros(1, bool), np.zeros(1, np.int64))
