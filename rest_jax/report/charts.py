"""What all charts have in common: the palette, axes, error bars and the band of the BC policy.

Floor 7. A chart is plain data for plotly.js: {"data": [...], "layout": {...}}. Colours are names of the
page's custom properties ("$blue"), which the page's script looks up, so that charts follow light and dark.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rest_jax.report.markup import Figure, text

# Okabe and Ito's colours: told apart with any common colour blindness. Symbols and dashes say it once more.
PALETTE = ("$blue", "$orange", "$green", "$pink", "$sky", "$amber")
SYMBOLS = ("circle", "diamond", "square", "triangle-up", "cross", "star")
REWARD_TICKS = ".2f"
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")


def style(index: int) -> dict[str, str]:
    """Colour, marker symbol and dash of the series of this number."""
    return {
        "color": PALETTE[index % len(PALETTE)],
        "symbol": SYMBOLS[index % len(SYMBOLS)],
        "dash": DASHES[index % len(DASHES)],
    }


def label(name: Any) -> str:
    """Text for a chart: plotly reads some HTML tags in labels, so they are escaped."""
    return text(name).replace("&quot;", '"').replace("&#x27;", "'")


def axis(title: str, **more: Any) -> dict[str, Any]:
    """An axis with a title, in the page's colours."""
    return {
        "title": {"text": title, "standoff": 10},
        "gridcolor": "$grid",
        "linecolor": "$line",
        "zeroline": False,
        "ticks": "outside",
        "tickcolor": "$line",
        "automargin": True,
        **more,
    }


def layout(x_title: str, y_title: str, **more: Any) -> dict[str, Any]:
    """The layout of a chart with one pair of axes and its legend above."""
    return {"xaxis": axis(x_title, showgrid=False), "yaxis": axis(y_title), **base_layout(), **more}


def base_layout() -> dict[str, Any]:
    """Margins, fonts and legend that every chart shares."""
    return {
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "size": 13, "color": "$ink"},
        "margin": {"l": 56, "r": 16, "t": 34, "b": 48},
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "bgcolor": "rgba(0,0,0,0)"},
        "hoverlabel": {"bgcolor": "$panel", "bordercolor": "$line", "font": {"color": "$ink"}},
        "dragmode": False,
    }


def error_bars(estimates: Sequence[Mapping[str, Any]], color: str) -> dict[str, Any]:
    """95 % error bars from intervals that need not lie evenly about their means."""
    above, below = [], []
    for estimate in estimates:
        low, high = estimate.get("ci95") or (estimate["mean"], estimate["mean"])
        above.append(high - estimate["mean"])
        below.append(estimate["mean"] - low)
    return {
        "type": "data", "symmetric": False, "array": above, "arrayminus": below,
        "color": color, "thickness": 1.6, "width": 5,
    }  # fmt: skip


def span(estimates: Sequence[Mapping[str, Any]], margin: float = 0.12) -> list[float]:
    """A range of an axis that holds all intervals, with some room on both sides."""
    bounds = [bound for e in estimates for bound in (e.get("ci95") or (e["mean"], e["mean"]))]
    room = margin * ((max(bounds) - min(bounds)) or 0.1)
    return [min(bounds) - room, max(bounds) + room]


def band(estimate: Mapping[str, Any], name: str, y_axis: str = "y") -> dict[str, Any]:
    """Shapes and annotation of a horizontal line at an estimate, with its 95 % interval as a band."""
    x_reference = "x domain" if y_axis == "y" else f"x{y_axis[1:]} domain"
    across = {"type": "rect", "xref": x_reference, "x0": 0, "x1": 1, "yref": y_axis, "layer": "below"}
    low, high = estimate.get("ci95") or (estimate["mean"], estimate["mean"])
    line = {**across, "type": "line", "y0": estimate["mean"], "y1": estimate["mean"]}
    return {
        "shapes": [
            {**across, "y0": low, "y1": high, "fillcolor": "$band", "line": {"width": 0}},
            {**line, "line": {"color": "$muted", "width": 1.5, "dash": "dash"}},
        ],
        "annotations": [
            {
                "xref": x_reference, "x": 1, "xanchor": "right", "yref": y_axis, "y": estimate["mean"],
                "yanchor": "bottom", "text": label(name), "showarrow": False,
                "font": {"color": "$muted", "size": 12},
            }
        ],
    }  # fmt: skip


def figure(data: Sequence[Mapping[str, Any]], chart_layout: Mapping[str, Any]) -> Figure:
    """A chart for plotly.js."""
    return {"data": [dict(trace) for trace in data], "layout": dict(chart_layout)}
