"""Reads the parameters of T5X checkpoints, both of its formats, without T5X.

Floor 7. The parameter tree of `rest_jax.network` is T5X's, so reading is the whole conversion.

A T5X checkpoint is a folder `checkpoint_<step>`:
  native  a msgpack file `checkpoint` with the tree; a small leaf is inline, a larger one is the tensorstore
          specification of a zarr array in a sibling folder (`target.token_embedder.embedding/`).
  orbax   an orbax composite whose item `state` holds `target` (the parameters) and `state` (the optimizer's).
Only the parameters are read; the optimizer's state stays on disk.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import jax
import numpy as np
from flax import serialization, traverse_util

from rest_jax import errors
from rest_jax.interop import parameter_names
from rest_jax.network.config import T5Config

_NATIVE_FILE = "checkpoint"
_ORBAX_ITEM = "state"
_NAMING = "Name a checkpoint_<step> folder written by T5X"
_MENDING = "Copy the whole checkpoint folder again"


def read_t5x(folder: str | Path) -> dict[str, Any]:
    """Reads the parameters of a T5X checkpoint of either format.

    Args:
      folder: a `checkpoint_<step>` folder.

    Returns:
      The parameter tree, float32 NumPy leaves: {"token_embedder": …, "encoder": …, "decoder": …}.

    Raises:
      MissingInputError: there is no T5X checkpoint in the folder.
      IntegrityError: the checkpoint is incomplete or cannot be read.
      NonFiniteError: a parameter is NaN or infinite.
    """
    base = Path(folder)
    if (base / _NATIVE_FILE).is_file():
        return read_t5x_native(base)
    if (base / _ORBAX_ITEM).is_dir():
        return read_t5x_orbax(base)
    steps = sorted(path.name for path in base.glob("checkpoint_*") if path.is_dir())
    if steps:
        remedy = f"Name one of them: {', '.join(steps[-5:])}"
        raise errors.MissingInputError(f"{base} holds checkpoints and is none itself", remedy=remedy)
    raise errors.MissingInputError(
        f"no T5X checkpoint in {base}: neither a file {_NATIVE_FILE!r} nor a folder {_ORBAX_ITEM!r}",
        remedy=_NAMING,
    )


def read_t5x_native(folder: str | Path) -> dict[str, Any]:
    """Reads the parameters of T5X's native format (msgpack and zarr); arguments and errors as `read_t5x`."""
    base = Path(folder)
    path = base / _NATIVE_FILE
    if not path.is_file():
        raise errors.MissingInputError(f"no file {path}", remedy=_NAMING)
    try:
        tree = serialization.msgpack_restore(path.read_bytes())
    except Exception as error:  # msgpack raises a family of its own
        raise errors.IntegrityError(f"{path} is not a msgpack tree: {error}", remedy=_MENDING) from error
    # Version 3 nests the parameters below `optimizer`; a checkpoint of parameters alone has them at the top.
    target = tree.get("optimizer", tree).get("target") if isinstance(tree, Mapping) else None
    if not isinstance(target, Mapping):
        raise errors.IntegrityError(f"{path} has no tree 'target'", remedy=_NAMING)
    flat = traverse_util.flatten_dict(dict(target), sep="/", is_leaf=lambda _, leaf: _is_specification(leaf))
    pending = {name: _opened(base, leaf) for name, leaf in flat.items()}
    arrays = {}
    for name, leaf in pending.items():
        try:
            arrays[name] = leaf.result().read().result() if hasattr(leaf, "result") else leaf
        except Exception as error:  # tensorstore raises ValueError, OSError and its own
            raise errors.IntegrityError(
                f"parameter {name} of {base} cannot be read: {_first_line(error)}", remedy=_MENDING
            ) from error
    return _finished(arrays, base)


def _is_specification(leaf: Any) -> bool:
    return isinstance(leaf, Mapping) and "driver" in leaf and "kvstore" in leaf


def _opened(base: Path, leaf: Any) -> Any:
    """An inline array as it is; for a specification, the future of its array."""
    if not _is_specification(leaf):
        return leaf
    import tensorstore

    # The stored path may be absolute or a bucket's: the array always lies beside the msgpack file.
    name = PurePosixPath(leaf["kvstore"]["path"]).name
    location = {"driver": "file", "path": f"{(base / name).absolute()}/"}
    return tensorstore.open({"driver": leaf["driver"], "kvstore": location}, open=True, read=True)


def read_t5x_orbax(folder: str | Path) -> dict[str, Any]:
    """Reads the parameters of T5X's orbax format; arguments and errors as `read_t5x`."""
    import orbax.checkpoint as ocp

    base = Path(folder)
    item = (base / _ORBAX_ITEM).absolute()
    if not item.is_dir():
        raise errors.MissingInputError(f"no folder {item}", remedy=_NAMING)
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            stored = checkpointer.metadata(item).item_metadata.tree
            wanted = {"target": stored["target"]}
            # Plain NumPy leaves: the mesh that the checkpoint was written on need not exist here.
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
            arguments = ocp.args.PyTreeRestore(item=wanted, restore_args=as_numpy, partial_restore=True)
            target = checkpointer.restore(item, args=arguments)["target"]
    except Exception as error:  # orbax passes on whatever its stores raise
        what = f"{item} cannot be read: {_first_line(error)}"
        raise errors.IntegrityError(what, remedy=_MENDING) from error
    return _finished(traverse_util.flatten_dict(target, sep="/"), base)


def config_from_params(params: Mapping[str, Any], num_heads: int | None = None, **settings: Any) -> T5Config:
    """The configuration of a network, as far as the shapes of its parameters tell.

    Args:
      params: the parameter tree.
      num_heads: to be checked against the table of relative positions, which states it.
      **settings: fields of T5Config that no shape tells (`dropout_rate`, `relpos_max_distance`, `dtype`, …).

    Returns:
      The configuration, its other fields at their defaults.

    Raises:
      ConfigError: the tree is not T5 1.1's, or `num_heads` is not the number of heads.
    """
    flat = parameter_names.flatten(params)
    try:
        vocab_size, emb_dim = flat["token_embedder/embedding"].shape
        heads, buckets = flat["encoder/relpos_bias/rel_embedding"].shape
        joined = flat["encoder/layers_0/attention/query/kernel"].shape[1]
        mlp_dim = flat["encoder/layers_0/mlp/wo/kernel"].shape[0]
    except (KeyError, ValueError) as error:
        raise errors.ConfigError(
            f"not the parameter tree of T5 1.1: {_first_line(error)}",
            remedy="Only checkpoints of t5x.examples.t5.network, not scanned over layers, can be read",
        ) from error
    if num_heads is not None and num_heads != heads:
        raise errors.ConfigError(
            f"num_heads is {num_heads}, the checkpoint's relative position table has {heads}",
            where="encoder/relpos_bias/rel_embedding",
            remedy=f"Set num_heads = {heads}",
        )
    gated = "encoder/layers_0/mlp/wi_0/kernel" in flat
    config = T5Config(
        vocab_size=vocab_size,
        emb_dim=emb_dim,
        num_heads=heads,
        head_dim=joined // heads,
        mlp_dim=mlp_dim,
        num_encoder_layers=_count_layers(flat, "encoder"),
        num_decoder_layers=_count_layers(flat, "decoder"),
        mlp_activations=("gelu", "linear") if gated else ("relu",),
        logits_via_embedding="decoder/logits_dense/kernel" not in flat,
        relpos_num_buckets=buckets,
        **settings,
    )
    parameter_names.check_tree(params, config)
    return config


def _count_layers(flat: Mapping[str, Any], stack: str) -> int:
    return len({name.split("/")[1] for name in flat if name.startswith(f"{stack}/layers_")})


def _finished(arrays: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The nested float32 tree; refuses what is not finite."""
    flat = {name: np.asarray(leaf).astype(np.float32) for name, leaf in arrays.items()}
    parameter_names.check_finite(flat, where=str(folder))
    return traverse_util.unflatten_dict(flat, sep="/")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
