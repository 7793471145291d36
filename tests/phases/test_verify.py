"""What is sealed is verified, what was sampled is sampled again, and nothing is changed by it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from rest_jax import errors, files, keys
from rest_jax.data import candidates
from rest_jax.data.candidate_shard import CandidateShard
from rest_jax.generation.batching import DecodeBatching
from rest_jax.phases import verify
from rest_jax.phases.lineage import BC
from rest_jax.phases.sampling import SampleSet, sampled_together
from rest_jax.types import EOS_ID, Examples, RaggedTokens, TokenPairs
from tests import tiny
from tests.phases import places


def verified(run_dir: Path, *more: str) -> tiny.Done:
    """Runs `rest-jax verify RUN`, with no settings but those in the run."""
    return tiny.program("verify", str(run_dir), *more)


def last_line(done: tiny.Done) -> str:
    return done.stderr.strip().splitlines()[-1]


def state_of(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Time and bytes of each file."""
    return {
        path.relative_to(folder).as_posix(): (path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }


# On a finished run.


def test_a_sound_run_is_verified_and_left_as_it_is(copied_run):
    before = state_of(copied_run)
    done = verified(copied_run, "--share=1", "--seed=7")
    assert done.returncode == 0, done.stderr
    for name in tiny.seals(copied_run):
        assert f"\n{name}: " in f"\n{done.stdout}"
    for number in (1, 2):
        assert f"grow/g{number}: 60 of 60 sources drawn again, 240 samples" in done.stdout
    assert f"verified {copied_run}; --seed=7" in done.stdout
    assert state_of(copied_run) == before


def test_a_few_sources_of_one_grow_step(finished_run):
    done = verified(finished_run, "--grow_step=2")
    assert done.returncode == 0, done.stderr
    assert "grow/g2: 1 of 60 sources drawn again, 4 samples" in done.stdout
    assert "grow/g1: 16 files" in done.stdout and "grow/g1: 1 of" not in done.stdout


def test_a_flipped_byte_is_found_before_anything_is_sampled(copied_run):
    path = copied_run / "eval" / "g1_i1" / "result.json"
    path.write_bytes(path.read_bytes().replace(b"1", b"2", 1))
    done = verified(copied_run)
    assert done.returncode == 77
    assert f"{path} has other bytes than its seal states" in last_line(done)
    assert "drawn again" not in done.stdout


def seal_again(run_dir: Path, index: int, row: int) -> tuple[int, int]:
    """Turns the last bit of a log-probability over, and seals the Grow step as if that were its work."""
    folder = run_dir / "grow" / "g1"
    seal = files.verify_seal(folder)
    shard = list(candidates.read_shards(folder))[index]
    bits = shard.log_probs.copy().view(np.uint32)
    bits[shard.tokens.offsets[row]] ^= 1
    writer = candidates.CandidateWriter(folder, 8)
    writer.write_shard(index, dataclasses.replace(shard, log_probs=bits.view(np.float32)))
    files.write_seal(folder, "grow", seal.identity, seal.facts, skip=("rewards", "summary.json"))
    return int(shard.example_id[row]), int(shard.sample[row])


def test_one_bit_of_one_log_probability_is_found_and_its_sample_named(copied_run):
    example_id, sample = seal_again(copied_run, index=3, row=6)
    before = state_of(copied_run)
    done = verified(copied_run, "--share=1", "--grow_step=1")
    assert done.returncode == 77
    line = last_line(done)
    assert line.startswith(
        f"rest_jax: E77 verify: sample {sample} of example {example_id} is not what the policy gives here: "
        "its log_probs differs [grow/g1]"
    )
    assert "delete the folder" in line and "grow/g1" in line
    assert state_of(copied_run) == before


def test_a_seal_of_another_identity_is_found(copied_run):
    path = copied_run / "policy" / "bc" / files.IDENTITY_NAME
    files.write_json(path, {**files.read_json(path), "seed": 5})
    done = verified(copied_run)
    assert done.returncode == 77
    assert f"{path} is not the identity that the seal states" in last_line(done)


@pytest.mark.parametrize(
    "more,code,said",
    [
        (["--gin.SAMPLES_PER_SOURCE=5"], 78, "differing: settings.samples_per_source"),
        (["--share=0"], 78, "a share of 0.0 cannot be drawn"),
        (["--share=1.5"], 78, "at most 1"),
        (["--grow_step=3"], 66, "grow/g3 is missing"),
    ],
)
def test_what_cannot_be_verified_is_refused(finished_run, more, code, said):
    done = verified(finished_run, *more)
    assert done.returncode == code
    assert said in last_line(done)


def test_without_its_settings_a_run_is_not_verified(tmp_path):
    done = verified(tmp_path)
    assert done.returncode == 66
    assert "config.gin" in last_line(done) and "--gin_file" in last_line(done)


def test_a_run_that_has_sealed_nothing_is_refused(tmp_path):
    place = places.workspace(tmp_path)
    place.run_dir.mkdir()
    with pytest.raises(errors.MissingInputError, match="nothing is sealed in"):
        list(verify.verify(place, None, 0.01, 0))


def test_a_run_without_samples_has_its_seals_verified_and_what_is_open_named(tmp_path):
    place = places.workspace(tmp_path)
    places.put_text(place, train=places.made_up(3))
    files.claim(place.policy_folder(BC), {"phase": "pretrain"})
    lines = list(verify.verify(place, None, 0.01, 0))
    assert [line.split(":")[0] for line in lines] == ["data", "policy/bc"]
    assert "not sealed yet" in lines[1]


# Which sources, and what counts as a difference.


@pytest.mark.parametrize("total,share,wanted", [(1000, 0.01, 10), (60, 0.001, 1), (7, 1.0, 7), (1, 0.5, 1)])
def test_a_share_is_chosen_at_least_one(total, share, wanted):
    rows = verify.choose(total, share, 3, 1)
    assert len(set(rows.tolist())) == len(rows) == wanted
    assert rows.tolist() == sorted(rows.tolist()) and rows[0] >= 0 and rows[-1] < total


def test_another_seed_and_another_grow_step_choose_others():
    first = verify.choose(10_000, 0.01, 0, 1).tolist()
    assert verify.choose(10_000, 0.01, 0, 1).tolist() == first
    assert verify.choose(10_000, 0.01, 1, 1).tolist() != first
    assert verify.choose(10_000, 0.01, 0, 2).tolist() != first


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_whatever_is_sampled_together_each_chosen_source_is_sampled_once(tmp_path, dtype):
    """Alone in float32; in bfloat16 with the others of its queue, which is its length bucket's."""
    made = places.workspace(tmp_path)
    policy = dataclasses.replace(made.experiment.policy, dtype=dtype)
    decoding = DecodeBatching(source_batch=2, source_lengths=(16, 32), queue_samples=1)
    made.experiment = dataclasses.replace(made.experiment, policy=policy, decoding=decoding)
    lengths = np.where(np.arange(60) % 3 == 0, 20, 5)
    tokens = RaggedTokens.from_lists([[7] * (n - 1) + [EOS_ID] for n in lengths])
    examples = Examples(["s"] * 60, ["t"] * 60, TokenPairs(np.arange(60), tokens, tokens))
    shard, chosen = np.arange(40, 60), np.array([41, 47, 59])
    sampling = made.experiment.grow.sampling
    wanted = SampleSet("Grow 1", "grow", tmp_path, BC, examples, 4, sampling, 8, keys.Stream.GROW, 1)
    calls = [call.tolist() for call in sampled_together(made, wanted, shard, chosen)]
    alone = [[41, 47, 59]]
    assert calls == (alone if dtype == "float32" else [[40, 41], [46, 47], [58, 59]])


def a_shard() -> CandidateShard:
    """Two sources of two samples each."""
    tokens = RaggedTokens.from_lists([[9, EOS_ID], [8, EOS_ID], [7, EOS_ID], [EOS_ID]])
    never = np.zeros(4, bool)
    return CandidateShard(
        example_id=np.array([5, 5, 6, 6]),
        sample=np.array([0, 1, 0, 1], np.int32),
        source=["a", "a", "b", "b"],
        text=["x", "y", "z", ""],
        tokens=tokens,
        log_probs=np.array([-1, 0, -2, 0, -3, 0, -4], np.float32),
        tempered_log_probs=np.array([-1, 0, -2, 0, -3, 0, -4], np.float32),
        truncated=never,
        empty=np.array([False, False, False, True]),
        copy_of_source=never,
        repeated_ngram=never,
        round_trip=~never,
    )


def test_equal_samples_have_no_difference():
    assert verify.first_difference(a_shard(), a_shard()) is None


def changed(column: str, place: int, value: object) -> CandidateShard:
    values = getattr(a_shard(), column)
    values = list(values) if isinstance(values, list) else np.array(values)
    values[place] = value
    return dataclasses.replace(a_shard(), **{column: values})


@pytest.mark.parametrize(
    "column,place,value,named",
    [
        ("log_probs", 4, np.float32(np.nextafter(np.float32(-3), np.float32(0))), (6, 0)),
        ("tempered_log_probs", 3, np.float32(-0.0), (5, 1)),
        ("text", 3, " ", (6, 1)),
        ("truncated", 1, True, (5, 1)),
        ("log_prob", 0, np.float32(-1.5), (5, 0)),
    ],
)
def test_the_first_difference_is_named(column, place, value, named):
    found = verify.first_difference(a_shard(), changed(column, place, value))
    assert found is not None
    assert (found.example_id, found.sample, found.column) == (*named, column)


def test_other_tokens_are_named_as_such():
    tokens = RaggedTokens.from_lists([[9, EOS_ID], [8, 4], [7, EOS_ID], [EOS_ID]])
    found = verify.first_difference(a_shard(), dataclasses.replace(a_shard(), tokens=tokens))
    assert found == (5, 1, "tokens")


def test_a_sample_that_is_not_there_is_a_difference():
    short = a_shard().take(np.array([0, 1, 3]))
    assert verify.first_difference(short, a_shard())[:2] == (6, 0)
    assert verify.first_difference(a_shard().take(np.array([0, 1, 2])), a_shard()) == (6, 1, "sample")
    assert verify.first_difference(a_shard(), a_shard().take(np.array([0, 1, 2]))) == (6, 1, "sample")
