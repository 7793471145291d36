"""The page in a real browser: charts are drawn, nothing is loaded, nothing is complained of."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

from rest_jax.report import build_report
from tests.report.synthetic_run import build_run, evaluation, write_json

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium or Chrome is installed")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions",
    "--enable-logging=stderr", "--virtual-time-budget=10000",
)  # fmt: skip


def browse(page, profile, *flags):
    """The document after its scripts ran, and the lines of the browser's console."""
    command = [CHROMIUM, *FLAGS, *flags, f"--user-data-dir={profile}", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if ":CONSOLE" in line]


@pytest.mark.parametrize("flags", [(), ("--window-size=500,800", "--blink-settings=preferredColorScheme=0")])
def test_all_charts_are_drawn_without_a_complaint(tmp_path, flags):
    paths = build_report(build_run(tmp_path / "run"))
    document, console = browse(paths.index_html, tmp_path / "profile", *flags)
    assert console == []
    places = re.findall(r'<div class="chart[^"]*" id="([^"]+)"', document)
    assert len(places) == 9
    parts = re.split(r'<div class="chart', document)[1:]
    for place, part in zip(places, parts, strict=True):
        assert 'class="main-svg"' in part, f"{place} is empty"
    assert "$blue" not in re.sub(r"<script.*?</script>", "", document, flags=re.DOTALL)
    colour = "rgb(86, 180, 233)" if flags else "rgb(0, 114, 178)"
    assert colour in document  # the palette of the colour scheme


def test_a_partial_page_is_quiet_too(tmp_path):
    write_json(tmp_path / "run/eval/bc.json", evaluation(0, 0, 0.6, 20.0, 40.0))
    document, console = browse(build_report(tmp_path / "run").index_html, tmp_path / "profile")
    assert console == []
    assert "This report is partial" in document
