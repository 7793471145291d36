"""The report of a run: a self-contained page, summary.json and the terminal's table.

Floor 7. It reads a run's files only, so it needs neither the models nor the data that made them.
"""

from rest_jax.report.build import ReportPaths, build_report
from rest_jax.report.summary import steps_table

__all__ = ["ReportPaths", "build_report", "steps_table"]
