from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rest_jax.network.mesh import MeshConfig, make_mesh
from rest_jax.training import state, step
from rest_jax.training.optimizers import OptimizerConfig, make_optimizer
from rest_jax.types import LossSums
from tests.training import toys


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(), jax.devices()[:1])


def noise_loss(params, batch, dropout_key):
    """Its gradient is the noise that the key draws."""
    noise_B = jax.random.normal(dropout_key, batch["rows"].shape)
    return LossSums(jnp.sum(noise_B * params["w"][: len(noise_B)]), jnp.sum(batch["weights"]), {})


def run_steps(mesh, loss_fn, params, batch, steps, microbatches=1):
    optimizer, schedule = make_optimizer(OptimizerConfig("sgd", b1=0.0, learning_rate=1.0, clip_norm=0.0))
    abstract = state.abstract_state(params, optimizer, mesh)
    train_step = step.make_train_step(
        step.Objective(loss_fn), optimizer, schedule, microbatches, mesh, abstract
    )
    current, seen = state.init_state(params, optimizer, abstract), []
    for _ in range(steps):
        before = np.asarray(current.params["w"])
        current, metrics = train_step(current, step.place_batch(batch, mesh), np.zeros(2, np.uint32), {})
        seen.append((before - np.asarray(current.params["w"]), jax.device_get(metrics)))
    return current, seen


def test_dropout_differs_between_steps_and_microbatches_and_repeats(mesh):
    batch = {"rows": np.zeros(4, np.float32), "weights": np.full(4, 0.25, np.float32)}
    params = {"w": np.zeros(4, np.float32)}
    whole = [gradient for gradient, _ in run_steps(mesh, noise_loss, params, batch, 3)[1]]
    again = [gradient for gradient, _ in run_steps(mesh, noise_loss, params, batch, 3)[1]]
    np.testing.assert_array_equal(whole, again)
    assert len({gradient.tobytes() for gradient in whole}) == 3
    key = jax.random.fold_in(jax.random.wrap_key_data(jnp.zeros(2, jnp.uint32), impl="threefry2x32"), 0)
    draws = [jax.random.normal(jax.random.fold_in(key, part), (2,)) for part in range(2)]
    ((halves, _),) = run_steps(mesh, noise_loss, params, batch, 1, microbatches=2)[1]
    np.testing.assert_allclose(halves[:2], draws[0] + draws[1], rtol=1e-5)
    assert float(jnp.abs(draws[0] - draws[1]).max()) > 0.1


def test_a_batch_without_weight_changes_nothing_and_is_finite(mesh):
    def loss_fn(params, batch, key):
        return LossSums(jnp.sum(batch["weights"] * params["w"]), jnp.sum(batch["weights"]), {})

    params = {"w": np.ones(4, np.float32)}
    last, seen = run_steps(mesh, loss_fn, params, {"weights": np.zeros(4, np.float32)}, 1)
    assert int(last.skipped) == 0 and float(seen[0][1]["weight"]) == 0.0
    np.testing.assert_array_equal(last.params["w"], params["w"])


def test_counts_what_is_not_finite(mesh):
    def loss_fn(params, batch, key):
        return LossSums(jnp.sum(jnp.log(batch["rows"]) * params["w"]), jnp.float32(1), {})

    last, seen = run_steps(mesh, loss_fn, {"w": np.ones(2, np.float32)}, {"rows": -np.ones(2, np.float32)}, 3)
    assert [int(metrics["skipped_in_a_row"]) for _, metrics in seen] == [1, 2, 3]
    assert (int(last.step), int(last.skipped)) == (3, 3)
    assert float(seen[-1][1]["learning_rate"]) == 1.0


@pytest.mark.parametrize("start", [1.0, -1e38, 3e38, np.inf, -np.inf, np.nan])
def test_a_new_parameter_that_is_not_finite_is_left_out(mesh, start):
    def loss_fn(params, batch, key):
        return LossSums(jnp.sum(batch["slopes"] * params["w"][:2] * 0 + batch["slopes"]), jnp.float32(1), {})

    # No gradient and a finite loss: all that can be wrong is a parameter that has no part in the loss.
    params = {"w": np.array([0.0, 1.0, start], np.float32), "b": np.zeros((3, 2), np.float32)}
    last, _ = run_steps(mesh, loss_fn, params, {"slopes": np.ones(2, np.float32)}, 1)
    assert int(last.skipped) == int(not np.isfinite(np.float32(start)))
    np.testing.assert_array_equal(last.params["w"], params["w"])


def test_microbatches_take_every_row_once(mesh):
    rows = jnp.arange(24).reshape(12, 2)
    parts = jax.jit(lambda x: step._split_rows(x, 3, mesh))(rows)
    assert parts.shape == (3, 4, 2)
    np.testing.assert_array_equal(np.sort(parts.reshape(12, 2), axis=0), rows)


def test_sums_of_parts_are_the_sums_of_the_whole(mesh):
    params, batch = toys.classifier_params(), toys.classifier_batch(0, rows=12)
    key = jax.random.key(0, impl="threefry2x32")
    results = [
        jax.jit(lambda p, b, parts=parts: step.sum_gradients(toys.without_dropout, p, b, key, parts, mesh))(
            params, batch
        )
        for parts in (1, 3)
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), *results)
    assert float(results[0][1].weight) == pytest.approx(float(batch["weights"].sum()))
