from __future__ import annotations

import dataclasses
import io
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rest_jax import errors
from rest_jax.network.mesh import MeshConfig, make_mesh
from rest_jax.training import checkpoints
from rest_jax.training.evaluators import LossEvaluator
from rest_jax.training.logbook import Logbook, read_metrics
from rest_jax.training.optimizers import OptimizerConfig
from rest_jax.training.trainer import Trainer, TrainerConfig, read_fit
from rest_jax.types import LossSums
from tests.training import toys

SGD = OptimizerConfig(name="sgd", b1=0.0, learning_rate=0.1, clip_norm=0.0)
BASE = TrainerConfig(train_steps=12, batch_size=8, eval_period=4, log_period=3, optimizer=SGD)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(), jax.devices()[:1])


@pytest.fixture
def logbook(tmp_path):
    with Logbook(tmp_path, stream=io.StringIO()) as book:
        yield book


def fit(
    mesh,
    logbook,
    folder,
    config=BASE,
    loss_fn=toys.classifier_loss,
    batch_at=toys.classifier_batch,
    evaluators=None,
    params=None,
):
    if evaluators is None:
        batches = [toys.classifier_batch(100 + i) for i in range(2)]
        evaluators = [LossEvaluator(loss_fn, batches, mesh)]
    params = toys.classifier_params() if params is None else params
    return Trainer(config, loss_fn, mesh).fit(params, batch_at, evaluators, folder, logbook, seed=3)


def assert_equal_trees(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


def assert_close_trees(left, right):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), left, right)


def metrics_of(run_dir, phase):
    return [line["metrics"] for line in read_metrics(run_dir) if line["phase"] == phase]


def scripted(values):
    """An evaluator that gives these values of "valid/score", by step."""
    return [lambda params, step: {"valid/score": values[step]}]


def test_finds_the_known_optimum_of_a_regression(mesh, logbook, tmp_path):
    rng = np.random.Generator(np.random.Philox(key=5))
    inputs = rng.normal(size=(64, 4)).astype(np.float32)
    targets = (inputs @ np.array([1.0, -2.0, 0.5, 3.0]) + rng.normal(size=64)).astype(np.float32)
    optimum = np.linalg.lstsq(inputs, targets, rcond=None)[0]

    def squared(params, batch, key):
        errors_B = batch["x"] @ params["w"] - batch["y"]
        return LossSums(jnp.sum(errors_B**2), jnp.float32(len(errors_B)), {})

    config = dataclasses.replace(BASE, train_steps=200, batch_size=64, eval_period=0)
    batch = {"x": inputs, "y": targets}
    result = Trainer(config, squared, mesh).fit(
        {"w": np.zeros(4, np.float32)}, lambda step: batch, [], tmp_path / "fit", logbook, seed=0
    )
    np.testing.assert_allclose(result.params["w"], optimum, atol=1e-4)
    assert result.best_step == 200 and result.best_metrics == {}


def test_one_step_of_sgd_is_the_gradient_of_the_weighted_mean(mesh, logbook, tmp_path):
    config = dataclasses.replace(BASE, train_steps=1)
    result = fit(mesh, logbook, tmp_path / "fit", config, toys.without_dropout)
    start, batch = toys.classifier_params(), toys.classifier_batch(0)

    def mean_loss(params):
        sums = toys.without_dropout(params, batch, None)
        return sums.loss / sums.weight

    expected = jax.tree.map(lambda p, g: p - 0.1 * g, start, jax.grad(mean_loss)(start))
    assert_close_trees(result.params, expected)


@pytest.mark.parametrize("microbatches", [2, 8])
def test_accumulation_equals_the_whole_batch(mesh, logbook, tmp_path, microbatches):
    whole = fit(mesh, logbook, tmp_path / "whole", loss_fn=toys.without_dropout)
    config = dataclasses.replace(BASE, microbatches=microbatches)
    parts = fit(mesh, logbook, tmp_path / "parts", config, toys.without_dropout)
    assert_close_trees(parts.params, whole.params)
    for left, right in zip(metrics_of(tmp_path, "whole"), metrics_of(tmp_path, "parts"), strict=True):
        for name in ("train/loss", "train/accuracy", "train/weight", "train/grad_norm"):
            assert left[name] == pytest.approx(right[name], rel=1e-4)


def test_writes_params_fit_json_and_metrics(mesh, logbook, tmp_path):
    result = fit(mesh, logbook, tmp_path / "policy" / "bc")
    loaded = checkpoints.load_params(tmp_path / "policy" / "bc" / "params")
    assert_equal_trees(loaded, result.params)
    written = read_fit(tmp_path / "policy" / "bc")
    assert written["best_step"] == result.best_step and written["steps"] == 12
    assert written["best_value"] == result.best_metrics["valid/loss"]
    assert written["best_value"] == min(row["valid/loss"] for row in result.history)
    assert [row["step"] for row in written["history"]] == [4, 8, 12]
    lines = read_metrics(tmp_path)
    assert {line["phase"] for line in lines} == {"policy/bc"}
    # Every log_period, and where a checkpoint ends a window.
    assert [line["step"] for line in lines] == [3, 4, 6, 8, 9, 12]
    assert lines[0]["metrics"]["train/learning_rate"] == pytest.approx(0.1)


def test_initial_params_are_not_touched(mesh, logbook, tmp_path):
    params = jax.tree.map(jnp.asarray, toys.classifier_params())
    fit(mesh, logbook, tmp_path / "fit", params=params)
    assert_equal_trees(params, toys.classifier_params())


@pytest.mark.parametrize("name", ["adafactor", "adamw"])
def test_resume_is_bit_exact(mesh, tmp_path, name):
    optimizer = OptimizerConfig(name=name, learning_rate=0.01, schedule="rsqrt", warmup_steps=3)
    config = dataclasses.replace(BASE, optimizer=optimizer, checkpoint_period=3)
    with Logbook(tmp_path / "a", stream=io.StringIO()) as book:
        unbroken = fit(mesh, book, tmp_path / "a" / "fit", config)

    class PowerCutError(Exception):
        pass

    def cut_at(limit):
        def batch_at(step):
            if step == limit:
                raise PowerCutError
            return toys.classifier_batch(step)

        return batch_at

    with Logbook(tmp_path / "b", stream=io.StringIO()) as book:
        for limit in (2, 5, 10):
            with pytest.raises(PowerCutError):
                fit(mesh, book, tmp_path / "b" / "fit", config, batch_at=cut_at(limit))
        resumed = fit(mesh, book, tmp_path / "b" / "fit", config)
    assert_equal_trees(resumed.params, unbroken.params)
    assert resumed.history == unbroken.history and resumed.params_digest == unbroken.params_digest
    assert read_fit(tmp_path / "a" / "fit") == read_fit(tmp_path / "b" / "fit")
    names = ("train/loss", "train/grad_norm", "train/learning_rate", "valid/loss")

    def curve(run):
        return {x["step"]: [x["metrics"].get(name) for name in names] for x in read_metrics(tmp_path / run)}

    assert curve("a") == curve("b")


def test_finished_training_returns_at_once(mesh, logbook, tmp_path):
    first = fit(mesh, logbook, tmp_path / "fit")
    checkpoints.discard_checkpoints(tmp_path / "fit")

    def no_batch(step):
        raise AssertionError("trained again")

    again = fit(mesh, logbook, tmp_path / "fit", batch_at=no_batch)
    assert_equal_trees(again.params, first.params)
    assert dataclasses.replace(again, params=None) == dataclasses.replace(first, params=None)


def test_keeps_the_best_and_the_newest(mesh, logbook, tmp_path):
    scores = {4: 0.2, 8: 0.9, 12: 0.9, 16: 0.1, 20: 0.3}
    config = dataclasses.replace(
        BASE, train_steps=20, best_metric="valid/score", best_mode="max", keep_checkpoints=1
    )
    seen = {}

    def evaluate(params, step):
        seen[step] = jax.device_get(params)
        return {"valid/score": scores[step]}

    result = fit(mesh, logbook, tmp_path / "fit", config, evaluators=[evaluate])
    assert result.best_step == 8  # the earlier of two equals
    assert_equal_trees(result.params, seen[8])
    assert checkpoints.CheckpointStore(tmp_path / "fit" / "checkpoints").steps() == [8, 20]


def test_starting_parameters_compete(mesh, logbook, tmp_path):
    config = dataclasses.replace(BASE, best_metric="valid/score", best_mode="max", evaluate_first=True)
    evaluators = scripted({0: 0.5, 4: 0.4, 8: 0.3, 12: float("nan")})
    result = fit(mesh, logbook, tmp_path / "fit", config, evaluators=evaluators)
    assert result.best_step == 0 and result.best_metrics == {"valid/score": 0.5}
    assert_equal_trees(result.params, toys.classifier_params())
    assert math.isnan(result.history[-1]["valid/score"])


def test_patience(mesh, logbook, tmp_path):
    config = dataclasses.replace(BASE, train_steps=40, best_metric="valid/score", best_mode="max", patience=2)
    values = {4: 0.1, 8: 0.3, 12: 0.2, 16: 0.3, 20: 0.9}
    result = fit(mesh, logbook, tmp_path / "fit", config, evaluators=scripted(values))
    assert (result.steps, result.best_step) == (16, 8)


def test_unknown_best_metric_lists_the_known(mesh, logbook, tmp_path):
    config = dataclasses.replace(BASE, best_metric="valid/reward")
    with pytest.raises(errors.ConfigError, match=r"valid/accuracy, valid/loss"):
        fit(mesh, logbook, tmp_path / "fit", config)


def poisoned(steps):
    def batch_at(step):
        batch = toys.classifier_batch(step)
        if step in steps:
            batch["inputs"][0, 0] = np.nan
        return batch

    return batch_at


@pytest.mark.parametrize("name", ["sgd", "adafactor", "adamw"])
def test_a_step_that_is_not_finite_is_left_out(mesh, logbook, tmp_path, name):
    optimizer = OptimizerConfig(name=name, learning_rate=0.01, schedule="rsqrt")
    config = dataclasses.replace(BASE, optimizer=optimizer, train_steps=6, eval_period=0)
    skipping = fit(mesh, logbook, tmp_path / "a", config, toys.without_dropout, poisoned({2, 3}))
    kept = [0, 1, 4, 5]
    shorter = dataclasses.replace(config, train_steps=4)
    without = fit(
        mesh, logbook, tmp_path / "b", shorter, toys.without_dropout, lambda i: toys.classifier_batch(kept[i])
    )
    assert_equal_trees(skipping.params, without.params)
    assert sum(metrics.get("train/skipped", 0) for metrics in metrics_of(tmp_path, "a")) == 2


def test_stops_when_nothing_is_finite(mesh, logbook, tmp_path):
    config = dataclasses.replace(BASE, train_steps=40)
    with pytest.raises(errors.NonFiniteError, match=r"3 steps in a row up to step 9.*checkpoints/000008"):
        fit(mesh, logbook, tmp_path / "fit", config, batch_at=poisoned(range(6, 40)))
    store = checkpoints.CheckpointStore(tmp_path / "fit" / "checkpoints")
    assert store.steps() == [4, 8]
    for leaf in jax.tree.leaves(store.restore_params(8, toys.classifier_params())):
        assert np.isfinite(leaf).all()


def test_a_huge_learning_rate_never_saves_what_is_not_finite(mesh, logbook, tmp_path):
    optimizer = dataclasses.replace(SGD, learning_rate=1e38)
    config = dataclasses.replace(BASE, optimizer=optimizer, nonfinite_limit=100)
    result = fit(mesh, logbook, tmp_path / "fit", config)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(result.params))


def test_a_damaged_checkpoint_is_passed_over_and_the_result_is_the_same(mesh, logbook, tmp_path):
    unbroken = fit(mesh, logbook, tmp_path / "a")
    with pytest.raises(ZeroDivisionError):
        fit(mesh, logbook, tmp_path / "b", batch_at=lambda step: toys.classifier_batch(step // (step < 10)))
    store = checkpoints.CheckpointStore(tmp_path / "b" / "checkpoints")
    assert store.steps() == [4, 8]
    data = max(
        (path for path in store.path(8).rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
    )
    raw = bytearray(data.read_bytes())
    raw[len(raw) // 2] ^= 1
    data.write_bytes(raw)
    resumed = fit(mesh, logbook, tmp_path / "b")
    assert_equal_trees(resumed.params, unbroken.params)
    assert resumed.history == unbroken.history


def test_training_goes_on_when_asked_for_more_steps(mesh, logbook, tmp_path):
    fit(mesh, logbook, tmp_path / "fit", dataclasses.replace(BASE, train_steps=8))
    longer = fit(mesh, logbook, tmp_path / "fit")
    assert_equal_trees(longer.params, fit(mesh, logbook, tmp_path / "at_once").params)
    with pytest.raises(errors.ConfigError, match="trained for 12 steps, and train_steps is 5"):
        fit(mesh, logbook, tmp_path / "fit", dataclasses.replace(BASE, train_steps=5))


def test_first_line_says_what_is_trained(mesh, tmp_path):
    stream = io.StringIO()
    fit(mesh, Logbook(tmp_path, stream=stream), tmp_path / "policy" / "bc")
    assert stream.getvalue().splitlines()[0] == (
        "policy/bc: 80 parameters; mesh data=1 x model=1; 0.0 MB of state per device; "
        "batch (8, 6), (8,); from the start"
    )


def test_batches_of_another_size_are_an_error(mesh, logbook, tmp_path):
    with pytest.raises(errors.ConfigError, match=r"batch of step 0 .*\(4, 6\), and batch_size is 8"):
        fit(mesh, logbook, tmp_path / "fit", batch_at=lambda step: toys.classifier_batch(step, rows=4))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"train_steps": 0}, "train_steps = 0 must be a whole number of 1 or more"),
        ({"log_period": 2.5}, "log_period = 2.5 must be a whole number"),
        ({"patience": -1}, "patience = -1 must be a whole number of 0 or more"),
        ({"microbatches": 3}, "batch_size = 8 cannot be cut into 3 equal parts"),
        ({"best_mode": "least"}, 'unknown best_mode "least"'),
    ],
)
def test_bad_configurations_are_named(fields, message):
    with pytest.raises(errors.ConfigError, match=message):
        dataclasses.replace(BASE, **fields)
