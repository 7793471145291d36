"""Runs side by side: what is listed, what is refused, and which orderings are found."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from rest_jax import errors, files
from rest_jax.report import comparison, orderings

SOURCES = 40


def put_evaluation(run: Path, policy: str, name: str, rewards_S: np.ndarray, **identity) -> None:
    """An evaluation as the evaluate phase leaves it."""
    folder = run / "eval" / policy
    folder.mkdir(parents=True)
    parts = name.split()
    grow, improve = (int(parts[1][2:]), int(parts[2][2:])) if len(parts) == 3 else (0, 0)
    files.claim(folder, {"evaluation": {"split": "test"}, "reward": "r", "policy": name, **identity})
    np.save(folder / "source_rewards.npy", rewards_S)
    estimate = {"mean": float(np.nanmean(rewards_S)), "ci95": [0.1, 0.2], "signature": "s"}
    content = {"name": name, "policy": policy, "grow": grow, "improve": improve, "loss": parts[0], "kept": 7}
    (folder / "result.json").write_text(json.dumps({**content, "reward": estimate, "bleu": estimate}))
    files.write_seal(folder, "evaluate", "identity")


def rewards(mean: float, seed: int = 0) -> np.ndarray:
    """Sources differ far more than policies do: only a comparison by source sees the policies."""
    difficulty = np.random.default_rng(7).uniform(-0.3, 0.3, SOURCES)
    return mean + difficulty + np.random.default_rng(seed).normal(0, 0.01, SOURCES)


@pytest.fixture
def runs(tmp_path):
    first, second = tmp_path / "bc", tmp_path / "gold"
    put_evaluation(first, "bc", "BC G=0 I=0", rewards(0.5, 1))
    put_evaluation(first, "g1_i0", "BC G=1 I=0", rewards(0.5, 2))
    put_evaluation(first, "g1_i1", "BC G=1 I=1", rewards(0.55, 3))
    put_evaluation(second, "bc", "BC G=0 I=0", rewards(0.5, 1))
    put_evaluation(second, "g1_i1", "GOLD-s G=1 I=1", rewards(0.6, 4))
    lines = [
        {"step": "grow/g1", "phase": "grow", "facts": {"rows": 320}},
        {"step": "policy/g1_i1", "phase": "improve", "facts": {}},
    ]
    for run in (first, second):
        (run / "ledger.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return first, second


def test_a_policy_that_runs_share_is_listed_once(runs):
    found = comparison.compare(runs)
    names = [row["name"] for row in found.rows]
    assert names == ["BC G=0 I=0", "BC G=1 I=0", "BC G=1 I=1", "GOLD-s G=1 I=1"]
    assert [row["run"] for row in found.rows] == ["bc", "bc", "bc", "gold"]
    assert [row["sampled"] for row in found.rows] == [0, 320, 320, 320]


def test_orderings_are_judged_source_by_source(runs):
    """0.55 is above 0.5 in spite of sources that differ by 0.6; GOLD above BC reverses what the paper has."""
    outcomes = {(f.ordering.better, f.ordering.worse): f.outcome for f in comparison.compare(runs).findings}
    assert outcomes == {
        ("BC G=1 I=0", "BC G=0 I=0"): "is not shown",
        ("BC G=1 I=1", "BC G=1 I=0"): "holds",
        ("GOLD-s G=1 I=1", "BC G=0 I=0"): "holds",
        ("BC G=1 I=1", "GOLD-s G=1 I=1"): "is reversed",
    }
    (finding,) = [f for f in comparison.compare(runs).findings if f.outcome == "is reversed"]
    assert finding.difference == pytest.approx(np.mean(rewards(0.55, 3) - rewards(0.6, 4)))
    assert finding.ci95[0] < finding.difference < finding.ci95[1] < 0


def test_a_source_without_a_reward_is_left_out():
    left, right = np.array([0.5, np.nan, 0.7]), np.array([0.4, 0.1, 0.6])
    (found,) = orderings.check([orderings.Ordering("a", "b", "x")], {"a": left, "b": right})
    assert found.difference == pytest.approx(0.1)
    assert found.outcome == "holds"


def test_the_orderings_of_the_paper_between_two_grow_steps_and_ppo():
    names = ["BC G=0 I=0", "BC G=1 I=1", "BC G=1 I=2", "BC G=2 I=1", "BC G=2 I=2", "PPO"]
    names += ["BVMPO G=1 I=2", "BVE G=1 I=2"]
    found = {(o.better, o.worse): o.source for o in orderings.paper_orderings(names)}
    assert found == {
        ("BC G=1 I=2", "BC G=1 I=1"): "Fig. 3",
        ("BC G=2 I=2", "BC G=2 I=1"): "Fig. 3",
        ("BC G=2 I=2", "BC G=1 I=2"): "Table 1, Fig. 4",
        ("BC G=1 I=2", "PPO"): "Table 1",
        ("BC G=2 I=2", "PPO"): "Table 1",
        ("PPO", "BC G=0 I=0"): "Table 1",
        ("BVMPO G=1 I=2", "BC G=0 I=0"): "Fig. 5",
        ("BC G=1 I=2", "BVMPO G=1 I=2"): "Fig. 5, 13, 14",
        ("BC G=1 I=2", "BVE G=1 I=2"): "App. A.2",  # which has nothing of BVE being above its start
    }


def test_runs_that_were_measured_otherwise_are_refused(runs, tmp_path):
    other = tmp_path / "other"
    put_evaluation(other, "g1_i1", "OAC G=1 I=1", rewards(0.5), reward="another")
    with pytest.raises(
        errors.DataError, match=r"other/eval/g1_i1 was measured otherwise .* differing: reward\."
    ):
        comparison.compare([*runs, other])


def test_policies_of_one_name_that_differ_have_their_run_s_name(runs, tmp_path):
    other = tmp_path / "percentile"
    put_evaluation(other, "bc", "BC G=0 I=0", rewards(0.5, 1))
    put_evaluation(other, "g1_i1", "BC G=1 I=1", rewards(0.58, 9))
    found = comparison.compare([*runs, other])
    assert [row["name"] for row in found.rows][-1] == "BC G=1 I=1 (percentile)"
    assert len(found.rows) == 5
    assert len(found.findings) == 4  # the same as without it


def test_the_tables_are_written_and_say_what_was_found(runs, tmp_path):
    path = comparison.write(comparison.compare(runs), tmp_path / "out")
    text = path.read_text(encoding="utf-8")
    assert "| BC G=1 I=1 > BC G=1 I=0 | Fig. 3 | holds | 0.0" in text
    assert text.count("\n| BC G=") == 3 + 3  # three policies, three claims
    written = json.loads((tmp_path / "out" / "comparison.json").read_text(encoding="utf-8"))
    assert [row["name"] for row in written["policies"]][-1] == "GOLD-s G=1 I=1"
    assert len(written["orderings"]) == 4
