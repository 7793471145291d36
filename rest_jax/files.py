"""The commit protocol: atomic writes, digests, seals and the run lock.

Floor 0. A phase writes its output into a folder and, as its very last act, a `SEAL.json` that names
every file with its SHA-256. The seal is the commit: a folder without one is unfinished work, a folder with
one is verified before it is read. A seal also states the identity of the work (its configuration and the
digests of what it read), so that output of another configuration is never mistaken for ours.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from rest_jax import errors

SEAL_NAME = "SEAL.json"
IDENTITY_NAME = "IDENTITY.json"
_LOCK_NAME = ".lock"


def failpoint(name: str) -> None:
    """Dies at once, as SIGKILL would, if `REST_JAX_FAILPOINT` is this name: tests aim kills with it."""
    if os.environ.get("REST_JAX_FAILPOINT") == name:
        os.kill(os.getpid(), 9)


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces, so that equal values have equal digests."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=_jsonable)


def _jsonable(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return {"__class__": type(value).__name__, **fields}
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item"):  # NumPy scalars
        return value.item()
    raise TypeError(f"cannot write {type(value).__name__} as JSON")


def digest_of(value: Any) -> str:
    """SHA-256 of a JSON-able value or dataclass."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def file_digest(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's bytes."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on success it is synced and renamed over `path`.

    Raises:
      OutputError: the disk is full or the folder cannot be written.
    """
    final = Path(path)
    temporary: Path | None = None
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{final.name}.", suffix=".tmp", dir=final.parent)
        os.close(descriptor)
        temporary = Path(name)
        yield temporary
        with open(temporary, "rb") as handle:
            os.fsync(handle.fileno())
        failpoint(f"before-rename:{final.name}")
        os.chmod(temporary, 0o644)
        os.replace(temporary, final)
        _sync_folder(final.parent)
    except OSError as error:
        raise output_error(error, final) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def output_error(error: OSError, path: Path) -> errors.OutputError:
    """An `OutputError` that says why the operating system refused."""
    return errors.OutputError(
        f"cannot write {path}: {error.strerror or error}",
        remedy="Free space or mend the folder's permissions, then run the same command again",
    )


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes a UTF-8 file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes indented JSON atomically; NaN is refused, since it is not JSON."""
    text = json.dumps(
        value, indent=2, sort_keys=False, ensure_ascii=False, allow_nan=False, default=_jsonable
    )
    write_text(path, text + "\n")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Reads a JSON file.

    Raises:
      MissingInputError: there is no such file.
      IntegrityError: it is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise errors.MissingInputError(
            f"no file {path}", remedy="Run the phase that writes it first"
        ) from error
    except ValueError as error:
        raise errors.IntegrityError(
            f"{path} is not JSON: {error}", remedy="Delete it and run the phase that writes it again"
        ) from error


@dataclasses.dataclass(frozen=True)
class Seal:
    """What a sealed folder says of itself.

    Attributes:
      phase: which phase wrote it ("pretrain", "grow" …).
      identity: digest of everything the bytes depend on: configuration, inputs, seed, versions.
      files: SHA-256 of each file, by path relative to the folder.
      facts: small JSON-able results that a later phase or the report wants (counts, best step).
    """

    phase: str
    identity: str
    files: Mapping[str, str]
    facts: Mapping[str, Any]

    @property
    def digest(self) -> str:
        """Digest of the content: what a later phase names as its input."""
        return digest_of({"phase": self.phase, "identity": self.identity, "files": dict(self.files)})


def read_seal(folder: str | os.PathLike[str]) -> Seal | None:
    """The seal of a folder, or None where the folder is missing or unfinished."""
    path = Path(folder) / SEAL_NAME
    if not path.exists():
        return None
    raw = read_json(path)
    return Seal(phase=raw["phase"], identity=raw["identity"], files=raw["files"], facts=raw["facts"])


def write_seal(
    folder: str | os.PathLike[str],
    phase: str,
    identity: str,
    facts: Mapping[str, Any] | None = None,
    skip: Iterable[str] = (),
) -> Seal:
    """Digests every file below `folder` and commits the folder by writing its seal.

    Args:
      folder: the finished output.
      phase: the name of the phase.
      identity: digest of what the bytes depend on.
      facts: small results to keep with the seal.
      skip: names of files or subfolders that are not part of the artefact (scratch, logs).
    """
    base = Path(folder)
    left_out = {SEAL_NAME, IDENTITY_NAME, *skip}
    files = {}
    for path in sorted(base.rglob("*")):
        relative = path.relative_to(base)
        if path.is_file() and not left_out.intersection(relative.parts) and not path.name.endswith(".tmp"):
            files[relative.as_posix()] = file_digest(path)
    seal = Seal(phase=phase, identity=identity, files=files, facts=dict(facts or {}))
    failpoint(f"before-seal:{phase}")
    write_json(base / SEAL_NAME, dataclasses.asdict(seal))
    failpoint(f"after-seal:{phase}")
    return seal


def verify_seal(folder: str | os.PathLike[str]) -> Seal:
    """Reads the seal of a folder and checks the digest of every file that it names.

    Raises:
      MissingInputError: the folder is missing or unfinished.
      IntegrityError: a file is missing or has other bytes; the message names it.
    """
    base = Path(folder)
    seal = read_seal(base)
    if seal is None:
        raise errors.MissingInputError(
            f"{base} is not finished: it has no {SEAL_NAME}", remedy="Run the phase that writes it first"
        )
    for name, digest in seal.files.items():
        path = base / name
        if not path.is_file() or file_digest(path) != digest:
            state = "has other bytes than its seal states" if path.is_file() else "is missing"
            raise errors.IntegrityError(
                f"{path} {state}",
                remedy=f"Delete the folder {base} and run the {seal.phase} phase again; it is made anew",
            )
    return seal


def adopt(folder: str | os.PathLike[str], other: str | os.PathLike[str], identity: str) -> bool:
    """Takes over the sealed output of another run, if it is of this identity; nothing of it is read by eye.

    Files are linked where the file system allows it and copied elsewhere: no code changes a committed file in
    place, so that neither run sees what the other does later.

    Args:
      folder: where it is wanted; untouched if work on it has begun.
      other: where the other run has it.
      identity: digest of what the output must depend on.

    Returns:
      Whether it was taken over.

    Raises:
      IntegrityError: the other's output is of this identity and damaged.
      OutputError: the folder cannot be written.
    """
    base, origin = Path(folder), Path(other)
    found = read_seal(origin)
    if found is None or found.identity != identity or (base / IDENTITY_NAME).exists():
        return False
    verify_seal(origin)
    try:
        for name in (*found.files, IDENTITY_NAME, SEAL_NAME):  # the seal last
            _link(origin / name, base / name)
    except OSError as error:
        raise output_error(error, base) from error
    return True


def _link(path: Path, new: Path) -> None:
    new.parent.mkdir(parents=True, exist_ok=True)
    new.unlink(missing_ok=True)
    try:
        os.link(path, new)
    except OSError:  # another file system, or one without links
        with atomic_path(new) as temporary:
            shutil.copyfile(path, temporary)


def claim(folder: str | os.PathLike[str], identity: Mapping[str, Any]) -> str:
    """Marks a folder as the place of one piece of work, and returns the digest of that identity.

    A resumed run finds its own mark. A run with another configuration finds a mark that is not its own.

    Raises:
      ConfigError: the folder holds output of another identity; the message lists what differs.
    """
    if (Path(folder) / IDENTITY_NAME).exists():
        return check_claim(folder, identity)
    wanted = json.loads(canonical_json(identity))
    write_json(Path(folder) / IDENTITY_NAME, wanted)
    return digest_of(wanted)


def check_claim(folder: str | os.PathLike[str], identity: Mapping[str, Any]) -> str:
    """Compares the mark of a folder with an identity, writing nothing, and returns the identity's digest.

    Raises:
      MissingInputError: the folder has no mark.
      ConfigError: the folder holds output of another identity; the message lists what differs.
    """
    base = Path(folder)
    wanted = json.loads(canonical_json(identity))
    found = read_json(base / IDENTITY_NAME)
    if found != wanted:
        keys = sorted(_differences(found, wanted))
        shown = ", ".join(keys[:6]) + (" …" if len(keys) > 6 else "")
        raise errors.ConfigError(
            f"{base} was made with another configuration or other inputs; differing: {shown}",
            remedy="Use a new MODEL_DIR, restore the old values, or delete the folder to make it anew",
        )
    return digest_of(wanted)


def _differences(left: Any, right: Any, path: str = "") -> set[str]:
    if isinstance(left, dict) and isinstance(right, dict):
        found: set[str] = set()
        for key in left.keys() | right.keys():
            inner = f"{path}.{key}" if path else str(key)
            if key not in left or key not in right:
                found.add(inner)
            else:
                found |= _differences(left[key], right[key], inner)
        return found
    return set() if left == right else {path}


def clear_folder(folder: str | os.PathLike[str]) -> None:
    """Deletes a folder and what is in it, if it is there."""
    shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def run_lock(run_dir: str | os.PathLike[str], job: tuple[int, int] | None = None) -> Iterator[None]:
    """Holds a run folder for this process; the lock ends with the process, however that ends.

    Args:
      run_dir: the run folder.
      job: (number, count) of one of several jobs that may work in it at a time. Jobs of one division share
        the folder; a whole run excludes them, and so does a job of another division, whose shards would
        overlap with theirs.

    Raises:
      LockedError: another live process holds it; the message says which.
      OutputError: the folder cannot be made or written.
    """
    base = Path(run_dir)
    with contextlib.ExitStack() as held:
        if job is None:
            whole = held.enter_context(_lock_file(base / _LOCK_NAME))
            if not _taken(whole, fcntl.LOCK_EX):
                raise _locked(base, ", ".join(_live_jobs(base).values()) or _holder(whole))
            _sign(whole)
        else:
            # Its own lock first: whoever is refused because of the shared one finds the job's name in it.
            own_path = base / f"{_LOCK_NAME}.job-{job[0]}-of-{job[1]}"
            own = held.enter_context(_lock_file(own_path))
            if not _taken(own, fcntl.LOCK_EX):
                raise _locked(base, _holder(own))
            _sign(own, f"job {job[0]} of {job[1]}, ")
            others = [
                who for path, who in _live_jobs(base).items() if not path.name.endswith(f"-of-{job[1]}")
            ]
            if others:
                raise _locked(base, ", ".join(others))
            whole = held.enter_context(_lock_file(base / _LOCK_NAME))
            if not _taken(whole, fcntl.LOCK_SH):
                raise _locked(base, _holder(whole))
        yield


@contextlib.contextmanager
def turn(run_dir: str | os.PathLike[str]) -> Iterator[None]:
    """Waits for its turn at what all jobs of a run share; a turn takes moments, and ends with its process."""
    with _lock_file(Path(run_dir) / f"{_LOCK_NAME}.turn") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _lock_file(path: Path) -> Iterator[TextIO]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = open(path, "a+", encoding="utf-8")  # noqa: SIM115 (held as long as the lock)
    except OSError as error:
        raise output_error(error, path.parent) from error
    with handle:
        yield handle


def _taken(handle: TextIO, kind: int) -> bool:
    """Takes a lock without waiting for its holder, but for the instant in which `_live_jobs` looks at it."""
    for pause in (0.05, 0.05, 0.0):
        try:
            fcntl.flock(handle, kind | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            time.sleep(pause)
    return False


def _live_jobs(base: Path) -> dict[Path, str]:
    """The locks of jobs that a live process holds, with what it wrote there; our own among them."""
    live = {}
    for path in sorted(base.glob(f"{_LOCK_NAME}.job-*")):
        with _lock_file(path) as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                live[path] = _holder(handle)
    return live


def _sign(handle: TextIO, what: str = "") -> None:
    handle.truncate(0)
    handle.write(f"{what}pid {os.getpid()} on {socket.gethostname()}")
    handle.flush()


def _holder(handle: TextIO) -> str:
    handle.seek(0)
    return handle.read().strip() or "unknown"


def _locked(base: Path, holder: str) -> errors.LockedError:
    return errors.LockedError(
        f"{base} is in use by another run ({holder})",
        remedy="Wait for it or stop it, or choose another MODEL_DIR",
    )
