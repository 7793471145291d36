"""Addressed randomness: every random number has an address, and depends on nothing else.

Floor 0. A key is a function of (seed, stream, round, example id, sample index, position). It is never split
in sequence, so a sample is the same whether 8 or 64 are asked for, in whatever batch, order or process.
64-bit numbers are folded as two 32-bit halves: `jax.random.fold_in` cuts them to 32 bits without a word.
"""

from __future__ import annotations

import enum
import hashlib

import jax
import jax.numpy as jnp
import numpy as np

_LOW_32 = 0xFFFFFFFF


class Stream(enum.IntEnum):
    """What a random number is for. The numbers are part of every dataset's identity: never renumber."""

    INIT = 0
    DROPOUT = 1
    GROW = 2
    EVALUATE = 3
    RATE = 4
    TRANSLATE = 5
    VALIDATE = 6
    SAMPLE = 7
    PPO = 8


def _fold_64(key: jax.Array, number: int) -> jax.Array:
    if not 0 <= number < 2**64:
        raise ValueError(f"{number} is not an unsigned 64-bit number")
    return jax.random.fold_in(jax.random.fold_in(key, number >> 32), number & _LOW_32)


def stream_key(seed: int, stream: Stream, round_index: int = 0) -> jax.Array:
    """The key of one stream of one round (a Grow step, an evaluation), as a typed threefry key []."""
    key = jax.random.key(0, impl="threefry2x32")
    key = _fold_64(key, seed)
    return jax.random.fold_in(jax.random.fold_in(key, int(stream)), round_index)


def derived_seed(seed: int, *address: str | int) -> int:
    """A seed of its own, in 0 to 2**63 - 1, for one part of a run: derived_seed(0, "improve", 2, 1)."""
    text = "/".join(str(part) for part in (seed, *address))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def address_hash(seed: int, *address: np.ndarray) -> np.ndarray:
    """A pseudo-random number of 64 bits for each address, on the host: uint64 [n].

    The parts of the address are stirred in one after another by the finaliser of SplitMix64 (Steele, Lea and
    Flood 2014), whose every output bit depends on every input bit. Good for choosing, not for secrets.

    Args:
      seed: 0 to 2**64 - 1.
      *address: integers [n], such as example ids and sample indices; at least one.
    """
    rows = len(address[0])
    state = np.full(rows, seed, np.uint64)
    for part in (np.zeros(rows, np.int64), *address):
        state = _mixed(state ^ np.asarray(part).astype(np.int64, copy=False).view(np.uint64))
    return state


def _mixed(state: np.ndarray) -> np.ndarray:
    """The next output of SplitMix64 for each state, uint64 [n]; products wrap around."""
    mixed = state + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def split_ids(example_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Splits int64 or uint64 ids [S] into their high and low 32-bit halves, each uint32 [S]."""
    ids = np.asarray(example_ids).astype(np.uint64)
    return (ids >> np.uint64(32)).astype(np.uint32), (ids & np.uint64(_LOW_32)).astype(np.uint32)


def sample_keys(
    key: jax.Array, ids_high_S: jax.Array, ids_low_S: jax.Array, sample_indices_N: jax.Array
) -> jax.Array:
    """One key for each sample of each example: typed keys [S, N]."""

    def one(high: jax.Array, low: jax.Array, index: jax.Array) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(key, high), low), index)

    over_samples = jax.vmap(one, in_axes=(None, None, 0))
    return jax.vmap(over_samples, in_axes=(0, 0, None))(ids_high_S, ids_low_S, sample_indices_N)


def position_uniforms(keys: jax.Array, positions: jax.Array) -> jax.Array:
    """The uniform in [0, 1) that each key draws at a token position: float32, the shape of `keys`.

    Args:
      keys: typed keys of any shape.
      positions: int32, one for all or one for each key.
    """
    flat, places = keys.reshape(-1), jnp.broadcast_to(positions, keys.shape).reshape(-1)
    draw = jax.vmap(lambda k, p: jax.random.uniform(jax.random.fold_in(k, p), dtype=jnp.float32))
    return draw(flat, places).reshape(keys.shape)
