"""Reading pairs of sentences from files that may be damaged.

Floor 3. Lines end at the newline character alone, so that line numbers agree with `wc -l` and with an
editor; a byte-order mark and a carriage return at the end of a line are taken off. A line that cannot be
a sentence is told apart from one that can, never mended in silence.
"""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from rest_jax import errors
from rest_jax.data.vocabulary import clean

MAX_LINE_BYTES = 1 << 16
_BOM = b"\xef\xbb\xbf"
_FORBIDDEN = {
    "\0": "a NUL character",
    "\r": "a carriage return inside the line",
    "\u2028": "a Unicode line separator (U+2028)",
    "\u2029": "a Unicode paragraph separator (U+2029)",
}
_ANY_FORBIDDEN = re.compile("[" + "".join(_FORBIDDEN) + "]")


class Pair(NamedTuple):
    """A source and a target with the number of their line, from 1."""

    line: int
    source: str
    target: str


class BadLine(NamedTuple):
    """A line that holds no pair, and why; `where` is file:line."""

    where: str
    reason: str


def _open(path: Path) -> BinaryIO:
    try:
        return gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb")  # type: ignore[return-value]
    except OSError as error:
        raise errors.MissingInputError(
            f"no corpus file {path}: {error.strerror}", remedy="Check the path in the corpus configuration"
        ) from error


def _raw_lines(path: Path) -> Iterator[bytes]:
    """Lines without their `\\n`; of a longer line than allowed only the beginning, one byte too much."""
    with _open(path) as handle:
        try:
            while line := handle.readline(MAX_LINE_BYTES + 1):
                rest = line
                while rest and not rest.endswith(b"\n"):
                    rest = handle.readline(MAX_LINE_BYTES)
                yield line.removesuffix(b"\n")
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise errors.DataError(
                f"{path} is not a whole gzip file: {error}", remedy="Fetch or compress it again"
            ) from error


def check_text(text: str) -> str | None:
    """Why a text cannot be (part of) a line of a corpus; None if it can."""
    found = _ANY_FORBIDDEN.search(text)
    return f"it has {_FORBIDDEN[found[0]]}" if found else None


def read_lines(path: str | Path) -> Iterator[str | BadLine]:
    """The lines of a plain or gzip-compressed UTF-8 file.

    Raises:
      MissingInputError: there is no such file.
      DataError: it is a broken gzip file.
    """
    path = Path(path).expanduser()
    for number, raw in enumerate(_raw_lines(path), start=1):
        where = f"{path}:{number}"
        if len(raw) > MAX_LINE_BYTES:
            yield BadLine(where, f"it is longer than {MAX_LINE_BYTES} bytes")
            continue
        if number == 1:
            raw = raw.removeprefix(_BOM)
        try:
            text = raw.removesuffix(b"\r").decode("utf-8")
        except UnicodeDecodeError as error:
            yield BadLine(where, f"it is not UTF-8 at byte {error.start + 1}")
            continue
        reason = check_text(text)
        yield BadLine(where, reason) if reason else text


def read_tsv(
    path: str | Path, source_column: int, target_column: int, header_rows: int = 0
) -> Iterator[Pair | BadLine]:
    """The pairs of a tab-separated file; columns count from 0, blank lines are pairs of empty sides.

    Raises:
      DataError: a line has too few columns; the message names file:line.
    """
    needed = max(source_column, target_column) + 1
    for number, line in enumerate(read_lines(path), start=1):
        if number <= header_rows:
            continue
        if isinstance(line, BadLine):
            yield line
            continue
        columns = line.split("\t")
        if len(columns) < needed and line.strip():
            raise errors.DataError(
                f"{path}:{number} has {len(columns)} column(s) and needs {needed}: "
                f"the source in column {source_column}, the target in column {target_column}, counted from 0",
                remedy="Separate them by a tab in every line, or set source_column and target_column",
            )
        columns += [""] * (needed - len(columns))
        yield Pair(number, clean(columns[source_column]).strip(), clean(columns[target_column]).strip())


def read_parallel(source_path: str | Path, target_path: str | Path) -> Iterator[Pair | BadLine]:
    """The pairs of two line-aligned files.

    Raises:
      DataError: the files have different numbers of lines; the message states both.
    """
    sources, targets = read_lines(source_path), read_lines(target_path)
    count = 0
    for source in sources:
        target = next(targets, None)
        if target is None:
            _refuse_lengths(source_path, count + 1 + sum(1 for _ in sources), target_path, count)
        assert target is not None
        count += 1
        if isinstance(source, BadLine):
            yield source
        elif isinstance(target, BadLine):
            yield target
        else:
            yield Pair(count, clean(source).strip(), clean(target).strip())
    if more := sum(1 for _ in targets):
        _refuse_lengths(source_path, count, target_path, count + more)


def _refuse_lengths(source_path: str | Path, sources: int, target_path: str | Path, targets: int) -> None:
    raise errors.DataError(
        f"{source_path} has {sources} lines and {target_path} has {targets}: they are not aligned",
        remedy="Give two files of the same text, one sentence a line",
    )
