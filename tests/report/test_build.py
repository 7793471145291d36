from __future__ import annotations

import html
import html.parser
import json
import re

import pytest

from rest_jax import errors
from rest_jax.report import build_report
from tests.report.synthetic_run import HOSTILE, build_run, evaluation, write_json

VOID = {"meta", "link", "br", "img", "input", "hr"}
ROW_KEYS = {
    "name", "grow", "improve", "loss", "threshold", "kept", "samples", "reward", "bleu", "chrf",
    "reward_greedy", "bleu_samples", "chrf_samples", "diagnostics",
}  # fmt: skip


class Page(html.parser.HTMLParser):
    """Checks that tags nest, and collects what the tests ask about."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[tuple[str, str, str]] = []
        self.tags: list[str] = []
        self.scripts: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        found = dict(attrs)
        if "id" in found:
            self.ids.append(found["id"])
        self.links += [(tag, key, found[key]) for key in ("src", "href", "data", "poster") if key in found]
        assert not any(key.startswith("on") for key in found)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        (self.scripts if self.open and self.open[-1] == "script" else self.words).append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return build_run(tmp_path_factory.mktemp("runs") / "demo <zh> & en")


@pytest.fixture(scope="module")
def paths(run_dir):
    return build_report(run_dir)


@pytest.fixture(scope="module")
def page(paths):
    return Page(paths.index_html.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def figures(page):
    return json.loads(page.scripts[0])


def test_summary_has_one_row_a_step_with_intervals(paths):
    summary = json.loads(paths.summary_json.read_text(encoding="utf-8"))
    names = [row["name"] for row in summary["steps"]]
    assert names == ["BC G=0 I=0", *(f"BC G={g} I={i}" for g in (1, 2) for i in (1, 2, 3))]
    for row in summary["steps"]:
        assert row.keys() >= ROW_KEYS
        for key in ("reward", "bleu", "chrf"):
            low, high = row[key]["ci95"]
            assert low < row[key]["mean"] < high
            assert row[key]["signature"]
    assert summary["steps"][0]["threshold"] is None
    assert summary["steps"][1]["kept"] < summary["steps"][1]["samples"]


def test_summary_has_the_facts_of_the_run(paths):
    summary = json.loads(paths.summary_json.read_text(encoding="utf-8"))
    assert summary["run"] == "demo <zh> & en"
    assert (summary["source_language"], summary["target_language"]) == ("zh", "en")
    assert summary["seed"] == 7
    assert summary["versions"]["jax"] == "0.10.2"
    assert summary["pairs"] == {"train": 48_300, "rater": 4_000, "valid": 1_000, "test": 1_000}
    assert summary["seconds"]["grow"] == pytest.approx(42.0 + 43.0)
    assert summary["seconds"]["improve"] == pytest.approx(2 * (28.4 + 27.4 + 26.4))
    assert summary["verdict"]["disjoint"] is True
    assert summary["reward_and_overlap_diverge"] == [{"step": "BC G=2 I=3", "metrics": ["bleu", "chrf"]}]
    assert summary["missing"] == []


def test_page_nests_and_loads_nothing(page):
    for tag, key, value in page.links:
        assert value.startswith(("#", "data:")), (tag, key, value)
    assert len(page.ids) == len(set(page.ids))
    assert {value[1:] for tag, _, value in page.links if tag == "a"} <= set(page.ids)
    assert page.tags.count("script") == 3  # the charts, plotly.js once, and the page's own


def test_style_and_own_script_load_nothing(paths):
    text = paths.index_html.read_text(encoding="utf-8")
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL)[1]
    assert "url(" not in style and "@import" not in style
    assert "default-src 'none'" in text


def test_text_of_the_run_is_escaped(paths, page):
    text = paths.index_html.read_text(encoding="utf-8")
    assert HOSTILE not in text
    assert html.escape(HOSTILE) in text
    assert HOSTILE in page.text  # and is read back as it was
    assert "<b>not markup</b>" not in text and "<b>not markup</b>" in page.text
    assert "ReST: demo <zh> & en" in page.text


def test_every_chart_has_its_place_axis_titles_and_a_label(paths, page, figures):
    assert set(figures) <= set(page.ids)
    assert set(figures) == {
        "chart-reward", "chart-overlap", "chart-histogram-1", "chart-histogram-2", "chart-scatter",
        "curve-policy", "curve-reward", "curve-improve-loss", "curve-improve-reward",
    }  # fmt: skip
    text = paths.index_html.read_text(encoding="utf-8")
    for identifier, figure in figures.items():
        axes = [axis for name, axis in figure["layout"].items() if re.match("[xy]axis", name)]
        assert any(axis["title"]["text"] for axis in axes)
        assert figure["layout"]["yaxis"]["title"]["text"]
        assert re.search(rf'id="{identifier}"[^>]*role="img" aria-label="[^"]+"', text)


def test_reward_chart_shows_each_grow_with_error_bars_and_bc(figures):
    figure = figures["chart-reward"]
    assert [trace["name"] for trace in figure["data"]] == ["Grow 1", "Grow 2"]
    for trace in figure["data"]:
        assert trace["x"] == ["I=1", "I=2", "I=3"]
        assert trace["error_y"]["array"] == pytest.approx([0.0085] * 3)
        assert trace["error_y"]["arrayminus"] == pytest.approx([0.0085] * 3)
    band, line = figure["layout"]["shapes"]
    assert (band["y0"], band["y1"]) == pytest.approx((0.5935, 0.6105))
    assert line["y0"] == line["y1"] == pytest.approx(0.602)
    low, high = figure["layout"]["yaxis"]["range"]
    assert low < 0.5935 and high > 0.7375


def test_histogram_shares_and_thresholds(figures, page):
    for name in ("chart-histogram-1", "chart-histogram-2"):
        taus = [shape["x0"] for shape in figures[name]["layout"]["shapes"]]
        assert len(taus) == 3 and taus == sorted(taus)
    samples, dataset = figures["chart-histogram-1"]["data"]
    assert sum(samples["y"]) == pytest.approx(100) and sum(dataset["y"]) == pytest.approx(100)
    assert sum(samples["customdata"]) == 96_000
    assert "38,400" in page.text  # survivors of the 0.6 quantile
    assert "1,260" in page.text  # sources with none


def test_steps_below_bc_are_marked_open(figures):
    symbols = {trace["name"]: trace["marker"]["symbol"] for trace in figures["chart-overlap"]["data"]}
    assert [s.endswith("-open") for s in symbols["chrF"]] == [False] * 6 + [True]
    assert not any(s.endswith("-open") for s in symbols["Reward"])


def test_rater_and_meaning_of_the_reward_are_stated(page):
    assert "The rater was automatic: sentence chrF against references. No human judged" in page.text
    assert "0.710" in page.text  # Spearman
    assert "87.4 %" in page.text and "[84.2, 90.0]" in page.text  # truncated, with Wilson's interval


def test_same_files_give_the_same_bytes(run_dir, paths):
    before = paths.index_html.read_bytes(), paths.summary_json.read_bytes()
    build_report(run_dir)
    assert (paths.index_html.read_bytes(), paths.summary_json.read_bytes()) == before


def test_only_bc_evaluated_gives_a_partial_report(tmp_path):
    write_json(tmp_path / "eval/bc/result.json", evaluation(0, 0, 0.6, 20.0, 40.0))
    paths = build_report(tmp_path)
    summary = json.loads(paths.summary_json.read_text(encoding="utf-8"))
    assert [row["name"] for row in summary["steps"]] == ["BC G=0 I=0"]
    assert summary["verdict"]["disjoint"] is None and summary["seed"] is None
    page = Page(paths.index_html.read_text(encoding="utf-8"))
    assert "This report is partial" in page.text and "not recorded" in page.text
    assert json.loads(page.scripts[0]) == {}


@pytest.mark.parametrize(
    "gone",
    ["grow/g1/summary.json", "grow/g2/summary.json", "reward/model/validation.json", "metrics.jsonl",
     "ledger.jsonl", "config.gin", "eval/bc.json", "eval/g2_i3.json", "data/IDENTITY.json"],
)  # fmt: skip
def test_any_file_may_be_missing(tmp_path, gone):
    run_dir = build_run(tmp_path / "run")
    (run_dir / gone).unlink()
    page = Page(build_report(run_dir).index_html.read_text(encoding="utf-8"))
    if gone in ("eval/bc.json", "eval/g2_i3.json", "ledger.jsonl", "reward/model/validation.json"):
        assert "This report is partial" in page.text


def test_a_bare_evaluation_is_enough(tmp_path):
    bare = {
        "name": "BC G=1 I=1",
        "grow": 1,
        "improve": 1,
        "reward": {"mean": 0.5, "ci95": [0.4, float("nan")]},
    }
    write_json(tmp_path / "eval/g1_i1.json", bare)
    (tmp_path / "policy/g1_i2").mkdir(parents=True)
    summary = json.loads(build_report(tmp_path).summary_json.read_text(encoding="utf-8"))
    assert summary["steps"][0]["bleu"] is None
    assert summary["steps"][0]["reward"] == {"mean": 0.5, "ci95": None}
    assert any("policy/g1_i2 is not evaluated" in note for note in summary["missing"])


def test_folder_without_evaluations_is_refused(tmp_path):
    with pytest.raises(errors.MissingInputError, match="no evaluation in .*Run evaluate"):
        build_report(tmp_path)
    with pytest.raises(errors.MissingInputError, match="no run folder"):
        build_report(tmp_path / "nowhere")


def test_damaged_files_are_named(tmp_path):
    write_json(tmp_path / "eval/bc.json", {"name": "BC G=0 I=0", "grow": 0})
    with pytest.raises(errors.IntegrityError, match=r"bc\.json lacks improve, reward"):
        build_report(tmp_path)
    (tmp_path / "eval/bc.json").write_text("{", encoding="utf-8")
    with pytest.raises(errors.IntegrityError, match=r"bc\.json is not JSON"):
        build_report(tmp_path)
