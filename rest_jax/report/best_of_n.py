"""What choosing one of n samples gains, policy by policy: the paper's Figure 6, and MBR decoding beside it.

Floor 7.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from rich.table import Table

from rest_jax.report import charts, numbers
from rest_jax.report.markup import (
    Column,
    Figure,
    Section,
    chart,
    details,
    estimate_cell,
    paragraph,
    table,
    text,
)
from rest_jax.report.run_files import Json, RunFiles

_METRICS = {"reward": "Reward", "chrf": "Sentence chrF", "bleu": "Sentence BLEU"}
_CORPUS = {"corpus_bleu": "BLEU", "corpus_chrf": "chrF"}
_SHORT = {"chrf": "chrF", "bleu": "BLEU", "reward": "reward"}
CAVEAT = (
    "What chooses a sample and also measures it rises with n whatever the translations are worth; read the "
    "metrics that did not choose."
)


class _Series(NamedTuple):
    """One way to choose from one policy."""

    policy: str
    method: Json

    @property
    def chooser(self) -> str:
        """ "best by reward", "MBR by chrF"."""
        by = _SHORT.get(self.method["by"], self.method["by"])
        return f"MBR by {by}" if self.method["method"] == "mbr" else f"best by {by}"


def best_of_n_section(run: RunFiles) -> Section:
    """Charts of the reward and of a held-out metric against n, and the numbers; needs a result at least."""
    series = list(_series(run.best_of_n))
    result = run.best_of_n[0]
    held_out = next((m for m in result["metrics"] if m not in ("reward", result["reward_kind"])), None)
    references = result["references"]["reward"]
    explanation = (
        "Each point is the expected reward of the best of n samples of a source, the mean over all subsets "
        "of n of the samples that were drawn; bars are 95 % intervals over sources. Dashed lines with open "
        "markers choose by agreement among the samples (MBR), without a reward. The band is the reward of "
        f"the references. {CAVEAT}"
    )
    figures = {"chart-best-of-n": _figure(series, "reward", references)}
    body = chart("chart-best-of-n", "Reward of the sample chosen among n", explanation, 420)
    if held_out is not None:
        figures["chart-best-of-n-held-out"] = _figure(series, held_out, None)
        body += chart(
            "chart-best-of-n-held-out",
            f"{_METRICS[held_out]} of the same choices",
            "The same choices measured against the references, which the reward does not see. A curve that "
            "falls while the reward rises has found what the reward model overrates.",
            420,
        )
    return Section("best-of-n", "Best of n", body + _tables(run.best_of_n, series), figures)


def terminal_table(result: Json) -> Table:
    """The table of one policy for a terminal: a row for each way to choose and each n."""
    shown = Table(
        title=f"Best of n: {result['name']}, {result['sources']} sources of {result['split']}",
        title_justify="left",
        caption=CAVEAT,
        caption_justify="left",
    )
    shown.add_column("chosen", no_wrap=True)
    shown.add_column("n", justify="right")
    keys = _keys(result)
    for key in keys:
        shown.add_column(f"{_heading(key)} ↑", justify="right")
    for series in _series([result]):
        for row in series.method["rows"]:
            cells = [numbers.estimate(row.get(key), _digits(key)) for key in keys]
            shown.add_row(series.chooser, str(row["n"]), *cells)
        shown.add_section()
    return shown


def _series(results: Sequence[Json]) -> Iterator[_Series]:
    splits = {result["split"] for result in results}
    for result in results:
        policy = result["name"] + (f" ({result['split']})" if len(splits) > 1 else "")
        for method in result["methods"]:
            yield _Series(policy, method)


def _figure(series: Sequence[_Series], metric: str, band: Mapping[str, Any] | None) -> Figure:
    policies = list(dict.fromkeys(each.policy for each in series))
    several = any(each.chooser != "best by reward" for each in series)
    traces, estimates, every_n = [], [], set()
    for each in series:
        look = charts.style(policies.index(each.policy))
        rows = [row for row in each.method["rows"] if row.get(metric)]
        is_mbr = each.method["method"] == "mbr"
        found = [row[metric] for row in rows]
        estimates += found
        every_n |= {row["n"] for row in rows}
        name = f"{each.policy}, {each.chooser}" if several else each.policy
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": charts.label(name),
                "x": [row["n"] for row in rows],
                "y": [estimate["mean"] for estimate in found],
                "error_y": charts.error_bars(found, look["color"]),
                "marker": {
                    "color": look["color"], "symbol": look["symbol"] + ("-open" if is_mbr else ""), "size": 9,
                    "line": {"width": 2, "color": look["color"]},
                },
                "line": {"color": look["color"], "dash": "dash" if is_mbr else "solid", "width": 1.5},
                "customdata": [
                    [charts.label(name), numbers.estimate(estimate), numbers.count(row["n"])]
                    for row, estimate in zip(rows, found, strict=True)
                ],
                "hovertemplate": "%{customdata[0]}<br>n = %{customdata[2]}: %{customdata[1]}<extra></extra>",
            }
        )  # fmt: skip
    shown = charts.layout("Samples a source, n", _METRICS[metric])
    ticks = sorted(every_n)
    shown["xaxis"] |= {
        "type": "log",
        "tickmode": "array",
        "tickvals": ticks,
        "ticktext": list(map(str, ticks)),
    }
    if band is not None:
        shown |= charts.band(band, f"references {numbers.number(band['mean'])}")
        estimates.append(dict(band))
    shown["yaxis"] |= {"tickformat": charts.REWARD_TICKS, "range": charts.span(estimates)}
    return charts.figure(traces, shown)


def _tables(results: Sequence[Json], series: Sequence[_Series]) -> str:
    keys = list(dict.fromkeys(key for result in results for key in _keys(result)))
    columns = [Column("Policy", numeric=False), Column("Chosen", numeric=False), Column("n")]
    columns += [Column(f"{_heading(key)} ↑", meaning=_meaning(key)) for key in keys]
    rows = []
    for each in series:
        for row in each.method["rows"]:
            cells = [estimate_cell(row.get(key), _digits(key)) for key in keys]
            rows.append([text(each.policy), text(each.chooser), text(numbers.count(row["n"])), *cells])
    samples = ", ".join(
        f"{result['name']}: {numbers.count(result['sources'])} sources of the {result['split']} split, "
        f"{numbers.count(result['samples_per_source'])} samples each at temperature "
        f"{result['temperature']:g}, {result['distinct_per_source']:.1f} of them different"
        for result in results
    )
    return details(
        "The numbers, with corpus metrics of what is chosen from the first n samples",
        paragraph(f"{samples}.") + table(columns, rows, "Choices among n samples with 95 % intervals"),
    )


def _keys(result: Json) -> list[str]:
    return [*result["metrics"], *_CORPUS]


def _heading(key: str) -> str:
    return _METRICS.get(key) or _CORPUS[key]


def _digits(key: str) -> int:
    return 1 if key in _CORPUS else 3


def _meaning(key: str) -> str:
    if key in _CORPUS:
        return "Of the corpus, from the first n samples, 0 to 100; higher is better"
    return "Mean over sources of the expected value, 0 to 1; higher is better"
