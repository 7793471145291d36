"""Checkpoints that are verified before they are read: the only module that knows orbax.

Floor 5. Orbax writes a folder atomically, but a bit flipped in its array bytes loads as other weights without
a word. So each checkpoint carries `verified.json`, with the SHA-256 of every file, written after orbax is
done; it is the commit of the checkpoint, and what has none is unfinished work.

    folder/000040/params/        the parameters, a plain orbax checkpoint
    folder/000040/optimizer/     the rest of the state
    folder/000040/verified.json  digests, the metrics of this step, the history of evaluations up to it
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from rest_jax import errors, files
from rest_jax.training import history as histories
from rest_jax.training.state import TrainState
from rest_jax.types import Params

VERIFIED_NAME = "verified.json"
_SPARE_BYTES = 1 << 20

logging.getLogger("absl").setLevel(logging.ERROR)  # orbax reports every save there


@dataclasses.dataclass(frozen=True)
class CheckpointRecord:
    """What a checkpoint says beside its arrays.

    Attributes:
      step: steps of training done.
      metrics: the evaluation at this step; empty if there was none.
      history: all evaluations up to and with this step.
      digests: SHA-256 of each file, by path relative to the checkpoint.
    """

    step: int
    metrics: Mapping[str, float]
    history: Sequence[histories.Row]
    digests: Mapping[str, str]


class CheckpointStore:
    """The checkpoints of one training: the newest few and the best.

    Opening a store deletes what an interrupted save left behind.

    Args:
      folder: where the checkpoints are; made at the first save.
      keep: how many of the newest to keep (1 or more); the best is kept besides.
      best_metric: the metric of the history that chooses the best.
      best_mode: "min" or "max".
      say: told about each checkpoint that is damaged.
    """

    def __init__(
        self,
        folder: str | Path,
        keep: int = 2,
        best_metric: str = "valid/loss",
        best_mode: str = "min",
        say: Callable[[str], None] = print,
    ):
        if keep < 1:
            raise errors.ConfigError(f"keep = {keep} keeps nothing", where="keep", remedy="Use 1 or more")
        histories.check_mode(best_mode, "best_mode")
        self.folder = Path(folder).absolute()
        self.keep, self.best_metric, self.best_mode, self._say = keep, best_metric, best_mode, say
        self._clean()

    def steps(self) -> list[int]:
        """Steps with a committed checkpoint, rising. Their bytes have not been checked."""
        return committed_steps(self.folder)

    def path(self, step: int) -> Path:
        """The folder of one checkpoint."""
        return self.folder / f"{step:06d}"

    def record(self, step: int) -> CheckpointRecord:
        """What the checkpoint of a step says beside its arrays."""
        raw = files.read_json(self.path(step) / VERIFIED_NAME)
        rows = [histories.from_json(row) for row in raw["history"]]
        return CheckpointRecord(raw["step"], histories.from_json(raw["metrics"]), rows, raw["files"])

    def best_step(self) -> int | None:
        """The best step by the history of the newest checkpoint; None before the first evaluation."""
        steps = self.steps()
        return self._best_of(self.record(steps[-1])) if steps else None

    def _best_of(self, record: CheckpointRecord) -> int | None:
        best = histories.best_row(record.history, self.best_metric, self.best_mode)
        return None if best is None else best["step"]

    def is_intact(self, step: int) -> bool:
        """Whether every file of a checkpoint has the digest it was committed with; says so if not."""
        damage = _damage(self.path(step))
        if damage:
            self._say(f"checkpoint {self.path(step)} is damaged: {damage}")
        return not damage

    def latest_verified_step(self) -> int | None:
        """The newest step whose checkpoint is intact; each damaged one on the way is named."""
        return next((step for step in reversed(self.steps()) if self.is_intact(step)), None)

    def resume_step(self) -> int | None:
        """The newest intact step from which training can go on as if it had never stopped.

        That also takes an intact checkpoint of the best step so far, which may be the training's result.
        """
        for step in reversed(self.steps()):
            if not self.is_intact(step):
                continue
            best = self._best_of(self.record(step))
            if best in (None, step) or (best in self.steps() and self.is_intact(best)):
                return step
            self._say(f"checkpoint {step} is passed over, since its best step {best} is not intact")
        return None

    def save(
        self,
        step: int,
        state: TrainState,
        metrics: Mapping[str, float] | None = None,
        history: Sequence[histories.Row] = (),
    ) -> None:
        """Writes and commits one checkpoint, then deletes those that are no longer kept.

        Every process must call it. An existing checkpoint of this step is replaced.

        Raises:
          OutputError: the disk is full or the folder cannot be written.
        """
        path = self.path(step)
        with _writing(path):
            _on_first_process(lambda: _make_room(path, state))
            _write_tree(path / "params", state.params)
            files.failpoint("between-params-and-optimizer")
            _write_tree(path / "optimizer", _without_params(state))
            files.failpoint("before-verified")
            record = {
                "step": step,
                "metrics": histories.to_json(metrics or {}),
                "history": [histories.to_json(row) for row in history],
            }
            _on_first_process(lambda: _commit(path, record))
        if step not in self.steps():
            raise errors.OutputError(
                f"checkpoint {path} was not written", remedy="Check the disk, then run the same command again"
            )
        _on_first_process(self._delete_old)

    def restore(self, step: int, abstract: TrainState) -> TrainState:
        """The state of a step, on the shardings of `abstract`, whatever mesh it was saved from.

        Raises:
          ConfigError: a shape, dtype or name is not the one `abstract` has; the message names it.
        """
        path = self.path(step)
        params = _read_tree(path / "params", abstract.params)
        rest = _read_tree(path / "optimizer", _without_params(abstract))
        return TrainState(params=params, **rest)

    def restore_params(self, step: int, abstract: Params) -> Params:
        """The parameters of a step alone, on the shardings of `abstract`."""
        return _read_tree(self.path(step) / "params", abstract)

    def delete_after(self, step: int | None) -> None:
        """Deletes checkpoints newer than a step (all for None): training from there writes them anew."""
        newer = [other for other in self.steps() if step is None or other > step]

        def delete() -> None:
            for other in newer:
                files.clear_folder(self.path(other))

        _on_first_process(delete)

    def _delete_old(self) -> None:
        steps = self.steps()
        kept = {*steps[-self.keep :], self.best_step()}
        for step in steps:
            if step not in kept:
                # Without its commit first: a kill in between leaves a stray folder, not a damaged checkpoint.
                (self.path(step) / VERIFIED_NAME).unlink()
                files.clear_folder(self.path(step))

    def _clean(self) -> None:
        def clean() -> None:
            if self.folder.is_dir():
                for path in self.folder.iterdir():
                    if path.is_dir() and not (path / VERIFIED_NAME).is_file():
                        files.clear_folder(path)

        _on_first_process(clean)


def committed_steps(folder: Path) -> list[int]:
    """Steps with a committed checkpoint in a store's folder, rising; none where there is no folder."""
    paths = folder.iterdir() if folder.is_dir() else ()
    return sorted(int(p.name) for p in paths if p.name.isdecimal() and (p / VERIFIED_NAME).is_file())


def params_digest(params: Params) -> str:
    """SHA-256 of a parameter tree: names, dtypes, shapes and bytes. Equal parameters have equal digests."""
    digest = hashlib.sha256()
    for path, leaf in sorted(_by_name(params).items()):
        array = np.asarray(leaf)
        digest.update(f"{path} {array.dtype} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def save_params(folder: str | Path, params: Params) -> str:
    """Writes parameters alone as an orbax checkpoint that any orbax reads, and returns their digest.

    Equal parameters give equal files: no time, no random name and no device is in them. Every process must
    call it. A folder that is there already is replaced, after the new one is whole.

    Raises:
      OutputError: the disk is full or the folder cannot be written.
    """
    final = Path(folder).absolute()
    draft = final.with_name(f".{final.name}.draft")
    host = jax.tree.map(_to_host, params)
    with _writing(final):
        _on_first_process(lambda: _make_room(draft, host))
        # One file a parameter: orbax's default layout draws random file names.
        _write_tree(draft / "tree", host, use_ocdbt=False)

        def publish() -> None:
            tree = draft / "tree"
            (tree / "commit_success.txt").unlink(missing_ok=True)
            _without_times(tree / "_CHECKPOINT_METADATA")
            _commit(tree, {"digest": params_digest(host)})
            files.clear_folder(final)
            tree.rename(final)
            files.clear_folder(draft)

        _on_first_process(publish)
    return params_digest(host)


def load_params(folder: str | Path, abstract: Params | None = None) -> Params:
    """Reads what `save_params` wrote, after checking its digests.

    Args:
      folder: the folder of the parameters.
      abstract: the shapes and dtypes expected, each with or without a sharding; None takes what is there.

    Returns:
      A nested dict of arrays: on the shardings of `abstract`, or whole on the default device.

    Raises:
      MissingInputError: there are no parameters in the folder.
      IntegrityError: a file has other bytes than were written.
      ConfigError: a shape, dtype or name is not the one `abstract` has; the message names it.
    """
    base = Path(folder).absolute()
    if not (base / VERIFIED_NAME).is_file():
        raise errors.MissingInputError(f"no parameters in {base}", remedy="Run the phase that trains them")
    damage = _damage(base)
    if damage:
        raise errors.IntegrityError(
            f"parameters {base} are damaged: {damage}", remedy="Delete the folder above and train again"
        )
    return _read_tree(base, abstract)


def discard_checkpoints(folder: str | Path) -> None:
    """Deletes the checkpoints of a finished training in `folder`; `params/` and `fit.json` stay."""
    _on_first_process(lambda: files.clear_folder(Path(folder) / "checkpoints"))


def _without_params(state: TrainState) -> dict[str, Any]:
    rest = {
        "step": state.step,
        "skipped": state.skipped,
        "skipped_in_a_row": state.skipped_in_a_row,
        "opt_state": state.opt_state,
    }
    return {**rest, "lagging": state.lagging} if state.lagging else rest


def _write_tree(path: Path, tree: Any, use_ocdbt: bool = True) -> None:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=use_ocdbt)) as checkpointer:
        checkpointer.save(path, tree)


def _read_tree(path: Path, abstract: Any | None) -> Any:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        stored = checkpointer.metadata(path).item_metadata.tree
        if abstract is None:
            abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), stored)
        else:
            _check_same(path, stored, abstract)
        default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

        def located(leaf: Any) -> jax.ShapeDtypeStruct:
            sharding = getattr(leaf, "sharding", None) or default
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        wanted = jax.tree.map(located, abstract)
        restore_args = ocp.checkpoint_utils.construct_restore_args(wanted)
        return checkpointer.restore(path, args=ocp.args.PyTreeRestore(item=wanted, restore_args=restore_args))


def _check_same(path: Path, stored: Any, abstract: Any) -> None:
    """Orbax casts a dtype and cuts or pads a shape on request, and without a word: so compare first."""
    found, wanted = _by_name(stored), _by_name(abstract)
    for name in sorted(found.keys() | wanted.keys()):
        here, there = found.get(name), wanted.get(name)
        if here is None or there is None:
            what = f"{name} is {'missing' if here is None else 'not in the network'}"
        elif tuple(here.shape) != tuple(there.shape):
            what = f"{name} has shape {tuple(here.shape)}, not {tuple(there.shape)}"
        elif jnp.dtype(here.dtype) != jnp.dtype(there.dtype):
            what = f"{name} has dtype {jnp.dtype(here.dtype)}, not {jnp.dtype(there.dtype)}"
        else:
            continue
        raise errors.ConfigError(
            f"checkpoint is of another network or optimiser: {what}",
            where=str(path),
            remedy="Restore the configuration it was trained with, or use a new MODEL_DIR",
        )


def _by_name(tree: Any) -> dict[str, Any]:
    """Leaves by dotted name; tuples, named tuples and dicts give the names that orbax stores."""

    def word(entry: Any) -> str:
        for attribute in ("key", "idx", "name"):
            if hasattr(entry, attribute):
                return str(getattr(entry, attribute))
        return str(entry)

    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {".".join(word(entry) for entry in path): leaf for path, leaf in leaves}


def _to_host(leaf: Any) -> np.ndarray:
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
    return np.asarray(leaf)


def _make_room(path: Path, tree: Any) -> None:
    """Clears the place of a new checkpoint, and refuses to begin one that cannot fit on the disk."""
    files.clear_folder(path)
    path.mkdir(parents=True)
    needed = sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) + _SPARE_BYTES
    free = shutil.disk_usage(path).free
    if free < needed:
        raise OSError(28, f"it takes {needed / 1e6:.0f} MB and {free / 1e6:.0f} MB are free")


def _without_times(path: Path) -> None:
    """Sets the times of an orbax metadata file to 0."""
    raw = json.loads(path.read_text(encoding="utf-8"))
    times = {key: 0 for key in raw if key.endswith("_timestamp_nsecs")}
    path.write_text(json.dumps({**raw, **times}, sort_keys=True), encoding="utf-8")


def _commit(path: Path, record: Mapping[str, Any]) -> None:
    digests = {
        file.relative_to(path).as_posix(): files.file_digest(file)
        for file in sorted(path.rglob("*"))
        if file.is_file()
    }
    content = {**record, "files": digests}
    files.write_json(path / VERIFIED_NAME, {**content, "self": files.digest_of(content)})


def _damage(path: Path) -> str:
    """What is wrong with the files of a checkpoint; empty if nothing is."""
    try:
        content = files.read_json(path / VERIFIED_NAME)
        stated, digests = content.pop("self"), content["files"]
    except (errors.RestError, UnicodeDecodeError, KeyError, TypeError, AttributeError):
        return f"{VERIFIED_NAME} cannot be read"
    if files.digest_of(content) != stated:
        return f"{VERIFIED_NAME} has other content than was written"
    for name, digest in digests.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if files.file_digest(file) != digest:
            return f"{name} has other bytes than were written"
    return ""


def _on_first_process(act: Callable[[], Any]) -> None:
    """Runs `act` in process 0 while the others wait."""
    if jax.process_index() == 0:
        act()
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("rest_jax checkpoint")


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turns what a full or read-only disk raises, here and inside orbax, into an OutputError."""
    try:
        yield
    except OSError as error:
        raise files.output_error(error, path) from error
    except ValueError as error:  # tensorstore's errors, which have no type of their own
        reason = str(error)
        marks = ("RESOURCE_EXHAUSTED", "No space left", "File too large", "PERMISSION_DENIED")
        if not any(mark in reason for mark in marks):
            raise
        raise files.output_error(OSError(28, reason.splitlines()[0][:200]), path) from error
