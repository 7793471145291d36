"""The section on the best of n: its charts, its numbers, and that a run without it has none."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from rest_jax.report import build_report
from rest_jax.report.best_of_n import best_of_n_section, terminal_table
from rest_jax.report.run_files import read_run
from tests.report.synthetic_run import build_run, estimate, write_json
from tests.report.test_build import Page

COUNTS = (1, 5, 200)


def rows(base: float) -> list[dict]:
    return [
        {
            "n": n,
            "reward": estimate(base + 0.001 * n, 0.01, "learned"),
            "chrf": estimate(base - 0.0005 * n, 0.02, "sentence_chrf"),
            "corpus_chrf": estimate(40.0 + n / 100, 1.0, "chrF"),
            "corpus_bleu": estimate(20.0, 1.0, "BLEU"),
        }
        for n in COUNTS
    ]


def result(grow: int, improve: int, base: float, split: str = "test", kind: str = "learned") -> dict:
    """One best_of_n/*/result.json."""
    return {
        "name": f"<b>BC</b> G={grow} I={improve}",
        "grow": grow,
        "improve": improve,
        "split": split,
        "sources": 1000,
        "samples_per_source": 200,
        "temperature": 0.8,
        "choose_truncated": False,
        "reward_kind": kind,
        "metrics": ["reward", "chrf"],
        "distinct_per_source": 81.25,
        "not_eligible": 12,
        "references": {"reward": estimate(0.7, 0.01, "learned")},
        "methods": [
            {"method": "best_of_n", "by": "reward", "signature": "learned", "rows": rows(base)},
            {"method": "mbr", "by": "chrf", "signature": "pairwise_chrf", "rows": rows(base - 0.05)},
        ],
    }


@pytest.fixture
def run_dir(tmp_path):
    folder = build_run(tmp_path / "run")
    write_json(folder / "best_of_n/g10_i1_test/result.json", result(10, 1, 0.7))
    write_json(folder / "best_of_n/bc_test/result.json", result(0, 0, 0.6))
    return folder


def test_all_policies_are_in_one_chart_in_the_order_of_the_loop(run_dir):
    figures = best_of_n_section(read_run(run_dir)).figures
    assert set(figures) == {"chart-best-of-n", "chart-best-of-n-held-out"}
    traces = figures["chart-best-of-n"]["data"]
    assert [(trace["name"].split("I=")[1], trace["marker"]["symbol"]) for trace in traces] == [
        ("0, best by reward", "circle"), ("0, MBR by chrF", "circle-open"),
        ("1, best by reward", "diamond"), ("1, MBR by chrF", "diamond-open"),
    ]  # fmt: skip
    for trace in traces:
        assert trace["x"] == list(COUNTS) and trace["error_y"]["array"] == pytest.approx([0.01] * 3)
    assert traces[0]["y"] == pytest.approx([0.601, 0.605, 0.8])
    assert figures["chart-best-of-n-held-out"]["data"][0]["y"] == pytest.approx([0.5995, 0.5975, 0.5])


def test_the_axis_is_logarithmic_and_the_references_are_a_band(run_dir):
    layout = best_of_n_section(read_run(run_dir)).figures["chart-best-of-n"]["layout"]
    assert layout["xaxis"]["type"] == "log" and layout["xaxis"]["tickvals"] == list(COUNTS)
    assert (layout["shapes"][0]["y0"], layout["shapes"][0]["y1"]) == pytest.approx((0.69, 0.71))
    low, high = layout["yaxis"]["range"]
    assert low < 0.551 - 0.01 and high > 0.9 + 0.01  # all intervals of all policies


def test_the_page_and_the_summary_have_it(run_dir):
    paths = build_report(run_dir)
    text = paths.index_html.read_text(encoding="utf-8")
    page = Page(text)
    assert "best-of-n" in page.ids and "<b>BC</b> G=10" not in text and "<b>BC</b> G=10" in page.text
    assert "0.800 " in page.text and "[0.790, 0.810]" in page.text and "81.2 of them different" in page.text
    assert "read the metrics that did not choose" in page.text
    figures = json.loads(page.scripts[0])
    assert {"chart-best-of-n", "chart-best-of-n-held-out"} <= set(figures) <= set(page.ids)
    assert "&lt;b&gt;" in figures["chart-best-of-n"]["data"][0]["name"]  # plotly would read the tag
    summary = json.loads(paths.summary_json.read_text(encoding="utf-8"))
    assert [found["grow"] for found in summary["best_of_n"]] == [0, 10]
    assert summary["best_of_n"][0]["methods"][0]["rows"][2]["reward"]["mean"] == pytest.approx(0.8)


def test_a_run_without_it_has_no_such_section(tmp_path):
    paths = build_report(build_run(tmp_path / "run"))
    assert "best-of-n" not in Page(paths.index_html.read_text(encoding="utf-8")).ids
    assert json.loads(paths.summary_json.read_text(encoding="utf-8"))["best_of_n"] == []


def test_two_splits_are_told_apart(run_dir):
    write_json(run_dir / "best_of_n/bc_valid/result.json", result(0, 0, 0.6, "valid"))
    traces = best_of_n_section(read_run(run_dir)).figures["chart-best-of-n"]["data"]
    assert "(test)" in traces[0]["name"] and "(valid)" in traces[2]["name"]


def test_what_chose_is_not_shown_as_held_out(run_dir):
    for policy, grow in (("bc", 0), ("g10_i1", 10)):
        name = f"best_of_n/{policy}_test/result.json"
        write_json(run_dir / name, result(grow, int(grow > 0), 0.6, kind="chrf"))
    assert set(best_of_n_section(read_run(run_dir)).figures) == {"chart-best-of-n"}


def test_the_terminals_table_has_a_row_for_each_choice_and_n():
    stream = io.StringIO()
    Console(file=stream, width=160).print(terminal_table(result(0, 0, 0.6)))
    shown = stream.getvalue()
    assert "1000 sources of test" in shown and "read the metrics that did not choose" in " ".join(
        shown.split()
    )
    assert "0.800 [0.790, 0.810]" in shown and "42.0 [41.0, 43.0]" in shown
    assert shown.count("best by reward") == shown.count("MBR by chrF") == 3
