from __future__ import annotations

import json

import pytest

from rest_jax.report import charts, markup, numbers
from rest_jax.report.learning import learning_section, thin
from rest_jax.report.reward_model import wilson_interval
from rest_jax.report.run_files import Curve, improve_of, read_run
from tests.report.synthetic_run import build_run


@pytest.mark.parametrize(
    ("seconds", "written"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (9.96, "10 s"), (59.4, "59 s"), (59.6, "1 min 00 s"),
     (192, "3 min 12 s"), (3599.6, "1 h 00 min"), (7500, "2 h 05 min"), (None, "–")],
)  # fmt: skip
def test_durations(seconds, written):
    assert numbers.duration(seconds) == written


def test_numbers_have_sensible_digits():
    assert numbers.estimate({"mean": 0.61049, "ci95": [0.6, 0.62]}) == "0.610 [0.600, 0.620]"
    assert numbers.estimate({"mean": 21.44, "ci95": [20, 23]}, 1) == "21.4 [20.0, 23.0]"
    assert numbers.estimate(None) == "–"
    assert numbers.estimate({"mean": 0.5, "ci95": None}) == "0.500"
    assert numbers.count(1234567) == "1,234,567"
    assert numbers.percent(0.1234) == "12.3 %"


def test_json_in_a_script_cannot_end_it():
    value = {"text": "</script><!-- & \u2028 <b>"}
    written = markup.script_json(value)
    assert not set("<>&\u2028") & set(written)
    assert json.loads(written) == value


def test_labels_of_charts_hold_no_markup():
    assert charts.label('<a href="x">&"b"') == '&lt;a href="x"&gt;&amp;"b"'


def test_asymmetric_intervals_give_asymmetric_bars():
    bars = charts.error_bars([{"mean": 0.5, "ci95": [0.4, 0.8]}, {"mean": 0.5}], "$blue")
    assert bars["array"] == pytest.approx([0.3, 0.0])
    assert bars["arrayminus"] == pytest.approx([0.1, 0.0])


def test_wilson_interval_by_hand():
    low, high = wilson_interval(1.0, 10)  # n / (n + z²), and 1
    assert low == pytest.approx(10 / (10 + 1.959964**2)) and high == pytest.approx(1.0)
    low, high = wilson_interval(0.5, 100)
    assert low + high == pytest.approx(1.0) and low == pytest.approx(0.4038, abs=1e-4)


def test_long_curves_are_thinned_to_the_end():
    curve = Curve(list(range(1, 2001)), [float(step) for step in range(1, 2001)])
    thinned = thin(curve, 600)
    assert len(thinned.steps) <= 600
    assert thinned.steps[-1] == 2000 and thinned.values[-1] == 2000.0
    assert thinned.steps == sorted(thinned.steps)
    assert thin(curve, 2000) is curve


def test_improve_steps_are_known_by_their_folder():
    assert improve_of("policy/g2_i13") == (2, 13)
    assert improve_of("policy/bc") is None and improve_of("reward/model") is None


def test_learning_curves_are_sorted_into_their_charts(tmp_path):
    figures = learning_section(read_run(build_run(tmp_path / "run"))).figures
    names = {key: [trace["name"] for trace in figure["data"]] for key, figure in figures.items()}
    assert names["curve-policy"] == names["curve-reward"] == ["train", "validation"]
    steps = [f"G={g} I={i}" for g in (1, 2) for i in (1, 2, 3)]
    assert names["curve-improve-loss"] == names["curve-improve-reward"] == steps
