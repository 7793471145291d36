from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rest_jax import errors, files
from rest_jax.data.examples import SCHEMA, from_list_array, read_examples, to_list_array, write_examples
from rest_jax.types import Examples, RaggedTokens, TokenPairs


def examples(count: int = 300) -> Examples:
    rng = np.random.default_rng(3)
    rows = [
        [rng.integers(3, 4000, rng.integers(0, 30)).tolist() + [1] for _ in range(count)] for _ in range(2)
    ]
    return Examples(
        sources=[f"Satz 狗 {i}" for i in range(count)],
        targets=[f"sentence {i}" for i in range(count)],
        tokens=TokenPairs(
            ids=np.arange(count, dtype=np.int64) + 2**40,
            sources=RaggedTokens.from_lists(rows[0]),
            targets=RaggedTokens.from_lists(rows[1]),
        ),
    )


def assert_same(left: Examples, right: Examples) -> None:
    assert (left.sources, left.targets) == (right.sources, right.targets)
    np.testing.assert_array_equal(left.ids, right.ids)
    for a, b in ((left.tokens.sources, right.tokens.sources), (left.tokens.targets, right.tokens.targets)):
        assert a.values.dtype == b.values.dtype == np.int32 and a.offsets.dtype == b.offsets.dtype == np.int64
        np.testing.assert_array_equal(a.values, b.values)
        np.testing.assert_array_equal(a.offsets, b.offsets)


@pytest.mark.parametrize("count", [0, 1, 300])
def test_what_is_written_is_read(tmp_path: Path, count: int):
    write_examples(tmp_path / "train.parquet", examples(count))
    assert_same(read_examples(tmp_path / "train.parquet"), examples(count))


def test_a_part_of_a_split_and_many_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("rest_jax.data.examples._ROWS_A_GROUP", 64)
    some = examples().take(np.array([7, 3, 250, 3, *range(100, 290)]))
    write_examples(tmp_path / "part.parquet", some)
    assert pq.ParquetFile(tmp_path / "part.parquet").num_row_groups == 4
    assert_same(read_examples(tmp_path / "part.parquet"), some)


@given(st.lists(st.lists(st.integers(0, 2**31 - 1), max_size=6), max_size=20), st.integers(0, 20))
@settings(max_examples=60, deadline=None)
def test_list_arrays_keep_ragged_tokens(rows: list[list[int]], start: int):
    whole = to_list_array(RaggedTokens.from_lists(rows))
    assert whole.to_pylist() == rows
    sliced = from_list_array(pa.chunked_array([whole.slice(start)]))
    assert [row.tolist() for row in (sliced[i] for i in range(len(sliced)))] == rows[start:]
    chunks = pa.chunked_array([whole.slice(0, start), whole.slice(start)], type=whole.type)
    assert from_list_array(chunks).values.tolist() == [token for row in rows for token in row]


def test_columns_compression_and_checksums(tmp_path: Path):
    path = tmp_path / "train.parquet"
    write_examples(path, examples())
    assert pq.read_schema(path).equals(SCHEMA)
    metadata = pq.read_metadata(path).row_group(0)
    assert {metadata.column(i).compression for i in range(metadata.num_columns)} == {"ZSTD"}


def test_bytes_are_the_same_every_time(tmp_path: Path):
    write_examples(tmp_path / "a", examples())
    write_examples(tmp_path / "b", examples())
    assert files.file_digest(tmp_path / "a") == files.file_digest(tmp_path / "b")


def test_no_flipped_bit_is_read_silently(tmp_path: Path):
    path = tmp_path / "train.parquet"
    write_examples(path, examples())
    whole, expected = path.read_bytes(), examples()
    found = 0
    for place in range(0, len(whole), 61):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << (place % 8)
        path.write_bytes(bytes(damaged))
        try:
            assert_same(read_examples(path), expected)  # a flip in unused metadata changes nothing
        except errors.IntegrityError as error:
            found += 1
            assert str(path) in str(error)
    assert found > 0.8 * len(whole) / 61


@pytest.mark.parametrize("keep", [0, 3, 0.5, 0.999])
def test_a_cut_file_is_found(tmp_path: Path, keep: float):
    path = tmp_path / "train.parquet"
    write_examples(path, examples())
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * len(whole)) if isinstance(keep, float) else keep])
    with pytest.raises(errors.IntegrityError, match=r"train.parquet is damaged.*run the same command again"):
        read_examples(path)


def test_other_files(tmp_path: Path):
    with pytest.raises(errors.MissingInputError, match="no examples"):
        read_examples(tmp_path / "none.parquet")
    pq.write_table(pa.table({"id": [1]}), tmp_path / "other.parquet")
    with pytest.raises(errors.IntegrityError, match="other columns"):
        read_examples(tmp_path / "other.parquet")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "train.parquet"
    write_examples(path, examples(5))

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq, "write_table", full)
    with pytest.raises(errors.OutputError, match="No space left"):
        write_examples(path, examples(9))
    assert len(read_examples(path)) == 5
    assert [p.name for p in tmp_path.iterdir()] == ["train.parquet"]
