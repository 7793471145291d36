"""PPO on a run made for it: it learns, is on-policy where it says so, and survives kills to the last bit."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from rest_jax import errors, files
from rest_jax.phases import losses, ppo, reward_model, rollouts, token_numbers
from rest_jax.phases.lineage import BC, PPO
from rest_jax.training import checkpoints
from rest_jax.training.logbook import read_metrics
from rest_jax.types import LossContext
from tests import tiny
from tests.phases import ppo_place
from tests.phases.ppo_place import EvenReward


@pytest.fixture(autouse=True)
def reward_is_restored(monkeypatch):
    monkeypatch.setattr(reward_model, "load_reward", reward_model.load_reward)


def metrics_of(place, name: str) -> dict[int, float]:
    lines = [line for line in read_metrics(place.run_dir) if line["phase"] == "policy/ppo"]
    return {line["step"]: line["metrics"][name] for line in lines if name in line["metrics"]}


LEARNING = (
    "PPOSettings.samples=2560",
    "PPOSettings.sources_per_rollout=32",
    "PPOSettings.samples_per_source=8",
    "ppo/TrainerConfig.train_steps=100",
    "ppo/TrainerConfig.eval_period=50",
    "PPOConfig.kl_weight=0.01",
    "ppo/OptimizerConfig.learning_rate=5e-3",
)


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A whole training on the even reward."""
    before = reward_model.load_reward
    place = ppo_place.place(tmp_path_factory.mktemp("learned"), *LEARNING)
    ppo.train(place)
    reward_model.load_reward = before
    return place


def test_the_reward_rises(learned):
    """Half of the ids are even, so that chance gives about a half."""
    valid = metrics_of(learned, "valid/reward")
    assert valid[0] < 0.6
    assert valid[100] > valid[0] + 0.2
    of_rollouts = metrics_of(learned, "rollout/reward")
    assert len(of_rollouts) == 10
    assert np.mean([of_rollouts[90], of_rollouts[80]]) > np.mean([of_rollouts[0], of_rollouts[10]]) + 0.15


def test_distance_entropy_and_the_rest_are_logged(learned):
    kl = metrics_of(learned, "rollout/kl_per_token")
    assert kl[0] == pytest.approx(0, abs=1e-5)  # the first rollout is BC's own
    assert kl[90] > 0.01
    length, whole = metrics_of(learned, "rollout/length"), metrics_of(learned, "rollout/kl_per_sequence")
    for step in kl:
        assert whole[step] == pytest.approx(kl[step] * length[step], rel=1e-4, abs=1e-5)
    assert metrics_of(learned, "rollout/samples")[90] == 2560
    names = ("entropy_per_token", "truncated", "passes", "value_explained_variance", "reward_std_in_source")
    for name in names:
        assert set(metrics_of(learned, f"rollout/{name}")) == set(kl), name
    assert all(0 <= value <= 1 for value in metrics_of(learned, "train/clip_fraction").values())


def test_the_story_and_the_seal_tell_the_budget(learned):
    folder = learned.policy_folder(PPO)
    story = json.loads((folder / "ppo.json").read_text())
    assert (story["samples"], story["rollouts"], story["steps"]) == (2560, 10, 100)
    seal = files.verify_seal(folder)
    assert (seal.phase, seal.facts["samples"]) == ("ppo", 2560)
    assert seal.facts["samples_at_best"] == seal.facts["best_step"] // 10 * 256
    assert not [name for name in seal.files if name.startswith(("rollouts", "checkpoints"))]
    assert not (folder / "rollouts").exists() and not (folder / "checkpoints").exists()
    assert learned.policy_params(PPO).keys() == learned.policy_params(BC).keys()


def test_a_finished_training_is_left_as_it_is(learned, capsys):
    seal = files.read_seal(learned.policy_folder(PPO))
    ppo_place.place(learned.run_dir.parent, *LEARNING)
    ppo.train(learned)
    assert files.read_seal(learned.policy_folder(PPO)) == seal
    assert "rollout" not in capsys.readouterr().err


# On-policy, at first.


def made_rollout(place, number: int = 0):
    params = ppo.initial_params(place)
    kept = rollouts.Rollouts(place, place.policy_folder(PPO))
    kept.before_batch(number * place.experiment.ppo.steps_per_rollout, params)
    return kept, params


def test_at_first_every_ratio_is_1(tmp_path):
    """Before the first update new and old policy are one: nothing is clipped, nothing lies between them."""
    place = ppo_place.place(tmp_path)
    kept, params = made_rollout(place)
    loss = losses.ppo_loss(place.experiment.policy, place.experiment.ppo.objective)
    context = LossContext({}, {}, np.float32(0))
    for step in (0, 1, 2):
        batch = kept.batch_at(step)
        sums = loss(params, batch, None, context)
        assert float(sums.metrics["clip_fraction"][0]) == 0
        assert float(sums.metrics["approx_kl"][0]) == pytest.approx(0, abs=1e-4)
        advantages = batch.token_columns["advantage"]
        assert float(sums.metrics["policy_loss"][0]) == pytest.approx(-advantages.sum(), rel=1e-4, abs=1e-3)
        assert float(sums.weight) == batch.decoder_loss_weights.sum()


def test_columns_of_a_rollout_worked_out_anew(tmp_path):
    """Rewards, penalty, generalised advantages, whitening: in NumPy, sequence by sequence, from the text."""
    place = ppo_place.place(tmp_path, "PPOConfig.discount=0.9", "PPOConfig.kl_weight=0.5")
    start = ppo.initial_params(place)
    moved = jax.tree.map(lambda leaf: leaf * 1.02, start["policy"])  # so that there is a distance to BC
    params = {"policy": moved, "value": start["value"]}
    kept = rollouts.Rollouts(place, place.policy_folder(PPO))
    kept.before_batch(0, params)
    found = kept._read(0)
    pairs = kept._pairs(found.rows, found.targets)
    reference = token_numbers.log_probs(place, start["policy"], pairs, 8)
    texts = ppo_place.Numerals().decode_batch([found.targets[row] for row in range(len(pairs))])
    rewards_SxN = EvenReward().score([], texts).reshape(16, 4)
    shaped = rewards_SxN - rewards_SxN.mean(1, keepdims=True)
    shaped /= rewards_SxN.std(1, keepdims=True) + 1e-6
    old, values = found.columns["old_log_prob"], found.columns["old_value"]
    advantages = np.zeros_like(old, np.float64)
    for row, (first, end) in enumerate(zip(pairs.targets.offsets, pairs.targets.offsets[1:], strict=False)):
        later_advantage = later_value = 0.0
        for token in range(end - 1, first - 1, -1):
            reward = -0.5 * (old[token] - reference[token])
            reward += shaped.reshape(-1)[row] if token == end - 1 else 0.0
            delta = reward + 0.9 * later_value - values[token]
            later_advantage = delta + 0.9 * 0.95 * later_advantage
            later_value = values[token]
            advantages[token] = later_advantage
    assert np.abs(old - reference).max() > 1e-3
    np.testing.assert_allclose(found.columns["return"], advantages + values, atol=2e-4)
    white = (advantages - advantages.mean()) / advantages.std()
    np.testing.assert_allclose(found.columns["advantage"], white, atol=1e-3)


def test_samples_without_a_reward_are_left_out(tmp_path):
    place = ppo_place.place(tmp_path)
    kept, _ = made_rollout(place)
    whole = kept._read(0)
    texts = ppo_place.Numerals().decode_batch([whole.targets[row] for row in range(len(whole.rows))])
    other = ppo_place.place(tmp_path / "other", reward=EvenReward(missing=(texts[5],)))
    kept, _ = made_rollout(other)
    fewer = kept._read(0)
    left = [row for row, text in enumerate(texts) if text != texts[5]]
    np.testing.assert_array_equal(fewer.targets.values, whole.targets.take(np.array(left)).values)
    assert all(np.isfinite(column).all() for column in fewer.columns.values())
    nothing = ppo_place.place(tmp_path / "nothing", reward=EvenReward(missing=tuple(texts)))
    with pytest.raises(errors.DataError, match="none of the 64 translations of rollout 0 has a reward"):
        made_rollout(nothing)


def test_sources_of_rollouts():
    """Each pass over D is a new order; a rollout never has a source twice; seeds differ."""
    passes = [np.concatenate([rollouts.source_rows(40, 13, 7, 3 * p + k) for k in range(3)]) for p in (0, 1)]
    for rows in passes:
        assert len(set(rows.tolist())) == 39 and rows.min() >= 0 and rows.max() < 40
    assert not np.array_equal(*passes)
    assert not np.array_equal(rollouts.source_rows(40, 13, 8, 0), passes[0][:13])
    assert sorted(rollouts.source_rows(5, 5, 0, 0).tolist()) == [0, 1, 2, 3, 4]


def test_explained_variance_by_hand():
    assert rollouts.explained_variance(np.array([1.0, 3.0]), np.array([1.0, 3.0])) == 1.0
    assert rollouts.explained_variance(np.array([2.0, 2.0]), np.array([1.0, 3.0])) == 0.0
    assert rollouts.explained_variance(np.array([3.0, 1.0]), np.array([1.0, 3.0])) == -3.0


def test_nothing_is_compiled_after_the_first_rollouts(tmp_path):
    """Rollouts have other lengths each time; shapes that programs see do not."""
    place = ppo_place.place(tmp_path, "ppo/TrainerConfig.eval_period=0")
    compiled: list[str] = []

    def count(name: str, seconds: float, **more) -> None:
        if name.endswith("backend_compile_duration"):
            compiled.append(name)

    after = []
    kept, params = made_rollout(place)
    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        for number in range(1, 4):
            kept.before_batch(3 * number, params)
            after.append(len(compiled))
            jax.block_until_ready(jax.jit(lambda x, n=number: x + n)(1.0))  # the listener is alive
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
    assert after == [0, 1, 2]


# Kills.


def run(folder, point: str = "") -> subprocess.CompletedProcess[str]:
    env = tiny.environment(**({"REST_JAX_FAILPOINT": point} if point else {}))
    return subprocess.run(
        [sys.executable, "-m", "tests.phases.ppo_place", str(folder)],
        cwd=tiny.ROOT, env=env, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    done = run(folder)
    assert done.returncode == 0, done.stderr
    return folder


def digest(folder) -> str:
    return files.verify_seal(folder / "run/policy/ppo").digest


def it_goes_on_to_the_end_of(unbroken, folder) -> None:
    done = run(folder)
    assert done.returncode == 0, done.stderr
    assert digest(folder) == digest(unbroken)
    story = (folder / "run/policy/ppo/ppo.json").read_text()
    assert story == (unbroken / "run/policy/ppo/ppo.json").read_text()


@pytest.mark.slow
def test_killed_within_rollouts_a_training_ends_the_same(unbroken, tmp_path):
    """Rollouts start at steps 0, 3, 6, 9; checkpoints are of 0, 2, 4, 6, 8, 10, 12: some within a rollout."""
    points = ["before-rename:000000.safetensors", "rollout-written:1", "rollout-written:2", "before-fit"]
    for point in points:
        killed = run(tmp_path, point)
        assert killed.returncode == -9, f"no training came to {point}: {killed.stderr[-2000:]}"
    left = sorted(path.name for path in (tmp_path / "run/policy/ppo/rollouts").iterdir())
    assert "000003.safetensors" in left and len(left) <= 3  # what no checkpoint needs is gone
    it_goes_on_to_the_end_of(unbroken, tmp_path)


def test_stopped_within_a_rollout_a_training_ends_the_same(unbroken, tmp_path):
    """It reads the rollout it stands in, and makes one anew that is newer than its checkpoint."""
    assert run(tmp_path, "rollout-written:3").returncode == -9  # at step 9; the newest checkpoint is of 8
    folder = tmp_path / "run/policy/ppo/rollouts"
    assert {"000002.safetensors", "000003.safetensors"} <= {path.name for path in folder.iterdir()}
    newer = (folder / "000003.safetensors").read_bytes()
    (folder / "000003.safetensors").write_bytes(b"of parameters that are no more")
    assert run(tmp_path, "rollout-written:3").returncode == -9
    assert (folder / "000003.safetensors").read_bytes() == newer
    it_goes_on_to_the_end_of(unbroken, tmp_path)


@pytest.mark.parametrize("damage", ["gone", "cut", "changed"])
def test_a_rollout_that_training_stands_within_must_be_there_and_sound(tmp_path, damage):
    place = ppo_place.place(tmp_path)
    kept, params = made_rollout(place)
    path = place.policy_folder(PPO) / "rollouts" / "000000.safetensors"
    whole = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(whole[:100] if damage == "cut" else whole[:-1] + bytes([whole[-1] ^ 1]))
    again = rollouts.Rollouts(place, place.policy_folder(PPO))
    kind = errors.MissingInputError if damage == "gone" else errors.IntegrityError
    with pytest.raises(kind, match="000000.safetensors.*Delete the folder .*policy/ppo"):
        again.before_batch(1, params)


def test_a_rollout_is_read_back_as_it_was_made(tmp_path):
    place = ppo_place.place(tmp_path)
    kept, params = made_rollout(place)
    again = rollouts.Rollouts(place, place.policy_folder(PPO))
    again.before_batch(1, params)
    for step in (0, 1, 2):
        for one, other in zip(*(jax.tree.leaves(r.batch_at(step)) for r in (kept, again)), strict=True):
            np.testing.assert_array_equal(one, other)


# What stops it before it begins.


@pytest.mark.parametrize(
    ("binding", "said"),
    [
        ("PPOSettings.samples=250", "250 samples are no whole .*multiple of 64, such as 256"),
        ("PPOSettings.samples=0", "samples is 0"),
        ("ppo/TrainerConfig.train_steps=13", "13 steps cannot be spread evenly over 4 rollouts"),
        ("ppo/TrainerConfig.batch_size=128", "batch of 128 rows is larger than a rollout of 64"),
        ("PPOConfig.clip=0.0", "clip = 0.0 must be a number above 0"),
        ("PPOConfig.trace=1.5", "trace = 1.5 must be"),
        ("ppo/SamplingConfig.max_length=17", "samples of up to 17 tokens do not fit training rows of 16"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_are_refused(tmp_path, binding, said):
    with pytest.raises(errors.ConfigError, match=said):
        ppo_place.place(tmp_path, binding)


def test_one_sample_a_source_needs_rewards_as_they_are(tmp_path):
    one = ("PPOSettings.samples_per_source=1", "ppo/TrainerConfig.train_steps=16")
    with pytest.raises(errors.ConfigError, match="always 0 after normalising"):
        ppo_place.place(tmp_path, *one)
    place = ppo_place.place(tmp_path, *one, "PPOConfig.normalise_rewards=False")
    rewards = np.array([[0.25], [0.75]])
    np.testing.assert_array_equal(rollouts.shaped_rewards(rewards, place.experiment.ppo), rewards)


def test_more_sources_than_there_are(tmp_path):
    wide = ("PPOSettings.sources_per_rollout=64", "ppo/TrainerConfig.batch_size=8")
    with pytest.raises(errors.ConfigError, match="a rollout takes 64 sources, and D has 40"):
        ppo.train(ppo_place.place(tmp_path, *wide))


def test_a_run_without_settings_or_inputs(tmp_path):
    place = ppo_place.place(tmp_path)
    place.experiment = dataclasses.replace(place.experiment, ppo=None)
    with pytest.raises(errors.ConfigError, match="no settings of PPO .*ppo.gin"):
        ppo.train(place)
    place = ppo_place.place(tmp_path)
    shutil.rmtree(place.policy_folder(BC))
    with pytest.raises(errors.MissingInputError, match="policy/bc is missing .*`rest-jax pretrain` first"):
        ppo.train(place)
    reward = dataclasses.replace(place.experiment.reward, kind="learned")
    place = ppo_place.place(tmp_path)
    place.experiment = dataclasses.replace(place.experiment, reward=reward)
    with pytest.raises(errors.MissingInputError, match="reward/model is missing .*reward_model` first"):
        ppo.train(place)


# As a user runs it.


def test_a_whole_run_goes_on_with_ppo(copied_run, finished_run):
    """rest with the settings of PPO does what is missing: PPO, its evaluation, its row in the report."""
    corpus = finished_run.parent / "pairs.tsv"
    done = tiny.tiny("rest", copied_run, corpus, *tiny.PPO)
    assert done.returncode == 0, done.stderr
    steps = tiny.steps_of(copied_run)
    assert [step["name"] for step in steps][-1] == "PPO"
    assert (steps[-1]["samples"], steps[-1]["threshold"], steps[-1]["loss"]) == (480, None, "PPO")
    verdict = json.loads((copied_run / "report/summary.json").read_text())["verdict"]
    assert verdict["step"] == "BC G=2 I=2"  # ReST's own last step, not the baseline
    page = (copied_run / "report/index.html").read_text()
    assert "PPO: reward" in page and "PPO: distance from BC" in page
    said = tiny.tiny("translate", copied_run, corpus, *tiny.PPO, "--policy=ppo", stdin="one two\n")
    assert said.returncode == 0, said.stderr
    assert re.search(r"\w", said.stdout)
    found = checkpoints.load_params(copied_run / "policy/ppo/params")
    assert checkpoints.params_digest(found) == json.loads(
        (copied_run / "policy/ppo/fit.json").read_text()
    )["params_digest"]  # fmt: skip
