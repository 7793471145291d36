"""Puts the report together: one page that needs nothing but a browser, and the same numbers as JSON.

Floor 7.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from rest_jax import files
from rest_jax.report.best_of_n import best_of_n_section
from rest_jax.report.examples import examples_section
from rest_jax.report.learning import learning_section
from rest_jax.report.overview import overview_section, run_section
from rest_jax.report.page import render
from rest_jax.report.results import diagnostics_section, overlap_section, reward_section, steps_section
from rest_jax.report.reward_model import reward_model_section
from rest_jax.report.run_files import RunFiles, read_run
from rest_jax.report.samples import samples_section
from rest_jax.report.summary import steps_table, summarise

__all__ = ["ReportPaths", "build_report", "render_page", "steps_table"]

_SECTIONS = (
    overview_section,
    steps_section,
    reward_section,
    overlap_section,
    best_of_n_section,
    samples_section,
    reward_model_section,
    learning_section,
    diagnostics_section,
    examples_section,
    run_section,
)


@dataclasses.dataclass(frozen=True)
class ReportPaths:
    """Where the report was written."""

    index_html: Path
    summary_json: Path


def build_report(run_dir: Path) -> ReportPaths:
    """Writes RUN/report/index.html and RUN/report/summary.json from the files of a run.

    The same files give the same bytes. A run that is not finished gives a report that says what is missing.

    Raises:
      MissingInputError: there is no run folder, or no evaluation in it.
      IntegrityError: a file of the run is damaged; the message names it.
      OutputError: the report cannot be written.
    """
    run = read_run(Path(run_dir))
    folder = Path(run_dir) / "report"
    paths = ReportPaths(index_html=folder / "index.html", summary_json=folder / "summary.json")
    files.write_json(paths.summary_json, summarise(run))
    files.write_text(paths.index_html, render_page(run))
    return paths


def render_page(run: RunFiles) -> str:
    """The whole page as HTML, with plotly.js, style and data inside it."""
    sections = [section(run) for section in _SECTIONS if section is not best_of_n_section or run.best_of_n]
    return render(run.name, f"ReST: {run.name}", "Reinforced Self-Training report", sections)
