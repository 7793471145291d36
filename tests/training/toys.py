"""A tiny softmax classifier: data that is a pure function of the step, and its loss."""

from __future__ import annotations

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np

from rest_jax.types import LossSums
from tests import tiny

FEATURES, CLASSES = 6, 3


def classifier_params(seed: int = 0) -> dict:
    """Two layers with a bias: matrices and vectors, as an optimiser meets them."""
    draw = np.random.Generator(np.random.Philox(key=seed)).normal
    return {
        "hidden": {"kernel": np.float32(0.3 * draw(size=(FEATURES, 8))), "bias": np.zeros(8, np.float32)},
        "out": {"kernel": np.float32(0.3 * draw(size=(8, CLASSES)))},
    }


def classifier_batch(step: int, rows: int = 8) -> dict[str, np.ndarray]:
    """Rows whose class is that of the greatest of their first three features; weights differ between rows."""
    generator = np.random.Generator(np.random.Philox(key=1000 + step))
    inputs = generator.normal(size=(rows, FEATURES)).astype(np.float32)
    weights = generator.uniform(0.5, 1.5, size=rows).astype(np.float32)
    return {"inputs": inputs, "labels": inputs[:, :CLASSES].argmax(1).astype(np.int32), "weights": weights}


def classifier_loss(params, batch, dropout_key) -> LossSums:
    """Weighted cross-entropy, with dropout on the hidden layer when there is a key."""
    hidden = jnp.tanh(batch["inputs"] @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    if dropout_key is not None:
        kept = jax.random.bernoulli(dropout_key, 0.9, hidden.shape)
        hidden = jnp.where(kept, hidden / 0.9, 0.0)
    logits = hidden @ params["out"]["kernel"]
    losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), batch["labels"][:, None], axis=1)[:, 0]
    weights = batch["weights"]
    right = jnp.sum(weights * (logits.argmax(-1) == batch["labels"]))
    return LossSums(jnp.sum(weights * losses), weights.sum(), {"accuracy": (right, weights.sum())})


def without_dropout(params, batch, dropout_key) -> LossSums:
    """The same loss, with the key unused."""
    del dropout_key
    return classifier_loss(params, batch, None)


def environment(devices: int) -> dict[str, str]:
    """The environment of a new process with this many virtual CPU devices."""
    return tiny.environment(**tiny.on_devices(devices, compiled=""), PYTHONPATH=str(tiny.ROOT))


def run_python(code: str, devices: int = 1) -> subprocess.CompletedProcess[str]:
    """Runs Python source in a new process with this many virtual CPU devices."""
    command, env = [sys.executable, "-c", code], environment(devices)
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
