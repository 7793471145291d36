"""Several jobs make the shards of one Grow step, and what they leave is what a whole run leaves."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rest_jax import errors, files, main
from rest_jax.phases.jobs import Job
from rest_jax.phases.workspace import read_ledger
from tests import tiny
from tests.phases import places

# Which job, and which shards are its own.


def test_a_job_is_read_from_its_name():
    assert Job.parse("2/8") == Job(2, 8)
    assert Job.parse("1/1") == Job(1, 1)
    assert str(Job.parse("12/12")) == "job 12 of 12"


@pytest.mark.parametrize(
    "text", ["3", "0/4", "5/4", "a/b", "", "1/", "/4", "-1/4", "1/4/4", " 1/4", "1/0", "²/8"]
)
def test_what_names_no_job_is_refused(text):
    with pytest.raises(errors.ConfigError, match='names no job .*SHARD = "2/8"'):
        Job.parse(text)


@given(st.integers(0, 200), st.integers(1, 60))
def test_the_shares_are_contiguous_even_and_the_whole(parts, count):
    shares = [Job(number, count).share(parts) for number in range(1, count + 1)]
    assert [part for share in shares for part in share] == list(range(parts))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_more_jobs_than_shards_are_refused(tmp_path):
    assert places.workspace(tmp_path, 'SHARD="8/8"').experiment.job == Job(8, 8)
    with pytest.raises(errors.ConfigError, match="more jobs than the 8 shards.*GrowConfig.shards"):
        places.workspace(tmp_path, 'SHARD="1/9"')


# In the program.


@pytest.fixture
def corpus(finished_run) -> Path:
    return finished_run.parent / "pairs.tsv"


def refused(capsys, code: int, run_dir: Path, corpus: Path, verb: str, *more: str) -> str:
    """The one line that a command ends with in this process."""
    arguments = [verb, f"--gin_file={tiny.GIN_FILE}", *tiny.bindings(run_dir, corpus), *more]
    assert main.main(arguments) == code
    said = capsys.readouterr()
    (line,) = said.err.strip().splitlines()
    assert said.out == ""
    return line


@pytest.mark.parametrize("value", ['"3"', '"0/4"', '"5/4"', '"a/b"', "3", "2/4"])
def test_a_bad_value_is_one_line(capsys, tmp_path, value):
    line = refused(capsys, 78, tmp_path / "run", tmp_path / "pairs.tsv", "grow", f"--gin.SHARD={value}")
    assert "SHARD" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "verb", ["rest", "vocab", "pretrain", "reward_model", "improve", "evaluate", "report"]
)
def test_other_verbs_are_not_shared_out(capsys, tmp_path, verb):
    line = refused(capsys, 78, tmp_path / "run", tmp_path / "pairs.tsv", verb, '--gin.SHARD="1/2"')
    assert f"{verb} is not shared out among jobs" in line and "only grow, annotate and sample" in line
    assert not (tmp_path / "run").exists()


def start(verb: str, job: str, run_dir: Path, corpus: Path) -> subprocess.Popen[str]:
    """Starts a job without waiting for it."""
    return subprocess.Popen(
        tiny.command(
            verb, f"--gin_file={tiny.GIN_FILE}", *tiny.bindings(run_dir, corpus), f'--gin.SHARD="{job}"'
        ),
        cwd=tiny.ROOT,
        env=tiny.environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def shards_in(folder: Path, stem: str) -> list[int]:
    """Numbers of the committed shards."""
    return sorted(int(path.name.split("-")[1]) for path in folder.glob(f"{stem}-*.json"))


def test_three_jobs_and_a_whole_run_leave_what_one_run_leaves(copied_run, finished_run, corpus):
    folder = copied_run / "grow" / "g1"
    config, ledger = (copied_run / "config.gin").read_bytes(), (copied_run / "ledger.jsonl").read_bytes()
    shutil.rmtree(folder)
    together = [start("grow", job, copied_run, corpus) for job in ("1/3", "3/3")]
    said = [process.communicate(timeout=600)[1] for process in together]
    assert [process.returncode for process in together] == [0, 0], said
    assert shards_in(folder, "samples") == [0, 1, 5, 6, 7]
    assert not (folder / files.SEAL_NAME).exists()
    middle = '--gin.SHARD="2/3"'
    point = {"REST_JAX_FAILPOINT": "after-shard:samples-00003-of-00008.parquet"}
    assert tiny.tiny("grow", copied_run, corpus, middle, env=point).returncode == -signal.SIGKILL
    assert shards_in(folder, "samples") == [0, 1, 2, 5, 6, 7]
    last = tiny.tiny("grow", copied_run, corpus, middle)
    assert last.returncode == 0, last.stderr
    assert "job 2 of 3: its 3 of 8 shards are committed, and so are all others" in last.stderr
    assert "`rest-jax grow` without SHARD" in last.stderr
    assert not (folder / files.SEAL_NAME).exists()
    assert (copied_run / "config.gin").read_bytes() == config
    whole = tiny.tiny("grow", copied_run, corpus)
    assert whole.returncode == 0, whole.stderr
    assert tiny.seals(copied_run)["grow/g1"] == tiny.seals(finished_run)["grow/g1"]
    assert (copied_run / "ledger.jsonl").read_bytes() == ledger
    # The rewards were deleted with the samples; jobs make them, too, one without the other.
    one = tiny.tiny("annotate", copied_run, corpus, '--gin.SHARD="2/2"')
    assert one.returncode == 0, one.stderr
    assert "its 4 of 8 shards are committed, 4 others are not yet" in one.stderr
    assert shards_in(folder / "rewards" / "learned", "rewards") == [4, 5, 6, 7]
    rest = tiny.tiny("annotate", copied_run, corpus)
    assert rest.returncode == 0, rest.stderr
    assert tiny.seals(copied_run) == tiny.seals(finished_run)
    assert (copied_run / "ledger.jsonl").read_bytes() == ledger


def test_a_job_finds_a_sealed_step_and_leaves_it(copied_run, corpus):
    before = {path: path.stat().st_mtime_ns for path in (copied_run / "grow").rglob("*") if path.is_file()}
    done = tiny.tiny("grow", copied_run, corpus, '--gin.SHARD="1/2"')
    assert done.returncode == 0, done.stderr
    assert "grow/g1 is sealed: nothing is left to do" in done.stderr
    after = {path: path.stat().st_mtime_ns for path in (copied_run / "grow").rglob("*") if path.is_file()}
    assert after == before


def test_the_same_job_twice_and_jobs_beside_a_whole_run_are_refused(capsys, copied_run, corpus):
    mine, whole = '--gin.SHARD="2/3"', ()
    with files.run_lock(copied_run, (2, 3)):
        line = refused(capsys, 75, copied_run, corpus, "grow", mine)
        assert "in use by another run (job 2 of 3, pid " in line
        line = refused(capsys, 75, copied_run, corpus, "grow", *whole)
        assert "in use by another run (job 2 of 3, pid " in line
        line = refused(capsys, 75, copied_run, corpus, "grow", '--gin.SHARD="1/4"')
        assert "in use by another run (job 2 of 3, pid " in line
    with files.run_lock(copied_run):
        line = refused(capsys, 75, copied_run, corpus, "grow", mine)
        assert "in use by another run (pid " in line


def test_a_job_with_other_settings_is_refused(capsys, copied_run, corpus):
    settings = (copied_run / "grow" / "g1" / files.IDENTITY_NAME).read_bytes()
    line = refused(capsys, 78, copied_run, corpus, "grow", '--gin.SHARD="1/2"', "--gin.SAMPLES_PER_SOURCE=5")
    assert "differing: settings.samples_per_source" in line
    assert (copied_run / "grow" / "g1" / files.IDENTITY_NAME).read_bytes() == settings
    assert "SAMPLES_PER_SOURCE = 4" in (copied_run / "config.gin").read_text()


# In the folder.


@pytest.fixture
def place(tmp_path):
    place = places.workspace(tmp_path)
    place.run_dir.mkdir()
    return place


def test_a_part_is_done_and_not_sealed(place):
    done: list[int] = []
    for _ in range(2):
        place.run_part(place.run_dir / "step", "grow", {"g": 1}, lambda: done.append(1))
    assert done == [1, 1]
    assert json.loads((place.run_dir / "step" / files.IDENTITY_NAME).read_text())["g"] == 1
    assert not (place.run_dir / "step" / files.SEAL_NAME).exists()
    assert read_ledger(place.run_dir) == []


def test_a_part_of_a_damaged_step_is_made_anew(place, capsys):
    folder = place.run_dir / "step"
    files.write_text(folder / "a.txt", "whole")
    digest = files.claim(folder, place.identity("grow", {}))
    files.write_seal(folder, "grow", digest)
    done: list[int] = []
    place.run_part(folder, "grow", {}, lambda: done.append(1))
    assert done == []
    (folder / "a.txt").write_text("hole")
    place.run_part(folder, "grow", {}, lambda: done.append(1))
    assert done == [1] and not (folder / files.SEAL_NAME).exists()
    assert "a.txt has other bytes than its seal states" in capsys.readouterr().err
