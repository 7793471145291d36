from __future__ import annotations

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rest_jax import errors
from rest_jax.objectives.v_mpo import Anchors, VMPOConfig, annealed, e_step, project_duals, v_mpo
from tests.objectives.episodes import (
    Layout,
    assert_trees_close,
    central_differences,
    descend,
    drawn,
    lengths,
    softmax,
)
from tests.training.toys import run_python

CONFIG = VMPOConfig()
DUALS = {"eta": jnp.float32(0.7), "alpha": jnp.float32(2.0)}
one_step = jax.jit(e_step, static_argnums=3)


def case(seed: int = 0, vocabulary: int = 5):
    """Two layouts of five pairs, and logits, targets, advantages, logits of π_old and of π_β."""
    rng = np.random.default_rng(seed)
    sizes = lengths(rng, 5, 4)
    ragged = [
        drawn(rng, sizes, (vocabulary,)),
        [rng.integers(0, vocabulary, size).astype(np.int32) for size in sizes],
        drawn(rng, sizes),
        drawn(rng, sizes, (vocabulary,)),
        drawn(rng, sizes, (vocabulary,)),
    ]
    return Layout(sizes), Layout(sizes, [[0, 1], [2], [3, 4]]), ragged


def loss_of(layout: Layout, ragged, config=CONFIG, behaviour_weight: float | None = 0.3, duals=None):
    logits, targets, advantages, old, behaviour = (layout.lay(array) for array in ragged)
    anchors = Anchors(old) if behaviour_weight is None else Anchors(old, behaviour, behaviour_weight)
    return v_mpo(logits, targets, layout.weights, advantages, anchors, duals or DUALS, config)


def oracle(ragged, config, behaviour_weight, eta=0.7, alpha=2.0):
    """The loss of a batch of tokens by the formulas, in float64; also its KL and ψ."""
    logits, targets, advantages, old, behaviour = map(np.concatenate, ragged)
    policy, old, behaviour = map(softmax, (logits, old, behaviour))
    kept = np.argsort(-advantages)[: int(config.top_fraction * len(advantages))]
    raised = np.exp(np.float64(advantages[kept]) / eta)
    psi = raised / raised.sum()
    policy_loss = -(psi * np.log(policy[kept, targets[kept]])).sum()
    temperature_loss = eta * (config.epsilon_eta + np.log(raised.mean()))
    kl = (old * np.log(old / policy)).sum(-1).mean()
    prior = (behaviour * np.log(behaviour / policy)).sum(-1).mean()
    dual_loss = alpha * (config.epsilon_alpha - kl) + alpha * kl
    return policy_loss + temperature_loss + dual_loss + (behaviour_weight or 0) * prior, kl, psi


@pytest.mark.parametrize("behaviour_weight", [None, 0.3])
@pytest.mark.parametrize("fraction", [0.5, 0.34, 1.0])
def test_packed_or_not_it_is_the_formula(behaviour_weight, fraction):
    apart, packed, ragged = case()
    config = VMPOConfig(top_fraction=fraction)
    expected, kl, psi = oracle(ragged, config, behaviour_weight)
    alone = loss_of(apart, ragged, config, behaviour_weight)
    assert_trees_close(loss_of(packed, ragged, config, behaviour_weight), alone, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(alone.loss / alone.weight, expected, rtol=1e-5)
    found = {name: float(a / b) for name, (a, b) in alone.metrics.items()}
    assert float(alone.weight) == sum(apart.sizes)
    assert found["kl"] == pytest.approx(kl, rel=1e-5)
    assert found["kept"] == pytest.approx(len(psi) / sum(apart.sizes))
    assert found["effective"] == pytest.approx(np.exp(-(psi * np.log(psi)).sum()) / len(psi), rel=1e-5)
    assert (found["eta"], found["alpha"]) == pytest.approx((0.7, 2.0))
    assert ("kl_behaviour" in found) == (behaviour_weight is not None)


def test_worked_by_hand():
    # A = 1, 0, 3, −1: kept are tokens 2 and 0. η = 2/log 3, so exp(A/η) = 3^(3/2) and 3^(1/2): ψ = 3/4, 1/4
    eta = 2 / math.log(3)
    logits = jnp.log(jnp.array([[[1.0, 3.0], [1.0, 1.0], [1.0, 1.0], [1.0, 1.0]]]))
    anchors = Anchors(logits)  # KL(π_old || π) = 0
    duals = {"eta": jnp.float32(eta), "alpha": jnp.float32(5)}
    sums = v_mpo(
        logits,
        jnp.zeros((1, 4), jnp.int32),
        jnp.ones((1, 4)),
        jnp.array([[1.0, 0, 3, -1]]),
        anchors,
        duals,
        VMPOConfig(epsilon_eta=0.5, epsilon_alpha=0.1),
    )
    policy_loss = 0.25 * math.log(4) + 0.75 * math.log(2)
    temperature_loss = eta * (0.5 + math.log((3**1.5 + 3**0.5) / 2))
    np.testing.assert_allclose(sums.loss / 4, policy_loss + temperature_loss + 5 * 0.1, rtol=1e-6)
    np.testing.assert_allclose(sums.metrics["policy_loss"][0] / 4, policy_loss, rtol=1e-6)
    np.testing.assert_allclose(sums.metrics["kl"][0], 0, atol=1e-6)


@pytest.mark.parametrize("fraction", [0.5, 1.0])
def test_rlax_agrees_in_value_and_gradients(fraction):
    rlax = pytest.importorskip("rlax")
    rng = np.random.default_rng(1)
    logits, old = rng.normal(size=(2, 11, 5)).astype(np.float32)
    targets = rng.integers(0, 5, 11)
    advantages = rng.normal(size=11).astype(np.float32)
    config = VMPOConfig(top_fraction=fraction, epsilon_eta=0.2, epsilon_alpha=0.03)

    def theirs(logits, duals):
        log_probs = jax.nn.log_softmax(logits)
        log_old = jax.nn.log_softmax(old)
        kl = jnp.sum(jnp.exp(log_old) * (log_old - log_probs), -1)
        losses, _ = rlax.vmpo_loss(
            log_probs[jnp.arange(11), targets],
            jnp.asarray(advantages),
            rlax.LagrangePenalty(duals["eta"], config.epsilon_eta),
            [(kl, rlax.LagrangePenalty(duals["alpha"], config.epsilon_alpha))],
            top_k_fraction=fraction,
        )
        return losses.mean()

    def ours(logits, duals):
        sums = v_mpo(
            logits[None],
            jnp.asarray(targets)[None],
            jnp.ones((1, 11)),
            jnp.asarray(advantages)[None],
            Anchors(jnp.asarray(old)[None]),
            duals,
            config,
        )
        return sums.loss / sums.weight

    expected = jax.jit(jax.value_and_grad(theirs, (0, 1)))(jnp.asarray(logits), DUALS)
    found = jax.jit(jax.value_and_grad(ours, (0, 1)))(jnp.asarray(logits), DUALS)
    assert_trees_close(found, expected, rtol=1e-5, atol=1e-6)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.25, 0.5, 1.0]), st.floats(0.01, 100))
def test_the_best_are_kept_and_psi_is_a_distribution(seed, fraction, eta):
    rng = np.random.default_rng(seed)
    advantages = rng.integers(-3, 4, (3, 6)).astype(np.float32)  # with ties
    weights = (rng.uniform(size=(3, 6)) < 0.7).astype(np.float32)
    weights[0, 0] = 1
    poisoned = np.where(weights > 0, advantages, np.nan)
    found = one_step(poisoned, weights, jnp.float32(eta), VMPOConfig(top_fraction=fraction))
    there = np.sort(advantages[weights > 0])
    wanted = max(int(fraction * len(there)), 1)
    kept = (weights > 0) & (advantages >= there[-wanted])
    np.testing.assert_array_equal(found.kept_BxT, kept)
    raised = np.where(kept, np.exp((advantages - there[-1]) / np.float64(eta)), 0)
    np.testing.assert_allclose(found.psi_BxT, raised / raised.sum(), rtol=1e-4, atol=1e-6)
    expected = eta * (CONFIG.epsilon_eta + np.log(raised.sum() / kept.sum())) + there[-1]
    np.testing.assert_allclose(found.temperature_loss, expected, rtol=1e-4, atol=1e-3)


def test_a_weight_of_two_is_two_tokens():
    found = e_step(
        jnp.array([[2.0, 1.0]]), jnp.array([[2.0, 1.0]]), jnp.float32(1), VMPOConfig(top_fraction=1.0)
    )
    twice = e_step(jnp.array([[2.0, 2, 1]]), jnp.ones((1, 3)), jnp.float32(1), VMPOConfig(top_fraction=1.0))
    np.testing.assert_allclose(found.psi_BxT[0, 0], twice.psi_BxT[0, :2].sum(), rtol=1e-6)
    np.testing.assert_allclose(found.temperature_loss, twice.temperature_loss, rtol=1e-6)


def test_gradients_of_policy_and_duals():
    """By differences of the two functions that the stop-gradients make of the loss: in π, and in η and α."""
    _, packed, ragged = case(2)
    with jax.enable_x64(True):
        arrays = [np.nan_to_num(packed.lay(array)) for array in ragged]
        logits, targets, advantages, old, behaviour = (
            array.astype(np.float64) if array.dtype == np.float32 else array for array in arrays
        )
        psi = np.asarray(e_step(advantages, packed.weights, 0.7, CONFIG).psi_BxT)
        mask = packed.weights / packed.weights.sum()

        def of_policy(logits):
            log_probs = jax.nn.log_softmax(logits)
            taken = jnp.take_along_axis(log_probs, targets[..., None], -1)[..., 0]
            cross = -jnp.sum((2.0 * softmax(old) + 0.3 * softmax(behaviour)) * log_probs, -1)
            return -jnp.sum(psi * taken) + jnp.sum(mask * cross)

        kl = oracle(ragged, CONFIG, None)[1]
        best = np.sort(np.concatenate(ragged[2]).astype(np.float64))[::-1]
        best = best[: len(best) // 2]

        def of_duals(duals):
            eta, alpha = duals
            temperature = eta * (CONFIG.epsilon_eta + jnp.log(jnp.mean(jnp.exp(best / eta))))
            return temperature + alpha * (CONFIG.epsilon_alpha - kl)

        def value(logits, duals):
            sums = v_mpo(logits, targets, packed.weights, advantages, Anchors(old, behaviour, 0.3), duals)
            return sums.loss / sums.weight

        duals = {"eta": jnp.float64(0.7), "alpha": jnp.float64(2.0)}
        in_policy, in_duals = jax.grad(value, (0, 1))(jnp.asarray(logits), duals)
        np.testing.assert_allclose(in_policy, central_differences(jax.jit(of_policy), logits), atol=1e-6)
        expected = central_differences(of_duals, np.array([0.7, 2.0]))
        np.testing.assert_allclose([in_duals["eta"], in_duals["alpha"]], expected, atol=1e-6)


def bandit():
    """One state, five answers of one token; each is there as often as the behaviour policy gives it."""
    rng = np.random.default_rng(3)
    counts = rng.uniform(0.5, 2, (5, 1)).astype(np.float32)
    advantages = np.array([[-1.0], [0.2], [0.9], [1.4], [-0.3]], np.float32)
    old, prior = (rng.normal(size=5).astype(np.float32) for _ in range(2))
    return counts, np.arange(5, dtype=np.int32)[:, None], advantages, old, prior


def spread(logits):
    return jnp.broadcast_to(logits, (5, 1, 5))


@pytest.mark.parametrize("behaviour_weight", [None, 0.5])
def test_the_policy_becomes_the_mixture_of_psi_and_its_anchors(behaviour_weight):
    """With η, α and λ held: π = (ψ + α π_old + λ π_β) / (1 + α + λ)."""
    counts, targets, advantages, old, prior = bandit()
    anchors = Anchors(spread(old), spread(prior), behaviour_weight)
    if behaviour_weight is None:
        anchors = Anchors(spread(old))

    def mean(logits):
        sums = v_mpo(spread(logits), targets, counts, advantages, anchors, DUALS)
        return sums.loss / sums.weight

    found = softmax(descend(jax.grad(mean), jnp.zeros(5), 0.3, 3000))
    psi = np.where(np.isin(np.arange(5), [2, 3]), counts[:, 0] * np.exp(advantages[:, 0] / 0.7), 0)
    weight = behaviour_weight or 0.0
    expected = psi / psi.sum() + 2 * softmax(old) + weight * softmax(prior)
    np.testing.assert_allclose(found, expected / (3 + weight), atol=1e-4)


def test_without_anchors_it_is_imitation_weighted_by_psi():
    counts, targets, advantages, old, _ = bandit()
    duals = {"eta": jnp.float32(0.7), "alpha": jnp.float32(1e-8)}
    config = VMPOConfig(top_fraction=1.0)

    def mean(logits):
        sums = v_mpo(spread(logits), targets, counts, advantages, Anchors(spread(old)), duals, config)
        return sums.loss / sums.weight

    found = softmax(descend(jax.grad(mean), jnp.zeros(5), 0.5, 5000))
    psi = counts[:, 0] * np.exp(advantages[:, 0] / 0.7)
    np.testing.assert_allclose(found, psi / psi.sum(), atol=1e-3)


def test_the_temperature_keeps_psi_within_its_bound():
    """At the dual's optimum KL(ψ || uniform over the kept) is ε_η."""
    rng = np.random.default_rng(4)
    advantages, weights = rng.normal(size=(4, 25)).astype(np.float32), jnp.ones((4, 25))
    config = VMPOConfig(epsilon_eta=0.3)
    slope = jax.grad(lambda eta: e_step(advantages, weights, eta, config).temperature_loss)
    eta = descend(slope, jnp.float32(1.0), 0.05, 3000)
    step = e_step(advantages, weights, eta, config)
    psi = np.asarray(step.psi_BxT, np.float64)[np.asarray(step.kept_BxT)]
    assert len(psi) == 50
    assert (psi * np.log(psi * 50)).sum() == pytest.approx(0.3, rel=1e-3)


def test_the_multiplier_keeps_the_policy_within_its_bound():
    """Policy and duals descend on one loss together, with projection: KL(π_old || π) ends at ε_α."""
    counts, targets, advantages, old, _ = bandit()
    config = VMPOConfig(epsilon_alpha=0.02)

    anchors = Anchors(spread(old))

    def mean(params):
        sums = v_mpo(spread(params["logits"]), targets, counts, advantages, anchors, params["duals"], config)
        return sums.loss / sums.weight

    start = {"logits": jnp.asarray(old), "duals": config.initial_duals()}
    rates = {"logits": 0.05, "duals": {"eta": 0.05, "alpha": 5.0}}

    def update(_, params):
        params = jax.tree.map(lambda p, g, rate: p - rate * g, params, jax.grad(mean)(params), rates)
        return {**params, "duals": project_duals(params["duals"])}

    found = jax.jit(lambda p: jax.lax.fori_loop(0, 10000, update, p))(start)
    policy, before = softmax(found["logits"]), softmax(old)
    assert (before * np.log(before / policy)).sum() == pytest.approx(0.02, rel=0.01)
    assert found["duals"]["alpha"] > 0.1
    assert policy @ advantages[:, 0] > before @ advantages[:, 0]


def test_duals_stay_above_zero_and_can_rise_again():
    projected = project_duals({"eta": jnp.float32(-3), "alpha": jnp.float32(2)})
    assert float(projected["eta"]) == np.float32(1e-8) and float(projected["alpha"]) == 2
    apart, _, ragged = case(5)
    low = {"eta": jnp.float32(0.7), "alpha": jnp.float32(-1.0)}
    slope = jax.grad(lambda duals: loss_of(apart, ragged, duals=duals).loss)(low)
    kl = oracle(ragged, CONFIG, None)[1]
    assert float(slope["alpha"]) == pytest.approx(sum(apart.sizes) * (CONFIG.epsilon_alpha - kl), rel=1e-4)
    assert float(loss_of(apart, ragged, duals=low).metrics["alpha"][0]) > 0


@pytest.mark.parametrize("shape", ["exponential", "linear"])
def test_annealing(shape):
    found = annealed(jnp.array([-0.5, 0.0, 0.5, 1.0, 2.0]), shape=shape)
    middle = math.sqrt(1e-5) if shape == "exponential" else (1 + 1e-5) / 2
    np.testing.assert_allclose(found, [1, 1, middle, 1e-5, 1e-5], rtol=1e-3)
    assert float(VMPOConfig(anneal=shape).weight_of_behaviour(0.5)) == pytest.approx(middle, rel=1e-3)
    assert VMPOConfig(behaviour_weight=None).weight_of_behaviour(0.5) is None


def test_one_array_may_be_both_anchors():
    apart, _, ragged = case(6)
    logits, targets, advantages, old, _ = (apart.lay(array) for array in ragged)
    same, copied = (
        v_mpo(logits, targets, apart.weights, advantages, Anchors(old, prior, 0.5), DUALS)
        for prior in (old, old.copy())
    )
    assert_trees_close(same, copied, rtol=1e-6)


def test_tokens_that_are_excluded_have_no_part_in_the_divergence():
    logits = jnp.array([[[0.0, 1.0, -jnp.inf]]])
    arrays = jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1)), jnp.ones((1, 1))

    def loss(logits, old):
        return v_mpo(logits, *arrays, Anchors(old, old, 1.0), DUALS).loss

    value, gradient = jax.value_and_grad(loss)(logits, jnp.array([[[1.0, 0.0, -jnp.inf]]]))
    expected, fewer = jax.value_and_grad(loss)(logits[..., :2], jnp.array([[[1.0, 0.0]]]))
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(gradient[..., :2], fewer, rtol=1e-6)
    assert float(gradient[0, 0, 2]) == 0


def test_nothing_leaks_from_behind_weight_zero():
    _, packed, ragged = case(7)
    arrays = [packed.lay(array) for array in ragged]

    def value(logits, advantages, old, behaviour, duals, weights=packed.weights):
        return v_mpo(logits, arrays[1], weights, advantages, Anchors(old, behaviour, 0.3), duals).loss

    poisoned = (arrays[0], *arrays[2:])
    assert all(np.isnan(array).any() for array in poisoned)
    loss, gradients = jax.value_and_grad(value, range(5))(*poisoned, DUALS)
    assert float(loss) == float(value(*map(np.nan_to_num, poisoned), DUALS))
    assert all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(gradients))
    assert not np.asarray(gradients[0])[packed.weights == 0].any()
    assert not any(np.asarray(gradient).any() for gradient in gradients[1:4])
    empty, slopes = jax.value_and_grad(value, (0, 4))(*poisoned, DUALS, np.zeros_like(packed.weights))
    assert float(empty) == 0 and not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(slopes))


def test_micro_batches_average_by_their_tokens():
    apart, _, ragged = case(8)
    parts = []
    for pairs in (range(0, 2), range(2, 5)):
        some = [[array[pair] for pair in pairs] for array in ragged]
        expected, _, _ = oracle(some, CONFIG, 0.3)
        sums = loss_of(Layout([apart.sizes[pair] for pair in pairs]), some)
        np.testing.assert_allclose(sums.loss, expected * sum(map(len, some[1])), rtol=1e-5)
        parts.append(sums)
    added, whole = jax.tree.map(lambda *leaves: sum(leaves), *parts), loss_of(apart, ragged)
    for name in ("kl", "kl_behaviour", "nll", "advantage", "eta", "alpha"):
        np.testing.assert_allclose(added.metrics[name], whole.metrics[name], rtol=1e-5)
    assert float(added.weight) == float(whole.weight)


PROBE = """
import json
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from rest_jax.objectives.v_mpo import Anchors, v_mpo
rng = np.random.default_rng(9)
logits, old, prior = rng.normal(size=(3, 4, 6, 5)).astype(np.float32)
targets = rng.integers(0, 5, (4, 6)).astype(np.int32)
weights = (np.arange(6) < rng.integers(2, 7, (4, 1))).astype(np.float32)
advantages = rng.normal(size=(4, 6)).astype(np.float32) + 3 * (np.arange(4) < 2)[:, None]
def value(logits, duals, rest):
    targets, weights, advantages, old, prior = rest
    sums = v_mpo(logits, targets, weights, advantages, Anchors(old, prior, 0.3), duals)
    return sums.loss / sums.weight, sums.metrics
mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
rows = NamedSharding(mesh, PartitionSpec("data"))
laid = jax.device_put((logits, (targets, weights, advantages, old, prior)), rows)
assert len(laid[0].addressable_shards) == jax.device_count()
with jax.set_mesh(mesh):
    step = jax.jit(jax.value_and_grad(value, (0, 1), has_aux=True))
    found = step(laid[0], {"eta": np.float32(0.7), "alpha": np.float32(2)}, laid[1])
print(json.dumps([np.asarray(leaf).tolist() for leaf in jax.tree.leaves(found)]))
"""


def test_rows_on_two_devices_are_one_batch():
    """The best half lies on the first device's rows, so a choice made by each device would be another."""
    found = []
    for devices in (1, 2):
        done = run_python(PROBE, devices)
        assert done.returncode == 0, done.stderr[-2000:]
        found.append(json.loads(done.stdout.splitlines()[-1]))
    for one, two in zip(*found, strict=True):
        np.testing.assert_allclose(two, one, rtol=1e-5, atol=1e-6)


def test_a_behaviour_policy_and_its_weight_come_together():
    apart, _, ragged = case(9)
    logits, targets, advantages, old, behaviour = (apart.lay(array) for array in ragged)
    for anchors in (Anchors(old, behaviour), Anchors(old, None, 0.5)):
        with pytest.raises(ValueError, match="come together"):
            v_mpo(logits, targets, apart.weights, advantages, anchors, DUALS)


@pytest.mark.parametrize(
    "wrong",
    [
        {"top_fraction": 0.0},
        {"epsilon_eta": -1.0},
        {"epsilon_alpha": 0.0},
        {"initial_alpha": math.nan},
        {"behaviour_weight": -1.0},
        {"behaviour_weight_end": 0.0},
        {"anneal": "cosine"},
        {"discount": 1.1},
        {"c_bar": 2.0},
        {"sync_period": 0},
    ],
)
def test_wrong_settings_are_named(wrong):
    (field,) = wrong
    with pytest.raises(errors.ConfigError, match=rf"VMPOConfig\.{field}"):
        VMPOConfig(**wrong)


def test_names():
    assert CONFIG.name == "BVMPO" and dataclasses.replace(CONFIG, behaviour_weight=None).name == "V-MPO"
