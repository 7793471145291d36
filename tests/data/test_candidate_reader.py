"""A Grow step read by row groups: what comes, what is found damaged, and how little memory it takes."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rest_jax import errors, files
from rest_jax.data import candidate_shard, candidates, shards
from rest_jax.data.candidates import CandidateShard, CandidateWriter, RewardWriter
from tests.data.test_candidates import SHARDS, assert_same, make_shard, rewards_of, write_rewards, write_store

ROOT = Path(__file__).parents[2]
GROUP = 5  # rows of a row group in these tests: the 12 of a shard are then cut into 5, 5 and 2
NAME = "samples-00001-of-00003.parquet"


@pytest.fixture(autouse=True)
def small_row_groups(monkeypatch):
    monkeypatch.setattr(shards, "ROW_GROUP_ROWS", GROUP)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    write_store(tmp_path / "g1")
    return tmp_path / "g1"


def pieces_of(shard: CandidateShard, cuts: list[int]) -> list[CandidateShard]:
    ends = [0, *sorted(cuts), len(shard)]
    return [shard.take(np.arange(a, b)) for a, b in itertools.pairwise(ends)]


# What comes.


def test_batches_are_row_groups_and_make_up_the_shards(store):
    whole = [make_shard(index) for index in range(SHARDS)]
    batches = list(candidates.read_batches(store))
    expected = [min(GROUP, len(s) - start) for s in whole for start in range(0, len(s), GROUP)]
    assert [len(batch) for batch in batches] == expected
    metadata = pq.ParquetFile(store / NAME).metadata
    assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [5, 5, 2]
    parts = itertools.chain.from_iterable(
        pieces_of(shard, list(range(GROUP, len(shard), GROUP))) for shard in whole
    )
    for batch, part in zip(batches, parts, strict=True):
        assert_same(batch.samples(), part)
        np.testing.assert_array_equal(batch.example_id, part.example_id)


def test_a_shard_of_several_row_groups_is_read_whole_too(store):
    for index, shard in enumerate(candidates.read_shards(store)):
        assert_same(shard, make_shard(index))


def test_a_batch_has_the_columns_asked_for_and_can_read_more(store):
    batches = list(candidates.read_batches(store, ("truncated",)))
    for batch, whole in zip(batches, candidates.read_batches(store), strict=True):
        assert batch.table.column_names == ["example_id", "sample", "truncated"]
        more, expected = batch.more(("tokens", "text")), whole.samples()
        assert (more.text, more.source) == (expected.text, [])
        np.testing.assert_array_equal(more.tokens.values, expected.tokens.values)
        np.testing.assert_array_equal(more.tokens.offsets, expected.tokens.offsets)
    with pytest.raises(errors.ConfigError, match="no column 'reward'"):
        next(candidates.read_batches(store, ["reward"]))


def test_two_rewards_lie_side_by_side(store):
    write_rewards(store)
    second = RewardWriter(store, "length", "characters")
    for index in second.missing_shards():
        shard = second.samples(index, ["text"])
        second.write_shard(index, shard, np.array([len(text) for text in shard.text]) / 100)
    second.seal()
    samples = list(candidates.read_batches(store, ["text"], rewards=("chrf", "length")))
    assert sum(len(batch) for batch in samples) == sum(len(make_shard(i)) for i in range(SHARDS))
    chrf = np.concatenate([rewards_of(make_shard(i)) for i in range(SHARDS)])
    np.testing.assert_array_equal(np.concatenate([batch.rewards["chrf"] for batch in samples]), chrf)
    for batch in samples:
        assert list(batch.rewards) == ["chrf", "length"]
        lengths = [len(text) / 100 for text in batch.samples().text]
        np.testing.assert_array_equal(batch.rewards["length"], lengths)
    alone = candidates.CandidateReader(store, ["length"])
    np.testing.assert_array_equal(
        np.concatenate([*alone.reward_chunks("length")]),
        np.concatenate([batch.rewards["length"] for batch in samples]),
    )
    with pytest.raises(errors.MissingInputError, match="rewards/bleu is missing"):
        next(candidates.read_batches(store, rewards=("chrf", "bleu")))


def test_rewards_in_other_row_groups_are_aligned_all_the_same(store, monkeypatch):
    monkeypatch.setattr(shards, "ROW_GROUP_ROWS", 3)
    write_rewards(store)
    found = np.concatenate([batch.rewards["chrf"] for batch in candidates.read_batches(store, [], ["chrf"])])
    np.testing.assert_array_equal(found, np.concatenate([rewards_of(make_shard(i)) for i in range(SHARDS)]))


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param([*range(11)], id="last missing"),
        pytest.param([*range(1, 12)], id="first missing"),
        pytest.param([0], id="most missing"),
        pytest.param([1, 0, *range(2, 12)], id="two swapped"),
        pytest.param([*range(12), 11], id="one too many"),
        pytest.param([*range(12)] * 2, id="twice"),
    ],
)
def test_rewards_that_do_not_fit_the_samples_row_by_row_are_refused(store, rows):
    """As a caller might write them that mixed up its rows; all digests are right."""
    writer = RewardWriter(store, "chrf", "v1")
    for index in writer.missing_shards():
        part = make_shard(index)
        part = part if index else part.take(np.array(rows))
        writer.write_shard(index, part, np.ones(len(part)))
    writer.seal()
    with pytest.raises(
        errors.IntegrityError, match="rewards-00000-of-00003.parquet holds the rewards of other"
    ):
        list(candidates.read_batches(store, (), ["chrf"]))


def test_the_seal_of_rewards_tells_their_mean_and_extremes(store):
    facts = write_rewards(store).facts
    rewards = np.concatenate([rewards_of(make_shard(i)) for i in range(SHARDS)])
    finite = rewards[np.isfinite(rewards)]
    assert (facts["rows"], facts["finite"]) == (len(rewards), len(finite))
    assert (facts["minimum"], facts["maximum"]) == (finite.min(), finite.max())
    assert facts["mean"] == pytest.approx(finite.mean(), rel=1e-14)
    writer = RewardWriter(store, "none", "v1")
    for index in writer.missing_shards():
        shard = writer.samples(index, [])
        writer.write_shard(index, shard, np.full(len(shard), np.nan))
    facts = writer.seal().facts
    assert (facts["finite"], facts["mean"], facts["minimum"], facts["maximum"]) == (0, None, None, None)


# Writing in pieces.


@settings(deadline=None, max_examples=30)
@given(cuts=st.lists(st.integers(0, 12), max_size=5))
def test_the_pieces_do_not_show_in_the_bytes(tmp_path_factory, cuts):
    folder, shard = tmp_path_factory.mktemp("pieces"), make_shard(0)
    writer = CandidateWriter(folder, 2, "ours")
    writer.write_shard(0, shard)
    writer.write_shard(1, iter(pieces_of(shard, cuts)))
    first, second = (sorted(folder.glob(f"samples-0000{i}-of-00002*")) for i in (0, 1))
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_the_pieces_do_not_show_in_the_bytes_of_large_shards(tmp_path, monkeypatch):
    """Columns of several pages: these must not be cut where pieces end."""
    monkeypatch.setattr(shards, "ROW_GROUP_ROWS", 1 << 15)
    rows, rng = 40_000, np.random.default_rng(0)
    small = make_shard(0)
    numbers = rng.integers(0, len(small), rows)
    columns = {name: getattr(small.take(numbers), name) for name in candidate_shard.SCHEMA.names}
    columns["tokens"] = small.take(numbers).tokens
    columns |= {"example_id": np.arange(rows), "text": [f"{k:0100d}" for k in rng.integers(0, 10**18, rows)]}
    shard = CandidateShard(**columns)
    writer = CandidateWriter(tmp_path, 2, "ours")
    writer.write_shard(0, shard)
    writer.write_shard(1, pieces_of(shard, [777, 20_011, 36_000]))
    first, second = (tmp_path / f"samples-0000{i}-of-00002.parquet" for i in (0, 1))
    metadata = pq.ParquetFile(first).metadata
    assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [
        1 << 15,
        40_000 - (1 << 15),
    ]
    assert metadata.row_group(0).column(3).total_uncompressed_size > 2 * 2**20
    assert first.read_bytes() == second.read_bytes()


def test_a_slice_of_a_table_is_those_samples():
    shard = make_shard(0)
    found = candidate_shard.from_table(candidate_shard.to_table(shard).slice(3, 6))
    assert_same(found, shard.take(np.arange(3, 9)))


def test_texts_may_come_as_arrow_arrays(tmp_path, store):
    writer = CandidateWriter(tmp_path / "arrow", SHARDS, "ours")
    rng = np.random.default_rng(3)
    for index in range(SHARDS):
        shard = make_shard(index)
        columns = {name: getattr(shard, name) for name in candidate_shard.SCHEMA.names}
        columns |= {"source": pa.array(shard.source).dictionary_encode(), "text": pa.array(shard.text)}
        writer.write_shard(index, CandidateShard(**columns).take(rng.permutation(len(shard))))
    assert writer.seal({"policy": "bc"}).files == files.read_seal(store).files


def test_pieces_out_of_order_are_refused_and_what_was_there_stays(tmp_path):
    writer, shard = CandidateWriter(tmp_path, 1, "ours"), make_shard(0)
    writer.write_shard(0, shard)
    first, second = pieces_of(shard, [6])
    for pieces in ([second, first], [first, first], [first, shard]):
        with pytest.raises(errors.DataError, match="comes after sample .* none twice"):
            writer.write_shard(0, pieces)
    assert writer.missing_shards() == []
    assert not list(tmp_path.glob(".*.tmp"))


def test_a_shard_tells_where_it_comes_from(tmp_path):
    origin = {"policy": "bc", "policy_digest": "ab" * 32, "sampling": {"temperature": 0.8}}
    CandidateWriter(tmp_path, 1, "ours", origin).write_shard(0, make_shard(0))
    record = files.read_json(tmp_path / "samples-00000-of-00001.json")
    assert record["origin"] == origin
    assert (record["identity"], record["rows"]) == ("ours", 12)


def test_unfinished_work_of_another_format_is_made_anew(store, monkeypatch):
    monkeypatch.setattr(shards, "FORMAT", 99)
    writer = CandidateWriter(store, SHARDS, "ours")
    assert writer.missing_shards() == [0, 1, 2]
    assert set(writer.discarded.values()) == {"its record states another value of 'format'"}


# What is found.


def flip_a_bit(path: Path, theirs: Path, place: float) -> None:
    content = bytearray(path.read_bytes())
    position = int(place * (len(content) - 1))
    content[position] ^= 1 << position % 8
    path.write_bytes(bytes(content))


def truncate(path: Path, theirs: Path, place: float) -> None:
    path.write_bytes(path.read_bytes()[: int(place * (path.stat().st_size - 1))])


def put_anothers(path: Path, theirs: Path, place: float) -> None:
    shutil.copy(theirs / path.name, path)


def put_anothers_with_its_record(path: Path, theirs: Path, place: float) -> None:
    put_anothers(path, theirs, place)
    put_anothers(path.with_suffix(".json"), theirs, place)


def remove(path: Path, theirs: Path, place: float) -> None:
    path.unlink()


DAMAGE = [
    *[pytest.param(flip_a_bit, k / 29, id=f"bit-flipped-at-{k}-of-29") for k in range(30)],
    *[pytest.param(truncate, share, id=f"cut-at-{share}") for share in (0.0, 0.3, 0.999, 1.0)],
    pytest.param(put_anothers, 0.0, id="of-another-run"),
    pytest.param(put_anothers_with_its_record, 0.0, id="of-another-run-with-its-record"),
    pytest.param(remove, 0.0, id="missing"),
]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Path:
    """Two runs whose samples differ, `ours` and `theirs`."""
    folder = tmp_path_factory.mktemp("pristine")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "ROW_GROUP_ROWS", GROUP)
        write_store(folder / "ours")
        write_store(folder / "theirs", salt=1, identity="theirs")
    return folder


@pytest.mark.parametrize("harm, place", DAMAGE)
def test_damage_is_found_and_named_and_mended_to_the_old_digest(tmp_path, pristine, harm, place):
    folder = tmp_path / "g1"
    shutil.copytree(pristine / "ours", folder)
    sealed = files.read_seal(folder)
    harm(folder / NAME, pristine / "theirs", place)
    reading = candidates.read_batches(folder, ("text",))
    assert next(reading).samples().text == make_shard(0).text[:GROUP]  # the shard before is whole
    with pytest.raises(errors.IntegrityError, match=f"{NAME} .*again: only this shard is remade"):
        list(reading)
    with pytest.raises(errors.IntegrityError, match=NAME.removesuffix(".parquet")):
        files.verify_seal(folder)
    writer = CandidateWriter(folder, SHARDS, "ours")
    assert writer.missing_shards() == [1]
    assert list(writer.discarded) == [NAME]
    again = write_store(folder)
    assert (again.digest, again.files) == (sealed.digest, sealed.files)
    assert files.verify_seal(folder).digest == sealed.digest


def test_a_shard_that_changes_after_it_was_verified_is_found_by_its_checksums(store):
    """The digest is taken when a file is first opened; later passes have the checksum of each page."""
    reader = candidates.CandidateReader(store)
    assert sum(len(batch) for batch in reader.batches()) == sum(len(make_shard(i)) for i in range(SHARDS))
    column = pq.ParquetFile(store / NAME).metadata.row_group(1).column(3)
    assert column.path_in_schema == "text"
    content = bytearray((store / NAME).read_bytes())
    content[column.data_page_offset + column.total_compressed_size - 2] ^= 1
    (store / NAME).write_bytes(bytes(content))
    with pytest.raises(errors.IntegrityError, match=f"{NAME} is damaged.*CRC"):
        list(reader.batches(("text",)))


# Memory.

_READ_MANY = """
import sys
import numpy as np, pyarrow as pa
from rest_jax.data import candidates
from rest_jax.types import RaggedTokens

ROWS, PIECE, TOKENS = 300_000, 10_000, 12
rng = np.random.default_rng(0)
flags = dict.fromkeys(candidates.FLAGS, np.zeros(PIECE, bool))

def piece(start):
    log_probs = -rng.random(PIECE * TOKENS).astype(np.float32)
    ids = rng.integers(2, 32_000, PIECE * TOKENS).astype(np.int32)
    texts = pa.array([f"sample {row} has a text of sixty characters, as many do" for row in range(PIECE)])
    return candidates.CandidateShard(
        example_id=np.arange(start, start + PIECE),
        sample=np.zeros(PIECE, np.int32),
        source=texts,
        text=texts,
        tokens=RaggedTokens(ids, TOKENS * np.arange(PIECE + 1)),
        log_probs=log_probs,
        tempered_log_probs=log_probs,
        **flags,
    )

writer = candidates.CandidateWriter(sys.argv[1], 1, "ours")
writer.write_shard(0, (piece(start) for start in range(0, ROWS, PIECE)))
writer.seal()
rewards = candidates.RewardWriter(sys.argv[1], "chrf", "v1")
rewards.write_shard(0, rewards.samples(0, []), rng.random(ROWS))
rewards.seal()
rows = total = 0
for batch in candidates.read_batches(sys.argv[1], rewards=["chrf"]):
    rows, total = rows + len(batch), total + batch.table.nbytes
print(rows, total, pa.default_memory_pool().max_memory())
"""


def test_memory_does_not_grow_with_the_store(tmp_path):
    """A shard of 300,000 rows, written in pieces, read by row groups: Arrow never holds half of it."""
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", _READ_MANY, str(tmp_path / "g1")],
        env=env, cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows, total, peak = map(int, done.stdout.split())
    assert rows == 300_000
    assert total > 80e6
    assert peak < 40e6
