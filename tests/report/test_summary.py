from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from rest_jax.report import build_report, steps_table
from rest_jax.report.run_files import read_run
from rest_jax.report.summary import compare_with_baseline, divergence_sentence, divergences
from tests.report.synthetic_run import build_run, estimate, evaluation, write_json


def two_steps(folder, reward, bleu=21.0, chrf=43.0):
    write_json(folder / "eval/bc.json", evaluation(0, 0, 0.6, 21.0, 43.0))
    write_json(folder / "eval/g1_i1.json", evaluation(1, 1, reward, bleu, chrf))
    return read_run(folder)


@pytest.mark.parametrize(
    ("reward", "disjoint", "words"),
    [(0.65, True, "has risen"), (0.55, True, "has fallen"), (0.61, False, "overlap, so no gain")],
)  # each interval reaches 0.0085 to both sides
def test_the_last_step_is_compared_with_bc(tmp_path, reward, disjoint, words):
    verdict = compare_with_baseline(two_steps(tmp_path, reward))
    assert verdict.disjoint is disjoint
    assert verdict.gain == pytest.approx(reward - 0.6)
    assert words in verdict.sentence


def test_intervals_that_touch_are_not_disjoint(tmp_path):
    write_json(
        tmp_path / "eval/bc.json", {**evaluation(0, 0, 0.6, 21, 43), "reward": estimate(0.5, 0.25, "s")}
    )
    write_json(
        tmp_path / "eval/g1_i1.json", {**evaluation(1, 1, 0.6, 21, 43), "reward": estimate(1.0, 0.25, "s")}
    )
    assert compare_with_baseline(read_run(tmp_path)).disjoint is False


def test_divergence_needs_a_risen_reward_and_a_fallen_metric(tmp_path):
    # BC's intervals: BLEU 21 - 1.3, chrF 43 - 1.1
    assert divergences(two_steps(tmp_path, 0.65, bleu=19.8, chrf=42.0)) == []
    assert "At no step" in divergence_sentence(read_run(tmp_path))
    assert divergences(two_steps(tmp_path, 0.55, bleu=10.0, chrf=20.0)) == []
    (found,) = divergences(two_steps(tmp_path, 0.65, bleu=19.6, chrf=42.0))
    assert (found.step, found.metrics) == ("BC G=1 I=1", ("bleu",))
    assert "BC G=1 I=1 (BLEU)" in divergence_sentence(read_run(tmp_path))


def test_steps_are_in_the_order_of_the_loop(tmp_path):
    for grow, improve in ((2, 1), (10, 1), (1, 2), (0, 0), (1, 10)):
        write_json(tmp_path / f"eval/g{grow}_i{improve}.json", evaluation_without_filter(grow, improve))
    found = [(e["grow"], e["improve"]) for e in read_run(tmp_path).evaluations]
    assert found == [(0, 0), (1, 2), (1, 10), (2, 1), (10, 1)]


def evaluation_without_filter(grow, improve):
    return {**evaluation(0, 0, 0.6, 21.0, 43.0), "grow": grow, "improve": improve}


def test_the_terminals_table_has_all_steps_and_the_verdict(tmp_path):
    stream = io.StringIO()
    Console(file=stream, width=120).print(steps_table(build_run(tmp_path / "run")))
    shown = " ".join(stream.getvalue().split())
    for words in ("BC G=0 I=0", "BC G=2 I=3", "0.640 [0.6", "19.4 [18.1, 20.7]", "τ"):
        assert words in shown
    assert "the 95 % intervals are disjoint, the reward has risen" in shown
    assert "Reward and overlap diverge" in shown


def test_resumed_and_torn_metrics_are_read_once(tmp_path):
    two_steps(tmp_path, 0.65)
    lines = [{"time": "t", "phase": "policy/bc", "step": s, "metrics": {"train/loss": v, "bad": None}}
             for s, v in ((20, 3.0), (40, 9.0), (40, 2.0))]  # fmt: skip
    text = "\n".join(json.dumps(line) for line in lines) + '\n{"time": "t", "pha'
    (tmp_path / "metrics.jsonl").write_text(text, encoding="utf-8")
    write_json(tmp_path / "policy/bc/fit.json", {"history": [{"step": 40, "train/loss": 7.0}]})
    write_json(
        tmp_path / "reward/model/fit.json", {"history": [{"step": 5, "valid/loss": 2.5, "valid/mse": None}]}
    )
    curves = read_run(tmp_path).curves
    loss = curves["policy/bc"]["train/loss"]
    assert (loss.steps, loss.values) == ([20, 40], [3.0, 2.0])
    assert "bad" not in curves["policy/bc"]
    assert curves["reward/model"]["valid/loss"].values == [2.5]  # which only fit.json has
    assert "valid/mse" not in curves["reward/model"]


def test_the_mesh_is_told_in_numbers(tmp_path):
    """The run's configuration gives one axis through a macro."""
    summary = json.loads(build_report(build_run(tmp_path / "run")).summary_json.read_text())
    assert summary["mesh"] == {"data": "-1", "model": "1"}


def rival(reward: float) -> dict:
    return {**evaluation(0, 0, reward, 20.0, 42.0), "name": "PPO", "loss": "PPO"}


def test_what_rest_is_compared_with_is_neither_its_base_nor_its_last_step(tmp_path):
    write_json(tmp_path / "eval/ppo.json", rival(0.9))
    run = two_steps(tmp_path, 0.65)
    assert [row["name"] for row in run.evaluations] == ["BC G=0 I=0", "BC G=1 I=1", "PPO"]
    assert compare_with_baseline(run).step == "BC G=1 I=1"


def test_without_a_step_of_rest_the_rival_is_compared_with_bc(tmp_path):
    write_json(tmp_path / "eval/a.json", rival(0.9))
    write_json(tmp_path / "eval/bc.json", {**evaluation(0, 0, 0.6, 21.0, 43.0), "name": "V-MPO G=0 I=0"})
    verdict = compare_with_baseline(read_run(tmp_path))
    assert (verdict.step, verdict.disjoint) == ("PPO", True)
    assert verdict.gain == pytest.approx(0.3)
