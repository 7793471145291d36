"""The benchmark of the losses measures the losses of the phases, on a network that is small here."""

from __future__ import annotations

import pytest

from benchmarks import losses as benchmark
from rest_jax.network.config import T5Config

pytestmark = pytest.mark.usefixtures("quick_compilation")

TINY = T5Config(
    vocab_size=40, emb_dim=16, num_heads=2, head_dim=8, mlp_dim=24, num_encoder_layers=1, num_decoder_layers=1
)
# (networks trained, networks read) by hand from the table of phases/learners.py.
NETWORKS = {
    "GOLD-s (own weights)": (1, 0), "GOLD-s": (1, 1), "OAC": (1, 0), "value": (1, 0), "BVE": (1, 1),
    "V-MPO": (2, 1), "BVMPO": (2, 2), "PPO": (2, 0),
}  # fmt: skip


@pytest.fixture(scope="module")
def measured():
    """All of them in one call, as the benchmark does it: BC beside them is compiled once."""
    return {row["loss"]: row for row in benchmark.measure(TINY, list(NETWORKS), repeats=1)}


@pytest.mark.parametrize("name", NETWORKS)
def test_each_loss_makes_finite_steps_beside_bc(measured, name):
    row = measured[name]
    assert (row["networks_trained"], row["networks_read"]) == NETWORKS[name]
    assert row["ratio"] == pytest.approx(row["ms"] / row["bc_ms"])
    assert benchmark.table_of([row]).row_count == 1


def test_no_loss_is_left_out():
    assert set(benchmark.cases(TINY)) == {"BC", *NETWORKS}
