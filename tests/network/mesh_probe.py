"""Run by test_mesh.py in a process of its own with four virtual CPU devices; prints its findings as JSON."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np

from rest_jax.network.decoding import empty_cache
from rest_jax.network.init import abstract_params, init_params
from rest_jax.network.mesh import MeshConfig, batch_sharding, make_mesh, param_shardings, replicated, use_mesh
from rest_jax.network.transformer import Transformer
from tests.network.tiny import SHALLOW, params_of, rows

SOURCE, TARGET = rows([7, 9, 4, 5], 9, seed=1), rows([5, 3, 4, 5], 5, seed=2, shifted=True)


def loss(params, source, target, key):
    logits = Transformer(SHALLOW).apply(
        {"params": params}, source, target, deterministic=False, rngs={"dropout": key}
    )
    return -jnp.mean(jax.nn.log_softmax(logits)[..., 3]), logits


def decode(params, source, target):
    model = Transformer(SHALLOW)
    encoded = model.apply({"params": params}, source, method="start_decoding")
    cache = empty_cache(SHALLOW, len(source), 2, 2)
    for t in range(2):
        tokens = jnp.repeat(target[:, t : t + 1], 2, axis=1)
        logits, cache = model.apply(
            {"params": params}, tokens, jnp.int32(t), cache, encoded, method="decode_step"
        )
    return logits


def on_mesh(mesh, params):
    key = jax.random.key(5)
    with use_mesh(mesh):
        shardings = param_shardings(mesh, abstract_params(SHALLOW))
        placed = jax.device_put(params, shardings)
        batch = jax.device_put((SOURCE, TARGET), batch_sharding(mesh))
        step = jax.value_and_grad(loss, has_aux=True)
        jaxpr = str(jax.make_jaxpr(step)(placed, *batch, key))
        (value, logits), gradients = jax.jit(step, out_shardings=(replicated(mesh), shardings))(
            placed, *batch, key
        )
        fresh = jax.jit(init_params, static_argnums=0, out_shardings=shardings)(SHALLOW, jax.random.key(0))
        decoded = jax.jit(decode)(placed, *batch)
    return {
        "constraints": jaxpr.count("sharding_constraint"),
        "value": np.asarray(value),
        "logits": np.asarray(logits),
        "decoded": np.asarray(decoded),
        "gradients": jax.tree.map(np.asarray, gradients),
        "fresh": jax.tree.map(np.asarray, fresh),
        "shards": {
            name: sorted({shard.data.shape for shard in leaf.addressable_shards})
            for name, leaf in (
                ("embedding", placed["token_embedder"]["embedding"]),
                ("wo", placed["encoder"]["layers_0"]["mlp"]["wo"]["kernel"]),
                ("scale", placed["encoder"]["encoder_norm"]["scale"]),
                ("source", batch[0]),
            )
        },
    }


def largest_difference(a, b):
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(np.max(np.abs(x - y))) for x, y in leaves)


def main():
    params = jax.tree.map(np.asarray, params_of(SHALLOW))
    plain = str(jax.make_jaxpr(lambda p: loss(p, SOURCE, TARGET, jax.random.key(5)))(params))
    one = on_mesh(make_mesh(MeshConfig(), jax.devices()[:1]), params)
    findings = {
        "devices": len(jax.devices()),
        "constraints without a mesh": plain.count("sharding_constraint"),
    }
    for model in (1, 2, 4):
        if SHALLOW.num_heads % model:
            continue
        many = on_mesh(make_mesh(MeshConfig(model=model)), params)
        compared = {
            k: largest_difference(one[k], many[k])
            for k in ("value", "logits", "decoded", "gradients", "fresh")
        }
        compared |= {"constraints": many["constraints"], "shards": many["shards"]}
        findings[f"{4 // model}x{model}"] = compared
    eager = init_params(SHALLOW, jax.random.key(0))
    findings["eager init"] = largest_difference(jax.tree.map(np.asarray, eager), one["fresh"])
    print(json.dumps(findings))


if __name__ == "__main__":
    main()
