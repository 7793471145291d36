"""The results of an evaluation: their schema, and that their numbers are those of the outputs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from rest_jax.phases import evaluate
from tests.phases import places

KEYS = {
    "name", "grow", "improve", "loss", "selection", "selection_value", "threshold", "threshold_quantile",
    "kept", "samples", "split", "sources", "samples_per_source", "reward", "reward_greedy",
    "bleu", "chrf", "bleu_samples", "chrf_samples", "diagnostics", "examples",
}  # fmt: skip
DIAGNOSTICS = {
    "length_ratio", "copy_rate", "empty_rate", "truncated_rate", "distinct_1", "distinct_2",
    "repeated_ngram_rate",
}  # fmt: skip


def result(run: Path, name: str) -> dict:
    return json.loads((run / "eval" / name / "result.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ["bc", "g1_i1", "g2_i2"])
def test_a_result_has_the_promised_schema(finished_run, name):
    found = result(finished_run, name)
    assert set(found) >= KEYS
    for key in ("reward", "reward_greedy", "bleu", "chrf", "bleu_samples", "chrf_samples"):
        number = found[key]
        assert set(number) >= {"mean", "ci95", "signature"}
        assert number["ci95"][0] <= number["mean"] <= number["ci95"][1]
    assert set(found["diagnostics"]) >= DIAGNOSTICS
    assert (found["split"], found["sources"], found["samples_per_source"]) == ("test", 24, 2)


def test_rewards_are_shares_and_bleu_and_chrf_are_out_of_a_hundred(finished_run):
    for name in ("bc", "g2_i2"):
        found = result(finished_run, name)
        assert 0 < found["reward"]["mean"] < 1
        assert 1 < found["chrf"]["mean"] <= 100


def test_the_bc_policy_has_no_threshold_and_an_improved_one_has(finished_run):
    bc, improved = result(finished_run, "bc"), result(finished_run, "g1_i2")
    assert (bc["name"], bc["grow"], bc["improve"], bc["loss"]) == ("BC G=0 I=0", 0, 0, "BC")
    assert [bc[k] for k in ("threshold", "threshold_quantile", "kept", "samples")] == [None] * 4
    story = json.loads((finished_run / "policy" / "g1_i2" / "improve.json").read_text())
    assert improved["name"] == "BC G=1 I=2"
    assert {k: improved[k] for k in ("threshold", "kept", "samples")} == {
        k: story[k] for k in ("threshold", "kept", "samples")
    }
    assert improved["threshold_quantile"] == 0.8


def test_examples_show_sources_with_their_samples_best_first(finished_run):
    examples = result(finished_run, "g1_i1")["examples"]
    assert len(examples) == 2
    corpus = dict(line.split("\t") for line in (finished_run.parent / "pairs.tsv").read_text().splitlines())
    for example in examples:
        assert corpus[example["source"]] == example["reference"]
        rewards = [sample["reward"] for sample in example["samples"]]
        assert len(rewards) == 2 and rewards == sorted(rewards, reverse=True)
        assert 0 < example["greedy_reward"] < 1


def test_missing_rewards_are_null_and_come_last():
    examples = places.made_up(2)
    rewards = np.array([np.nan, 0.5, 0.25, 0.75])
    shown = evaluate._examples(
        5, examples, ["g0", "g1"], np.array([np.nan, 0.1]), ["a", "b", "c", "d"], rewards
    )
    assert [s["greedy_reward"] for s in shown] == [None, 0.1]
    assert [(x["text"], x["reward"]) for x in shown[0]["samples"]] == [("b", 0.5), ("a", None)]
    assert [(x["text"], x["reward"]) for x in shown[1]["samples"]] == [("d", 0.75), ("c", 0.25)]
    json.dumps(shown, allow_nan=False)


def test_the_mean_reward_leaves_out_what_is_missing():
    class Missing:
        """A reward that has no answer for the first of each pair of samples."""

        from rest_jax.rewards.protocol import RewardSpec

        spec = RewardSpec("missing", 0.0, 1.0, "1", False)

        def score(self, sources, hypotheses, references=None):
            return np.array([np.nan, 0.25] * (len(sources) // 2))

        def signature(self):
            return "missing"

    class Vocabulary:
        def decode_batch(self, rows):
            return ["text"] * len(rows)

    class Place:
        vocabulary = Vocabulary()

    class Two:
        num_samples = 2
        tokens = places.made_up(4).tokens.sources

    assert evaluate.mean_reward(Place(), Missing(), places.made_up(2), Two()) == 0.25  # type: ignore[arg-type]
