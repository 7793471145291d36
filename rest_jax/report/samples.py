"""The section on what each Grow step drew: reward histograms, thresholds and who survives them.

Floor 7.
"""

from __future__ import annotations

from typing import Any

from rest_jax.report import charts, numbers
from rest_jax.report.markup import Column, Figure, Section, chart, paragraph, table, text
from rest_jax.report.run_files import Json, RunFiles

_FAULTS = {
    "duplicates": "repeat another sample of their source",
    "truncated": "were cut off at the maximum length",
    "empty": "are empty",
    "copies_of_source": "copy their source",
    "repeated_ngram": "repeat a phrase within themselves",
    "missing_rewards": "have no reward",
}
THRESHOLD_COLUMNS = (
    Column("Improve step", numeric=False),
    Column("Quantile", meaning="Quantile of the rewards of this Grow step that τ was taken from"),
    Column("τ", meaning="Kept is what lies strictly above; or how each source is judged on its own"),
    Column("Samples kept"),
    Column("Share", meaning="Share of the samples of this Grow step"),
    Column("Dataset pairs kept", meaning="Pairs of the human-made dataset D that pass the same filter"),
    Column("Sources with none", meaning="Sources of which no sample passes: they drop out of training"),
)


def samples_section(run: RunFiles) -> Section:
    """Histograms and threshold tables of all Grow steps."""
    if not run.grows:
        return Section(
            "samples", "Samples and thresholds", paragraph("No Grow step has been summarised yet.")
        )
    body, figures = [], {}
    for summary in run.grows:
        grow = int(summary["grow"])
        body.append(f"<h3>Grow {grow}</h3>{paragraph(_what_was_drawn(summary))}")
        if summary.get("histogram"):
            identifier = f"chart-histogram-{grow}"
            figures[identifier] = histogram_figure(summary)
            body.append(
                chart(
                    identifier,
                    f"Rewards of Grow {grow}",
                    "Filled: samples of the policy; outline: the human translations of dataset D; each as "
                    "a share of its own set, since the sets differ in size. What lies right of a vertical "
                    "line τ is trained on in that Improve step.",
                    360,
                )
            )
        if summary.get("thresholds"):
            body.append(table(THRESHOLD_COLUMNS, threshold_rows(summary), f"Thresholds of Grow {grow}"))
            body.append(_kept_tables(summary))
    return Section("samples", "Samples and thresholds", "".join(body), figures)


def _what_was_drawn(summary: Json) -> str:
    samples, sources = summary.get("samples"), summary.get("sources")
    reward = summary.get("reward") or {}
    quantiles = reward.get("quantiles") or {}
    said = f"{numbers.count(samples)} samples of {numbers.count(sources)} sources"
    if samples and sources:
        said += f" ({samples / sources:.3g} each)"
    faults = [
        f"{numbers.percent(summary[key] / samples)} {words}"
        for key, words in _FAULTS.items()
        if samples and summary.get(key) is not None
    ]
    said += f". Of these, {', '.join(faults)}" if faults else ""
    said += f". Mean reward {numbers.number(reward.get('mean'))}"
    if summary.get("dataset_reward"):
        said += f" (dataset D: {numbers.number(summary['dataset_reward'].get('mean'))})"
    ordered = sorted((float(q), value) for q, value in quantiles.items())
    if ordered:
        said += "; quantiles " + ", ".join(f"{q:g}: {numbers.number(value)}" for q, value in ordered)
    return said + "."


def threshold_rows(summary: Json) -> list[list[str]]:
    """Cells of `THRESHOLD_COLUMNS`, a row for each threshold of a Grow step's summary."""
    rows = []
    for threshold in summary["thresholds"]:
        samples = threshold.get("samples") or summary.get("samples")
        kept, quantile = threshold.get("kept_samples"), threshold.get("quantile")
        cells = [
            f"I={threshold['improve']}",
            numbers.ABSENT if quantile is None else f"{quantile:g}",
            filter_text(threshold),
            numbers.count(kept),
            numbers.percent(kept / samples if kept is not None and samples else None),
            numbers.count(threshold.get("kept_dataset")),
            numbers.count(threshold.get("sources_with_none")),
        ]
        rows.append([text(cell) for cell in cells])
    return rows


def filter_text(threshold: Json) -> str:
    """τ, or in words how each source is judged on its own."""
    if threshold.get("threshold") is None and threshold.get("words"):
        return str(threshold["words"])
    if threshold.get("threshold") is None:
        return numbers.source_filter(threshold.get("selection"), threshold.get("selection_value"))
    return numbers.number(threshold["threshold"], 4)


def _kept_tables(summary: Json) -> str:
    """Tables of what the Improve steps kept by source and by reward, and what the guards took."""
    stories = [story for story in summary["thresholds"] if story.get("kept_by_source")]
    if not stories:
        return ""
    grow, body = summary["grow"], ""
    by_source = list(stories[0]["kept_by_source"])
    columns = [Column("Improve step", numeric=False)]
    columns += [
        Column(f"{kept} kept", meaning="Sources of which so many samples are kept") for kept in by_source
    ]
    rows = [
        [f"I={story['improve']}", *(numbers.count(story["kept_by_source"].get(kept)) for kept in by_source)]
        for story in stories
    ]
    body += table(
        columns, [[text(cell) for cell in row] for row in rows], f"Sources of Grow {grow} by samples kept"
    )
    bands = stories[0].get("kept_by_quantile") or []
    if bands:
        columns = [Column("Improve step", numeric=False)]
        columns += [
            Column(
                f"q {band['from']:g}-{band['to']:g}",
                meaning="Kept of the samples with rewards between these quantiles",
            )
            for band in bands
        ]
        rows = [
            [
                f"I={story['improve']}",
                *(
                    numbers.percent(band["kept"] / band["samples"] if band["samples"] else None)
                    for band in story.get("kept_by_quantile") or []
                ),
            ]
            for story in stories
        ]
        rows = [row for row in rows if len(row) == len(columns)]
        body += table(
            columns,
            [[text(cell) for cell in row] for row in rows],
            f"Share kept in Grow {grow} by quantile of reward",
        )
    guarded = {guard: number for guard, number in (stories[0].get("guarded") or {}).items() if number}
    if guarded:
        said = ", ".join(
            f"{guard.replace('_', ' ')} {numbers.count(number)}" for guard, number in guarded.items()
        )
        body += paragraph(f"Out before the filter, by the guard that took them first: {said}.")
    return body


def histogram_figure(summary: Json) -> Figure:
    """The histogram of a Grow step's summary with its thresholds."""
    histogram = summary["histogram"]
    edges = histogram["edges"]
    centres = [(low + high) / 2 for low, high in zip(edges, edges[1:], strict=False)]
    traces: list[dict[str, Any]] = [
        {
            "type": "bar", "name": "samples", "x": centres, "y": _shares(histogram["samples"]),
            "width": [high - low for low, high in zip(edges, edges[1:], strict=False)],
            "marker": {"color": "$blue", "opacity": 0.55, "line": {"width": 0}},
            "customdata": histogram["samples"],
            "hovertemplate": "reward %{x:.2f}<br>%{y:.1f} % of samples (%{customdata:,})<extra></extra>",
        }
    ]  # fmt: skip
    if sum(histogram.get("dataset") or []):
        traces.append(
            {
                "type": "scatter", "mode": "lines", "name": "dataset D",
                "x": centres, "y": _shares(histogram["dataset"]),
                "line": {"shape": "hvh", "color": "$orange", "width": 2}, "customdata": histogram["dataset"],
                "hovertemplate": "reward %{x:.2f}<br>%{y:.1f} % of D (%{customdata:,})<extra></extra>",
            }
        )  # fmt: skip
    chart_layout = charts.layout("Reward", "Share of its set, %", bargap=0, **_threshold_lines(summary))
    chart_layout["margin"] = {**chart_layout["margin"], "t": 84}
    chart_layout["legend"] = {**chart_layout["legend"], "y": 1.18}
    chart_layout["xaxis"] |= {"range": [edges[0], edges[-1]]}
    chart_layout["yaxis"] |= {"rangemode": "tozero"}
    return charts.figure(traces, chart_layout)


def _shares(counts: list[int]) -> list[float]:
    total = sum(counts) or 1
    return [100 * count / total for count in counts]


def _threshold_lines(summary: Json) -> dict[str, Any]:
    """Vertical lines at τ; neighbouring labels stand on three levels, so that close thresholds stay "
    "legible."""
    shapes, annotations = [], []
    for index, threshold in enumerate(summary.get("thresholds") or []):
        tau = threshold.get("threshold")
        if tau is None:
            continue
        shapes.append(
            {
                "type": "line", "xref": "x", "yref": "y domain", "x0": tau, "x1": tau, "y0": 0, "y1": 1,
                "line": {"color": "$ink", "width": 1.5, "dash": "dot"},
            }
        )  # fmt: skip
        annotations.append(
            {
                "xref": "x", "yref": "y domain", "x": tau, "y": 1, "yanchor": "bottom", "showarrow": False,
                "yshift": 15 * (index % 3), "text": f"τ<sub>{threshold['improve']}</sub> {tau:.3f}",
                "font": {"size": 12, "color": "$ink"},
            }
        )  # fmt: skip
    return {"shapes": shapes, "annotations": annotations}
