from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from rest_jax import errors
from rest_jax.training.optimizers import OPTIMIZERS, OptimizerConfig, make_optimizer, make_schedule


def rates(steps, **fields):
    schedule = make_schedule(OptimizerConfig(**fields))
    return [float(schedule(step)) for step in steps]


def test_constant_with_warmup():
    assert rates([0, 1, 3, 4, 100], learning_rate=0.4, warmup_steps=4) == pytest.approx(
        [0.1, 0.2, 0.4, 0.4, 0.4]
    )


def test_rsqrt_is_t5x_curve_with_its_peak_at_the_end_of_warmup():
    warmup, peak = 10, 0.01
    after = [10, 11, 40, 1000]
    factor = peak * math.sqrt(warmup)
    assert rates(after, learning_rate=peak, schedule="rsqrt", warmup_steps=warmup) == pytest.approx(
        [factor / math.sqrt(step) for step in after]
    )
    assert rates([9], learning_rate=peak, schedule="rsqrt", warmup_steps=warmup) == pytest.approx([peak])
    assert rates([0, 1, 4], learning_rate=peak, schedule="rsqrt") == pytest.approx([peak, peak, peak / 2])


def test_linear_and_cosine_by_hand():
    fields = {"learning_rate": 1.0, "warmup_steps": 2, "decay_steps": 10, "final_fraction": 0.2}
    assert rates([2, 4, 6, 10, 99], schedule="linear", **fields) == pytest.approx([1.0, 0.8, 0.6, 0.2, 0.2])
    quarter = 0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi / 4))
    assert rates([2, 4, 6, 10], schedule="cosine", **fields) == pytest.approx([1.0, quarter, 0.6, 0.2])


def test_adamw_equals_torch():
    rng = np.random.Generator(np.random.Philox(key=2))
    start = rng.normal(size=5).astype(np.float32)
    gradients = rng.normal(size=(4, 5)).astype(np.float32)
    config = OptimizerConfig(
        "adamw", learning_rate=0.1, b1=0.8, b2=0.9, eps=1e-6, weight_decay=0.3, clip_norm=0
    )
    optimizer, _ = make_optimizer(config)
    params, state = jnp.asarray(start), optimizer.init(jnp.asarray(start))
    twin = torch.nn.Parameter(torch.tensor(start))
    torch_optimizer = torch.optim.AdamW([twin], lr=0.1, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.3)
    for gradient in gradients:
        updates, state = optimizer.update(jnp.asarray(gradient), state, params)
        params = optax.apply_updates(params, updates)
        twin.grad = torch.tensor(gradient)
        torch_optimizer.step()
    np.testing.assert_allclose(params, twin.detach().numpy(), rtol=1e-5, atol=1e-6)


def test_clipping_bounds_the_global_norm():
    optimizer, _ = make_optimizer(OptimizerConfig("sgd", learning_rate=1.0, b1=0.0, clip_norm=0.5))
    params = {"a": jnp.zeros(2), "b": jnp.zeros(())}
    gradients = {"a": jnp.array([2.0, 1.0]), "b": jnp.array(2.0)}  # of norm 3
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    np.testing.assert_allclose(updates["a"], [-1 / 3, -1 / 6], rtol=1e-6)
    np.testing.assert_allclose(updates["b"], -1 / 3, rtol=1e-6)


def test_adafactor_step_is_relative_to_the_parameter_only_if_asked():
    def first_step(scale, relative):
        config = OptimizerConfig("adafactor", learning_rate=0.01, multiply_by_parameter_scale=relative)
        optimizer, _ = make_optimizer(config)
        params = jnp.full((4, 3), scale)
        return float(optimizer.update(jnp.ones((4, 3)), optimizer.init(params), params)[0][0, 0])

    assert first_step(8.0, True) == pytest.approx(4 * first_step(2.0, True), rel=1e-5)
    assert (
        first_step(8.0, False)
        == pytest.approx(first_step(2.0, False), rel=1e-6)
        == pytest.approx(-0.01, rel=1e-4)
    )


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_descends_a_bowl(name):
    optimizer, _ = make_optimizer(OptimizerConfig(name, learning_rate=0.05))
    params = {"kernel": jnp.full((3, 2), 2.0)}
    state = optimizer.init(params)
    gradient = jax.jit(jax.grad(lambda p: jnp.sum(p["kernel"] ** 2)))
    update = jax.jit(optimizer.update)
    for _ in range(100):
        updates, state = update(gradient(params), state, params)
        params = optax.apply_updates(params, updates)
    assert float(jnp.abs(params["kernel"]).max()) < 1.0


def test_scaled_changes_the_rate_alone():
    config = OptimizerConfig("adamw", learning_rate=0.4, warmup_steps=3)
    assert config.scaled(0.5) == OptimizerConfig("adamw", learning_rate=0.2, warmup_steps=3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "adamax"}, 'unknown name "adamax".*adafactor, adamw, adam, lion, sgd'),
        ({"schedule": "step"}, "constant, rsqrt, linear, cosine"),
        ({"learning_rate": 0.0}, "learning_rate = 0.0 must be above 0"),
        ({"learning_rate": float("nan")}, "learning_rate = nan must be a finite number"),
        ({"b2": 1.0}, r"b2 = 1.0 must be in \[0, 1\)"),
        ({"clip_norm": -1.0}, "clip_norm = -1.0 must be 0 or more"),
        ({"warmup_steps": "10"}, "warmup_steps = '10' must be a finite number"),
        ({"schedule": "linear"}, "decay_steps = None must be above warmup_steps"),
        ({"schedule": "cosine", "decay_steps": 5, "warmup_steps": 5}, "decay_steps = 5 must be above"),
        ({"name": "adam", "weight_decay": 0.1}, 'choose "adamw"'),
    ],
)
def test_bad_values_are_named(fields, message):
    with pytest.raises(errors.ConfigError, match=message):
        OptimizerConfig(**fields)
