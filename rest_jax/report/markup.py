"""The pieces that the page's sections are made of. Whatever came from a run is escaped here.

Floor 7.
"""

from __future__ import annotations

import dataclasses
import html
import json
from collections.abc import Mapping, Sequence
from typing import Any

from rest_jax.report import numbers

Figure = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Section:
    """One chapter of the page.

    Attributes:
      anchor: id of the section, and where the table of contents points.
      title: its heading.
      body: HTML.
      figures: the charts in it, by the id of the element that `chart` made for them.
    """

    anchor: str
    title: str
    body: str
    figures: Mapping[str, Figure] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Column:
    """A column of a table: its heading, whether it holds numbers, and what its values mean."""

    heading: str
    numeric: bool = True
    meaning: str = ""


def text(value: Any) -> str:
    """Any value as HTML text."""
    return html.escape(str(value), quote=True)


def script_json(value: Any) -> str:
    """JSON that can stand inside a script element: no `<`, so neither `</script>` nor `<!--`."""
    raw = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        raw = raw.replace(character, f"\\u{ord(character):04x}")
    return raw


def prose(sentence: str) -> str:
    """A sentence as HTML text, in which a percentage stays on one line with its sign."""
    return text(sentence).replace(" %", "\u00a0%")


def paragraph(sentence: str, css_class: str = "") -> str:
    """A paragraph of plain text."""
    attribute = f' class="{text(css_class)}"' if css_class else ""
    return f"<p{attribute}>{prose(sentence)}</p>"


def estimate_cell(value: Mapping[str, Any] | None, digits: int = 3) -> str:
    """Mean and, smaller, its 95 % interval."""
    mean = numbers.number((value or {}).get("mean"), digits)
    bounds = numbers.interval(value, digits)
    return f'{mean}<span class="interval">{bounds}</span>' if bounds else mean


def table(columns: Sequence[Column], rows: Sequence[Sequence[str]], caption: str) -> str:
    """A table whose cells are HTML already; the first cell of a row is its heading."""
    head = "".join(
        f'<th scope="col"{_cell_class(c)}{_title(c.meaning)}>{text(c.heading)}</th>' for c in columns
    )
    body = "".join(f"<tr>{_row(columns, row)}</tr>" for row in rows)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{text(caption)}"><table>'
        f"<caption>{text(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _row(columns: Sequence[Column], row: Sequence[str]) -> str:
    first, *others = row
    cells = "".join(f"<td{_cell_class(c)}>{cell}</td>" for c, cell in zip(columns[1:], others, strict=True))
    return f'<th scope="row">{first}</th>{cells}'


def _cell_class(column: Column) -> str:
    return ' class="number"' if column.numeric else ""


def _title(meaning: str) -> str:
    return f' title="{text(meaning)}"' if meaning else ""


def chart(identifier: str, title: str, explanation: str, height: int = 340) -> str:
    """The place of a chart with its title and one sentence on how to read it.

    The height is set before the chart is drawn, so that the page does not jump.
    """
    return (
        f"<figure><figcaption><strong>{text(title)}</strong> {prose(explanation)}</figcaption>"
        f'<div class="chart" id="{text(identifier)}" style="height:{height}px" role="img" '
        f'aria-label="{text(title)} {text(explanation)}"></div></figure>'
    )


def facts(pairs: Sequence[tuple[str, str]]) -> str:
    """A list of terms with their values, both plain text."""
    items = "".join(f"<div><dt>{text(term)}</dt><dd>{text(value)}</dd></div>" for term, value in pairs)
    return f'<dl class="facts">{items}</dl>'


def details(summary_html: str, body: str, is_open: bool = False) -> str:
    """A folded part of the page; the summary is HTML already."""
    return f"<details{' open' if is_open else ''}><summary>{summary_html}</summary>{body}</details>"
