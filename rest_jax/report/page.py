"""One HTML page that needs nothing but a browser, from its sections.

Floor 7.
"""

from __future__ import annotations

import importlib.resources
import string
from collections.abc import Sequence

from rest_jax.report.markup import Section, script_json, text


def render(
    name: str, title: str, kicker: str, sections: Sequence[Section], styles: str = "", scripts: str = ""
) -> str:
    """The page, with style, scripts and data inside it, and plotly.js where there is a chart.

    Args:
      name: its heading.
      title: the browser's.
      kicker: the line above the heading.
      sections: its chapters.
      styles: a stylesheet of the package that is added to that of all pages.
      scripts: a script of the package that is added likewise.
    """
    figures = {identifier: figure for section in sections for identifier, figure in section.figures.items()}
    return string.Template(_packaged("page.html")).substitute(
        title=text(title),
        name=text(name),
        kicker=text(kicker),
        style="\n".join(_packaged(file) for file in ("page.css", styles) if file),
        contents="".join(f'<li><a href="#{s.anchor}">{text(s.title)}</a></li>' for s in sections),
        sections="".join(map(_section_html, sections)),
        figures=script_json(figures),
        plotly=_plotly() if figures else "",
        script="\n".join(_packaged(file) for file in ("page.js", scripts) if file),
    )


def _plotly() -> str:
    from plotly.offline import get_plotlyjs  # 5 MB of text, read only when a page has a chart

    return get_plotlyjs()


def _section_html(section: Section) -> str:
    return (
        f'<section id="{section.anchor}" aria-labelledby="{section.anchor}-title">'
        f'<h2 id="{section.anchor}-title">{text(section.title)}</h2>{section.body}</section>'
    )


def _packaged(name: str) -> str:
    return importlib.resources.files("rest_jax.report").joinpath(name).read_text(encoding="utf-8")
