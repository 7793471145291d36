from __future__ import annotations

import io
import json
import math

import pytest
from tensorboardX.proto.event_pb2 import Event

from rest_jax.training import logbook as logbooks
from rest_jax.training.logbook import Logbook, read_metrics


def test_metrics_are_lines_of_json(tmp_path):
    with Logbook(tmp_path) as book:
        book.log("policy/bc", 3, {"train/loss": 1.5, "train/odd": float("inf")})
        book.log("reward/model", 3, {"train/loss": 0.5})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["phase"] for line in lines] == ["policy/bc", "reward/model"]
    assert lines[0]["metrics"] == {"train/loss": 1.5, "train/odd": None} and lines[0]["time"].endswith(
        "+00:00"
    )
    first = read_metrics(tmp_path)[0]
    assert first["step"] == 3 and math.isnan(first["metrics"]["train/odd"])


def test_tensorboard_has_the_same_numbers(tmp_path):
    with Logbook(tmp_path) as book:
        book.log("policy/bc", 3, {"train/loss": 1.5})
    (events,) = (tmp_path / "tensorboard" / "policy" / "bc").iterdir()
    raw, values = events.read_bytes(), []
    while raw:  # records: length (8 bytes), its checksum (4), data, checksum (4)
        length = int.from_bytes(raw[:8], "little")
        event = Event.FromString(raw[12 : 12 + length])
        values += [(v.tag, v.simple_value, event.step) for v in event.summary.value]
        raw = raw[16 + length :]
    assert values == [("train/loss", 1.5, 3)]


def test_a_torn_line_is_passed_over_and_does_not_spoil_the_next(tmp_path):
    with Logbook(tmp_path) as book:
        book.log("bc", 1, {"a": 1.0})
    with open(tmp_path / "metrics.jsonl", "a") as handle:
        handle.write('{"time": "2026", "phase": "bc", "st')
    assert [line["step"] for line in read_metrics(tmp_path)] == [1]
    with Logbook(tmp_path) as book:
        book.log("bc", 2, {"a": 2.0})
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]


def test_a_step_written_again_keeps_its_last_value(tmp_path):
    with Logbook(tmp_path) as book:
        book.log("bc", 1, {"a": 1.0, "b": 1.0})
        book.log("bc", 2, {"a": 2.0})
        book.log("rm", 1, {"a": 5.0})
        book.log("bc", 1, {"a": 9.0})
    found = [(line["phase"], line["step"], line["metrics"]) for line in read_metrics(tmp_path)]
    assert found == [("bc", 1, {"a": 9.0, "b": 1.0}), ("bc", 2, {"a": 2.0}), ("rm", 1, {"a": 5.0})]


def test_no_run_folder_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Logbook(None, stream=io.StringIO()) as book:
        book.log("bc", 1, {"a": 1.0})
    assert list(tmp_path.iterdir()) == [] and read_metrics(tmp_path) == []


def test_progress_without_a_terminal_is_a_line_now_and_then(monkeypatch):
    clock = iter(range(0, 1000, 4))  # each look at the clock is 4 seconds later
    monkeypatch.setattr(logbooks.time, "monotonic", lambda: next(clock))
    stream = io.StringIO()
    with (
        Logbook(None, stream=stream) as book,
        book.progress("grow", total=12, completed=2, unit="sources") as meter,
    ):
        for _ in range(10):
            meter.advance(note="reward 0.5")
    lines = stream.getvalue().splitlines()
    assert lines[-1].startswith("grow: 12/12 sources (100 %)") and lines[-1].endswith("reward 0.5")
    assert 2 <= len(lines) <= 6


def test_progress_lines_give_rate_and_time_left(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(logbooks.time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    with Logbook(None, stream=stream) as book, book.progress("bc", total=1000, completed=100) as meter:
        now[0] = 20.0
        meter.advance(40)
    assert stream.getvalue().splitlines() == ["bc: 140/1000 steps (14 %), 2/s, 7:10 left"]


def test_progress_in_a_terminal_is_a_bar(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    with Logbook(None, stream=stream) as book, book.progress("bc", total=4) as meter:
        meter.advance(4, note="loss 0.25")
    assert (
        "4/4 steps" in stream.getvalue() and "loss 0.25" in stream.getvalue() and "\x1b[" in stream.getvalue()
    )


def test_markup_in_a_message_is_text():
    stream = io.StringIO()
    Logbook(None, stream=stream).say("bc: [red] [/x] batch (8, 16)")
    assert stream.getvalue() == "bc: [red] [/x] batch (8, 16)\n"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3725, "1:02:05"), (math.inf, "?")]
)
def test_duration(seconds, text):
    assert logbooks.duration(seconds) == text
