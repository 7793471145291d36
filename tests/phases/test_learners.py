"""Which network each loss reads, and that a fine-tuning with each of them ends in a policy alone."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from rest_jax import errors, files
from rest_jax.network import init
from rest_jax.phases import improve, learners, selection, token_numbers, value
from rest_jax.phases.lineage import PolicyName
from rest_jax.training import checkpoints
from rest_jax.training.companions import Companions
from rest_jax.types import LossContext
from tests.phases import places
from tests.phases.places import FIRST_ID

IDS = [FIRST_ID, FIRST_ID, FIRST_ID + 2, FIRST_ID + 2]
REWARDS = [0.5, 0.9, 0.8, 0.7]
OF_DATASET = [0.85, 0.8, float("nan")]
FIRST = PolicyName(1, 1)
LOSSES = ("bc", "gold", "v_mpo", "bvmpo", "oac", "bve")
SHORT = (
    "improve/TrainerConfig.train_steps=2",
    "improve/TrainerConfig.eval_period=2",
    "improve/TrainerConfig.evaluate_first=False",
    "GROW_STEPS=1",
    "ThresholdSchedule.quantiles=None",
    "ThresholdSchedule.values=(0.75,)",
    "ImproveConfig.require_above_mean=False",
    'RewardModelConfig.kind="chrf"',
)
SHORT_VALUE = ("value/TrainerConfig.train_steps=2", "value/TrainerConfig.eval_period=2")


def put_params(place, name: str, seed: int) -> None:
    """Seals a policy of random parameters."""
    params = init.init_params(place.experiment.policy, jax.random.key(seed))
    folder = place.run_dir / "policy" / name
    checkpoints.save_params(folder / "params", params)
    files.write_seal(folder, "pretrain" if name == "bc" else "improve", name)


@pytest.fixture
def a_place(finished_run, tmp_path):
    """A run with the vocabulary of the tiny one, a BC policy of random parameters and a scored Grow step."""

    def make(loss: str, *bindings: str):
        reads_values = loss in ("v_mpo", "bvmpo", "oac")
        objective = [] if loss == "bc" else [f"gin_configs/objectives/{loss}.gin"]
        given = (*SHORT, *(SHORT_VALUE if reads_values else ()), *bindings)
        place = places.workspace(tmp_path, *given, gin_files=objective)
        places.put_text(place, train=places.made_up(3), valid=places.made_up(2, FIRST_ID + 100))
        place.vocabulary_folder.parent.mkdir(parents=True, exist_ok=True)
        if not place.vocabulary_folder.exists():
            place.vocabulary_folder.symlink_to(finished_run / "vocab")
        put_params(place, "bc", 1)
        places.put_grow(place, IDS, [0, 1, 0, 1], ["a", "b", "c", "d"])
        places.put_rewards(place, REWARDS, OF_DATASET)
        return place

    return make


def make_learner(place, start_seed: int = 2):
    start = init.init_params(place.experiment.policy, jax.random.key(start_seed))
    return learners.make_learner(place, FIRST, start, selection.select(place, FIRST), 2), start


def test_gold_reads_the_bc_policy_whatever_it_starts_from(a_place):
    place = a_place("gold")
    learner, start = make_learner(place)
    bc = init.init_params(place.experiment.policy, jax.random.key(1))
    wanted = token_numbers.log_probs(place, bc, learner.pairs, 3)
    np.testing.assert_allclose(learner.pairs.token_columns["mle_log_prob"], wanted, atol=1e-5)
    of_start = token_numbers.log_probs(place, start, learner.pairs, 3)
    assert np.abs(of_start - wanted).max() > 0.1
    assert dict(learner.companions.lagging) == {"lagging": "policy"}


def test_gold_with_a_copy_of_every_step_needs_no_second_network(a_place):
    learner, _ = make_learner(a_place("gold", "GoldConfig.sync_period=1"))
    assert not learner.companions.lagging


def test_oac_reads_the_reward_of_its_own_pair_and_the_value_of_the_grow_step(a_place):
    place = a_place("oac")
    value.make_value(place, 1)
    learner, _ = make_learner(place)
    columns, pairs = learner.pairs.token_columns, learner.pairs
    # Above 0.75: samples 1 (0.9) and 2 (0.8), pairs 0 (0.85) and 1 (0.8) of D; two tokens each.
    assert places.lists(pairs.targets) == [[101, 1], [102, 1], [50, 1], [51, 1]]
    np.testing.assert_allclose(columns["reward"], np.repeat([0.9, 0.8, 0.85, 0.8], 2), rtol=1e-6)
    params = value.load_value(place, 1)
    found = token_numbers.values(place, value.network_of(place), params, pairs, 1)
    np.testing.assert_allclose(columns["value"], found, atol=1e-5)


def test_v_trace_reads_the_tempered_behaviour_policy(a_place):
    place = a_place("bvmpo")
    value.make_value(place, 1)
    learner, _ = make_learner(place)
    bc = init.init_params(place.experiment.policy, jax.random.key(1))
    tempered = token_numbers.log_probs(place, bc, learner.pairs, 3, place.experiment.grow.sampling)
    np.testing.assert_allclose(learner.pairs.token_columns["behaviour_log_prob"], tempered, atol=1e-5)
    assert set(learner.params) == {"policy", "value", "duals"}
    assert set(learner.companions.frozen) == {"prior"}
    without = make_learner(a_place("v_mpo"))[0]
    assert not without.companions.frozen


@pytest.mark.parametrize("loss", LOSSES)
def test_an_improve_step_with_each_loss_moves_the_policy_and_keeps_nothing_else(a_place, loss):
    place = a_place(loss)
    if place.experiment.needs_value:
        value.make_value(place, 1)
    improve.improve(place, FIRST)
    bc = init.init_params(place.experiment.policy, jax.random.key(1))
    made = place.policy_params(FIRST)
    assert jax.tree.structure(made) == jax.tree.structure(bc)
    moved = jax.tree.map(lambda a, b: float(np.abs(np.asarray(a) - np.asarray(b)).max()), made, bc)
    assert max(jax.tree.leaves(moved)) > 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(made))


@pytest.mark.parametrize("loss", ["gold", "bvmpo", "oac", "bve"])
def test_gradients_reach_the_policy_of_the_batch_and_no_companion(a_place, loss):
    """Pairs that fill a batch twice have the same averages as once."""
    place = a_place(loss)
    if place.experiment.needs_value:
        value.make_value(place, 1)
    learner, start = make_learner(place)
    from rest_jax.data import batches

    (batch,) = batches.eval_batches(learner.pairs, 4, 32, 32, pack=False)
    companions = learner.companions or Companions()
    lagging = {name: learner.params[part] for name, part in companions.lagging.items()}

    def averaged(params, of_batch):
        if learner.companions is None:
            sums = learner.loss_fn(params, of_batch, None)
        else:
            context = LossContext(companions.frozen, lagging, np.float32(0.5))
            sums = learner.loss_fn(params, of_batch, None, context)
        return sums.loss / sums.weight

    twice = jax.tree.map(lambda x: np.concatenate([x, x]), batch)
    gradient = jax.jit(jax.grad(averaged))
    once, doubled = gradient(learner.params, batch), gradient(learner.params, twice)
    flat = jax.tree.leaves(once)
    assert max(float(np.abs(leaf).max()) for leaf in flat) > 1e-6
    for a, b in zip(flat, jax.tree.leaves(doubled), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    assert jax.tree.structure(once) == jax.tree.structure(learner.params)
    del start


def test_a_loss_that_reads_values_says_what_is_missing(a_place):
    with pytest.raises(errors.MissingInputError, match="value/g1 is missing .*rest-jax value"):
        improve.improve(a_place("oac"), FIRST)
    with pytest.raises(errors.ConfigError, match=r"OAC discounts by 0\.9, and its value function by 1\.0"):
        a_place("oac", "OACConfig.discount=0.9")
    with pytest.raises(errors.ConfigError, match="OAC reads a value function, and the run has none"):
        a_place("oac", "Experiment.value=None")


def test_the_value_function_reports_how_it_ranks(a_place):
    place = a_place("oac", "value/TrainerConfig.train_steps=60", "value/TrainerConfig.eval_period=60")
    value.make_value(place, 1)
    report = files.read_json(place.value_folder(1) / "report.json")
    # Four samples and the two pairs of D that have a reward.
    assert report["pairs"] == 6
    assert report["spearman_last"] > 0.9
    assert set(report) == {"pairs"} | {
        f"{kind}_{place}" for kind in ("kendall", "spearman") for place in ("first", "middle", "last")
    }
