"""What benchmarks/grow.py measures the engines' samples with: one scorer, one limit for all of them."""

from __future__ import annotations

import functools
import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rest_jax import gin_setup
from rest_jax.generation.scorer import score_tokens
from rest_jax.network.config import T5Config
from rest_jax.phases.lineage import BC
from rest_jax.phases.workspace import Workspace

_ROWS = 128  # scored at a time


class Scoring:
    """The policy as a scorer.

    Args:
      flags: `--gin_file=…` and `--gin.…` of the run.
    """

    def __init__(self, flags: list[str]):
        self._workspace = Workspace(load_experiment(flags))
        self.vocab_size = self._workspace.vocabulary.size
        self.max_length = self._workspace.experiment.grow.sampling.max_length
        examples = self._workspace.split("test")
        # One length bucket, so that no engine pays for the padding of another's batches.
        longest = self._workspace.experiment.decoding.source_lengths[0]
        self._examples = examples.take(np.flatnonzero(examples.tokens.sources.lengths <= longest))

    @property
    def ids(self) -> list[int]:
        """The ids of the examples, in order."""
        return self._examples.ids.tolist()

    def sources(self, number: int) -> list[list[int]]:
        """Token ids of the first sources of the test split, EOS included."""
        return [self._examples.tokens.sources[i].tolist() for i in range(min(number, len(self._examples)))]

    def distinct(self, tokens_SxNxT: np.ndarray) -> int:
        """How many different samples there are, source by source."""
        return sum(len({tuple(row) for row in samples.tolist()}) for samples in tokens_SxNxT)

    def log_probs(self, tokens_SxNxT: np.ndarray, work: Path) -> np.ndarray:
        """The policy's log-probability of each sample, float [S, N], at temperature 1."""
        num_sources, num_samples, _ = tokens_SxNxT.shape
        rows = json.loads(work.read_text(encoding="utf-8"))["sources"]
        padded_SxL = np.zeros((num_sources, max(map(len, rows))), np.int32)
        for place, row in enumerate(rows):
            padded_SxL[place, : len(row)] = row
        flat = tokens_SxNxT.reshape(num_sources * num_samples, -1)
        lengths = (flat != 0).sum(-1)
        params, config = self._workspace.policy_params(BC), self._workspace.experiment.policy
        scores = np.zeros(len(flat), np.float32)
        # Rows of about the same length together, so that little is computed for padding.
        order = np.argsort(lengths, kind="stable")
        for first in range(0, len(order), _ROWS):
            chosen = order[first : first + _ROWS]
            filled = np.resize(chosen, _ROWS)
            longest = -(-int(lengths[chosen].max()) // 8) * 8
            tokens = np.pad(flat[filled], ((0, 0), (0, 8)))[:, :longest]
            found = _score(config, params, padded_SxL[filled // num_samples], tokens)
            scores[chosen] = np.asarray(found)[: len(chosen)]
        return scores.reshape(num_sources, num_samples)

    def matmul_limit(self) -> float:
        """Decoder rows a second if nothing but their products with the weights were computed."""
        return matmul_limit(self._workspace.experiment.policy)


def load_experiment(flags: list[str]) -> Any:
    """The experiment of `--gin_file=…` and `--gin.…` flags."""
    files = [flag.removeprefix("--gin_file=") for flag in flags if flag.startswith("--gin_file=")]
    bindings = [flag.removeprefix("--gin.") for flag in flags if flag.startswith("--gin.")]
    return gin_setup.load_experiment(files, bindings, [])


@functools.partial(jax.jit, static_argnums=0)
def _score(config: T5Config, params: Any, sources_BxL: jax.Array, tokens_BxT: jax.Array) -> jax.Array:
    return jnp.sum(score_tokens(config, params, sources_BxL, tokens_BxT), axis=-1)


def matmul_limit(config: T5Config, rows: int = 1024, repeats: int = 5) -> float:
    """Rows a second of the decoder's products with its weights (query, key, value, out; query and out of the
    attention to the source; MLP; logits), as one program, in float32: the best of some repeats.
    """
    width, joined, hidden = config.emb_dim, config.joined_kv_dim, config.mlp_dim
    branches = len(config.mlp_activations)
    shapes = [(width, joined)] * 3 + [(joined, width)] + [(width, joined), (joined, width)]
    shapes += [(width, hidden)] * branches + [(hidden, width)]
    shapes = shapes * config.num_decoder_layers + [(width, config.vocab_size)]
    rng = np.random.default_rng(0)
    weights = [jnp.asarray(rng.normal(size=shape).astype(np.float32)) for shape in shapes]
    inputs = {n: jnp.asarray(rng.normal(size=(rows, n)).astype(np.float32)) for n in (width, joined, hidden)}
    program = jax.jit(lambda inputs, weights: [inputs[w.shape[0]] @ w for w in weights])
    jax.block_until_ready(program(inputs, weights))
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(program(inputs, weights))
        seconds.append(time.perf_counter() - started)
    return rows / min(seconds)
