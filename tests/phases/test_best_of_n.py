"""The verbs sample and best_of_n on the finished tiny run: stores, resumption, and numbers counted again."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

from rest_jax import errors, files
from rest_jax.data.candidates import CandidateReader
from rest_jax.metrics.corpus import corpus_metrics
from rest_jax.phases import sample
from rest_jax.phases.experiment import BestOfNConfig
from rest_jax.phases.lineage import BC, PolicyName
from rest_jax.rewards.overlap import SentenceChrf
from tests import tiny
from tests.phases import places

FEW = (
    "--gin.BestOfNConfig.samples_per_source=6", "--gin.BestOfNConfig.sources=12",
    "--gin.BestOfNConfig.shards=3", "--gin.BestOfNConfig.resamples=50",
    '--gin.BestOfNConfig.select_by=("reward", "chrf")',
)  # fmt: skip


@pytest.fixture(scope="module")
def run_dir(finished_run, tmp_path_factory) -> Path:
    """The finished run with the best of n of two policies, in a report drawn anew."""
    folder = tmp_path_factory.mktemp("best") / "run"
    shutil.copytree(finished_run, folder)
    for policy in ("bc", "g1_i2"):
        done = tiny.tiny("best_of_n", folder, finished_run.parent / "pairs.tsv", f"--policy={policy}", *FEW)
        assert done.returncode == 0, done.stderr
        assert "best by reward" in done.stdout and "MBR by chrF" in done.stdout
    assert tiny.program("report", str(folder)).returncode == 0
    return folder


def result(run_dir: Path, policy: str = "bc") -> dict:
    return json.loads((run_dir / "best_of_n" / f"{policy}_test" / "result.json").read_text(encoding="utf-8"))


def test_the_store_is_one_like_grows(run_dir):
    for policy in ("bc", "g1_i2"):
        folder = run_dir / "samples" / f"{policy}_test"
        facts = files.verify_seal(folder).facts
        assert (facts["policy"], facts["rows"], facts["sources"]) == (policy, 72, 12)
        reader = CandidateReader(folder, ["learned", "chrf", "bleu"])
        assert len(reader.shards) == 3
        batches = list(reader.batches(whole=True))
        ids = np.concatenate([batch.example_id for batch in batches])
        assert (np.unique(ids, return_counts=True)[1] == 6).all() and (np.diff(ids) >= 0).all()
        for kind in ("learned", "chrf", "bleu"):
            rewards = np.concatenate([batch.rewards[kind] for batch in batches])
            assert ((rewards >= 0) & (rewards <= 1)).all() and np.ptp(rewards) > 0


def test_rewards_against_references_are_those_of_the_sources_own(run_dir):
    corpus = dict(tiny.pairs())
    for batch in CandidateReader(run_dir / "samples" / "bc_test", ["chrf"]).batches(("source", "text")):
        samples = batch.samples()
        references = [corpus[source] for source in samples.source]
        scores = SentenceChrf().score(samples.source, samples.text, references)
        np.testing.assert_array_equal(batch.rewards["chrf"], scores)


def test_policies_draw_with_the_same_random_numbers_and_others_than_grow_and_evaluate(run_dir):
    place = places.workspace(run_dir.parent, "BestOfNConfig.samples_per_source=6", "BestOfNConfig.sources=12")
    stores = [sample.sample_store(place, name) for name in (BC, PolicyName(1, 2))]
    assert {(store.stream.name, store.round_index) for store in stores} == {("SAMPLE", 0)}
    assert stores[0].stream == 7  # part of every store's identity


def test_a_killed_store_is_made_whole_with_the_same_bytes(run_dir, finished_run, tmp_path):
    again = tmp_path / "run"
    shutil.copytree(finished_run, again)
    corpus = finished_run.parent / "pairs.tsv"
    for point in ("after-shard:samples-00001-of-00003.parquet", "after-shard:rewards-00000-of-00003.parquet"):
        done = tiny.tiny("sample", again, corpus, *FEW, env={"REST_JAX_FAILPOINT": point})
        assert done.returncode == -signal.SIGKILL, done.stderr
    done = tiny.tiny("sample", again, corpus, *FEW)
    assert done.returncode == 0, done.stderr
    found, whole = tiny.seals(again), tiny.seals(run_dir)
    names = [name for name in found if name.startswith("samples/")]
    assert len(names) == 4 and all(found[name] == whole[name] for name in names)


def test_jobs_share_the_samples_and_a_whole_run_seals_the_same(run_dir, finished_run, tmp_path):
    again = tmp_path / "run"
    shutil.copytree(finished_run, again)
    corpus = finished_run.parent / "pairs.tsv"
    done = tiny.tiny("sample", again, corpus, *FEW, '--gin.SHARD="2/2"')
    assert done.returncode == 0 and "rest-jax sample" in done.stderr, done.stderr
    assert files.read_seal(again / "samples" / "bc_test") is None
    assert tiny.tiny("sample", again, corpus, *FEW).returncode == 0
    assert tiny.seals(again)["samples/bc_test"] == tiny.seals(run_dir)["samples/bc_test"]


def test_the_table_is_that_of_the_samples(run_dir):
    """n = 1 is the mean of all samples, n = N the best of each source."""
    found = result(run_dir)
    reader = CandidateReader(run_dir / "samples" / "bc_test", ["learned", "chrf", "bleu"])
    batches = list(reader.batches(("truncated",), whole=True))
    rewards, chrf = (
        np.concatenate([batch.rewards[kind] for batch in batches]).reshape(12, 6)
        for kind in ("learned", "chrf")
    )
    usable = ~np.concatenate([batch.samples().truncated for batch in batches]).reshape(12, 6)
    assert found["not_eligible"] == int((~usable).sum())
    by_reward, by_chrf, by_agreement = found["methods"]
    assert [m["method"] for m in found["methods"]] == ["best_of_n", "best_of_n", "mbr"]
    assert [row["n"] for row in by_reward["rows"]] == [1, 2, 5, 6]
    for method in found["methods"]:  # whatever chooses, one of one is any sample
        assert method["rows"][0]["reward"]["mean"] == pytest.approx(rewards.mean())
        assert method["rows"][0]["chrf"]["mean"] == pytest.approx(chrf.mean())
    best = np.where(usable, rewards, -1).argmax(axis=1)
    last = by_reward["rows"][-1]
    assert last["reward"]["mean"] == pytest.approx(rewards[np.arange(12), best].mean())
    assert by_chrf["rows"][-1]["chrf"]["mean"] == pytest.approx(np.where(usable, chrf, 0).max(axis=1).mean())
    means = [row["reward"]["mean"] for row in by_reward["rows"]]
    assert usable.any(axis=1).all() and means[0] < means[-1]
    for row in by_reward["rows"]:
        for key in ("reward", "chrf", "bleu", "corpus_chrf", "corpus_bleu"):
            assert row[key]["ci95"][0] <= row[key]["mean"] <= row[key]["ci95"][1] and row[key]["signature"]
    assert by_agreement["by"] == "chrf" and by_agreement["signature"].startswith("pairwise_chrf|")


def test_corpus_metrics_are_of_what_is_chosen_from_the_first_n(run_dir):
    reader = CandidateReader(run_dir / "samples" / "bc_test", ["learned"])
    corpus = dict(tiny.pairs())
    first: dict[int, tuple[str, str]] = {}
    for batch in reader.batches(("source", "text")):
        samples = batch.samples()
        for key, number, source, text in zip(
            samples.example_id.tolist(), samples.sample.tolist(), samples.source, samples.text, strict=True
        ):
            if number == 0:
                first[key] = text, corpus[source]
    texts, targets = zip(*first.values(), strict=True)
    expected = corpus_metrics(texts, targets, "de", 0, 50)
    for method in result(run_dir)["methods"]:
        assert method["rows"][0]["corpus_chrf"]["mean"] == pytest.approx(expected["chrf"]["mean"])
        assert method["rows"][0]["corpus_bleu"]["mean"] == pytest.approx(expected["bleu"]["mean"])


def test_a_second_call_changes_nothing_and_other_counts_keep_the_samples(run_dir, finished_run, tmp_path):
    again = tmp_path / "run"
    shutil.copytree(run_dir, again)
    corpus = finished_run.parent / "pairs.tsv"
    before = tiny.seals(again)
    assert tiny.tiny("best_of_n", again, corpus, *FEW).returncode == 0
    assert tiny.seals(again) == before
    shutil.rmtree(again / "best_of_n" / "bc_test")
    done = tiny.tiny("best_of_n", again, corpus, *FEW, "--gin.BestOfNConfig.counts=(3,)")
    assert done.returncode == 0, done.stderr
    assert [row["n"] for row in result(again)["methods"][0]["rows"]] == [3]
    assert tiny.seals(again)["samples/bc_test"] == before["samples/bc_test"]


def test_the_report_shows_both_policies_in_one_chart(run_dir):
    page = (run_dir / "report" / "index.html").read_text(encoding="utf-8")
    assert 'id="best-of-n"' in page and "chart-best-of-n-held-out" in page
    summary = json.loads((run_dir / "report" / "summary.json").read_text(encoding="utf-8"))
    assert [(r["grow"], r["improve"], r["split"]) for r in summary["best_of_n"]] == [
        (0, 0, "test"),
        (1, 2, "test"),
    ]


# Settings.


@pytest.mark.parametrize(
    "total,numbers",
    [(200, (1, 2, 5, 10, 20, 50, 100, 200)), (6, (1, 2, 5, 6)), (1, (1,)), (10, (1, 2, 5, 10))],
)
def test_the_numbers_of_the_table(total, numbers):
    assert BestOfNConfig(samples_per_source=total).numbers == numbers


@pytest.mark.parametrize("counts", [(), (2, 1), (0, 1), (1, 1), (1, 7)])
def test_counts_that_cannot_be_are_refused(counts):
    with pytest.raises(errors.ConfigError, match="counts are"):
        BestOfNConfig(samples_per_source=6, counts=counts)


def test_nothing_to_choose_by_is_refused():
    with pytest.raises(errors.ConfigError, match="no reward is named"):
        BestOfNConfig(select_by=())
    with pytest.raises(errors.ConfigError, match="samples_per_source is 0"):
        BestOfNConfig(samples_per_source=0)
