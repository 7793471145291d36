"""Parameters out of nothing but a configuration and a key.

Floor 2.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from rest_jax.errors import ConfigError
from rest_jax.network.config import T5Config
from rest_jax.network.heads import RewardModel, ValueModel
from rest_jax.network.mesh import unbox
from rest_jax.network.transformer import HEAD_IN_DECODER, Transformer
from rest_jax.types import Params

TRUNK = ("token_embedder", "encoder", "decoder")


def _boxed(model: nn.Module, key: jax.Array) -> Any:
    # Shapes of parameters do not depend on those of the inputs, so one token does. Lazy: only the parameters
    # are computed, each by a program that layers of the same shape share.
    token = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    # Without rules there are no constraints: those on parameters are the caller's (`out_shardings`), and a
    # constraint on an array that is made outside `jit` is an error.
    with nn.logical_axis_rules(()):
        return model.lazy_init(key, token, token)["params"]


def _unboxed(model: nn.Module, key: jax.Array) -> Any:
    return unbox(_boxed(model, key))


def init_params(config: T5Config, key: jax.Array) -> dict[str, Any]:
    """Fresh float32 parameters of `Transformer(config)`, a function of the key alone.

    May be called as it is, or inside `jit` with `out_shardings` where one device cannot hold them all: the
    numbers are the same to the bit.

    Returns:
      {"token_embedder": ..., "encoder": ..., "decoder": ...}, T5X's tree without boxes.
    """
    return _unboxed(Transformer(config), key)


def abstract_params(config: T5Config) -> dict[str, Any]:
    """Shapes of the policy's parameters, boxed with their logical axis names; nothing is computed."""
    return jax.eval_shape(functools.partial(_boxed, Transformer(config)), jax.random.key(0))


def init_reward_params(
    config: T5Config, key: jax.Array, policy_params: Params | None = None
) -> dict[str, Any]:
    """Parameters of `RewardModel(config)`.

    Args:
      config: the network; its output head plays no part.
      key: what the fresh parameters are drawn from.
      policy_params: parameters of a policy whose trunk to start from; None starts from fresh ones.

    Returns:
      {"token_embedder": ..., "encoder": ..., "decoder": ..., "score_head": ...}.

    Raises:
      ConfigError: the policy's trunk has other shapes than `config`.
    """
    return _on_trunk(RewardModel(config), key, policy_params)


def init_value_params(
    config: T5Config, key: jax.Array, policy_params: Params | None = None
) -> dict[str, Any]:
    """Parameters of `ValueModel(config)`; arguments, tree and errors are those of `init_reward_params`."""
    return _on_trunk(ValueModel(config), key, policy_params)


def _on_trunk(model: nn.Module, key: jax.Array, policy_params: Params | None) -> dict[str, Any]:
    fresh = _unboxed(model, key)
    if policy_params is None:
        return fresh
    trunk = {name: dict(policy_params[name]) for name in TRUNK}
    trunk["decoder"].pop(HEAD_IN_DECODER, None)
    _check_same_shapes(trunk, {name: fresh[name] for name in TRUNK})
    return {**trunk, "score_head": fresh["score_head"]}


def abstract_reward_params(config: T5Config) -> dict[str, Any]:
    """Shapes of the reward model's parameters, boxed with their logical axis names."""
    return jax.eval_shape(functools.partial(_boxed, RewardModel(config)), jax.random.key(0))


def abstract_value_params(config: T5Config) -> dict[str, Any]:
    """Shapes of the value function's parameters, boxed with their logical axis names."""
    return jax.eval_shape(functools.partial(_boxed, ValueModel(config)), jax.random.key(0))


def count_params(params: Any) -> int:
    """How many numbers a tree of (abstract) parameters holds."""
    return sum(leaf.size for leaf in jax.tree.leaves(unbox(params)))


def _shapes(params: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape for path, leaf in leaves}


def _check_same_shapes(given: Any, wanted: Any) -> None:
    given_shapes, wanted_shapes = _shapes(given), _shapes(wanted)
    for name in sorted(given_shapes.keys() | wanted_shapes.keys()):
        if given_shapes.get(name) != wanted_shapes.get(name):
            raise ConfigError(
                f"{name} is {given_shapes.get(name, 'missing')} in the policy and "
                f"{wanted_shapes.get(name, 'missing')} in the network with a head",
                where="T5Config",
                remedy="Start it from a policy of the same size, or from nothing",
            )
