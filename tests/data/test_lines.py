from __future__ import annotations

import gzip
import re
from pathlib import Path

import pytest

from rest_jax import errors
from rest_jax.data.lines import MAX_LINE_BYTES, BadLine, Pair, read_lines, read_parallel, read_tsv


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_lines_end_at_newlines_alone(tmp_path: Path, name: str):
    content = b"\xef\xbb\xbfone\r\ntwo \x85 \x0b\x0c\x1c\n\nlast".replace(b"\x85", "\x85".encode())
    assert list(read_lines(write(tmp_path / name, content))) == ["one", "two \x85 \x0b\x0c\x1c", "", "last"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"caf\xe9", "not UTF-8 at byte 4"),
        (b"a\0b", "NUL"),
        (b"a\rb", "carriage return"),
        ("a\u2028b".encode(), r"U\+2028"),
        ("a\u2029b".encode(), r"U\+2029"),
        (b"x" * (MAX_LINE_BYTES + 1), "longer than 65536 bytes"),
        (b"x" * 1_000_000, "longer than 65536 bytes"),
    ],
)
def test_a_bad_line_is_told_with_its_place(tmp_path: Path, line: bytes, reason: str):
    path = write(tmp_path / "a.txt", b"first\n" + line + b"\nthird\n")
    first, bad, third = read_lines(path)
    assert (first, third) == ("first", "third")
    assert isinstance(bad, BadLine) and bad.where == f"{path}:2"
    assert re.search(reason, bad.reason)


def test_the_longest_allowed_line_is_read(tmp_path: Path):
    path = write(tmp_path / "a.txt", b"x" * MAX_LINE_BYTES + b"\nnext\n")
    assert [len(line) for line in read_lines(path)] == [MAX_LINE_BYTES, 4]


def test_a_mark_inside_the_file_stays(tmp_path: Path):
    assert list(read_lines(write(tmp_path / "a.txt", "a\n\ufeffb\n".encode()))) == ["a", "\ufeffb"]


def test_missing_file_and_folder(tmp_path: Path):
    for path in (tmp_path / "no.tsv", tmp_path / "no.tsv.gz", tmp_path):
        with pytest.raises(errors.MissingInputError, match="no corpus file"):
            list(read_lines(path))


@pytest.mark.parametrize("damage", ["cut", "flipped", "not gzip"])
def test_damaged_gzip(tmp_path: Path, damage: str):
    whole = gzip.compress(b"one line of text\n" * 1000, mtime=0)
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0x10
    content = {"cut": whole[:-9], "flipped": bytes(flipped), "not gzip": b"plain text\n"}[damage]
    (tmp_path / "a.gz").write_bytes(content)
    with pytest.raises(errors.DataError, match="a.gz is not a whole gzip file"):
        list(read_lines(tmp_path / "a.gz"))


def test_tsv_takes_the_columns_asked_for(tmp_path: Path):
    path = write(tmp_path / "a.tsv", b"id\tzh\tid\ten\n1\t \xe7\x8b\x97 \t2\tdog\r\n\n")
    assert list(read_tsv(path, 1, 3, header_rows=1)) == [Pair(2, "狗", "dog"), Pair(3, "", "")]
    assert list(read_tsv(path, 3, 1))[1] == Pair(2, "dog", "狗")


def test_tsv_control_characters_become_spaces(tmp_path: Path):
    assert list(read_tsv(write(tmp_path / "a.tsv", b"a\x0bb\tc\x7f\n"), 0, 1)) == [Pair(1, "a b", "c")]


def test_one_column_stops_and_names_the_line(tmp_path: Path):
    path = write(tmp_path / "a.tsv", b"a\tb\nno tab here\n")
    with pytest.raises(errors.DataError, match=f"{path}:2 has 1 column") as caught:
        list(read_tsv(path, 0, 1))
    assert "tab" in caught.value.remedy and "source_column" in caught.value.remedy


def test_parallel_files(tmp_path: Path):
    source = write(tmp_path / "a.de", b"eins\n\xff\ndrei\n")
    target = write(tmp_path / "a.en.gz", b"one\ntwo\nth\0ree\n")
    pairs = list(read_parallel(source, target))
    assert pairs[0] == Pair(1, "eins", "one")
    assert [bad.where for bad in pairs[1:]] == [f"{source}:2", f"{target}:3"]


@pytest.mark.parametrize(("sources", "targets"), [(3, 5), (5, 3), (0, 2), (2, 0)])
def test_parallel_files_of_other_lengths(tmp_path: Path, sources: int, targets: int):
    source, target = write(tmp_path / "s", b"x\n" * sources), write(tmp_path / "t", b"y\n" * targets)
    with pytest.raises(errors.DataError, match=f"has {sources} lines and .* has {targets}"):
        list(read_parallel(source, target))
