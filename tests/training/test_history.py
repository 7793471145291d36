from __future__ import annotations

import json
import math

from rest_jax.training.history import best_row, evaluations_since_best, from_json, to_json

NAN, INF = float("nan"), float("inf")


def rows(*values):
    return [{"step": 10 * index, "m": value} for index, value in enumerate(values)]


def test_best_is_the_earliest_of_equals_in_either_direction():
    assert best_row(rows(3.0, 1.0, 1.0, 2.0), "m", "min")["step"] == 10
    assert best_row(rows(1.0, 3.0, 3.0, 2.0), "m", "max")["step"] == 10


def test_what_is_not_finite_or_missing_never_wins():
    assert best_row(rows(NAN, INF, 1.0), "m", "max")["step"] == 20
    assert best_row(rows(-INF, 1.0, NAN), "m", "min")["step"] == 10
    assert best_row(rows(NAN), "m", "min") is None and best_row([], "m", "min") is None
    assert best_row([{"step": 1, "other": 1.0}], "m", "min") is None


def test_waiting_is_counted_from_the_best():
    assert evaluations_since_best(rows(3.0, 1.0, 1.0, 2.0), "m", "min") == 2
    assert evaluations_since_best(rows(NAN, NAN), "m", "min") == 2
    assert evaluations_since_best([], "m", "min") == 0


def test_rows_survive_json():
    row = {"step": 3, "m": 0.1 + 0.2, "n": NAN}
    back = from_json(json.loads(json.dumps(to_json(row), allow_nan=False)))
    assert (back["step"], back["m"]) == (3, 0.1 + 0.2) and math.isnan(back["n"])
