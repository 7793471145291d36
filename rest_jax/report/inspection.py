"""The verb `inspect`: which Grow steps and which sources are shown, and where.

Floor 7.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from rich.console import RenderableType
from rich.text import Text

from rest_jax import errors, files
from rest_jax.report import inspect_data, inspect_sources, inspect_terminal
from rest_jax.report.inspect_data import GrowCounts
from rest_jax.report.inspect_page import Shown, render_inspection
from rest_jax.report.inspect_sources import Source


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What is to be seen of a run.

    Attributes:
      grow_step: g, or None for all Grow steps.
      source: an example id or the text of a source, whose samples are shown; or None.
      search: text that sources or their samples contain; or None.
      limit: sources that are shown of a Grow step at most.
    """

    grow_step: int | None = None
    source: str | None = None
    search: str | None = None
    limit: int = 50

    def __post_init__(self) -> None:
        inspect_sources.check_limit(self.limit)
        if self.source is not None and self.search is not None:
            raise errors.ConfigError("--source and --search exclude each other", remedy="Give one of the two")


def views(run_dir: Path, wanted: Wanted, width: int) -> Iterator[RenderableType]:
    """What a terminal of this many columns shows, piece by piece.

    Raises:
      MissingInputError: the run has no such Grow step, or no such source.
      IntegrityError: a shard is damaged.
    """
    found = False
    for number, folder in inspect_data.grow_folders(run_dir, wanted.grow_step):
        if not _is_sealed(folder):
            yield Text(_unfinished(number, folder))
            continue
        if wanted.source is None and wanted.search is None:
            yield inspect_terminal.grow_view(inspect_data.count(number, folder), width)
            continue
        counts = inspect_data.heads(number, folder)
        names = list(counts.rewards)
        sources, chosen = _choose(run_dir, counts, wanted)
        found = found or bool(sources)
        yield Text(chosen, style="bold")
        if wanted.search is not None and sources:
            yield inspect_terminal.match_view(sources, names, wanted.search)
        elif sources:
            yield from (inspect_terminal.source_view(source, names) for source in sources)
        yield Text()
    if wanted.source is not None and not found:
        raise _no_source(run_dir, wanted.source)


def write_page(run_dir: Path, wanted: Wanted, path: Path) -> None:
    """Writes the page.

    Raises:
      MissingInputError: the run has no such Grow step, or no such source.
      IntegrityError: a shard is damaged.
      OutputError: the page cannot be written.
    """
    shown, unfinished = [], []
    for number, folder in inspect_data.grow_folders(run_dir, wanted.grow_step):
        if not _is_sealed(folder):
            unfinished.append(_unfinished(number, folder))
            continue
        counts = inspect_data.count(number, folder)
        sources, chosen = _choose(run_dir, counts, wanted)
        shown.append(Shown(counts, sources, chosen))
    if wanted.source is not None and not any(grow.sources for grow in shown):
        raise _no_source(run_dir, wanted.source)
    files.write_text(path, render_inspection(run_dir.resolve().name, shown, unfinished))


def _choose(run_dir: Path, counts: GrowCounts, wanted: Wanted) -> tuple[list[Source], str]:
    """The sources of a Grow step that are shown, and a sentence on how they were chosen."""
    folder, names, where = counts.folder, list(counts.rewards), f"Grow {counts.number}"
    if wanted.source is not None:
        one = inspect_sources.by_id_or_text(folder, names, wanted.source)
        sources = [] if one is None else [one]
        chosen = f"{where}: the source that was asked for." if sources else f"{where} has no such source."
    elif wanted.search is not None:
        sources, total, hits = inspect_sources.containing(folder, names, wanted.search, wanted.limit)
        chosen = (
            f"{where}: {total:,} sources contain {wanted.search!r} or have samples that do ({hits:,} samples)"
        )
        chosen += f"; the first {len(sources)} are shown." if total > len(sources) else "."
    else:
        sources = inspect_sources.evenly(folder, names, counts.sources, wanted.limit)
        chosen = f"{len(sources):,} of {counts.sources:,} sources, evenly spaced by their ids."
    return inspect_sources.with_references(run_dir, sources), chosen


def _is_sealed(folder: Path) -> bool:
    return (folder / files.SEAL_NAME).exists()


def _unfinished(number: int, folder: Path) -> str:
    done, total = inspect_data.committed(folder)
    shards = f"{done} of {total} shards are committed" if total else "no shard is committed"
    return f"Grow {number} is not sealed yet: {shards}."


def _no_source(run_dir: Path, source: str) -> errors.MissingInputError:
    return errors.MissingInputError(
        f"no source of {run_dir} has the id or the text {source!r}",
        where="--source",
        remedy="Give an example id or a whole source; --search finds parts of one",
    )
