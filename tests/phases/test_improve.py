"""What passes the threshold, worked out by hand, and what stops an Improve step before it trains."""

from __future__ import annotations

import numpy as np
import pytest

from rest_jax import errors
from rest_jax.objectives.filters import threshold_rule
from rest_jax.phases import improve, selection
from rest_jax.phases.grow_set import open_grow_set
from rest_jax.phases.lineage import PolicyName
from tests.phases import places
from tests.phases.places import FIRST_ID

# Three sources in D. Samples: two of source 0, two of source 2, in the order of the store.
IDS = [FIRST_ID, FIRST_ID, FIRST_ID + 2, FIRST_ID + 2]
REWARDS = [0.5, 0.9, 0.8, float("nan")]
OF_DATASET = [0.85, 0.8, 0.2]


def a_place(tmp_path, *bindings: str, rewards=REWARDS, of_dataset=OF_DATASET, truncated=None):
    """A run up to the rewards of its first Grow step; thresholds (0.8, 0.95) unless others are given."""
    thresholds = () if any("Schedule" in b for b in bindings) else ("ThresholdSchedule.values=(0.8, 0.95)",)
    off = "ThresholdSchedule.quantiles=None" if "quantiles=(" not in "".join(bindings) else "SEED=0"
    place = places.workspace(tmp_path, off, *thresholds, *bindings)
    places.put_text(place, train=places.made_up(3), valid=places.made_up(2, FIRST_ID + 100))
    places.put_policy(place)
    places.put_grow(place, IDS, [0, 1, 0, 1], ["a", "b", "c", "d"], truncated)
    places.put_rewards(place, rewards, of_dataset)
    return place


def survivors(place, tau: float):
    found = selection.survivors(place, open_grow_set(place, 1), threshold_rule(tau))
    return found.pairs, found.story


def test_the_union_is_filtered_strictly(tmp_path):
    """Above 0.8: sample 1 (0.9) and pair 0 of D (0.85); 0.8 itself and NaN do not pass."""
    pairs, story = survivors(a_place(tmp_path), 0.8)
    assert pairs.ids.tolist() == [FIRST_ID, FIRST_ID]
    assert places.lists(pairs.sources) == [[10, 1], [10, 1]]
    assert places.lists(pairs.targets) == [[101, 1], [50, 1]]
    assert {k: story[k] for k in ("threshold", "kept", "kept_samples", "kept_dataset")} == {
        "threshold": 0.8, "kept": 2, "kept_samples": 1, "kept_dataset": 1,
    }  # fmt: skip
    assert (story["samples"], story["dataset"]) == (4, 3)
    assert (story["sources"], story["sources_with_none"]) == (2, 1)
    assert story["mean_kept_reward"] == 0.9


def test_a_threshold_just_below_lets_equals_pass(tmp_path):
    pairs, story = survivors(a_place(tmp_path), np.nextafter(0.8, 0))
    assert places.lists(pairs.sources) == [[10, 1], [12, 1], [10, 1], [11, 1]]
    assert places.lists(pairs.targets) == [[101, 1], [102, 1], [50, 1], [51, 1]]
    assert story["sources_with_none"] == 0


def test_one_switch_keeps_the_original_data_whole(tmp_path):
    pairs, story = survivors(a_place(tmp_path, 'ImproveConfig.dataset="whole"'), 0.8)
    assert places.lists(pairs.targets) == [[101, 1], [50, 1], [51, 1], [52, 1]]
    assert (story["kept_samples"], story["kept_dataset"], story["kept"]) == (1, 3, 4)


def test_truncated_samples_are_left_out_unless_asked_for(tmp_path):
    cut = [False, True, False, False]
    pairs, story = survivors(a_place(tmp_path / "out", truncated=cut), 0.7)
    assert places.lists(pairs.targets) == [[102, 1], [50, 1], [51, 1]]
    assert story["truncated_left_out"] == 1
    place = a_place(tmp_path / "in", "GuardConfig.truncated=False", truncated=cut)
    pairs, story = survivors(place, 0.7)
    assert places.lists(pairs.targets) == [[101, 1], [102, 1], [50, 1], [51, 1]]
    assert story["truncated_left_out"] == 0


def test_data_alone_may_survive(tmp_path):
    pairs, story = survivors(a_place(tmp_path, rewards=[0.1, 0.2, 0.3, 0.4]), 0.8)
    assert places.lists(pairs.targets) == [[50, 1]]
    assert (story["kept_samples"], story["sources_with_none"], story["mean_kept_reward"]) == (0, 2, None)


def test_nothing_surviving_stops_before_training(tmp_path):
    place = a_place(tmp_path, "ThresholdSchedule.values=(0.95,)")
    with pytest.raises(errors.DataError) as raised:
        improve.improve(place, PolicyName(1, 1))
    line = str(raised.value)
    assert "threshold 0.95 keeps 0 of 7" in line
    assert "max reward 0.9" in line and "quantiles" in line
    folder = place.policy_folder(PolicyName(1, 1))
    assert not (folder / "checkpoints").exists() and not (folder / "params").exists()


def test_the_first_threshold_must_exceed_the_mean(tmp_path):
    """The finite rewards 0.5, 0.9, 0.8, 0.85, 0.8, 0.2 have the mean 0.675."""
    place = a_place(tmp_path, "ThresholdSchedule.values=(0.6, 0.7)")
    for name in (PolicyName(1, 1), PolicyName(1, 2)):
        with pytest.raises(
            errors.ConfigError, match="first threshold 0.6 is not above the mean reward 0.675"
        ):
            selection.rule_of(place, open_grow_set(place, 1), name)


def test_one_switch_turns_that_into_a_warning(tmp_path, capsys):
    place = a_place(tmp_path, "ThresholdSchedule.values=(0.6, 0.7)", "ImproveConfig.require_above_mean=False")
    assert selection.rule_of(place, open_grow_set(place, 1), PolicyName(1, 2)).threshold == 0.7
    assert "warning: first threshold 0.6 is not above the mean reward 0.675" in capsys.readouterr().err


def test_quantiles_are_of_samples_and_data_together(tmp_path):
    """Sorted: 0.2 0.5 0.8 0.8 0.85 0.9; two thirds of them are at most 0.8."""
    place = a_place(tmp_path, "ThresholdSchedule.quantiles=(0.65, 0.8)")
    grow_set = open_grow_set(place, 1)
    assert selection.rule_of(place, grow_set, PolicyName(1, 1)).threshold == 0.8
    assert selection.rule_of(place, grow_set, PolicyName(1, 2)).threshold == 0.85


def test_the_learning_rate_falls_with_every_improve_step_of_the_run(tmp_path):
    place = places.workspace(tmp_path, "ImproveConfig.learning_rate_decay=0.5", "GROW_STEPS=3")
    names = [PolicyName(g, i) for g in (1, 2, 3) for i in (1, 2)]
    configs = [improve.trainer_config(place, name) for name in names]
    np.testing.assert_allclose(
        [c.optimizer.learning_rate for c in configs], [2e-3 * 0.5**k for k in range(6)], rtol=1e-12
    )
    assert {c.train_steps for c in configs} == {40}


@pytest.mark.parametrize("name", [PolicyName(0, 1), PolicyName(1, 0), PolicyName(1, 3), PolicyName(3, 1)])
def test_a_step_that_the_run_does_not_have_is_refused(tmp_path, name):
    with pytest.raises(errors.ConfigError, match=f"no Improve step {name.folder}: G = 2, I = 2"):
        improve.improve(places.workspace(tmp_path), name)


def test_what_has_to_come_before_is_named(tmp_path):
    place = places.workspace(tmp_path)
    with pytest.raises(errors.MissingInputError, match="policy/bc is missing .*`rest-jax pretrain` first"):
        improve.improve(place, PolicyName(1, 1))
    places.put_policy(place)
    with pytest.raises(errors.MissingInputError, match="`rest-jax annotate` first"):
        improve.improve(place, PolicyName(1, 1))
    with pytest.raises(errors.MissingInputError, match="g1_i1 is missing .*`rest-jax improve` first"):
        improve.improve(place, PolicyName(1, 2))
