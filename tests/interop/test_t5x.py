from __future__ import annotations

import tarfile
from pathlib import Path

import jax
import msgpack
import numpy as np
import pytest
import scipy.special
import tensorstore
from flax import serialization

from rest_jax import errors
from rest_jax.interop import parameter_names, t5x
from rest_jax.network.transformer import Transformer
from tests.interop.conftest import random_params, tiny_config

GOLDEN = Path(__file__).parents[2] / "../shared/golden"
HEADS = ("tied", "untied")


def _golden(kind: str, folder: Path) -> Path:
    archive = GOLDEN / f"t5x-tiny-{kind}.tar.gz"
    if not archive.is_file():
        pytest.skip(f"needs the checkpoint {archive.name}, written by T5X, beside the repository")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder / f"t5x-tiny-{kind}"


def write_native(folder: Path, params, *, inline_below: int = 30) -> None:
    """A checkpoint as T5X writes it, small arrays inline: written here without T5X and without the reader."""
    folder.mkdir()

    def leaf(path: str, array: np.ndarray):
        if array.size < inline_below:
            return array
        name = "target." + path.replace("/", ".")
        compressor = {"id": "gzip", "level": 1}
        chunks = [max(1, array.shape[0] // 2), *array.shape[1:]]
        metadata = {"shape": list(array.shape), "chunks": chunks, "compressor": compressor}
        place = {"driver": "file", "path": f"{folder / name}/"}
        store = tensorstore.open(
            {"driver": "zarr", "kvstore": place, "metadata": {**metadata, "dtype": "<f4"}}, create=True
        ).result()
        store.write(array).result()
        kvstore = {"driver": "gcs", "bucket": "a-bucket", "path": f"somewhere/else/{name}/"}
        return {"driver": "zarr", "dtype": "float32", "kvstore": kvstore, "metadata": metadata}

    flat = {path: leaf(path, np.asarray(array)) for path, array in parameter_names.flatten(params).items()}
    tree: dict = {}
    for path, value in flat.items():
        node = tree
        for part in path.split("/")[:-1]:
            node = node.setdefault(part, {})
        node[path.split("/")[-1]] = value
    absent = {"driver": "zarr", "kvstore": {"driver": "file", "path": "state.not.copied/"}, "metadata": {}}
    optimizer = {"target": tree, "state": {"step": np.int32(7), "param_states": {"v": absent}}}
    data = serialization.msgpack_serialize({"version": 3, "optimizer": optimizer})
    (folder / "checkpoint").write_bytes(data)


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("flavour", ["native", "orbax"])
def test_golden_checkpoint_gives_t5xs_numbers(tmp_path, kind, flavour):
    base = _golden(kind, tmp_path)
    params = t5x.read_t5x(base / flavour / "checkpoint_20")
    config = t5x.config_from_params(params)
    assert config.logits_via_embedding == (kind == "tied")
    expected = np.load(base / "expected.npz")
    sources, inputs = expected["encoder_input_tokens"], expected["decoder_input_tokens"]
    network = Transformer(config)
    encoded = network.apply({"params": params}, sources, method="encode")
    logits = network.apply({"params": params}, sources, inputs)
    log_probs = logits - scipy.special.logsumexp(logits, axis=-1, keepdims=True)
    targets, weights = expected["decoder_target_tokens"], expected["decoder_loss_weights"]
    chosen = np.take_along_axis(np.asarray(log_probs), targets[..., None], -1)[..., 0]
    # What stands on padding is read by nobody, and T5X's mask leaves other numbers there.
    real_source, real_target = sources != 0, weights > 0
    assert 0 < real_source.sum() < real_source.size and 0 < real_target.sum() < real_target.size
    np.testing.assert_allclose(encoded[real_source], expected["encoded"][real_source], atol=1e-5)
    np.testing.assert_allclose(logits[real_target], expected["logits"][real_target], atol=1e-5)
    np.testing.assert_allclose((chosen * weights).sum(-1), expected["sequence_log_prob"], atol=1e-5)


@pytest.mark.parametrize("kind", HEADS)
def test_both_formats_hold_the_same_parameters(tmp_path, kind):
    base = _golden(kind, tmp_path)
    native = parameter_names.flatten(t5x.read_t5x_native(base / "native" / "checkpoint_20"))
    orbax = parameter_names.flatten(t5x.read_t5x_orbax(base / "orbax" / "checkpoint_20"))
    assert native.keys() == orbax.keys()
    assert all(np.array_equal(native[name], orbax[name]) for name in native)
    assert {array.dtype for array in native.values()} == {np.dtype(np.float32)}


def test_native_checkpoint_is_read_wherever_it_lies(tmp_path):
    params = random_params(tiny_config())
    write_native(tmp_path / "written_here", params)
    (tmp_path / "written_here").rename(tmp_path / "checkpoint_7")
    found = t5x.read_t5x(tmp_path / "checkpoint_7")
    assert jax.tree.all(jax.tree.map(np.array_equal, params, found))


def test_orbax_checkpoint_is_read(tmp_path):
    import orbax.checkpoint as ocp

    params = random_params(tiny_config())
    state = {"target": params, "state": {"step": np.int32(7), "param_states": {"v": np.ones(3)}}}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(tmp_path / "checkpoint_7" / "state", args=ocp.args.PyTreeSave(state))
    found = t5x.read_t5x(tmp_path / "checkpoint_7")
    assert jax.tree.all(jax.tree.map(np.array_equal, params, found))


@pytest.mark.parametrize("tied", [False, True])
def test_configuration_is_told_by_the_shapes(tied):
    config = tiny_config(logits_via_embedding=tied, dropout_rate=0.0, relpos_max_distance=99)
    params = random_params(config)
    assert t5x.config_from_params(params, dropout_rate=0.0, relpos_max_distance=99) == config
    assert t5x.config_from_params(params, num_heads=4).num_heads == 4
    with pytest.raises(errors.ConfigError, match="num_heads is 8"):
        t5x.config_from_params(params, num_heads=8)


def test_configuration_of_a_plain_mlp():
    config = tiny_config(mlp_activations=("relu",))
    assert t5x.config_from_params(random_params(config)) == config


def test_a_tree_that_is_not_t5s_is_refused():
    params = random_params(tiny_config())
    with pytest.raises(errors.ConfigError, match="not the parameter tree of T5"):
        t5x.config_from_params({"encoder": params["encoder"]})
    params["decoder"]["adapter"] = {"kernel": np.zeros((2, 2))}
    with pytest.raises(errors.ConfigError, match="decoder/adapter/kernel has no place"):
        t5x.config_from_params(params)


def test_nonfinite_parameters_are_refused(tmp_path):
    params = jax.tree.map(np.array, random_params(tiny_config()))
    params["encoder"]["encoder_norm"]["scale"][0] = np.nan
    write_native(tmp_path / "checkpoint_7", params)
    with pytest.raises(errors.NonFiniteError, match="encoder/encoder_norm/scale"):
        t5x.read_t5x(tmp_path / "checkpoint_7")


def test_an_array_that_is_missing_is_named(tmp_path):
    write_native(tmp_path / "checkpoint_7", random_params(tiny_config()))
    (tmp_path / "checkpoint_7" / "target.token_embedder.embedding" / ".zarray").unlink()
    with pytest.raises(errors.IntegrityError, match="token_embedder/embedding"):
        t5x.read_t5x(tmp_path / "checkpoint_7")


def test_a_chunk_that_is_broken_is_named(tmp_path):
    write_native(tmp_path / "checkpoint_7", random_params(tiny_config()))
    chunk = tmp_path / "checkpoint_7" / "target.token_embedder.embedding" / "1.0"
    chunk.write_bytes(chunk.read_bytes()[:40])
    with pytest.raises(errors.IntegrityError, match="token_embedder/embedding"):
        t5x.read_t5x(tmp_path / "checkpoint_7")


def test_folders_without_a_checkpoint(tmp_path):
    with pytest.raises(errors.MissingInputError, match="no T5X checkpoint"):
        t5x.read_t5x(tmp_path)
    (tmp_path / "checkpoint_100").mkdir()
    with pytest.raises(errors.MissingInputError, match="Name one of them: checkpoint_100"):
        t5x.read_t5x(tmp_path)
    with pytest.raises(errors.MissingInputError, match="no file"):
        t5x.read_t5x_native(tmp_path)
    with pytest.raises(errors.MissingInputError, match="no folder"):
        t5x.read_t5x_orbax(tmp_path)


def test_files_that_are_no_checkpoint(tmp_path):
    (tmp_path / "checkpoint").write_bytes(b"\xc1 not msgpack")
    with pytest.raises(errors.IntegrityError, match="not a msgpack tree"):
        t5x.read_t5x(tmp_path)
    (tmp_path / "checkpoint").write_bytes(msgpack.packb({"weights": 1}))
    with pytest.raises(errors.IntegrityError, match="no tree 'target'"):
        t5x.read_t5x(tmp_path)
    (tmp_path / "checkpoint").unlink()
    (tmp_path / "state").mkdir()
    with pytest.raises(errors.IntegrityError, match="cannot be read"):
        t5x.read_t5x(tmp_path)
