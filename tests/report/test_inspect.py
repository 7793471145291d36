"""`inspect`: its counts beside those of the Improve steps, and what it shows beside what was put there."""

from __future__ import annotations

import html
import io
import json
import re
import weakref
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from rest_jax import errors, files, main
from rest_jax.data import candidates, examples
from rest_jax.data.candidate_shard import CandidateShard
from rest_jax.report import inspect_data, inspection
from rest_jax.report.inspect_page import MOST_SAMPLES
from rest_jax.report.inspect_terminal import histogram, plain
from rest_jax.report.inspection import Wanted
from rest_jax.types import EOS_ID, Examples, RaggedTokens, TokenPairs
from tests.report.synthetic_run import HOSTILE
from tests.report.test_browser import CHROMIUM, browse
from tests.report.test_build import Page

FIRST_ID, SOURCES, SHARDS = 10**12, 12, 3
ESCAPES = "\x1b[31mred\x1b[0m [bold]loud[/bold]"


def a_shard(ids: Sequence[int], times: int) -> CandidateShard:
    """`times` samples of each source; the fourth repeats the third, and the first source has hostile ones."""
    count = len(ids) * times
    texts = [f"sample {min(k, 2)} of {i - FIRST_ID}" for i in ids for k in range(times)]
    if ids[0] == FIRST_ID:
        texts[:2] = [HOSTILE, ESCAPES]
    flagged = np.arange(count) % times == 1
    return CandidateShard(
        example_id=np.repeat(np.array(ids, np.int64), times),
        sample=np.tile(np.arange(times, dtype=np.int32), len(ids)),
        source=[
            f"source {i - FIRST_ID}" + (HOSTILE if i == FIRST_ID else "") for i in ids for _ in range(times)
        ],
        text=texts,
        tokens=RaggedTokens.from_lists([[100 + k, EOS_ID] for k in range(count)]),
        log_probs=np.tile(np.array([-1.5, -0.25], np.float32), count),
        tempered_log_probs=np.tile(np.array([-1.0, -0.5], np.float32), count),
        truncated=flagged,
        empty=np.zeros(count, bool),
        copy_of_source=np.zeros(count, bool),
        repeated_ngram=flagged & (np.arange(count) < times),
        round_trip=~flagged,
    )


def rewards_of(shard: CandidateShard, name: str) -> np.ndarray:
    """Rising with the source and the sample; of "other" the other way round, with gaps."""
    rewards = (shard.example_id - FIRST_ID) / SOURCES + shard.sample / 100
    if name == "other":
        rewards = 1 - rewards
        rewards[shard.sample == 2] = np.nan
    return rewards.astype(np.float64)


def put_grow(run_dir: Path, names: Sequence[str] = ("learned",), times: int = 4, seal: bool = True) -> Path:
    """Writes grow/g1 with these rewards."""
    folder = run_dir / "grow" / "g1"
    writer = candidates.CandidateWriter(folder, SHARDS, "grow")
    for index, ids in enumerate(np.array_split(np.arange(FIRST_ID, FIRST_ID + SOURCES), SHARDS)):
        writer.write_shard(index, a_shard(ids.tolist(), times))
    if seal:
        writer.seal()
        for name in names:
            rewarder = candidates.RewardWriter(folder, name, f"{name} v1")
            for index in range(SHARDS):
                shard = rewarder.samples(index)
                rewarder.write_shard(index, shard, rewards_of(shard, name))
            rewarder.seal()
    return folder


def put_threshold(
    run_dir: Path, improve: int, tau: float, drop_truncated: bool = True, name: str = "learned"
):
    """Writes the story of an Improve step, as far as `inspect` reads it."""
    seal = files.read_seal(run_dir / "grow" / "g1" / "rewards" / name)
    folder = run_dir / "policy" / f"g1_i{improve}"
    files.write_json(folder / "improve.json", {"threshold": tau, "threshold_quantile": None})
    identity = {"rewards": seal.digest, "settings": {"drop_truncated": drop_truncated}}
    files.write_json(folder / files.IDENTITY_NAME, identity)


def put_data(run_dir: Path) -> None:
    """Writes the training data that the sources are of."""
    ids = np.arange(FIRST_ID, FIRST_ID + SOURCES)
    tokens = RaggedTokens.from_lists([[5, EOS_ID]] * SOURCES)
    texts = [f"source {k}" for k in range(SOURCES)], [f"reference {k}" for k in range(SOURCES)]
    examples.write_examples(
        run_dir / "data" / "train.parquet", Examples(*texts, TokenPairs(ids, tokens, tokens))
    )


@pytest.fixture
def run_dir(tmp_path) -> Path:
    """A run with two rewards and two thresholds of the first."""
    run_dir = tmp_path / "demo <zh> & en"
    put_grow(run_dir, ("learned", "other"))
    put_threshold(run_dir, 1, 0.5)
    put_threshold(run_dir, 2, 0.75, drop_truncated=False)
    put_data(run_dir)
    return run_dir


def shown(run_dir: Path, width: int = 120, **wanted) -> str:
    """What a terminal would show."""
    console = Console(file=io.StringIO(), width=width)
    for view in inspection.views(run_dir, Wanted(**wanted), width):
        console.print(view, highlight=False)
    return console.file.getvalue()


def page_of(run_dir: Path, **wanted) -> str:
    path = run_dir.parent / "page.html"
    inspection.write_page(run_dir, Wanted(**wanted), path)
    return path.read_text(encoding="utf-8")


# What is counted.


@pytest.mark.parametrize("number", [1, 2])
def test_a_finished_run_is_counted_as_its_own_steps_count_it(finished_run, number):
    folder = finished_run / "grow" / f"g{number}"
    counts = inspect_data.count(number, folder)
    summary = json.loads((folder / "summary.json").read_text())
    assert (counts.samples, counts.sources) == (summary["samples"], summary["sources"])
    assert counts.duplicates == summary["duplicates"]
    for flag, key in (
        ("truncated",) * 2,
        ("empty",) * 2,
        ("repeated_ngram",) * 2,
        ("copy_of_source", "copies_of_source"),
    ):
        assert counts.flags[flag] == summary[key]
    reward = counts.rewards["learned"]
    assert reward.histogram.tolist() == summary["histogram"]["samples"]
    assert reward.mean == pytest.approx(summary["reward"]["mean"])
    assert [threshold.improve for threshold in counts.thresholds] == [1, 2]
    for threshold in counts.thresholds:
        story = json.loads((finished_run / f"policy/g{number}_i{threshold.improve}/improve.json").read_text())
        assert threshold.value == story["threshold"]
        assert threshold.kept == story["kept_samples"]
        assert threshold.sources_with_none == story["sources_with_none"]


def everything(name: str) -> tuple[CandidateShard, np.ndarray]:
    shard = a_shard(list(range(FIRST_ID, FIRST_ID + SOURCES)), 4)
    return shard, rewards_of(shard, name)


def test_survivors_are_those_strictly_above_and_truncated_ones_where_they_are_left_out(run_dir):
    counts = inspect_data.count(1, run_dir / "grow" / "g1")
    shard, rewards = everything("learned")
    for threshold, drops in zip(counts.thresholds, (True, False), strict=True):
        survivors = [
            (int(i), float(r))
            for i, r, cut in zip(shard.example_id, rewards, shard.truncated, strict=True)
            if r > threshold.value and not (drops and cut)
        ]
        assert threshold.kept == len(survivors)
        assert threshold.sources_with_none == SOURCES - len({i for i, _ in survivors})


def put_story(run_dir: Path, improve: int, story: dict, settings: dict) -> None:
    """Writes the story of an Improve step with other filters than one threshold."""
    seal = files.read_seal(run_dir / "grow" / "g1" / "rewards" / "learned")
    folder = run_dir / "policy" / f"g1_i{improve}"
    files.write_json(folder / "improve.json", story)
    files.write_json(folder / files.IDENTITY_NAME, {"rewards": seal.digest, "settings": settings})


def test_a_filter_that_judges_each_source_is_told_as_its_improve_step_told_it(run_dir):
    story = {
        "selection": "percentile", "selection_value": 0.9, "threshold": None, "threshold_quantile": None,
        "kept_samples": 17, "sources_with_none": 3,
    }  # fmt: skip
    put_story(run_dir, 3, story, {"guards": {"__class__": "GuardConfig", "truncated": True, "empty": False}})
    capped = {"selection": "threshold", "threshold": 0.5, "kept_samples": 5, "sources_with_none": 2}
    put_story(run_dir, 4, capped, {"max_per_source": 1})
    same_as_first = {"selection": "threshold", "threshold": 0.5, "kept_samples": 10**6}
    guards = {"__class__": "GuardConfig", "truncated": True, "empty": False, "length_ratio": None}
    put_story(run_dir, 5, same_as_first, {"guards": guards})
    counts = inspect_data.count(1, run_dir / "grow" / "g1")
    first, _, third, fourth, fifth = counts.thresholds
    assert (third.value, third.words, third.kept, third.sources_with_none) == (None, "percentile 0.9", 17, 3)
    assert (fourth.value, fourth.kept, fourth.sources_with_none) == (0.5, 5, 2)
    assert (fifth.kept, fifth.sources_with_none) == (first.kept, first.sources_with_none)
    assert "percentile 0.9" in shown(run_dir)
    assert "percentile 0.9" in page_of(run_dir)


def test_each_reward_is_counted_and_the_one_of_the_thresholds_comes_first(run_dir):
    put_threshold(run_dir, 1, 0.5, name="other")
    put_threshold(run_dir, 2, 0.75, name="other")
    counts = inspect_data.count(1, run_dir / "grow" / "g1")
    assert list(counts.rewards) == ["other", "learned"]
    other = counts.rewards["other"]
    assert (other.count, other.missing, other.outside) == (36, 12, 0)
    present = everything("other")[1]
    present = present[np.isfinite(present)]
    assert (other.low, other.high) == (present.min(), present.max())
    assert other.histogram.tolist() == np.histogram(present, np.linspace(0, 1, 51))[0].tolist()
    assert other.mean == pytest.approx(present.mean())
    assert counts.duplicates == SOURCES
    assert counts.flags == {
        "truncated": 12, "empty": 0, "copy_of_source": 0, "repeated_ngram": 3, "no_round_trip": 12,
    }  # fmt: skip


def test_rewards_outside_the_range_are_counted_apart():
    reward = inspect_data.RewardCounts()
    reward.add(np.array([-0.5, 0.0, 1.0, 3.0, np.nan, np.inf]))
    assert (reward.count, reward.outside, reward.missing) == (4, 2, 2)
    assert (reward.low, reward.high) == (-0.5, 3.0)
    assert reward.histogram.sum() == 2


@pytest.mark.parametrize("wanted", [{}, {"search": "sample"}, {"source": "source 11"}])
def test_no_more_than_the_row_group_at_hand_is_kept(run_dir, monkeypatch, wanted):
    """The one before is still there while the next is read, and none before that."""
    alive: list[weakref.ref] = []
    most = 0
    read = candidates.CandidateReader.batches

    def watched(self, *arguments):
        nonlocal most
        for batch in read(self, *arguments):
            alive.append(weakref.ref(batch))
            most = max(most, sum(reference() is not None for reference in alive))
            yield batch

    monkeypatch.setattr(candidates.CandidateReader, "batches", watched)
    shown(run_dir, **wanted)
    assert len(alive) == SHARDS and most <= 2


@pytest.mark.parametrize("rows", [1, 3, 4, 7])
def test_a_source_whose_samples_lie_in_several_row_groups_is_one(run_dir, monkeypatch, rows):
    whole = shown(run_dir), shown(run_dir, source="source 7"), shown(run_dir, search="of 1")
    read = candidates.CandidateReader.batches

    def cut(self, *arguments):
        for batch in read(self, *arguments):
            for first in range(0, len(batch), rows):
                rewards = {name: values[first : first + rows] for name, values in batch.rewards.items()}
                yield candidates.Batch(batch.table.slice(first, rows), rewards, batch.read)

    monkeypatch.setattr(candidates.CandidateReader, "batches", cut)
    assert (shown(run_dir), shown(run_dir, source="source 7"), shown(run_dir, search="of 1")) == whole


# In a terminal.


def test_a_grow_step_is_shown_in_numbers_and_bars(run_dir):
    said = shown(run_dir)
    assert "48 samples of 12 sources (4 each)" in said
    assert "learned: mean 0.4733, from 0.0000 to 0.9467" in said
    assert "other: " in said and "12 samples have none" in said
    assert re.search(r"I=1 +learned +– +0\.5000 +\d+ ", said) and re.search(r"I=2 +learned +– +0\.7500", said)
    assert re.search(r"truncated +12 +25\.00 %", said)
    assert re.search(r"duplicate +12 +25\.00 %", said)
    assert "τ1" in said and "┊" in said and "█" in said


@pytest.mark.parametrize("cells", [1, 2])
def test_bars_are_as_high_as_their_counts_and_thresholds_stand_where_they_are(cells):
    reward = inspect_data.RewardCounts()
    reward.histogram[10], reward.histogram[11], reward.histogram[40] = 80, 40, 1
    tau = inspect_data.Threshold(3, 0.5, None, "learned", True)
    lines = list(histogram(reward, [tau], cells))
    labels, bars = lines[0], [line[2:].ljust(100) for line in lines[1:9]]
    assert labels.index("τ3") - 2 == 25 * cells
    assert all(line[25 * cells] == "┊" for line in bars)
    column = {place: "".join(line[place * cells] for line in bars) for place in (10, 11, 40, 12)}
    assert column[10] == "█" * 8
    assert column[11] == " " * 4 + "█" * 4
    assert column[40] == " " * 7 + "▁"  # one of many is still seen
    assert column[12] == " " * 8
    assert re.findall(r"\d\.\d", lines[-1]) == ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]


def test_close_thresholds_keep_their_labels():
    taus = [inspect_data.Threshold(i, 0.5 + 0.01 * i, None, "learned", True) for i in range(1, 4)]
    said = "\n".join(histogram(inspect_data.RewardCounts(), taus))
    for i in range(1, 4):
        assert str(i) in said.split("┊")[0]


def test_samples_of_a_source_are_listed_by_reward(run_dir):
    for asked in ("source 7", str(FIRST_ID + 7)):
        said = shown(run_dir, source=asked)
        assert f"{FIRST_ID + 7}  source 7" in said and "reference  reference 7" in said
        rows = re.findall(
            r"^ *(0\.\d{4}) +(0\.\d{4}|–) +-1\.75 +-1\.50 +(\d) +2  (sample \d of 7) *(.*?) *$", said, re.M
        )
        assert [row[2] for row in rows] == ["3", "2", "1", "0"]
        assert rows[0][0] == "0.6133" and rows[1][1] == "–"
        assert rows[2][4] == "truncated, no_round_trip"


def test_text_is_found_in_sources_and_samples(run_dir):
    said = shown(run_dir, search="SAMPLE 2 of 1")
    # of 1, of 10, of 11
    assert "3 sources contain 'SAMPLE 2 of 1' or have samples that do (6 samples)." in said
    assert [str(FIRST_ID + k) in said for k in (1, 10, 11, 2)] == [True, True, True, False]
    assert "source 1" in said and "sample 2 of 10" in said
    few = shown(run_dir, search="source", limit=2)
    assert "12 sources contain" in few and "the first 2 are shown" in few
    assert "0 sources contain 'nowhere'" in shown(run_dir, search="nowhere")


def test_control_codes_and_markup_of_a_sample_have_no_effect(run_dir):
    said = shown(run_dir, width=240, source=str(FIRST_ID))
    assert "\x1b" not in said
    assert r"\x1b[31mred\x1b[0m [bold]loud[/bold]" in said
    assert plain("a\x00\x9b\n译").plain == r"a\x00\x9b\x0a译"


# As a page.


def test_the_page_nests_loads_nothing_and_escapes_what_comes_from_the_run(run_dir):
    text = page_of(run_dir)
    page = Page(text)
    for tag, key, value in page.links:
        assert value.startswith(("#", "data:")), (tag, key, value)
    assert len(page.ids) == len(set(page.ids))
    assert "default-src 'none'" in text
    assert HOSTILE not in text and html.escape(HOSTILE) in text and HOSTILE in page.text
    assert "demo <zh> & en" in page.text
    assert page.tags.count("script") == 3


def test_the_page_has_charts_with_thresholds_tables_and_sources(run_dir):
    page = Page(page_of(run_dir))
    figures = json.loads(page.scripts[0])
    assert set(figures) == {"chart-1-0", "chart-1-1"} <= set(page.ids)
    assert [shape["x0"] for shape in figures["chart-1-0"]["layout"]["shapes"]] == [0.5, 0.75]
    assert figures["chart-1-1"]["layout"]["shapes"] == []
    assert sum(figures["chart-1-0"]["data"][0]["customdata"]) == 48
    words = " ".join(page.text.split())
    assert "12 of 12 sources, evenly spaced by their ids." in words
    for k in range(1, SOURCES):
        assert f"source {k}" in words and f"reference {k}" in words and f"sample 2 of {k}" in words
    assert "truncated, no round trip" in words
    assert "learned: best" in words and "other: best" in words


def test_sources_are_chosen_evenly_and_no_more_than_asked_for(run_dir):
    text = page_of(run_dir, limit=3)
    found = re.findall(r'<th scope="row" class="number" data-value="(\d+)">', text)
    assert found == [str(FIRST_ID), str(FIRST_ID + 5), str(FIRST_ID + 11)]
    text = page_of(run_dir, search="of 1", limit=2)
    assert re.findall(r'<th scope="row" class="number" data-value="(\d+)">', text) == [
        str(FIRST_ID + 1), str(FIRST_ID + 10),
    ]  # fmt: skip


def test_of_very_many_samples_the_best_and_the_worst_are_on_the_page(tmp_path):
    put_grow(tmp_path / "run", times=MOST_SAMPLES + 6)
    text = page_of(tmp_path / "run", source=str(FIRST_ID + 3))
    assert "6 between are left out" in text
    numbers = [
        int(n) for n in re.findall(r'<td class="number">-1\.50</td><td class="number">(\d+)</td>', text)
    ]
    half = MOST_SAMPLES // 2
    assert numbers == [*range(MOST_SAMPLES + 5, half + 5, -1), *range(half - 1, -1, -1)]


# Runs that are not finished.


def test_samples_without_rewards_are_shown_as_they_are(tmp_path):
    run_dir = tmp_path / "run"
    put_grow(run_dir, names=())
    assert "No rewards yet: run annotate" in shown(run_dir)
    said = shown(run_dir, source="source 4")
    assert "sample 2 of 4" in said and "reference" not in said
    page = Page(page_of(run_dir))
    assert json.loads(page.scripts[0]) == {}
    assert "These samples have no rewards yet" in page.text and "sample 2 of 4" in page.text


def test_a_grow_step_at_work_is_named_with_what_it_has(tmp_path):
    run_dir = tmp_path / "run"
    put_grow(run_dir, seal=False)
    (run_dir / "grow" / "g1" / "samples-00001-of-00003.json").unlink()
    assert "Grow 1 is not sealed yet: 2 of 3 shards are committed." in shown(run_dir)
    assert "Grow 1 is not sealed yet: 2 of 3 shards are committed." in Page(page_of(run_dir)).text


def test_a_damaged_shard_is_found(run_dir):
    path = run_dir / "grow" / "g1" / "samples-00001-of-00003.parquet"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(errors.IntegrityError, match="samples-00001-of-00003.parquet has other bytes"):
        shown(run_dir)


# As a verb.


def run_here(capsys, *arguments: str) -> tuple[int, str, str]:
    code = main.main(["inspect", *arguments])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_the_verb_shows_and_writes_nothing_in_the_run(capsys, run_dir, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
    code, out, _ = run_here(capsys, str(run_dir), "--source=source 7")
    assert code == 0 and "sample 2 of 7" in out
    code, out, _ = run_here(capsys, str(run_dir), "--grow_step=1")
    assert code == 0 and "48 samples of 12 sources" in out
    code, out, _ = run_here(capsys, str(run_dir), f"--html={tmp_path / 'out' / 'page.html'}")
    assert code == 0 and f"page: {tmp_path / 'out' / 'page.html'}" in out
    assert (tmp_path / "out" / "page.html").is_file()
    assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")} == before


@pytest.mark.parametrize(
    "flags,code,said",
    [
        (["--source=nowhere"], 66, "has the id or the text 'nowhere'"),
        (["--grow_step=2"], 66, "there is no Grow step 2"),
        (["--limit=0"], 78, "0 sources cannot be shown"),
        (["--source=a", "--search=b"], 78, "exclude each other"),
    ],
)
def test_what_cannot_be_shown_is_one_line(capsys, run_dir, flags, code, said):
    found, out, err = run_here(capsys, str(run_dir), *flags)
    assert found == code and said in err
    assert len(err.strip().splitlines()) == 1


def test_a_folder_without_samples_is_refused(capsys, tmp_path):
    code, _, err = run_here(capsys, str(tmp_path))
    assert code == 66 and "there is no Grow step" in err


# In a browser.


CLICKS = """<script>
const type = (text) => {
  const input = document.querySelector(".finder input");
  input.value = text;
  input.dispatchEvent(new Event("input"));
};
const state = () => [...document.querySelectorAll("table.sources > tbody")].map((body) => [
  Number(body.rows[0].cells[0].dataset.value) - 1000000000000,
  !body.hidden,
  body.querySelector("details").open,
]);
const seen = {};
type("SAMPLE 2 of 7");
seen.found = state().filter((row) => row[1]);
seen.output = document.querySelector(".finder output").value;
type("reference 4");
seen.inReference = state().filter((row) => row[1]);
type("");
const headings = [...document.querySelectorAll("table.sources th button")];
const order = () => state().map((row) => row[0]);
headings[4].click();
seen.bestFirst = order();
headings[4].click();
seen.worstFirst = order();
headings[1].click();
seen.byText = order();
seen.sorted = headings.map((button) => button.parentElement.getAttribute("aria-sort"));
document.title = JSON.stringify(seen);
</script></body>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium or Chrome is installed")
@pytest.mark.parametrize("flags", [(), ("--window-size=500,800", "--blink-settings=preferredColorScheme=0")])
def test_the_page_searches_and_sorts_without_a_complaint(run_dir, tmp_path, flags):
    path = tmp_path / "page.html"
    path.write_text(page_of(run_dir).replace("</body>", CLICKS), encoding="utf-8")
    document, console = browse(path, tmp_path / "profile", *flags)
    assert console == []
    seen = json.loads(html.unescape(re.search(r"<title>(.*?)</title>", document, re.S)[1]))
    assert seen["found"] == [[7, True, True]]
    assert seen["output"] == f"1 of {SOURCES} sources"
    assert seen["inReference"] == [[4, True, False]]
    assert seen["bestFirst"] == list(range(SOURCES - 1, -1, -1))
    assert seen["worstFirst"] == list(range(SOURCES))
    assert seen["byText"] == [9, 8, 7, 6, 5, 4, 3, 2, 11, 10, 1, 0]
    assert seen["sorted"][1] == "descending" and set(seen["sorted"][:1] + seen["sorted"][2:]) == {"none"}
    assert document.count('class="main-svg"') >= 2
