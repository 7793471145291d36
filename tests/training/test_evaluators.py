from __future__ import annotations

import jax
import numpy as np
import pytest

from rest_jax.network.mesh import MeshConfig, make_mesh
from rest_jax.training.evaluators import LossEvaluator
from tests.training import toys


def test_averages_over_weights_and_not_over_batches():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    params = toys.classifier_params()
    batches = [toys.classifier_batch(step) for step in range(3)]
    batches[2]["weights"][2:] = 0.0  # rows that only fill the last batch
    found = LossEvaluator(toys.classifier_loss, batches, mesh, name="rater")(params, 7)

    def joined(name):
        return np.concatenate([batch[name] for batch in batches])

    inputs, labels, weights = joined("inputs"), joined("labels"), joined("weights")
    hidden = np.tanh(inputs @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    logits = (hidden @ params["out"]["kernel"]).astype(np.float64)
    losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(len(labels)), labels]
    assert found == {
        "rater/loss": pytest.approx(np.average(losses, weights=weights), rel=1e-5),
        "rater/accuracy": pytest.approx(np.average(logits.argmax(1) == labels, weights=weights), rel=1e-5),
    }


def test_nothing_to_evaluate_is_nan():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    batch = toys.classifier_batch(0)
    batch["weights"][:] = 0.0
    found = LossEvaluator(toys.classifier_loss, [batch], mesh)(toys.classifier_params(), 0)
    assert np.isnan(found["valid/loss"])
