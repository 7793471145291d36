"""The small layers of T5 1.1: embedding, dense, norm, MLP.

Floor 2. Names, shapes, logical axes and initialisers of the parameters are those of T5X's
`examples/t5/layers.py`, so its checkpoints fit. Parameters are float32; a layer casts them to the type of
the activations when it uses them.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from rest_jax.network.config import T5Config

Initializer = Callable[..., jax.Array]

NORM_EPSILON = 1e-6


def compiled(init: Initializer) -> Initializer:
    """An initialiser as one compiled program for each shape, the same inside `jit` and outside."""
    return jax.jit(init, static_argnums=(1, 2))


attention_init = compiled(nn.initializers.variance_scaling(1.0, "fan_in", "normal"))
dense_init = compiled(nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal"))
embedding_init = compiled(nn.initializers.normal(stddev=1.0))

_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=True),
    "linear": lambda x: x,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


def declare(
    module: nn.Module, name: str, init: Initializer, shape: tuple[int, ...], axes: tuple[str, ...]
) -> jax.Array:
    """Declares a float32 parameter whose axes have logical names."""
    return cast(jax.Array, module.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.float32))


def constrain(x: jax.Array, *axes: str) -> jax.Array:
    """Lays an activation on the mesh by its logical axes; does nothing where no mesh is set."""
    return nn.with_logical_constraint(x, axes)


def dropout(rate: float) -> nn.Dropout:
    """T5's dropout: one mask for all positions of a row (it is shared over the length axis)."""
    return nn.Dropout(rate=rate, broadcast_dims=(-2,))


def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """[..., in] times [in, out], as one product of two matrices.

    With leading dimensions left as they are, XLA's CPU compiler computes what is upstream in the backward
    pass once for each of its uses, and transposed: a gradient step then takes twice the time.
    """
    rows = x.reshape(-1, x.shape[-1])
    multiply = _bfloat16_product if x.dtype == kernel.dtype == jnp.bfloat16 else jnp.dot
    return multiply(rows, kernel).reshape(*x.shape[:-1], kernel.shape[-1])


@jax.custom_vjp
def _bfloat16_product(left: jax.Array, right: jax.Array) -> jax.Array:
    """[M, K] times [K, N] in bfloat16: added in float32 and rounded at the end, forward and backward.

    Every platform does that with a plain product, but XLA's CPU compiler widens the operands of one whose
    result is bfloat16. Asked for float32 it uses the processor's own bfloat16 instructions, where there are
    any, at nearly twice the speed. Elsewhere the plain product stays: if a mesh splits K, what devices
    exchange is the result in the type that was asked for.
    """
    return jax.lax.platform_dependent(
        left,
        right,
        cpu=lambda left, right: jnp.dot(left, right, preferred_element_type=jnp.float32).astype(left.dtype),
        default=jnp.dot,
    )


def _bfloat16_product_forward(
    left: jax.Array, right: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _bfloat16_product(left, right), (left, right)


def _bfloat16_product_backward(
    operands: tuple[jax.Array, jax.Array], cotangent: jax.Array
) -> tuple[jax.Array, jax.Array]:
    left, right = operands
    return _bfloat16_product(cotangent, right.T), _bfloat16_product(left.T, cotangent)


_bfloat16_product.defvjp(_bfloat16_product_forward, _bfloat16_product_backward)


class Embed(nn.Module):
    """Token embedding [V, E], also the output head when it is tied."""

    config: T5Config

    def setup(self) -> None:
        """Declares the table."""
        shape = (self.config.vocab_size, self.config.emb_dim)
        self.embedding = declare(self, "embedding", embedding_init, shape, ("vocab", "embed"))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Vectors of tokens: int32 [...] to [..., E] in the type of the activations."""
        return jnp.take(self.embedding.astype(self.config.activation_dtype), tokens, axis=0)

    def attend(self, hidden: jax.Array) -> jax.Array:
        """Logits of a tied head: [..., E] to float32 [..., V], divided by sqrt(E)."""
        scaled = hidden.astype(jnp.float32) * self.config.logits_scale
        return product(scaled, self.embedding.T)


class Dense(nn.Module):
    """A matrix without bias, [in, out].

    Attributes:
      features: width of the output.
      axes: logical names of the two axes of the kernel.
      dtype: type of the product.
      kernel_init: initialiser of the kernel.
    """

    features: int
    axes: tuple[str, str]
    dtype: jnp.dtype
    kernel_init: Initializer = dense_init

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., in] to [..., out]."""
        kernel = declare(self, "kernel", self.kernel_init, (x.shape[-1], self.features), self.axes)
        return product(x.astype(self.dtype), kernel.astype(self.dtype))


class RMSNorm(nn.Module):
    """Scales by the root mean square, without mean or bias (arXiv:1910.07467); computed in float32."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., E] to [..., E]."""
        scale = declare(self, "scale", nn.initializers.ones, (x.shape[-1],), ("embed",))
        x = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
        return (x * jax.lax.rsqrt(mean_square + NORM_EPSILON)).astype(self.dtype) * scale.astype(self.dtype)


class MLP(nn.Module):
    """The feed-forward block: the product of its activated branches, then back to E (arXiv:2002.05202)."""

    config: T5Config

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool = True) -> jax.Array:
        """[..., E] to [..., E]."""
        config = self.config
        names = _branch_names(config.mlp_activations)
        branches = []
        for name, activation in zip(names, config.mlp_activations, strict=True):
            branch = Dense(config.mlp_dim, ("embed", "mlp"), config.activation_dtype, name=name)(x)
            branches.append(_ACTIVATIONS[activation](branch))
        hidden = functools.reduce(operator.mul, branches)
        hidden = dropout(config.dropout_rate)(hidden, deterministic=deterministic)
        hidden = constrain(hidden, *(("batch", "length", "mlp") if hidden.ndim == 3 else ("batch", "mlp")))
        return Dense(config.emb_dim, ("mlp", "embed"), config.activation_dtype, name="wo")(hidden)


def _branch_names(activations: Sequence[str]) -> list[str]:
    return ["wi"] if len(activations) == 1 else [f"wi_{i}" for i in range(len(activations))]
