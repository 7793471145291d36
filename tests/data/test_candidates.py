from __future__ import annotations

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
from rest_jax.types import RaggedTokens

ROOT = Path(__file__).parents[2]
SHARDS, SOURCES, SAMPLES = 3, 8, 4
IDS = np.sort(np.random.default_rng(1).choice(2**40, SOURCES, replace=False))


def make_shard(index: int, salt: int = 0) -> CandidateShard:
    """Shard `index` of SHARDS over IDS; the same arguments give the same shard."""
    ids = np.array_split(IDS, SHARDS)[index]
    rows = len(ids) * SAMPLES
    rng = np.random.default_rng([index, salt])
    tokens = RaggedTokens.from_lists([rng.integers(2, 99, n).tolist() for n in rng.integers(0, 9, rows)])
    return CandidateShard(
        example_id=np.repeat(ids, SAMPLES),
        sample=np.tile(np.arange(SAMPLES, dtype=np.int32), len(ids)),
        source=[f"source {i} 译\u2028文" for i in np.repeat(ids, SAMPLES)],
        text=[f"sample {k}\t" * (k % 3) for k in range(rows)],
        tokens=tokens,
        log_probs=-rng.random(len(tokens.values)).astype(np.float32),
        tempered_log_probs=-rng.random(len(tokens.values)).astype(np.float32),
        truncated=rng.random(rows) < 0.3,
        empty=rng.random(rows) < 0.3,
        copy_of_source=rng.random(rows) < 0.3,
        repeated_ngram=rng.random(rows) < 0.3,
        round_trip=rng.random(rows) < 0.7,
    )


def write_store(folder: Path, salt: int = 0, identity: str = "ours") -> files.Seal:
    """Makes what is missing of a store, and seals it."""
    writer = CandidateWriter(folder, SHARDS, identity)
    for index in writer.missing_shards():
        writer.write_shard(index, make_shard(index, salt))
    return writer.seal({"policy": "bc"})


def rewards_of(shard: CandidateShard) -> np.ndarray:
    rewards = (shard.example_id % 97 + shard.sample) / 101.0
    rewards[::5] = np.nan
    return rewards


def write_rewards(folder: Path, identity: str = "chrf v1") -> files.Seal:
    writer = RewardWriter(folder, "chrf", identity)
    for index in writer.missing_shards():
        shard = writer.samples(index, ["text"])
        writer.write_shard(index, shard, rewards_of(shard))
    return writer.seal()


def assert_same(left: CandidateShard, right: CandidateShard) -> None:
    assert (left.source, left.text) == (right.source, right.text)
    for name in candidate_shard.SCHEMA.names:
        if name in ("source", "text"):
            continue
        a, b = getattr(left, name), getattr(right, name)
        if name == "tokens":
            np.testing.assert_array_equal(a.offsets, b.offsets)
            a, b = a.values, b.values
        np.testing.assert_array_equal(a, b, err_msg=name)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    write_store(tmp_path / "g1")
    return tmp_path / "g1"


@pytest.fixture
def scored(store: Path) -> Path:
    write_rewards(store)
    return store


def test_what_is_read_is_what_was_written(store):
    found = list(candidates.read_shards(store))
    assert len(found) == SHARDS
    for index, shard in enumerate(found):
        assert_same(shard, make_shard(index))


def test_sums_of_log_probabilities_are_per_sample():
    shard = make_shard(0)
    for row in range(len(shard)):
        span = slice(shard.tokens.offsets[row], shard.tokens.offsets[row + 1])
        assert shard.log_prob[row] == pytest.approx(shard.log_probs[span].sum(), rel=1e-6)
        assert shard.tempered_log_prob[row] == pytest.approx(shard.tempered_log_probs[span].sum(), rel=1e-6)


def test_a_shard_opens_as_plain_parquet(store):
    table = pq.read_table(store / "samples-00001-of-00003.parquet")
    assert table.schema.equals(candidate_shard.SCHEMA)
    expected = make_shard(1)
    assert table["text"].to_pylist() == expected.text
    assert table["tokens"].to_pylist() == [expected.tokens[i].tolist() for i in range(len(expected))]
    np.testing.assert_array_equal(table["log_prob"].to_numpy(), expected.log_prob)


def test_a_shard_opens_in_pandas(store):
    pandas = pytest.importorskip("pandas", reason="pandas is not needed by the package")
    frame = pandas.read_parquet(store / "samples-00001-of-00003.parquet")
    assert list(frame.columns) == candidate_shard.SCHEMA.names
    assert frame.text.tolist() == make_shard(1).text


def test_rows_are_sorted_whatever_order_they_came_in(tmp_path):
    writer = CandidateWriter(tmp_path, SHARDS, "ours")
    rng = np.random.default_rng(0)
    for index in writer.missing_shards():
        shard = make_shard(index)
        writer.write_shard(index, shard.take(rng.permutation(len(shard))))
    writer.seal()
    for index, shard in enumerate(candidates.read_shards(tmp_path)):
        assert_same(shard, make_shard(index))


def test_the_same_samples_give_the_same_bytes(tmp_path, store):
    again = write_store(tmp_path / "again")
    assert again.files == files.read_seal(store).files
    assert again.digest == files.read_seal(store).digest
    assert write_store(tmp_path / "other", salt=1).digest != again.digest


def test_columns_can_be_read_alone(store):
    for index, shard in enumerate(candidates.read_shards(store, ["text", "tempered_log_probs"])):
        whole = make_shard(index)
        np.testing.assert_array_equal(shard.example_id, whole.example_id)
        np.testing.assert_array_equal(shard.sample, whole.sample)
        np.testing.assert_array_equal(shard.tempered_log_probs, whole.tempered_log_probs)
        np.testing.assert_array_equal(shard.tokens.values, whole.tokens.values)
        assert shard.text == whole.text
        assert shard.source == [] and len(shard.log_probs) == len(shard.truncated) == 0
    with pytest.raises(errors.ConfigError, match="no column 'reward'"):
        next(candidates.read_shards(store, ["reward"]))


@settings(deadline=None, max_examples=25)
@given(st.data())
def test_take_by_mask_or_rows(data):
    shard = make_shard(0)
    mask = np.array(data.draw(st.lists(st.booleans(), min_size=len(shard), max_size=len(shard))))
    taken = shard.take(mask)
    assert_same(taken, shard.take(np.flatnonzero(mask)))
    assert len(taken) == mask.sum()
    for new, old in enumerate(np.flatnonzero(mask)):
        assert taken.text[new] == shard.text[old]
        assert taken.log_prob[new] == shard.log_prob[old]
        np.testing.assert_array_equal(taken.tokens[new], shard.tokens[old])
    ends = np.cumsum(taken.tokens.lengths)
    assert len(taken.log_probs) == (ends[-1] if len(ends) else 0)


def test_wrong_sizes_are_refused():
    shard = make_shard(0)
    with pytest.raises(ValueError, match="mask of shape"):
        shard.take(np.ones(2, bool))
    with pytest.raises(ValueError, match="1 values of text"):
        CandidateShard(shard.example_id, shard.sample, text=["a"])
    with pytest.raises(ValueError, match="log_probs for"):
        CandidateShard(shard.example_id, shard.sample, tokens=shard.tokens, log_probs=np.zeros(1, np.float32))


def test_an_incomplete_doubled_or_broken_shard_is_not_written(tmp_path):
    writer, shard = CandidateWriter(tmp_path, 1, "ours"), make_shard(0)
    with pytest.raises(errors.DataError, match="no column source"):
        writer.write_shard(0, CandidateShard(shard.example_id, shard.sample))
    doubled = shard.take(np.array([0, 1, 1]))
    with pytest.raises(errors.DataError, match=f"sample 1 of example {shard.example_id[1]} is there twice"):
        writer.write_shard(0, doubled)
    broken = shard.take(np.arange(len(shard)))
    broken.log_prob[3] = np.nan
    with pytest.raises(
        errors.NonFiniteError, match=f"sample 3 of example {shard.example_id[3]} has the log_prob"
    ):
        writer.write_shard(0, broken)
    assert writer.missing_shards() == [0]


def test_a_shard_without_samples_is_allowed(tmp_path):
    writer, nothing = CandidateWriter(tmp_path, 2, "ours"), make_shard(0).take(np.zeros(0, np.int64))
    writer.write_shard(0, make_shard(0))
    writer.write_shard(1, nothing)
    writer.seal()
    assert [len(shard) for shard in candidates.read_shards(tmp_path)] == [len(make_shard(0)), 0]


def test_totals_count_rows_tokens_and_flags(store):
    whole = [make_shard(index) for index in range(SHARDS)]
    facts = files.read_seal(store).facts
    assert facts["rows"] == SOURCES * SAMPLES
    assert facts["tokens"] == sum(len(shard.tokens.values) for shard in whole)
    assert facts["log_prob"] == pytest.approx(sum(shard.log_prob.sum() for shard in whole), rel=1e-5)
    for name in candidate_shard.FLAGS:
        assert facts[name] == sum(getattr(shard, name).sum() for shard in whole)
    assert facts["policy"] == "bc"


def test_overlapping_shards_are_found(tmp_path):
    writer = CandidateWriter(tmp_path, 2, "ours")
    writer.write_shard(0, make_shard(0))
    writer.write_shard(1, make_shard(0, salt=1))
    with pytest.raises(errors.DataError, match="overlap"):
        writer.seal()
    files.write_seal(tmp_path, "grow", "ours")  # as a phase that seals the folder itself would
    with pytest.raises(errors.DataError, match="overlap"):
        list(candidates.read_shards(tmp_path))


def test_nothing_is_read_or_sealed_before_all_is_committed(tmp_path):
    writer = CandidateWriter(tmp_path, SHARDS, "ours")
    writer.write_shard(1, make_shard(1))
    with pytest.raises(errors.MissingInputError, match="2 of 3 shards are not committed.*samples-00000"):
        writer.seal()
    with pytest.raises(errors.MissingInputError, match="Run the grow phase first"):
        next(candidates.read_shards(tmp_path))
    assert writer.missing_shards() == [0, 2]


def _flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 0x10
    path.write_bytes(bytes(content))


def test_every_flipped_byte_is_found_by_the_reader(scored):
    for path in (
        scored / "samples-00001-of-00003.parquet",
        scored / "rewards/chrf/rewards-00001-of-00003.parquet",
    ):
        for position in range(0, path.stat().st_size, 61):
            _flip(path, position)
            with pytest.raises(
                errors.IntegrityError, match=f"{path.name} has other bytes.*again: only this shard"
            ):
                list(candidates.read_scored(scored, "chrf", ["text"]))
            _flip(path, position)
    assert len(list(candidates.read_scored(scored, "chrf"))) == SHARDS


def test_page_checksums_find_flips_even_without_the_digest(store):
    content = (store / "samples-00001-of-00003.parquet").read_bytes()
    metadata = pq.ParquetFile(store / "samples-00001-of-00003.parquet").metadata.row_group(0)
    column = metadata.column(candidate_shard.SCHEMA.names.index("text"))
    start = column.data_page_offset
    found = 0
    for position in range(start, start + column.total_compressed_size, 7):
        flipped = bytearray(content)
        flipped[position] ^= 1
        try:
            source = pa.BufferReader(bytes(flipped))
            table = shards.ShardFile(source, candidate_shard.SCHEMA, "shard").read()
        except errors.IntegrityError:
            found += 1
        else:  # a bit of the page's header that says nothing of its content
            assert candidate_shard.from_table(table).text == make_shard(1).text
    assert found > 0


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("suffix", [".parquet", ".json"])
def test_a_truncated_shard_is_made_again(store, share, suffix):
    sealed = files.read_seal(store)
    path = store / f"samples-00001-of-00003{suffix}"
    content = path.read_bytes()
    path.write_bytes(content[: min(int(share * len(content)), len(content) - 3)])
    with pytest.raises(errors.IntegrityError, match="samples-00001"):
        files.verify_seal(store)
    writer = CandidateWriter(store, SHARDS, "ours")
    assert writer.missing_shards() == [1]
    assert list(writer.discarded) == ["samples-00001-of-00003.parquet"]
    assert write_store(store).digest == sealed.digest


def test_flipped_missing_and_foreign_shards_are_made_again(tmp_path, store):
    sealed = files.read_seal(store)
    write_store(tmp_path / "theirs", salt=1, identity="theirs")
    _flip(store / "samples-00000-of-00003.parquet", 200)
    (store / "samples-00001-of-00003.parquet").unlink()
    for suffix in (".parquet", ".json"):
        shutil.copy(tmp_path / "theirs" / f"samples-00002-of-00003{suffix}", store)
    with pytest.raises(errors.IntegrityError, match="samples-00000"):
        next(candidates.read_shards(store))
    writer = CandidateWriter(store, SHARDS, "ours")
    assert writer.missing_shards() == [0, 1, 2]
    assert list(writer.discarded.values()) == [
        "it has other bytes than its record states",
        "it is missing",
        "its record states another value of 'identity'",
    ]
    assert write_store(store).digest == sealed.digest


def test_a_shard_swapped_with_its_neighbour_is_found(store):
    first, second = (store / f"samples-0000{i}-of-00003.parquet" for i in (0, 1))
    held = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(held)
    assert CandidateWriter(store, SHARDS, "ours").missing_shards() == [0, 1]


def test_strays_of_another_division_are_removed(store):
    (store / ".samples-00000-of-00003.parquet.abc.tmp").write_bytes(b"half")
    (store / "summary.json").write_text("{}")
    writer = CandidateWriter(store, 2, "ours")
    assert writer.missing_shards() == [0, 1]
    assert sorted(path.name for path in store.iterdir()) == ["SEAL.json", "summary.json"]


def test_a_job_looks_at_no_shard_but_its_own(tmp_path):
    """What another job is writing: a half-written file, and a shard that has no record yet."""
    writer = CandidateWriter(tmp_path, SHARDS, "ours")
    writer.write_shard(2, make_shard(2))
    half = [tmp_path / f".samples-0000{index}-of-00003.parquet.x1.tmp" for index in (0, 1)]
    unrecorded = tmp_path / "samples-00000-of-00003.parquet"
    for path in (*half, unrecorded):
        path.write_bytes(b"PAR1")
    assert CandidateWriter(tmp_path, SHARDS, "ours").missing_shards(range(1, 3)) == [1]
    assert half[0].exists() and unrecorded.exists() and not half[1].exists()
    assert writer.uncommitted() == [0, 1]
    assert CandidateWriter(tmp_path, SHARDS, "ours").missing_shards() == [0, 1]
    assert not half[0].exists() and not unrecorded.exists()


def test_a_job_of_rewards_looks_at_no_shard_but_its_own(store):
    writer = RewardWriter(store, "chrf", "chrf v1")
    half = writer.folder / ".rewards-00000-of-00003.parquet.x1.tmp"
    files.write_text(half, "half")
    assert writer.num_shards == SHARDS
    assert writer.missing_shards(range(1, 2)) == [1] and half.exists()
    assert writer.uncommitted() == [0, 1, 2]
    assert writer.missing_shards() == [0, 1, 2] and not half.exists()


def test_identity_is_that_of_the_claimed_folder(tmp_path):
    identity = files.claim(tmp_path, {"seed": 1})
    CandidateWriter(tmp_path, 1).write_shard(0, make_shard(0))
    assert CandidateWriter(tmp_path, 1, identity).missing_shards() == []
    assert CandidateWriter(tmp_path, 1, "another").missing_shards() == [0]


def test_work_that_is_done_is_left_alone(store):
    before = {path.name: path.stat().st_mtime_ns for path in store.glob("samples-*")}
    assert CandidateWriter(store, SHARDS, "ours").missing_shards() == []
    assert before == {path.name: path.stat().st_mtime_ns for path in store.glob("samples-*")}


KILLS = [
    "before-rename:samples-00000-of-00003.parquet",
    "after-shard:samples-00001-of-00003.parquet",
    "before-rename:samples-00001-of-00003.json",
    "after-record:samples-00002-of-00003.parquet",
    "before-seal:grow",
    "after-seal:grow",
    "after-shard:rewards-00001-of-00003.parquet",
    "before-seal:annotate",
]
# One import, then a process for each kill.
_JOB = """
import os, sys
from pathlib import Path
from tests.data import test_candidates as job
for number, point in enumerate(job.KILLS):
    child = os.fork()
    if not child:
        os.environ["REST_JAX_FAILPOINT"] = point
        folder = Path(sys.argv[1]) / str(number)
        job.write_store(folder)
        job.write_rewards(folder)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == 9, point
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> Path:
    """A folder with a store for each kill, as the kill left it."""
    folder = tmp_path_factory.mktemp("killed")
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", _JOB, str(folder)], env=env, cwd=ROOT, check=True)
    return folder


@pytest.mark.parametrize("point", KILLS)
def test_killed_and_resumed_ends_in_the_same_bytes(killed, scored, point):
    folder = killed / str(KILLS.index(point))
    assert write_store(folder).digest == files.read_seal(scored).digest
    assert write_rewards(folder).digest == files.read_seal(scored / "rewards/chrf").digest
    assert not [path for path in folder.rglob("*") if path.name.endswith(".tmp")]


def test_rewards_come_back_with_their_samples(scored):
    for index, (shard, rewards) in enumerate(candidates.read_scored(scored, "chrf")):
        assert_same(shard, make_shard(index))
        np.testing.assert_array_equal(rewards, rewards_of(shard))
        assert rewards.dtype == np.float64


def test_rewards_do_not_change_the_seal_of_the_samples(scored):
    assert write_store(scored).digest == files.verify_seal(scored).digest
    assert not [name for name in files.read_seal(scored).files if name.startswith("rewards")]


def test_infinite_rewards_are_kept_as_they_are(store):
    writer = RewardWriter(store, "odd", "v1")
    values = np.array([np.nan, np.inf, -np.inf, -0.0, 1e38])
    for index in writer.missing_shards():
        shard = writer.samples(index)
        writer.write_shard(index, shard, np.resize(values, len(shard)))
    writer.seal()
    for _, rewards in candidates.read_scored(store, "odd", ["text"]):
        np.testing.assert_array_equal(rewards, np.resize(values, len(rewards)))
        assert np.signbit(rewards[3])


def test_damaged_and_foreign_rewards_are_made_again(scored):
    folder = scored / "rewards/chrf"
    sealed = files.read_seal(folder)
    _flip(folder / "rewards-00002-of-00003.parquet", 100)
    writer = RewardWriter(scored, "chrf", "chrf v1")
    assert writer.missing_shards() == [2]
    assert write_rewards(scored).digest == sealed.digest
    assert RewardWriter(scored, "chrf", "chrf v2").missing_shards() == [0, 1, 2]


def test_rewards_of_other_samples_are_never_read(tmp_path, scored):
    write_store(tmp_path / "g2", salt=1)
    shutil.copytree(scored / "rewards", tmp_path / "g2" / "rewards")
    with pytest.raises(errors.IntegrityError, match="rewards of other samples.*annotate phase again"):
        next(candidates.read_scored(tmp_path / "g2", "chrf"))
    writer = RewardWriter(tmp_path / "g2", "chrf", "chrf v1")
    assert writer.missing_shards() == [0, 1, 2]
    assert set(writer.discarded.values()) == {"its record states another value of 'samples'"}


def test_missing_rewards_and_samples_name_the_phase_to_run(tmp_path, store):
    with pytest.raises(errors.MissingInputError, match="rewards/bleu is missing.*Run the annotate phase"):
        next(candidates.read_scored(store, "bleu"))
    with pytest.raises(errors.MissingInputError, match="g7 is missing or unfinished. Run the grow phase"):
        RewardWriter(tmp_path / "g7", "chrf")


def test_one_reward_a_sample(store):
    writer = RewardWriter(store, "chrf", "v1")
    with pytest.raises(errors.DataError, match="2 rewards for the 12 samples of shard 0"):
        writer.write_shard(0, writer.samples(0), np.ones(2))


@pytest.mark.parametrize("name", ["", ".", "..", "../../etc", "a/b", ".hidden", "-x", "a b"])
def test_reward_names_cannot_leave_their_folder(store, name):
    with pytest.raises(errors.ConfigError, match="cannot name a reward"):
        RewardWriter(store, name)


def test_shard_numbers_are_checked(tmp_path):
    with pytest.raises(errors.ConfigError, match="0 shards"):
        CandidateWriter(tmp_path, 0)
    with pytest.raises(ValueError, match="shard 3 of 3"):
        CandidateWriter(tmp_path, 3).write_shard(3, make_shard(0))


def test_a_seal_with_a_hole_in_its_shards_is_refused(store):
    seal = files.read_seal(store)
    without = {name: digest for name, digest in seal.files.items() if "00001" not in name}
    with pytest.raises(errors.IntegrityError, match="2 samples shards that are not a whole set"):
        shards.sealed_shards(files.Seal("grow", "ours", without, {}), "samples")


def test_only_one_shard_is_read_at_a_time(store, monkeypatch):
    opened = []
    original = shards.verified
    monkeypatch.setattr(shards, "verified", lambda *args: opened.append(args[2]) or original(*args))
    stream = candidates.read_shards(store)
    assert opened == []
    for count, _ in enumerate(stream, start=1):
        assert len(opened) == count
