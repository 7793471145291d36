"""The verify phase: every sealed byte of a run against its seal, and samples drawn again bit for bit.

Floor 6. A digest shows that a file is what was written; only sampling again shows that what was written is
what the policy gives. That finds what digests cannot: a host that computes wrongly, another version of a
library, an edited file that was sealed again. Nothing is written, so it may look at a run that is at work.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rest_jax import errors, files
from rest_jax.data import candidates
from rest_jax.data.candidate_shard import KEYS, SCHEMA, CandidateShard
from rest_jax.phases.grow import grow_identity, grow_store
from rest_jax.phases.sampling import as_candidates, draw, sampled_together, translator_of
from rest_jax.phases.workspace import Workspace, versions
from rest_jax.training.logbook import Logbook
from rest_jax.types import Examples, RaggedTokens

_PER_TOKEN = ("log_probs", "tempered_log_probs")


class Difference(NamedTuple):
    """The first sample that was not drawn again as it is stored, and the column in which it differs."""

    example_id: int
    sample: int
    column: str


def verify(workspace: Workspace, grow_step: int | None, share: float, seed: int) -> Iterator[str]:
    """Verifies all seals, then draws a share of the sources of each sealed Grow step again.

    Args:
      workspace: the run.
      grow_step: g, to draw sources of this Grow step alone; None takes all that are sealed.
      share: of each Grow step's sources, in (0, 1]; at least one source is drawn.
      seed: chooses the sources.

    Yields:
      What was checked, one line each.

    Raises:
      ConfigError: the share is out of range, or the samples were made with other settings.
      MissingInputError: nothing is sealed, or not this Grow step.
      IntegrityError: a file differs from its seal, or a sample from what the policy gives; it is named.
    """
    if not 0.0 < share <= 1.0:
        raise errors.ConfigError(
            f"a share of {share} cannot be drawn", where="--share", remedy="Give more than 0, at most 1"
        )
    steps = range(1, workspace.experiment.grow_steps + 1) if grow_step is None else [grow_step]
    if grow_step is not None:
        workspace.require(workspace.grow_folder(grow_step), "grow")
    yield from _verify_seals(workspace.run_dir)
    for number in steps:
        if files.read_seal(workspace.grow_folder(number)) is not None:
            yield _verify_samples(workspace, number, share, seed)


def _verify_seals(run_dir: Path) -> Iterator[str]:
    folders = sorted(path.parent for path in run_dir.rglob(files.SEAL_NAME))
    if not folders:
        raise errors.MissingInputError(
            f"nothing is sealed in {run_dir}", remedy="Name the MODEL_DIR of a run that has done something"
        )
    for folder in folders:
        seal = files.verify_seal(folder)
        identity = folder / files.IDENTITY_NAME
        if identity.exists() and files.digest_of(files.read_json(identity)) != seal.identity:
            raise errors.IntegrityError(
                f"{identity} is not the identity that the seal states",
                remedy=f"Delete the folder {folder} and run the {seal.phase} phase again",
            )
        size = sum((folder / name).stat().st_size for name in seal.files)
        name = folder.relative_to(run_dir).as_posix()
        yield f"{name}: {len(seal.files)} files, {size:,} bytes, all as sealed"
    open_folders = sorted({path.parent for path in run_dir.rglob(files.IDENTITY_NAME)} - set(folders))
    for folder in open_folders:
        yield f"{folder.relative_to(run_dir).as_posix()}: not sealed yet, left out"


def _verify_samples(workspace: Workspace, number: int, share: float, seed: int) -> str:
    """Draws sources of a Grow step again, shard by shard."""
    folder, name = workspace.grow_folder(number), f"grow/g{number}"
    files.check_claim(folder, workspace.identity("grow", grow_identity(workspace, number)))
    wanted = grow_store(workspace, number)
    examples = wanted.examples
    chosen = choose(len(examples), share, seed, number)
    translator = translator_of(workspace, wanted)
    found, samples, tokens = 0, 0, 0
    # A logbook without a folder: it shows how far the work is, and writes nothing.
    with Logbook(None).progress(f"drawing sources of {name} again", len(chosen), unit="sources") as bar:
        for shard in candidates.read_shards(folder):
            rows = np.flatnonzero(np.isin(examples.ids, shard.example_id))
            here = chosen[np.isin(chosen, rows)]
            for together in sampled_together(workspace, wanted, rows, here) if len(here) else ():
                part = examples.take(together)
                again = as_candidates(workspace, part, draw(workspace, wanted, translator, part))
                stored = shard.take(np.isin(shard.example_id, part.ids))
                difference = first_difference(stored, again)
                if difference is not None:
                    raise _differs(workspace, number, difference)
                samples, tokens = samples + len(again), tokens + len(again.tokens.values)
            found += len(here)
            bar.advance(len(here))
    _require_all(workspace, number, found, len(chosen), examples)
    return (
        f"{name}: {len(chosen)} of {len(examples)} sources drawn again, {samples:,} samples of {tokens:,} "
        "tokens, the same bit for bit"
    )


def choose(total: int, share: float, seed: int, number: int) -> np.ndarray:
    """The rows of a Grow step that are drawn again, int64, rising: a share of all, at least one."""
    address = np.array([seed & 0xFFFFFFFFFFFFFFFF, number], np.uint64)
    generator = np.random.Generator(np.random.Philox(key=address))
    return np.sort(generator.choice(total, size=max(1, round(share * total)), replace=False))


def first_difference(stored: CandidateShard, again: CandidateShard) -> Difference | None:
    """The first sample in which two sets of samples differ in any bit; None where all are the same.

    Args:
      stored: with all columns, sorted by (example_id, sample).
      again: the same sources, drawn again, in the same order.
    """
    both = min(len(stored), len(again))
    for row in range(both):
        for column in (*KEYS, *(name for name in SCHEMA.names if name not in KEYS)):
            if _bits(stored, column, row) != _bits(again, column, row):
                return Difference(int(again.example_id[row]), int(again.sample[row]), column)
    if len(stored) != len(again):
        longer = stored if len(stored) > both else again
        return Difference(int(longer.example_id[both]), int(longer.sample[both]), KEYS[1])
    return None


def _bits(shard: CandidateShard, column: str, row: int) -> Any:
    """A cell as it can be compared: text, or the bytes of its numbers, so that -0 is not 0 and NaN is NaN."""
    values = getattr(shard, column)
    if column in _PER_TOKEN:
        values = RaggedTokens(values, shard.tokens.offsets)
    return values[row] if isinstance(values, list) else values[row].tobytes()


def _differs(workspace: Workspace, number: int, difference: Difference) -> errors.IntegrityError:
    folder = workspace.grow_folder(number)
    made_with = workspace.require(folder, "grow").facts.get("versions") or {}
    here = versions()
    changed = [
        f"{name} {made_with[name]} then, {here[name]} now"
        for name in here
        if made_with.get(name, here[name]) != here[name]
    ]
    return errors.IntegrityError(
        f"sample {difference.sample} of example {difference.example_id} is not what the policy gives here: "
        f"its {difference.column} differs",
        where=f"grow/g{number}",
        remedy=_remedy(folder, changed),
    )


def _remedy(folder: Path, changed: list[str]) -> str:
    if changed:
        return f"It was made with other versions ({'; '.join(changed)}): verify with those"
    return (
        "The same kind of machine, device and versions give the same bits; if these are the same, delete the "
        f"folder {folder} and run grow again"
    )


def _require_all(workspace: Workspace, number: int, found: int, wanted: int, examples: Examples) -> None:
    """Each chosen source must have been in a shard."""
    if found == wanted:
        return
    folder = workspace.grow_folder(number)
    stored = [shard.example_id for shard in candidates.read_shards(folder, columns=())]
    absent = np.setdiff1d(examples.ids, np.concatenate(stored))
    raise errors.IntegrityError(
        f"{len(absent)} sources of grow/g{number} have no samples, the first is example {absent[0]}",
        where=str(folder),
        remedy=f"Delete the folder {folder} and run grow again",
    )
