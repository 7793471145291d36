"""Logits against those that T5X itself computed with its own network and weights."""

from __future__ import annotations

import tarfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rest_jax.network.config import T5Config
from rest_jax.network.transformer import Transformer
from tests.network.tiny import policy_logits

GOLDEN = Path(__file__).parents[2] / "../shared/golden"


@pytest.fixture(scope="module", params=["untied", "tied"])
def golden(request, tmp_path_factory):
    """(config, parameters, expected arrays) of a network that T5X trained for 20 steps."""
    archive = GOLDEN / f"t5x-tiny-{request.param}.tar.gz"
    if not archive.exists():
        pytest.skip(f"{archive} is not there")
    checkpoint = pytest.importorskip("orbax.checkpoint")
    folder = tmp_path_factory.mktemp(request.param)
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    (expected,) = folder.rglob("expected.npz")
    state = checkpoint.PyTreeCheckpointer().restore(expected.parent / "orbax/checkpoint_20/state")
    config = T5Config(
        vocab_size=128,
        emb_dim=32,
        num_heads=4,
        head_dim=8,
        mlp_dim=64,
        num_encoder_layers=2,
        num_decoder_layers=2,
        logits_via_embedding=request.param == "tied",
    )
    params = jax.tree.map(jnp.asarray, state["target"])
    return config, params, dict(np.load(expected))


def test_encoder_and_logits_equal_t5x_s(golden):
    config, params, expected = golden
    source, target = expected["encoder_input_tokens"], expected["decoder_input_tokens"]
    encoded = jax.jit(lambda p, s: Transformer(config).apply({"params": p}, s, method="encode"))(
        params, source
    )
    # T5X says something else on padding, where nothing is meant.
    np.testing.assert_allclose(
        np.asarray(encoded)[source != 0], expected["encoded"][source != 0], atol=1e-5, rtol=0
    )
    real = expected["decoder_loss_weights"] > 0
    assert 0 < real.sum() < real.size
    logits = policy_logits(config, params, source, target)
    np.testing.assert_allclose(logits[real], expected["logits"][real], atol=1e-4, rtol=0)


def test_sequence_log_probabilities_equal_t5x_s(golden):
    config, params, expected = golden
    logits = policy_logits(config, params, expected["encoder_input_tokens"], expected["decoder_input_tokens"])
    log_probs = np.asarray(jax.nn.log_softmax(logits))
    of_targets = np.take_along_axis(log_probs, expected["decoder_target_tokens"][..., None], axis=-1)[..., 0]
    total = (of_targets * expected["decoder_loss_weights"]).sum(1)
    np.testing.assert_allclose(total, expected["sequence_log_prob"], rtol=1e-5)
