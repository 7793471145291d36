from __future__ import annotations

import errno
import hashlib
import shutil
from collections import namedtuple
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from rest_jax import errors, files
from rest_jax.network.mesh import MeshConfig, make_mesh
from rest_jax.training import checkpoints, state
from tests.training import toys

OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adafactor(0.1, min_dim_size_to_factor=4))


@pytest.fixture(scope="module")
def abstract():
    return state.abstract_state(
        toys.classifier_params(), OPTIMIZER, make_mesh(MeshConfig(), jax.devices()[:1])
    )


def state_at(abstract, step):
    """A state whose every number depends on the step."""
    fresh = state.init_state(toys.classifier_params(step), OPTIMIZER, abstract)
    return jax.tree.map(lambda leaf: leaf + jnp.asarray(step, leaf.dtype), fresh)


def open_store(tmp_path, heard=None, **fields):
    return checkpoints.CheckpointStore(
        tmp_path / "checkpoints", say=(heard if heard is not None else []).append, **fields
    )


def assert_same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(np.testing.assert_array_equal, left, right)


def flip_a_bit(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 4
    path.write_bytes(raw)


def largest_file(folder: Path) -> Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def test_round_trip(tmp_path, abstract):
    store = open_store(tmp_path)
    saved = state_at(abstract, 7)
    history = [{"step": 7, "valid/loss": 0.1 + 0.2, "valid/odd": float("nan")}]
    store.save(7, saved, {"valid/loss": 0.1 + 0.2, "valid/odd": float("nan")}, history)
    assert_same(store.restore(7, abstract), saved)
    assert_same(store.restore_params(7, abstract.params), saved.params)
    record = store.record(7)
    assert record.step == 7 and record.metrics["valid/loss"] == 0.1 + 0.2
    assert np.isnan(record.history[0]["valid/odd"])


@pytest.mark.parametrize("item", ["params", "optimizer"])
def test_a_flipped_bit_is_found_and_the_step_before_is_used(tmp_path, abstract, item):
    store = open_store(tmp_path)
    for step in (1, 2):
        store.save(step, state_at(abstract, step))
    flip_a_bit(largest_file(store.path(2) / item))
    heard: list[str] = []
    reopened = open_store(tmp_path, heard)
    assert reopened.latest_verified_step() == 1
    assert len(heard) == 1 and "000002 is damaged" in heard[0] and "other bytes" in heard[0]
    assert_same(reopened.restore(1, abstract), state_at(abstract, 1))


@pytest.mark.parametrize("harm", ["delete", "empty", "metrics", "not json"])
def test_other_damage(tmp_path, abstract, harm):
    store = open_store(tmp_path)
    for step in (1, 2):
        store.save(step, state_at(abstract, step), {"valid/loss": 0.125})
    verified = store.path(2) / checkpoints.VERIFIED_NAME
    if harm == "delete":
        largest_file(store.path(2) / "params").unlink()
    elif harm == "empty":
        largest_file(store.path(2) / "params").write_bytes(b"")
    elif harm == "metrics":
        verified.write_text(verified.read_text().replace("0.125", "0.025"))
    else:
        verified.write_bytes(b"\xff{")
    assert store.latest_verified_step() == 1


def test_stray_folders_are_cleaned_and_never_restored(tmp_path, abstract):
    store = open_store(tmp_path)
    store.save(3, state_at(abstract, 3))
    (store.folder / "000009").mkdir()
    (store.folder / "000005" / "params.orbax-checkpoint-tmp").mkdir(parents=True)
    assert store.steps() == [3]
    assert open_store(tmp_path).latest_verified_step() == 3
    assert [path.name for path in store.folder.iterdir()] == ["000003"]


def test_resuming_needs_the_best_checkpoint_too(tmp_path, abstract):
    store = open_store(tmp_path, keep=3)
    history = []
    for step, loss in ((1, 0.5), (2, 0.1), (3, 0.4)):
        history.append({"step": step, "valid/loss": loss})
        store.save(step, state_at(abstract, step), {"valid/loss": loss}, history)
    assert store.best_step() == 2 and store.resume_step() == 3
    flip_a_bit(largest_file(store.path(2) / "params"))
    assert store.latest_verified_step() == 3
    assert store.resume_step() == 1
    store.delete_after(1)
    assert store.steps() == [1]


def test_an_existing_step_is_replaced(tmp_path, abstract):
    store = open_store(tmp_path)
    store.save(4, state_at(abstract, 1))
    store.save(4, state_at(abstract, 2))
    assert store.is_intact(4)
    assert_same(store.restore(4, abstract), state_at(abstract, 2))


def test_another_shape_dtype_or_name_is_named(tmp_path, abstract):
    store = open_store(tmp_path)
    store.save(1, state_at(abstract, 1))
    kernel = abstract.params["hidden"]["kernel"]

    def with_kernel(leaf):
        return {**abstract.params, "hidden": {**abstract.params["hidden"], "kernel": leaf}}

    cases = {
        "hidden.kernel has shape": with_kernel(jax.ShapeDtypeStruct((6, 9), kernel.dtype)),
        "hidden.kernel has dtype float32, not bfloat16": with_kernel(
            jax.ShapeDtypeStruct(kernel.shape, jnp.bfloat16)
        ),
        "out.kernel is not in the network": {"hidden": abstract.params["hidden"]},
        "scale is missing": {**abstract.params, "scale": kernel},
    }
    for message, wanted in cases.items():
        with pytest.raises(errors.ConfigError, match=message):
            store.restore_params(1, wanted)


def test_another_optimiser_is_an_error(tmp_path, abstract):
    store = open_store(tmp_path)
    store.save(1, state_at(abstract, 1))
    other = state.abstract_state(
        toys.classifier_params(), optax.adamw(0.1), make_mesh(MeshConfig(), jax.devices()[:1])
    )
    with pytest.raises(errors.ConfigError, match="another network or optimiser: opt_state"):
        store.restore(1, other)


def test_params_are_a_plain_orbax_checkpoint_with_the_same_bytes_each_time(tmp_path):
    params = toys.classifier_params()
    digests = [checkpoints.save_params(tmp_path / name / "params", params) for name in "ab"]
    assert digests[0] == digests[1] == checkpoints.params_digest(jax.tree.map(jnp.asarray, params))

    def tree_digest(folder):
        found = sorted(path for path in folder.rglob("*") if path.is_file())
        return {
            str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found
        }

    assert tree_digest(tmp_path / "a") == tree_digest(tmp_path / "b")
    assert_same(ocp.StandardCheckpointer().restore(tmp_path / "a" / "params"), params)
    assert_same(checkpoints.load_params(tmp_path / "a" / "params"), params)
    assert_same(checkpoints.load_params(tmp_path / "a" / "params", state.abstract_of(params)), params)


def test_digest_sees_names_shapes_types_and_bits():
    params = toys.classifier_params()
    flat = {**params, "out": {"kernel": params["out"]["kernel"].reshape(-1)}}
    other = {**params, "out": {"kernel": params["out"]["kernel"].view(np.int32)}}
    renamed = {"hidden": params["hidden"], "head": params["out"]}
    nudged = {**params, "out": {"kernel": np.nextafter(params["out"]["kernel"], np.float32(9))}}
    assert len({checkpoints.params_digest(tree) for tree in (params, flat, other, renamed, nudged)}) == 5


def test_saved_params_replace_and_damage_is_an_error(tmp_path):
    folder = tmp_path / "params"
    with pytest.raises(errors.MissingInputError, match="no parameters in"):
        checkpoints.load_params(folder)
    checkpoints.save_params(folder, toys.classifier_params(1))
    checkpoints.save_params(folder, toys.classifier_params(2))
    assert_same(checkpoints.load_params(folder), toys.classifier_params(2))
    flip_a_bit(folder / "hidden.kernel" / "0.0")
    with pytest.raises(errors.IntegrityError, match=r"hidden.kernel/0.0 has other bytes"):
        checkpoints.load_params(folder)


def test_a_disk_without_room_is_an_output_error(tmp_path, abstract, monkeypatch):
    store = open_store(tmp_path)
    store.save(1, state_at(abstract, 1))
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(100, 99, 1))
    with pytest.raises(errors.OutputError, match=r"000002.*0 MB are free"):
        store.save(2, state_at(abstract, 2))
    assert open_store(tmp_path).latest_verified_step() == 1


def test_a_disk_that_fills_up_while_writing_is_an_output_error(tmp_path, abstract):
    """The limit on a file's size makes the operating system itself refuse, in the middle of orbax's write."""
    code = f"""
import resource, signal
import numpy as np
from rest_jax import errors
from rest_jax.training import checkpoints
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
folder = {str(tmp_path)!r} + "/params"
checkpoints.save_params(folder, {{"w": np.arange(4.0)}})
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    checkpoints.save_params(folder, {{"w": np.random.default_rng(0).normal(size=200_000)}})
except errors.OutputError as error:
    print("refused", error.exit_code)
print(checkpoints.load_params(folder)["w"])
"""
    done = toys.run_python(code)
    assert done.stdout.splitlines() == ["refused 74", "[0. 1. 2. 3.]"], done.stderr


def test_a_folder_that_cannot_be_written(tmp_path, abstract):
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    with pytest.raises(errors.OutputError, match="cannot write"):
        open_store(tmp_path).save(1, state_at(abstract, 1))


def test_an_error_of_the_system_keeps_its_reason():
    assert "No space left" in str(
        files.output_error(OSError(errno.ENOSPC, "No space left on device"), Path("x"))
    )


def test_restores_on_another_mesh(tmp_path):
    save = f"""
import numpy as np, optax
from jax.sharding import NamedSharding, PartitionSpec as P
from rest_jax.network.mesh import MeshConfig, make_mesh
from rest_jax.training import checkpoints, state
mesh = make_mesh(MeshConfig(data=2, model=2))
w = np.arange(256 * 128, dtype=np.float32).reshape(256, 128)
params = {{"w": w, "b": np.arange(5, dtype=np.float32)}}
shardings = {{"w": NamedSharding(mesh, P("data", "model")), "b": NamedSharding(mesh, P())}}
abstract = state.abstract_state(params, optax.adamw(0.1), mesh, shardings)
assert abstract.opt_state[0].mu["w"].sharding == shardings["w"]
assert state.bytes_per_device(abstract) == 4 * (3 * 256 * 128 // 4 + 3 * 5 + 4)
checkpoints.CheckpointStore({str(tmp_path)!r}).save(1, state.init_state(params, optax.adamw(0.1), abstract))
"""
    done = toys.run_python(save, devices=4)
    assert done.returncode == 0, done.stderr
    params = {
        "w": np.arange(256 * 128, dtype=np.float32).reshape(256, 128),
        "b": np.arange(5, dtype=np.float32),
    }
    one = state.abstract_state(params, optax.adamw(0.1), make_mesh(MeshConfig(), jax.devices()[:1]))
    store = checkpoints.CheckpointStore(tmp_path)
    assert store.latest_verified_step() == 1
    assert_same(store.restore(1, one).params, params)
