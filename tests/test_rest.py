"""The outer loop: a run that is killed again and again ends in the files of one that was not."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest

from rest_jax import files
from rest_jax.phases.lineage import PolicyName
from rest_jax.phases.workspace import read_ledger
from rest_jax.rest import plan
from tests import tiny

STEPS = [
    "vocab", "data", "policy/bc", "reward/ratings", "reward/model", "eval/bc",
    "grow/g1", "reward/dataset", "grow/g1/rewards/learned",
    "policy/g1_i1", "eval/g1_i1", "policy/g1_i2", "eval/g1_i2",
    "grow/g2", "grow/g2/rewards/learned",
    "policy/g2_i1", "eval/g2_i1", "policy/g2_i2", "eval/g2_i2",
]  # fmt: skip

# Inside the first training; between two shards; at the end of a step, before and after its commit.
FEW_KILLS = [
    "before-verified",
    "after-seal:evaluate",
    "after-shard:samples-00003-of-00008.parquet",
    "before-seal:improve",
]
# Every step before and after its commit, and files between writing and renaming, in the order of a run: each
# kill leaves the next one something to do.
MORE_KILLS = [
    "before-rename:config.gin", "before-rename:spm.model", "before-seal:vocab", "after-seal:vocab",
    "before-rename:train.parquet",
    "between-params-and-optimizer", "before-verified", "before-fit", "before-seal:pretrain",
    "after-seal:pretrain",
    "before-rename:ratings.tsv", "before-rename:validation.json", "before-seal:reward_model",
    "after-seal:reward_model",
    "before-rename:result.json", "before-seal:evaluate", "after-seal:evaluate", "before-rename:ledger.jsonl",
    "before-rename:samples-00000-of-00008.parquet", "after-shard:samples-00003-of-00008.parquet",
    "after-record:samples-00005-of-00008.parquet", "before-seal:grow", "after-seal:grow",
    "before-rename:rewards.npy", "after-shard:rewards-00001-of-00008.parquet", "before-seal:annotate",
    "after-seal:annotate", "before-rename:summary.json",
    "before-rename:improve.json", "before-rename:fit.json", "before-seal:improve", "after-seal:improve",
    "before-rename:index.html",
]  # fmt: skip
# Kills at no place in particular: so many seconds after the program said this.
TIMED_KILLS = [
    ("step 1 of 16", 0.5), ("step 2 of 16", 1.0), ("policy/bc: step 100", 0.05), ("step 3 of 16", 2.0),
    ("reward/model: step 60", 0.02), ("step 5 of 16", 0.7), ("step 7 of 16", 3.0),
    ("policy/g1_i1: step 20", 0.02), ("step 11 of 16", 1.5), ("policy/g2_i2: step 20", 0.01),
]  # fmt: skip


def killed_at(point: str, run_dir: Path, corpus: Path) -> bool:
    """Runs until a failpoint kills; False where the run ends before it comes to that point."""
    done = tiny.tiny("rest", run_dir, corpus, env={"REST_JAX_FAILPOINT": point})
    assert done.returncode in (-signal.SIGKILL, 0), done.stderr
    return done.returncode != 0


def killed_after(text: str, seconds: float, run_dir: Path, corpus: Path) -> bool:
    """Kills a run some time after it said something; False where it ends without having said it."""
    arguments = tiny.command("rest", f"--gin_file={tiny.GIN_FILE}", *tiny.bindings(run_dir, corpus))
    said = run_dir.parent / "said.txt"
    with (
        open(said, "w") as handle,
        subprocess.Popen(
            arguments, cwd=tiny.ROOT, env=tiny.environment(), stdout=subprocess.DEVNULL, stderr=handle
        ) as process,
    ):
        while process.poll() is None and text not in said.read_text():
            time.sleep(0.01)
        time.sleep(seconds)
        process.kill()
    assert process.returncode in (-signal.SIGKILL, 0), said.read_text()
    return process.returncode != 0


def assert_same_runs(killed: Path, whole: Path) -> None:
    """The same table, the same sealed folders with the same bytes, the same ledger but for times."""

    def entries(run_dir: Path) -> list[tuple[str, str, str]]:
        return [(e["step"], e["identity"], e["digest"]) for e in read_ledger(run_dir)]

    assert tiny.steps_of(killed) == tiny.steps_of(whole)
    assert tiny.seals(killed) == tiny.seals(whole)
    assert entries(killed) == entries(whole)


@pytest.fixture(scope="module")
def corpus(finished_run) -> Path:
    return finished_run.parent / "pairs.tsv"


# A run that nothing disturbs.


def test_the_plan_is_algorithm_1(tmp_path):
    from tests.phases.places import workspace

    assert [str(step) for step in plan(workspace(tmp_path).experiment)] == [
        "vocab", "pretrain", "reward_model", "evaluate bc",
        "grow g1", "annotate g1", "improve g1_i1", "evaluate g1_i1", "improve g1_i2", "evaluate g1_i2",
        "grow g2", "annotate g2", "improve g2_i1", "evaluate g2_i1", "improve g2_i2", "evaluate g2_i2",
    ]  # fmt: skip


def test_a_run_leaves_what_the_table_of_steps_says(finished_run):
    assert [entry["step"] for entry in read_ledger(finished_run)] == STEPS
    for step in STEPS:
        files.verify_seal(finished_run / step)
    names = [(step["name"], step["grow"], step["improve"]) for step in tiny.steps_of(finished_run)]
    assert names == [
        ("BC G=0 I=0", 0, 0), ("BC G=1 I=1", 1, 1), ("BC G=1 I=2", 1, 2), ("BC G=2 I=1", 2, 1),
        ("BC G=2 I=2", 2, 2),
    ]  # fmt: skip


def test_the_summary_has_what_is_promised(finished_run):
    for step in tiny.steps_of(finished_run):
        for metric in ("reward", "bleu", "chrf"):
            low, high = step[metric]["ci95"]
            assert low <= step[metric]["mean"] <= high
            assert step[metric]["signature"]
        if step["grow"]:
            assert step["kept"] > 0 and step["samples"] == 240
            assert 0 < step["threshold"] < 1
        else:
            assert (step["kept"], step["samples"], step["threshold"]) == (None, None, None)


def test_thresholds_rise_and_keep_less_and_the_learning_rate_falls(finished_run):
    names = [PolicyName(g, i) for g in (1, 2) for i in (1, 2)]
    stories = [json.loads((finished_run / "policy" / n.folder / "improve.json").read_text()) for n in names]
    for first, second in (stories[:2], stories[2:]):
        assert first["threshold"] < second["threshold"]
        assert first["kept_samples"] > second["kept_samples"] > 0
        assert first["kept_dataset"] > second["kept_dataset"] > 0
    assert [story["started_from"] for story in stories] == ["bc", "g1_i1", "g1_i2", "g2_i1"]
    rates = [story["learning_rate"] for story in stories]
    assert rates == [rates[0] * 0.5**k for k in range(4)]


def test_an_improve_step_never_ends_below_its_start_on_the_validation_set(finished_run):
    for path in finished_run.glob("policy/g*/fit.json"):
        fit = json.loads(path.read_text())
        rewards = {row["step"]: row["valid/reward"] for row in fit["history"]}
        assert fit["best_value"] == max(rewards.values()) >= rewards[0]


def test_the_program_prints_the_table_and_where_the_report_is(finished_run):
    said = (finished_run.parent / "stdout.txt").read_text()
    assert "G=2 I=2" in said
    assert f"report: {finished_run / 'report' / 'index.html'}" in said
    assert (finished_run / "report" / "index.html").stat().st_size > 10_000


def test_nothing_but_the_run_is_left_behind(finished_run):
    assert not list(finished_run.rglob("*.tmp"))
    assert not list(finished_run.rglob("checkpoints"))


# Runs that are disturbed.


def test_killed_and_started_again_a_run_ends_the_same(finished_run, corpus, tmp_path):
    run_dir = tmp_path / "run"
    for point in FEW_KILLS:
        assert killed_at(point, run_dir, corpus), f"no run came to {point}"
    done = tiny.tiny("rest", run_dir, corpus)
    assert done.returncode == 0, done.stderr
    assert_same_runs(run_dir, finished_run)


@pytest.mark.slow
def test_killed_at_every_commit_a_run_ends_the_same(finished_run, corpus, tmp_path):
    run_dir = tmp_path / "run"
    for point in MORE_KILLS:
        assert killed_at(point, run_dir, corpus), f"no run came to {point}"
    assert tiny.tiny("rest", run_dir, corpus).returncode == 0
    assert_same_runs(run_dir, finished_run)


@pytest.mark.slow
def test_killed_anywhere_a_run_ends_the_same(finished_run, corpus, tmp_path):
    run_dir = tmp_path / "run"
    kills = [killed_after(text, seconds, run_dir, corpus) for text, seconds in TIMED_KILLS]
    assert sum(kills) >= len(kills) - 2, "the kills came too late"
    assert tiny.tiny("rest", run_dir, corpus).returncode == 0
    assert_same_runs(run_dir, finished_run)


def test_a_finished_run_does_nothing_more(copied_run, corpus):
    before = {path: path.stat().st_mtime_ns for path in copied_run.rglob("SEAL.json")}
    seals, ledger = tiny.seals(copied_run), (copied_run / "ledger.jsonl").read_bytes()
    metrics = (copied_run / "metrics.jsonl").read_bytes()
    done = tiny.tiny("rest", copied_run, corpus)
    assert done.returncode == 0, done.stderr
    assert {path: path.stat().st_mtime_ns for path in copied_run.rglob("SEAL.json")} == before
    assert (tiny.seals(copied_run), (copied_run / "ledger.jsonl").read_bytes()) == (seals, ledger)
    assert (copied_run / "metrics.jsonl").read_bytes() == metrics
    assert "G=2 I=2" in done.stdout


def test_another_seed_in_the_same_folder_is_refused(copied_run, corpus):
    seals = tiny.seals(copied_run)
    done = tiny.tiny("rest", copied_run, corpus, "--gin.SEED=1")
    assert done.returncode == 78
    line = done.stderr.strip().splitlines()[-1]
    assert "was made with another configuration or other inputs; differing: seed" in line
    assert "new MODEL_DIR" in line
    assert tiny.seals(copied_run) == seals


def test_a_damaged_shard_is_found_and_made_anew(copied_run, corpus):
    path = copied_run / "grow" / "g1" / "samples-00003-of-00008.parquet"
    whole, seals = path.read_bytes(), tiny.seals(copied_run)
    path.write_bytes(whole[:200] + bytes([whole[200] ^ 1]) + whole[201:])
    done = tiny.tiny("rest", copied_run, corpus)
    assert done.returncode == 0, done.stderr
    assert f"{path.name} has other bytes than its seal states" in done.stderr
    assert path.read_bytes() == whole
    assert tiny.seals(copied_run) == seals


def test_a_damaged_policy_is_found_and_named(copied_run, corpus):
    path = copied_run / "policy" / "g1_i1" / "params" / "token_embedder.embedding" / "0.0"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    done = tiny.tiny("rest", copied_run, corpus)
    assert done.returncode == 77
    line = done.stderr.strip().splitlines()[-1]
    assert "token_embedder.embedding/0.0 has other bytes" in line
    assert "Delete the folder" in line and "improve" in line
