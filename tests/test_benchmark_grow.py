"""What benchmarks/grow.py goes by: whether two engines sample one distribution, and the machine's limit."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import grow
from benchmarks.grow_scoring import matmul_limit
from tests.generation.small import SMALL


def found(lengths_SxN: np.ndarray, log_probs_SxN: np.ndarray) -> dict[str, list[float]]:
    return {
        "mean_length": grow.mean_of_sources(lengths_SxN),
        "mean_log_prob": grow.mean_of_sources(log_probs_SxN),
    }


@pytest.mark.parametrize(("shift", "same"), [(0.0, True), (0.5, False)])
def test_engines_that_differ_by_more_than_chance_are_told_apart(shift, same):
    rng = np.random.default_rng(0)
    centres = rng.normal(10, 5, size=(60, 1))  # sources differ far more than samples of one do
    left, right = (centres + rng.normal(size=(60, 50)) for _ in range(2))
    assert grow.same_distribution(found(left, -left), found(right + shift, -right)) is same
    assert grow.same_distribution(found(left, -left), found(right, -right - shift)) is same


def test_the_error_of_a_mean_is_that_of_the_draws():
    rng = np.random.default_rng(1)
    means = [grow.mean_of_sources(np.array([[0.0], [9.0]]) + rng.normal(size=(2, 25))) for _ in range(400)]
    assert np.std([mean for mean, _ in means]) == pytest.approx(np.mean([e for _, e in means]), rel=0.15)


def test_the_limit_is_a_rate():
    assert 0 < matmul_limit(SMALL, rows=8, repeats=1) < np.inf


def test_ratios_are_of_ours_to_each_peer():
    speeds = {"rest_jax": 40.0, "rest_jax_bfloat16": 60.0, "huggingface": 10.0}
    found = {name: {"tokens_per_s": speed} for name, speed in speeds.items()}
    assert grow.ratios_to_peers(found) == {
        "ratios": {"huggingface": 4.0},
        "ratios_bfloat16": {"huggingface": 6.0},
    }
    del found["rest_jax_bfloat16"]
    assert grow.ratios_to_peers(found) == {"ratios": {"huggingface": 4.0}}
