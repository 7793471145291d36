"""What an Improve step trains on, against plain Python on all candidates at once."""

from __future__ import annotations

import math
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rest_jax import errors, files, keys
from rest_jax.data import shards
from rest_jax.objectives import filters, guards, selections
from rest_jax.phases import improve, selection
from rest_jax.phases.grow_set import GrowSet, Sieve, open_grow_set
from rest_jax.phases.lineage import PolicyName
from rest_jax.types import RaggedTokens
from tests import tiny
from tests.phases import places
from tests.phases.places import FIRST_ID

NAN = float("nan")
G1I1 = PolicyName(1, 1)
PERCENTILE = ("ImproveConfig.selection=@PercentileSchedule()", "PercentileSchedule.percentiles=(0.5,)")
TOP_1 = ("ImproveConfig.selection=@TopKSchedule()", "TopKSchedule.counts=(1,)")
MEAN_MAX = ("ImproveConfig.selection=@MeanMaxSchedule()", "MeanMaxSchedule.gammas=(0.0, 0.5)")

# Four sources in D, of which the second and the last have no samples.
IDS = [FIRST_ID] * 4 + [FIRST_ID + 2] * 3
REWARDS = [0.2, 0.6, 0.4, NAN, 0.9, 0.9, 0.1]
OF_DATASET = [0.5, 0.7, 0.9, NAN]


def a_place(tmp_path, *bindings: str, rewards=REWARDS, of_dataset=OF_DATASET, **flags):
    place = places.workspace(tmp_path, *bindings)
    places.put_text(place, train=places.made_up(4), valid=places.made_up(2, FIRST_ID + 100))
    places.put_policy(place)
    places.put_grow(place, IDS, [0, 1, 2, 3, 0, 1, 2], list("abcdefg"), **flags)
    places.put_rewards(place, rewards, of_dataset)
    return place


def targets(found: selection.Selected) -> list[int]:
    """The first token of each target: 100 + k is sample k, 50 + k pair k of D."""
    return [tokens[0] for tokens in places.lists(found.pairs.targets)]


# By hand.


def test_the_pairs_of_d_compete_within_their_sources(tmp_path):
    """Medians: source 0 of 0.2 0.4 0.5 0.6 is 0.4; source 2 of 0.1 0.9 0.9 0.9 is 0.9. A pair alone is its
    own median, so nothing is above it."""
    found = selection.select(a_place(tmp_path, *PERCENTILE), G1I1)
    assert targets(found) == [101, 50]
    assert found.pairs.ids.tolist() == [FIRST_ID, FIRST_ID]
    assert places.lists(found.pairs.sources) == [[10, 1], [10, 1]]
    assert (found.rewards.tolist(), found.is_sample.tolist()) == ([0.6, 0.5], [True, False])
    story = found.story
    assert (story["selection"], story["selection_value"], story["threshold"]) == ("percentile", 0.5, None)
    assert (story["kept"], story["kept_samples"], story["kept_dataset"]) == (2, 1, 1)
    assert (story["samples"], story["sources"], story["sources_with_none"]) == (7, 2, 1)
    assert (story["kept_by_source"]["0"], story["kept_by_source"]["1"]) == (1, 1)
    assert selection.told(story) == (
        "percentile 0.5 of each source keeps 1 of 7 samples and 1 of 4 pairs of D; 1 of 2 sources have no "
        "sample left"
    )


def test_d_whole_stands_beside_the_competition(tmp_path):
    """Source 0 of 0.2 0.4 0.6: above 0.4 is 0.6; source 2 of 0.1 0.9 0.9: nothing is above 0.9."""
    found = selection.select(a_place(tmp_path, *PERCENTILE, 'ImproveConfig.dataset="whole"'), G1I1)
    assert targets(found) == [101, 50, 51, 52, 53]
    np.testing.assert_array_equal(found.rewards, [0.6, 0.5, 0.7, 0.9, NAN])


def test_best_of_n_without_d_is_raft(tmp_path):
    """Of the two 0.9 of source 2 the first sample."""
    found = selection.select(a_place(tmp_path, *TOP_1, 'ImproveConfig.dataset="none"'), G1I1)
    assert (targets(found), found.rewards.tolist()) == ([101, 104], [0.6, 0.9])
    assert found.is_sample.all()
    assert (found.story["kept_dataset"], found.story["sources_with_none"]) == (0, 0)


def test_best_of_n_with_d(tmp_path):
    """Source 0: the sample of 0.6. Source 1: D alone. Source 2: D ties with two samples and is first."""
    found = selection.select(a_place(tmp_path, *TOP_1), G1I1)
    assert targets(found) == [101, 51, 52]


def test_mean_max_of_each_source(tmp_path):
    """Source 0: mean 0.425 of 0.2 0.4 0.5 0.6, maximum 0.6. Source 2: mean 0.7 of 0.1 0.9 0.9 0.9."""
    place = a_place(tmp_path, *MEAN_MAX)
    assert targets(selection.select(place, G1I1)) == [101, 104, 105, 50, 52]
    assert targets(selection.select(place, PolicyName(1, 2))) == [101, 104, 105, 52]  # above 0.5125 and 0.8


def test_a_cap_leaves_one_of_equals_and_does_not_touch_d(tmp_path):
    every = "ThresholdSchedule.quantiles=(0.0,)", "ImproveConfig.require_above_mean=False"
    place = a_place(tmp_path, *every, "ImproveConfig.max_per_source=1")
    found = selection.select(place, G1I1)
    seed = keys.derived_seed(0, "max_per_source")
    kept = []
    for rows in ([0, 1, 2], [4, 5]):  # above 0.1, the lowest reward
        ids = np.array([IDS[row] for row in rows])
        numbers = np.array([row if row < 4 else row - 4 for row in rows])
        priorities = selections.cap_priorities(seed, np.ones(len(rows), np.int64), ids, numbers)
        kept.append(100 + rows[int(priorities.argmin())])
    assert targets(found) == [*kept, 50, 51, 52]


def test_i_0_is_all_of_d_g_whatever_the_filter_the_cap_and_the_shares(tmp_path):
    """Every candidate that has a reward: samples 0 1 2 of source 0, 4 5 6 of source 2, three pairs of D."""
    strict = (*TOP_1, "ImproveConfig.max_per_source=1", "ImproveConfig.model_share=0.9")
    found = selection.select(a_place(tmp_path, *strict), PolicyName(1, 0))
    assert targets(found) == [100, 101, 102, 104, 105, 106, 50, 51, 52]
    assert (found.story["selection"], found.story["max_per_source"]) == ("unfiltered", None)
    assert "no filter keeps 6 of 7 samples and 3 of 4 pairs of D" in selection.told(found.story)


def test_guards_come_before_the_reward(tmp_path):
    """Without the best sample of source 0 the median is that of 0.2 0.4 0.5."""
    copied = np.arange(7) == 1
    place = a_place(tmp_path, *PERCENTILE, "GuardConfig.copy_of_source=True", copy_of_source=copied)
    found = selection.select(place, G1I1)
    assert targets(found) == [50]
    assert found.story["guarded"] == {"truncated": 0, "copy_of_source": 1}
    assert found.story["without_reward"] == 2
    assert "guards took 1 (copy_of_source)" in selection.told(found.story)


def test_nothing_kept_is_an_error_that_states_the_quantiles(tmp_path):
    place = a_place(tmp_path, *PERCENTILE, rewards=[0.5] * 7, of_dataset=[0.5] * 4)
    with pytest.raises(errors.DataError) as raised:
        improve.improve(place, G1I1)
    assert "percentile 0.5 of each source keeps 0 of 11 (max reward 0.5; quantiles 0.5: 0.5" in str(
        raised.value
    )
    assert not (place.policy_folder(G1I1) / "checkpoints").exists()


def test_require_above_mean_is_about_global_thresholds_alone(tmp_path):
    """Global quantile 0.1 is below the mean and refused; a percentile of 0.1 is no such threshold."""
    with pytest.raises(errors.ConfigError, match="not above the mean"):
        selection.select(a_place(tmp_path / "a", "ThresholdSchedule.quantiles=(0.1,)"), G1I1)
    share = "PercentileSchedule.percentiles=(0.1,)"
    assert selection.select(a_place(tmp_path / "b", PERCENTILE[0], share), G1I1).story["kept"] > 2


def test_a_sample_of_an_unknown_source_is_named(tmp_path):
    place = a_place(tmp_path, *TOP_1)
    places.put_text(place, train=places.made_up(4, FIRST_ID + 1))
    with pytest.raises(
        errors.IntegrityError, match=f"a sample is of example {FIRST_ID}, which the train split"
    ):
        selection.survivors(place, open_grow_set(place, 1), selections.TopKSchedule((1,)).rules(())[0])


# Shares.


@pytest.mark.parametrize(
    "samples,dataset,share,wanted",
    [
        (100, 50, None, (100, 50)),
        (100, 50, 0.5, (100, 100)),  # D twice
        (100, 30, 0.5, (100, 100)),  # D three times and 10 of it
        (100, 90, 0.1, (100, 900)),
        (100, 90, 0.9, (810, 90)),  # D has more than its share, so the samples are repeated
        (3, 7, 0.3, (3, 7)),
        (5, 7, 0.0, (0, 7)),
        (5, 7, 1.0, (5, 0)),
        (5, 0, 1.0, (5, 0)),
    ],
)
def test_shares_by_hand(samples, dataset, share, wanted):
    rows = selection.rows_in_shares(samples, dataset, share, seed=3)
    assert ((rows < samples).sum(), (rows >= samples).sum()) == wanted


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(5, 95), st.integers(0, 2**63 - 1))
def test_shares_lose_nothing_and_repeat_evenly(samples, dataset, percent, seed):
    rows = selection.rows_in_shares(samples, dataset, percent / 100, seed)
    times = np.bincount(rows, minlength=samples + dataset)
    sides = times[:samples], times[samples:]
    for side in sides:  # each pair at least once, and any two differ by one repetition at most
        assert side.min() >= 1
        assert side.max() - side.min() <= 1
    assert min(side.max() for side in sides) == 1  # one side is kept as it is
    assert abs(sides[0].sum() - percent / 100 * len(rows)) <= 0.5 + 1e-9
    np.testing.assert_array_equal(rows, selection.rows_in_shares(samples, dataset, percent / 100, seed))


@pytest.mark.parametrize(
    "samples,dataset,share,what", [(0, 5, 0.5, "no sample"), (5, 0, 0.5, "no pair of D")]
)
def test_a_share_of_nothing_is_refused(samples, dataset, share, what):
    with pytest.raises(errors.DataError, match=f"{what} passes the filter.*ImproveConfig.model_share"):
        selection.rows_in_shares(samples, dataset, share, 0)


def test_shares_of_a_run(tmp_path):
    """One sample and one pair of D are kept; at 0.75 the sample is there three times."""
    found = selection.select(a_place(tmp_path, *PERCENTILE, "ImproveConfig.model_share=0.75"), G1I1)
    assert targets(found) == [101, 101, 101, 50]
    assert found.rewards.tolist() == [0.6, 0.6, 0.6, 0.5]
    assert found.is_sample.tolist() == [True, True, True, False]
    assert (found.story["kept"], found.story["pairs"], found.story["pairs_of_samples"]) == (2, 4, 3)
    assert "3 of 4 training pairs are samples" in selection.told(found.story)
    with pytest.raises(errors.ConfigError, match="model share 0.75 needs pairs of D"):
        places.workspace(tmp_path, "ImproveConfig.model_share=0.75", 'ImproveConfig.dataset="none"')


# Any filter on any store.


def brute_force(rows: list[dict], dataset: dict[int, float], config: dict) -> tuple[list, set[int]]:
    """(key of each kept sample) and the kept ids of D, one source at a time in plain Python."""
    kept_samples, kept_dataset = [], set()
    seen: set[tuple[int, str]] = set()
    for row in rows:  # sorted by source, Grow step and sample
        ratio = row["tokens"] / row["source_tokens"]
        out = row["truncated"] or (config["length_ratio"] and not 0.5 <= ratio <= 2.0)
        if not out and config["distinct"]:
            out = (row["id"], row["text"]) in seen
            seen.add((row["id"], row["text"]))
        row["usable"] = NAN if out else row["reward"]
    everything = [row["usable"] for row in rows] + list(dataset.values())
    finite_all = sorted(r for r in everything if math.isfinite(r))
    for source in sorted({row["id"] for row in rows} | set(dataset)):
        pool = [(None, dataset[source])] if config["dataset"] == "filtered" and source in dataset else []
        pool += [(row, row["usable"]) for row in rows if row["id"] == source]
        finite = sorted(r for _, r in pool if math.isfinite(r))
        passed = []
        for place, (row, reward) in enumerate(pool):
            if not math.isfinite(reward):
                continue
            match config["kind"]:
                case "quantile":
                    ok = bool(finite_all) and reward > finite_all[max(-(-6 * len(finite_all) // 10), 1) - 1]
                case "percentile":
                    ok = reward > finite[max(-(-6 * len(finite) // 10), 1) - 1]
                case "top_k":
                    before = [r for _, r in pool[:place] if r == reward]
                    ok = len([r for r in finite if r > reward]) + len(before) < 2
            if ok:
                passed.append(row)
        if None in passed:
            kept_dataset.add(source)
        of_source = [row for row in passed if row is not None]
        if config["cap"]:
            of_source.sort(key=lambda row: row["priority"])
            of_source = sorted(of_source[: config["cap"]], key=lambda row: (row["g"], row["sample"]))
        kept_samples += [(row["id"], row["g"], row["sample"]) for row in of_source]
    return kept_samples, kept_dataset


RULES = {
    "quantile": filters.ThresholdSchedule(quantiles=(0.6,)),
    "percentile": selections.PercentileSchedule((0.6,)),
    "top_k": selections.TopKSchedule((2,)),
}


@pytest.mark.parametrize("group", [1, 7, 10_000])
@pytest.mark.parametrize("grows", [1, 2])
def test_any_filter_on_any_cut_of_the_store(tmp_path, monkeypatch, group, grows):
    monkeypatch.setattr(shards, "ROW_GROUP_ROWS", group)
    rng = np.random.default_rng(11)
    count, times, seed = 18, 6, 99
    place = places.workspace(tmp_path)
    examples = places.made_up(count)
    order = rng.permutation(count)  # D need not be sorted
    places.put_text(place, train=examples.take(order))
    of_dataset = np.where(rng.random(count) < 0.2, NAN, rng.integers(0, 12, count) / 12)
    rows: list[dict] = []
    for g in range(1, grows + 1):
        chosen = FIRST_ID + np.sort(rng.choice(count, 12, replace=False))
        ids, numbers = np.repeat(chosen, times), np.tile(np.arange(times), len(chosen))
        rewards = np.where(rng.random(len(ids)) < 0.1, NAN, rng.integers(0, 12, len(ids)) / 12)
        rewards[rng.random(len(ids)) < 0.05] = np.inf
        texts = [f"text {k}" for k in rng.integers(0, 5, len(ids))]
        truncated = rng.random(len(ids)) < 0.15
        lengths = rng.integers(1, 4, len(ids))
        tokens = RaggedTokens.from_lists(
            [
                [1000 * g + k] * n + [1] * (not cut)
                for k, (n, cut) in enumerate(zip(lengths, truncated, strict=True))
            ]
        )
        places.put_grow(place, ids, numbers, texts, truncated, number=g, tokens=tokens)
        places.put_rewards(place, rewards, of_dataset, number=g)
        priorities = selections.cap_priorities(seed, np.full(len(ids), g), ids, numbers)
        rows += [
            {
                "id": int(ids[k]), "g": g, "sample": int(numbers[k]), "reward": float(rewards[k]),
                "text": texts[k], "truncated": bool(truncated[k]), "tokens": int(lengths[k]),
                "source_tokens": 1, "priority": int(priorities[k]), "first": 1000 * g + k,
            }
            for k in range(len(ids))
        ]  # fmt: skip
    rows.sort(key=lambda row: (row["id"], row["g"], row["sample"]))
    dataset = dict(zip(examples.ids[order].tolist(), of_dataset.tolist(), strict=True))
    found_set = open_grow_set(place, *range(1, grows + 1))
    for kind in RULES:
        for cap, distinct, length_ratio, with_d in [
            (None, False, False, "filtered"), (1, True, False, "filtered"), (2, False, True, "filtered"),
            (None, True, True, "none"),
        ]:  # fmt: skip
            config = {
                "kind": kind, "cap": cap, "distinct": distinct, "length_ratio": length_ratio,
                "dataset": with_d,
            }  # fmt: skip
            check(found_set, rows, dataset, config, seed)


def check(found_set: GrowSet, rows: list[dict], dataset: dict[int, float], config: dict, seed: int) -> None:
    guard = guards.GuardConfig(
        distinct=config["distinct"], length_ratio=(0.5, 2.0) if config["length_ratio"] else None
    )
    filtered = config["dataset"] == "filtered"
    wanted, wanted_dataset = brute_force(rows, dataset if filtered else {}, config)
    (rule,) = RULES[config["kind"]].rules(found_set.usable_rewards(guard, with_dataset=filtered))
    found = found_set.survivors(
        Sieve(rule, guard, config["cap"], seed, dataset_competes=filtered), found_set.reward_bands(guard)
    )
    kept = {(row["id"], row["g"], row["sample"]): row for row in rows}
    assert [tokens[0] for tokens in places.lists(found.tokens)] == [kept[key]["first"] for key in wanted]
    assert found.example_ids.tolist() == [key[0] for key in wanted]
    assert found.rewards.tolist() == [kept[key]["reward"] for key in wanted]
    assert set(found_set.dataset.ids[found.kept_dataset].tolist()) == wanted_dataset
    counts = found.counts
    assert (counts.total, counts.kept) == (len(rows), len(wanted))
    assert counts.sources == len({row["id"] for row in rows})
    assert counts.sources_with_none == counts.sources - len({key[0] for key in wanted})
    assert sum(band["kept"] for band in counts.by_quantile) == len(wanted)
    missing = sum(not math.isfinite(row["usable"]) for row in rows)
    assert counts.missing == missing == len(rows) - sum(band["samples"] for band in counts.by_quantile)


# Several Grow steps.


def two_grow_steps(tmp_path, *bindings: str):
    """Grow 2 has source 0 again, with a better sample and one that Grow 1 has too, and the last source."""
    place = a_place(tmp_path, "GROW_STEPS=2", *bindings)
    ids = [FIRST_ID, FIRST_ID, FIRST_ID + 3]
    tokens = RaggedTokens.from_lists([[200 + k, 1] for k in range(3)])
    places.put_grow(place, ids, [0, 1, 0], ["new", "b", "h"], number=2, tokens=tokens)
    places.put_rewards(place, [0.8, 0.6, 0.3], OF_DATASET, number=2)
    return place


def test_accumulated_grow_steps_compete_together(tmp_path):
    place = two_grow_steps(tmp_path, *TOP_1, "ImproveConfig.accumulate=True", 'ImproveConfig.dataset="none"')
    assert targets(selection.select(place, G1I1)) == [101, 104]
    found = selection.select(place, PolicyName(2, 1))
    assert targets(found) == [200, 104, 202]
    assert found.story["grow_steps"] == [1, 2]
    assert (found.story["samples"], found.story["sources"]) == (10, 3)
    assert list(selection.earlier_rewards(place, 2)) == ["earlier_rewards"]
    assert len(selection.earlier_rewards(place, 2)["earlier_rewards"]) == 1


def test_without_it_a_grow_step_stands_alone(tmp_path):
    place = two_grow_steps(tmp_path, *TOP_1, 'ImproveConfig.dataset="none"')
    assert targets(selection.select(place, PolicyName(2, 1))) == [200, 202]
    assert selection.earlier_rewards(place, 2) == {}


def test_outputs_of_an_earlier_grow_step_count_as_seen(tmp_path):
    """Text "b" of source 0 is in both Grow steps; the quantile 0 is the lowest reward, and strict."""
    bindings = "ThresholdSchedule.quantiles=(0.0,)", "ImproveConfig.require_above_mean=False"
    place = two_grow_steps(tmp_path, *bindings, "ImproveConfig.accumulate=True", "GuardConfig.distinct=True")
    found = selection.select(place, PolicyName(2, 1))
    assert targets(found) == [100, 101, 102, 200, 104, 105, 202, 50, 51, 52]
    assert found.story["guarded"] == {"truncated": 0, "distinct": 1}


def test_later_grow_steps_have_their_own_filter(tmp_path):
    later = (
        "ImproveConfig.later_selection=@TopKSchedule()", "TopKSchedule.counts=(2, 1)", "GROW_STEPS=3",
    )  # fmt: skip
    place = two_grow_steps(tmp_path, "ThresholdSchedule.quantiles=(0.5, 0.6, 0.7)", *later)
    steps_of = place.experiment.improve.steps_of
    assert [steps_of(g) for g in (1, 2, 3)] == [3, 2, 2]
    assert selection.select(place, G1I1).story["selection"] == "threshold"
    story = selection.select(place, PolicyName(2, 2)).story
    assert (story["selection"], story["selection_value"]) == ("top_k", 1)
    with pytest.raises(errors.ConfigError, match="no Improve step g2_i3: G = 3, I = 2"):
        improve.improve(place, PolicyName(2, 3))
    rates = [
        improve.trainer_config(place, name).optimizer.learning_rate
        for name in [PolicyName(1, 1), PolicyName(1, 3), PolicyName(2, 1), PolicyName(3, 1)]
    ]
    np.testing.assert_allclose(np.array(rates) / rates[0], [1, 0.25, 0.125, 0.125 / 4], rtol=1e-12)


# The whole program.


def test_a_run_goes_on_with_another_filter(copied_run, finished_run):
    """Improve made anew: the better half of each source, one sample of it at most, and as much of D."""
    for stale in ("policy/g*", "eval/g*", "grow/g2"):
        for folder in copied_run.glob(stale):
            shutil.rmtree(folder)
    corpus = finished_run.parent / "pairs.tsv"
    given_ = [
        *(f"--gin.{binding}" for binding in PERCENTILE),
        "--gin.ImproveConfig.max_per_source=1",
        "--gin.ImproveConfig.model_share=0.5",
        "--gin.GuardConfig.distinct=True",
    ]
    for verb in ("improve", "evaluate"):
        about = ["--grow_step=1", "--improve_step=1"] if verb == "improve" else ["--policy=g1_i1"]
        done = tiny.tiny(verb, copied_run, corpus, *given_, *about)
        assert done.returncode == 0, done.stderr
    story = files.read_json(copied_run / "policy" / "g1_i1" / "improve.json")
    assert (story["selection"], story["selection_value"], story["threshold"]) == ("percentile", 0.5, None)
    by_source = story["kept_by_source"]
    assert set(by_source.values()) - {by_source["0"], by_source["1"]} == {0}
    assert story["kept_samples"] == by_source["1"] > 0
    assert story["guarded"]["distinct"] > 0
    assert 2 * story["pairs_of_samples"] == story["pairs"]
    done = tiny.program("report", str(copied_run))
    assert done.returncode == 0, done.stderr
    page = (copied_run / "report" / "index.html").read_text(encoding="utf-8")
    assert "percentile 0.5" in page and "Sources of Grow 1 by samples kept" in page
    assert "Share kept in Grow 1 by quantile of reward" in page and "distinct" in page
    done = tiny.program("inspect", str(copied_run))
    assert done.returncode == 0 and "percentile 0.5" in done.stdout, done.stderr
