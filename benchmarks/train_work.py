"""What the engines of benchmarks/train.py work on: first weights, batches, and the machine's limit."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from rest_jax.data import batches
from rest_jax.network.config import T5Config
from rest_jax.network.init import init_params
from rest_jax.training.optimizers import OptimizerConfig
from rest_jax.types import EOS_ID, RaggedTokens, Seq2SeqBatch, TokenPairs

Arrays = dict[str, np.ndarray]

# Which batches each engine takes for a workload. PyTorch's T5 has no segment ids, so it cannot pack.
PADDED, PACKED, IN_ORDER, SORTED = "padded", "packed", "pairs_in_order", "pairs_sorted"
WORKLOADS = {
    "rest_jax": (PADDED, PACKED),
    "t5x": (PADDED, PACKED),
    "pytorch": (PADDED, IN_ORDER, SORTED),
}


@dataclasses.dataclass(frozen=True)
class Packing:
    """How sentences are made into batches.

    Attributes:
      rows: of a packed batch.
      length: of a row, on both sides.
      batches: how many are measured.
      pool: over how many batches sentences are sorted by length, for those who pad.
    """

    rows: int = 16
    length: int = 64
    batches: int = 4
    pool: int = 50


@dataclasses.dataclass(frozen=True)
class Work:
    """All that an engine needs.

    Attributes:
      config: the network.
      optimizer: the optimiser.
      params: the first weights, T5X's tree.
      batches: for each kind of batches the arrays of each, by the names of `Seq2SeqBatch`.
    """

    config: T5Config
    optimizer: OptimizerConfig
    params: dict[str, Any]
    batches: dict[str, list[Arrays]]

    def of_engine(self, name: str) -> dict[str, list[Arrays]]:
        """The batches that an engine takes."""
        return {kind: self.batches[kind] for kind in WORKLOADS[name] if kind in self.batches}

    def write(self, folder: Path) -> None:
        """Writes everything for the engines' processes."""
        settings = {
            "config": dataclasses.asdict(self.config),
            "optimizer": dataclasses.asdict(self.optimizer),
        }
        (folder / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
        np.savez(folder / "params.npz", **traverse_util.flatten_dict(jax.device_get(self.params), sep="/"))
        for kind, each in self.batches.items():
            flat = {f"{number}/{name}": array for number, a in enumerate(each) for name, array in a.items()}
            np.savez(folder / f"batches_{kind}.npz", **flat)

    @classmethod
    def read(cls, folder: Path) -> Work:
        """Reads what `write` wrote."""
        settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
        params = traverse_util.unflatten_dict(dict(np.load(folder / "params.npz")), sep="/")
        found = {}
        for path in folder.glob("batches_*.npz"):
            numbered = traverse_util.unflatten_dict(dict(np.load(path)), sep="/")
            found[path.stem.removeprefix("batches_")] = [numbered[str(n)] for n in range(len(numbered))]
        return cls(T5Config(**settings["config"]), OptimizerConfig(**settings["optimizer"]), params, found)


def make_work(
    config: T5Config,
    optimizer: OptimizerConfig,
    padded: Seq2SeqBatch,
    pairs: TokenPairs | None,
    packing: Packing,
) -> Work:
    """Draws the weights and makes all batches; without `pairs` only the padded one."""
    made = {PADDED: [arrays_of(padded)]}
    if pairs is not None:
        made |= real_batches(pairs, packing)
    return Work(config, optimizer, init_params(config, jax.random.key(0)), made)


def arrays_of(batch: Seq2SeqBatch) -> Arrays:
    """The arrays that a batch has, by name."""
    fields = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    return {name: array for name, array in fields.items() if isinstance(array, np.ndarray)}


def random_batch(vocab_size: int, rows: int = 32, length: int = 32) -> Seq2SeqBatch:
    """Random tokens in rows of `length` + `length` places, half of them full, the others less and less."""
    draw = np.random.Generator(np.random.Philox(key=0))
    lengths = np.minimum(np.linspace(2, 2 * length, rows).astype(int), length)
    sides = []
    for side_lengths in (lengths, draw.permutation(lengths)):
        tokens = [draw.integers(3, vocab_size, size=size) for size in side_lengths]
        sides.append(RaggedTokens.from_lists([np.append(each[:-1], EOS_ID) for each in tokens]))
    pairs = TokenPairs(np.arange(rows), *sides)
    return batches.eval_batches(pairs, rows, length, length)[0]


def real_batches(pairs: TokenPairs, packing: Packing) -> dict[str, list[Arrays]]:
    """Pairs packed into rows, the same pairs padded, and pairs of like lengths padded.

    A padded batch holds as many pairs as the packed one beside it. In order they are the same pairs, so that
    losses can be compared step by step. Like lengths are found as transformers' trainer does, by sorting the
    pairs of many batches (`packing.pool`); of the sorted batches some are taken, evenly from short to long.
    """
    ours = batches.PackedBatches(pairs, packing.rows, packing.length, packing.length, seed=0)
    place_of = {int(number): place for place, number in enumerate(pairs.ids)}
    chosen = [np.array([place_of[int(i)] for i in ours.ids_at(step)]) for step in range(packing.pool)]
    pool = np.concatenate(chosen)
    sources, targets = pairs.sources.lengths[pool], pairs.targets.lengths[pool]
    by_length = pool[np.lexsort((sources + targets, np.maximum(sources, targets)))]
    sorted_batches = np.array_split(by_length, packing.pool)
    evenly = ((np.arange(packing.batches) + 0.5) * packing.pool / packing.batches).astype(int)
    return {
        PACKED: [arrays_of(ours.at(step)) for step in range(packing.batches)],
        IN_ORDER: [padded_to_longest(pairs.take(part)) for part in chosen[: packing.batches]],
        SORTED: [padded_to_longest(pairs.take(sorted_batches[place])) for place in evenly],
    }


def padded_to_longest(pairs: TokenPairs) -> Arrays:
    """One pair a row, both sides as long as the longest."""
    longest_source, longest_target = (int(side.lengths.max()) for side in (pairs.sources, pairs.targets))
    return arrays_of(batches.eval_batches(pairs, len(pairs), longest_source, longest_target)[0])


def useful_tokens(each: list[Arrays]) -> int:
    """Target tokens with a weight in the loss."""
    return int(sum((arrays["decoder_loss_weights"] > 0).sum() for arrays in each))


def fill(each: list[Arrays]) -> float:
    """The share of the places on both sides that hold a token."""
    sides = ("encoder_input_tokens", "decoder_target_tokens")
    held = sum(int((arrays[side] != 0).sum()) for arrays in each for side in sides)
    return held / sum(arrays[side].size for arrays in each for side in sides)


def products(config: T5Config, arrays: Arrays) -> list[tuple[int, int, int]]:
    """(rows, in, out) of every product of activations with a weight in the forward pass of one batch."""
    width, joined, hidden = config.emb_dim, config.joined_kv_dim, config.mlp_dim
    source, target = arrays["encoder_input_tokens"].size, arrays["decoder_target_tokens"].size
    mlp = [(width, hidden)] * len(config.mlp_activations) + [(hidden, width)]
    attention = [(width, joined)] * 3 + [(joined, width)]
    encoder = [(source, *shape) for shape in attention + mlp] * config.num_encoder_layers
    to_source = [(target, width, joined), (target, joined, width), *[(source, width, joined)] * 2]
    decoder = ([(target, *shape) for shape in attention + mlp] + to_source) * config.num_decoder_layers
    return [*encoder, *decoder, (target, width, config.vocab_size)]


def matmul_limit(config: T5Config, arrays: Arrays, repeats: int = 3) -> float:
    """Steps a second if nothing but the products with the weights were computed, forward and backward.

    For each weight: the product itself, and those that give the gradients of the activations and of the
    weight. The three are timed for each shape, in float32, the best of some repeats, and added up.
    """
    rng = np.random.default_rng(0)
    total = 0.0
    shapes = products(config, arrays)

    @jax.jit
    def three(x: jax.Array, w: jax.Array, g: jax.Array) -> tuple[jax.Array, ...]:
        return x @ w, g @ w.T, x.T @ g

    for rows, inner, outer in set(shapes):
        operands = [
            jnp.asarray(rng.normal(size=shape).astype(np.float32))
            for shape in ((rows, inner), (inner, outer), (rows, outer))
        ]
        jax.block_until_ready(three(*operands))
        seconds = []
        for _ in range(repeats):
            started = time.perf_counter()
            jax.block_until_ready(three(*operands))
            seconds.append(time.perf_counter() - started)
        total += min(seconds) * shapes.count((rows, inner, outer))
    return 1 / total
