"""`inspect` as a page: each Grow step in numbers and charts, and a table of sources to search and sort.

Floor 7. The page looks like the report and needs nothing but a browser. Its size depends on how many sources
are shown and not on how many there are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from rest_jax.report import numbers
from rest_jax.report.inspect_data import EDGES, FLAGS, GrowCounts, RewardCounts
from rest_jax.report.inspect_sources import Sample, Source
from rest_jax.report.inspect_terminal import described, drawn
from rest_jax.report.markup import Column, Figure, Section, chart, details, paragraph, table, text
from rest_jax.report.page import render
from rest_jax.report.samples import THRESHOLD_COLUMNS, histogram_figure, threshold_rows

MOST_SAMPLES = 64  # of one source; of more, the best and the worst are shown
# What an Improve step is told of in the report and cannot be read from the samples.
_COLUMNS = tuple(column for column in THRESHOLD_COLUMNS if column.heading != "Dataset pairs kept")
_FLAG_COLUMNS = (Column("Flag", numeric=False), Column("Samples"), Column("Share"), Column("Meaning", False))


class Shown(NamedTuple):
    """A Grow step with the sources of it that are shown, and a sentence on how they were chosen."""

    counts: GrowCounts
    sources: Sequence[Source]
    chosen: str


def render_inspection(name: str, grows: Sequence[Shown], unfinished: Sequence[str] = ()) -> str:
    """The whole page as HTML.

    Args:
      name: of the run.
      grows: what is shown.
      unfinished: sentences on Grow steps that are not sealed yet.
    """
    sections = [section for shown in grows for section in (_numbers_section(shown.counts), _sources(shown))]
    if unfinished:
        body = "".join(paragraph(sentence, "callout warn") for sentence in unfinished)
        sections.append(Section("unfinished", "Not sealed yet", body))
    return render(name, f"Samples: {name}", "Samples of Grow", sections, "inspect.css", "inspect.js")


def _numbers_section(counts: GrowCounts) -> Section:
    body, figures = [paragraph(f"{drawn(counts)}.")], {}
    for place, (name, reward) in enumerate(counts.rewards.items()):
        identifier = f"chart-{counts.number}-{place}"
        summary = _summary(counts, name, reward)
        body.append(f"<h3>Reward: {text(name)}</h3>{paragraph(_sentence(described(reward)))}")
        if reward.count:
            figures[identifier] = _figure(summary)
            explanation = "What lies right of a vertical line τ passes that Improve step's filter."
            body.append(chart(identifier, f"{name} of Grow {counts.number}", explanation, 360))
        if summary["thresholds"]:
            rows = [[*row[:5], row[6]] for row in threshold_rows(summary)]
            body.append(table(_COLUMNS, rows, f"Thresholds of Grow {counts.number} by {name}"))
    if not counts.rewards:
        body.append(paragraph("These samples have no rewards yet: run annotate.", "callout warn"))
    body.append("<h3>Flags</h3>" + table(_FLAG_COLUMNS, _flag_rows(counts), f"Flags of Grow {counts.number}"))
    return Section(f"grow-{counts.number}", f"Grow {counts.number}", "".join(body), figures)


def _sentence(words: str) -> str:
    return f"{words[0].upper()}{words[1:]}."


def _summary(counts: GrowCounts, name: str, reward: RewardCounts) -> dict:
    """One reward of a Grow step in the form of its summary.json, for the report's chart and table."""
    return {
        "grow": counts.number,
        "samples": counts.samples,
        "histogram": {"edges": EDGES.tolist(), "samples": reward.histogram.tolist()},
        "thresholds": [
            {
                "improve": threshold.improve,
                "quantile": threshold.quantile,
                "threshold": threshold.value,
                "words": threshold.words,
                "kept_samples": threshold.kept,
                "sources_with_none": threshold.sources_with_none,
            }
            for threshold in counts.thresholds
            if threshold.reward == name
        ],
    }


def _figure(summary: Mapping) -> Figure:
    figure = histogram_figure(dict(summary))
    figure["layout"]["yaxis"]["title"]["text"] = "Share of samples, %"
    return figure


def _flag_rows(counts: GrowCounts) -> list[list[str]]:
    found = {**counts.flags, "duplicate": counts.duplicates}
    meanings = {**FLAGS, "duplicate": "another sample of its source has its text"}
    return [
        [
            text(name.replace("_", " ")),
            text(numbers.count(number)),
            text(numbers.percent(number / counts.samples if counts.samples else None, 2)),
            text(meanings[name]),
        ]
        for name, number in found.items()
    ]


def _sources(shown: Shown) -> Section:
    number, names = shown.counts.number, list(shown.counts.rewards)
    identifier = f"sources-{number}"
    headings = ["Example", "Source", "Samples", "Different"]
    for name in names:
        headings += [f"{name}: best", "mean", "worst"]
    head = "".join(
        f'<th scope="col" aria-sort="none"{"" if place == 1 else _NUMBER}>'
        f'<button type="button">{text(heading)}</button></th>'
        for place, heading in enumerate(headings)
    )
    rows = "".join(_source_rows(source, names, len(headings)) for source in shown.sources)
    body = (
        paragraph(shown.chosen)
        + f'<p class="finder"><label for="find-{number}">Search sources, references and samples</label> '
        f'<input type="search" id="find-{number}" data-table="{identifier}" autocomplete="off"> '
        f'<output for="find-{number}"></output></p>'
        f'<div class="scroll"><table class="sources" id="{identifier}"><caption>'
        f"Sources of Grow {number}; a click on a heading sorts</caption>"
        f"<thead><tr>{head}</tr></thead>{rows}</table></div>"
    )
    return Section(f"of-grow-{number}", f"Sources of Grow {number}", body)


_NUMBER = ' class="number"'


def _source_rows(source: Source, names: Sequence[str], width: int) -> str:
    cells = [
        f'<th scope="row"{_NUMBER} data-value="{source.example_id}">{source.example_id}</th>',
        f'<td dir="auto" data-value="{text(source.text)}">{text(source.text)}</td>',
        _number_cell(len(source.samples), 0),
        _number_cell(source.different, 0),
    ]
    for name in names:
        found = source.rewards(name)
        mean = sum(found) / len(found) if found else None
        best, worst = (max(found), min(found)) if found else (None, None)
        cells += [_number_cell(value, 3) for value in (best, mean, worst)]
    reference = ""
    if source.reference is not None:
        reference = f'<p class="reference"><span>Reference</span> <bdi>{text(source.reference)}</bdi></p>'
    samples = details(f"{len(source.samples)} samples", _samples_table(source, names))
    return (
        f'<tbody><tr>{"".join(cells)}</tr><tr class="unfolded"><td></td>'
        f'<td colspan="{width - 1}">{reference}{samples}</td></tr></tbody>'
    )


def _number_cell(value: float | None, digits: int) -> str:
    shown = numbers.number(value, digits)
    return f'<td{_NUMBER} data-value="{"" if value is None else value}">{shown}</td>'


def _samples_table(source: Source, names: Sequence[str]) -> str:
    headings = (*names, "log p", "tempered", "sample", "tokens")
    head = "".join(f'<th scope="col"{_NUMBER}>{text(heading)}</th>' for heading in headings)
    shown, left_out = list(source.samples), len(source.samples) - MOST_SAMPLES
    rows = [_sample_row(sample, names) for sample in shown]
    if left_out > 0:
        half = MOST_SAMPLES // 2
        gap = (
            f'<tr><td colspan="{len(headings) + 2}" class="absent">{left_out} between are left out</td></tr>'
        )
        rows = [*rows[:half], gap, *rows[-half:]]
    return (
        f'<table class="samples"><thead><tr>{head}<th scope="col">text</th><th scope="col">flags</th></tr>'
        f"</thead><tbody>{''.join(rows)}</tbody></table>"
    )


def _sample_row(sample: Sample, names: Sequence[str]) -> str:
    figures = [
        *(numbers.number(sample.rewards[name], 4) for name in names),
        numbers.number(sample.log_prob, 2),
        numbers.number(sample.tempered_log_prob, 2),
        str(sample.number),
        str(sample.tokens),
    ]
    cells = "".join(f"<td{_NUMBER}>{text(figure)}</td>" for figure in figures)
    shown = text(sample.text) if sample.text.strip() else '<span class="absent">(empty)</span>'
    flags = ", ".join(flag.replace("_", " ") for flag in sample.flags)
    return f'<tr>{cells}<td dir="auto">{shown}</td><td class="flag">{text(flags)}</td></tr>'
