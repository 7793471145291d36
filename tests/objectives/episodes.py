"""Pairs for tests of the losses: drawn apart, laid one a row or packed, and taken apart again."""

from __future__ import annotations

import jax
import numpy as np


def lengths(rng: np.random.Generator, pairs: int, longest: int) -> np.ndarray:
    """Tokens of each pair, from 1; the last pair has the most."""
    drawn = rng.integers(1, longest + 1, pairs)
    drawn[-1] = longest
    return drawn


class Layout:
    """Where the tokens of pairs lie: one pair a row (`segments` is None), or several packed into rows."""

    def __init__(self, sizes, rows: list[list[int]] | None = None, width: int = 0):
        self.sizes = [int(size) for size in sizes]
        packed = rows is not None
        rows = rows if rows is not None else [[pair] for pair in range(len(self.sizes))]
        self.width = width or 1 + max(sum(self.sizes[pair] for pair in row) for row in rows)
        self.places: dict[int, tuple[int, slice]] = {}
        self.weights = np.zeros((len(rows), self.width), np.float32)
        segments = np.zeros((len(rows), self.width), np.int32)
        for number, row in enumerate(rows):
            start = 0
            for segment, pair in enumerate(row, 1):
                place = slice(start, start + self.sizes[pair])
                self.places[pair] = (number, place)
                segments[number, place] = segment
                self.weights[number, place] = 1
                start = place.stop
        self.segments = segments if packed else None

    def lay(self, ragged: list[np.ndarray], filler=np.nan) -> np.ndarray:
        """One array a pair, [tokens, …], laid into rows; `filler` on padding."""
        first = np.asarray(ragged[0])
        fill = filler if np.issubdtype(first.dtype, np.floating) else 0
        laid = np.full((*self.weights.shape, *first.shape[1:]), fill, first.dtype)
        for pair, values in enumerate(ragged):
            row, place = self.places[pair]
            laid[row, place] = values
        return laid

    def take(self, laid) -> list[np.ndarray]:
        """The tokens of each pair, out of the rows."""
        laid = np.asarray(laid)
        return [laid[self.places[pair]] for pair in range(len(self.sizes))]


def drawn(rng: np.random.Generator, sizes, shape=(), scale: float = 1.0) -> list[np.ndarray]:
    """Normal numbers for each token of each pair, float32 [tokens, *shape]."""
    return [rng.normal(scale=scale, size=(size, *shape)).astype(np.float32) for size in sizes]


def central_differences(function, array: np.ndarray, step: float = 1e-5) -> np.ndarray:
    """The gradient of a function of one array, in float64 (run it under `jax.enable_x64`)."""
    array = np.array(array, np.float64)
    slopes = np.zeros_like(array)
    for index in np.ndindex(array.shape):
        up, down = array.copy(), array.copy()
        up[index] += step
        down[index] -= step
        slopes[index] = (float(function(up)) - float(function(down))) / (2 * step)
    return slopes


def assert_trees_close(found, expected, **tolerance) -> None:
    """Every leaf, at once."""
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), found, expected)


def softmax(logits) -> np.ndarray:
    """In float64."""
    logits = np.asarray(logits, np.float64)
    exponentials = np.exp(logits - logits.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def descend(gradient, start, rate: float, steps: int):
    """Plain gradient descent on a tree, compiled; the loss functions under test do the rest."""

    def update(_, params):
        return jax.tree.map(lambda p, g: p - rate * g, params, gradient(params))

    return jax.jit(lambda params: jax.lax.fori_loop(0, steps, update, params))(start)
