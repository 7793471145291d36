"""Trainings of several parts: other optimisers, lagging copies, frozen networks, what is kept of it all."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rest_jax import errors
from rest_jax.network.mesh import MeshConfig, make_mesh
from rest_jax.training import checkpoints, trainer
from rest_jax.training.companions import Companions
from rest_jax.training.logbook import Logbook
from rest_jax.training.optimizers import OptimizerConfig
from rest_jax.types import LossSums

SGD = OptimizerConfig("sgd", b1=0.0, learning_rate=0.5, clip_norm=0.0)
SLOW = dataclasses.replace(SGD, learning_rate=0.1)
PARAMS = {"policy": {"w": np.zeros(2, np.float32)}, "dual": {"eta": np.float32(0.25)}}


@pytest.fixture
def mesh():
    return make_mesh(MeshConfig(data=1, model=1), devices=jax.devices()[:1])


def batch_at(step: int) -> dict[str, np.ndarray]:
    return {"x": np.full((2, 2), step + 1, np.float32)}


def loss(params, batch, key, context):
    """Gradients that can be told by hand: of the policy −x + frozen − lagging, of the dual 1."""
    del key
    pull = context.frozen["prior"]["w"] - context.lagging["old"]["w"]
    value = jnp.sum(params["policy"]["w"] * (pull - batch["x"][0])) + params["dual"]["eta"]
    return LossSums(value, jnp.float32(1), {"progress": (context.progress, jnp.float32(1))})


def companions(**changes) -> Companions:
    settings = {
        "frozen": {"prior": {"w": jnp.array([1.0, 2.0], jnp.float32)}},
        "lagging": {"old": "policy"},
        "sync_period": 2,
        "optimizers": {"dual": SLOW},
        "project": lambda p: {**p, "dual": {"eta": jnp.maximum(p["dual"]["eta"], 0.1)}},
        "result": "policy",
    }
    return Companions(**{**settings, **changes})


def fit(folder, mesh, steps, seen=None, **changes):
    config = trainer.TrainerConfig(
        train_steps=steps, batch_size=2, optimizer=SGD, eval_period=1, best_metric="m", best_mode="max"
    )

    def judge(params, step):
        if seen is not None:
            seen.append((step, np.asarray(params["w"])))
        return {"m": float(step)}

    made = trainer.Trainer(config, loss, mesh, None, companions(**changes))
    return made.fit(PARAMS, batch_at, [judge], folder, Logbook(folder), 0)


def expected(steps: int) -> list[np.ndarray]:
    policy, old, seen = np.zeros(2), np.zeros(2), []
    for step in range(steps):
        policy = policy - 0.5 * (np.array([1.0, 2.0]) - old - (step + 1))
        if (step + 1) % 2 == 0:
            old = policy
        seen.append(policy)
    return seen


def test_each_part_has_its_optimiser_copies_lag_and_the_result_is_one_part(tmp_path, mesh):
    seen = []
    result = fit(tmp_path, mesh, 5, seen)
    for (_, got), want in zip(seen, expected(5), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6)
    assert set(result.params) == {"w"}
    np.testing.assert_allclose(result.params["w"], expected(5)[-1], rtol=1e-6)
    assert set(checkpoints.load_params(tmp_path / "params")) == {"w"}


def test_a_resumed_training_has_the_copies_of_an_unbroken_one(tmp_path, mesh):
    """Stopped at step 3, the copy is that of step 2: neither the start nor the present."""
    stopping = trainer.TrainerConfig(
        train_steps=5, batch_size=2, optimizer=SGD, eval_period=1, best_metric="m", best_mode="max"
    )

    def judge(params, step):
        del params
        if step == 4 and not (tmp_path / "seen").exists():
            (tmp_path / "seen").touch()
            raise KeyError("stop")
        return {"m": float(step)}

    def attempt():
        made = trainer.Trainer(stopping, loss, mesh, None, companions())
        return made.fit(PARAMS, batch_at, [judge], tmp_path / "run", Logbook(tmp_path / "run"), 0)

    with pytest.raises(KeyError):
        attempt()
    np.testing.assert_allclose(attempt().params["w"], expected(5)[-1], rtol=1e-6)


def test_the_projection_holds_after_every_update(tmp_path, mesh):
    """0.25 falls by 0.1 a step and stops at 0.1."""
    result = fit(tmp_path, mesh, 4, result=None)
    assert float(result.params["dual"]["eta"]) == pytest.approx(0.1)


def test_progress_is_the_share_of_the_steps_behind(tmp_path, mesh):
    config = trainer.TrainerConfig(train_steps=4, batch_size=2, optimizer=SGD, eval_period=0, log_period=1)
    made = trainer.Trainer(config, loss, mesh, None, companions())
    book = Logbook(tmp_path)
    logged = []
    book.log = lambda phase, step, metrics: logged.append(metrics["train/progress"])  # type: ignore[method-assign]
    made.fit(PARAMS, batch_at, [], tmp_path, book, 0)
    assert logged == [0.0, 0.25, 0.5, 0.75]


def test_before_batch_sees_the_parameters_of_its_step(tmp_path, mesh):
    seen = {}

    def before(step, params):
        seen[step] = np.asarray(params["policy"]["w"])

    config = trainer.TrainerConfig(train_steps=3, batch_size=2, optimizer=SGD, eval_period=0)
    made = trainer.Trainer(config, loss, mesh, None, companions())
    made.fit(PARAMS, batch_at, [], tmp_path, Logbook(tmp_path), 0, before_batch=before)
    np.testing.assert_allclose(seen[0], 0)
    for step, want in enumerate(expected(2), start=1):
        np.testing.assert_allclose(seen[step], want, rtol=1e-6)


def test_an_optimiser_of_no_part_is_refused(tmp_path, mesh):
    with pytest.raises(errors.ConfigError, match="'value'"):
        fit(tmp_path, mesh, 1, optimizers={"value": SLOW})
    with pytest.raises(errors.ConfigError, match="sync_period"):
        companions(sync_period=0)


def test_adafactor_and_adam_side_by_side(tmp_path, mesh):
    """Statistics of unlike optimisers live in one state, and survive a checkpoint."""
    adafactor, adam = OptimizerConfig("adafactor"), OptimizerConfig("adam")
    config = trainer.TrainerConfig(train_steps=2, batch_size=2, optimizer=adafactor, eval_period=0)
    params = {"policy": {"w": np.ones(2, np.float32)}, "dual": {"eta": np.float32(1.0)}}
    results = []
    for steps in (1, 2):
        made = trainer.Trainer(
            dataclasses.replace(config, train_steps=steps),
            loss,
            mesh,
            None,
            companions(optimizers={"dual": adam}, result=None),
        )
        results.append(made.fit(params, batch_at, [], tmp_path / "one", Logbook(tmp_path / "one"), 0))
    whole = trainer.Trainer(config, loss, mesh, None, companions(optimizers={"dual": adam}, result=None))
    unbroken = whole.fit(params, batch_at, [], tmp_path / "two", Logbook(tmp_path / "two"), 0)
    assert results[1].params_digest == unbroken.params_digest
