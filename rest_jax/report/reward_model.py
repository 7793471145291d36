"""The section on how far the reward can be trusted: rank correlation and the corruption test.

Floor 7.
"""

from __future__ import annotations

import math

from rest_jax.report import charts, numbers
from rest_jax.report.markup import Column, Figure, Section, chart, facts, paragraph, table, text
from rest_jax.report.run_files import Json, RunFiles

NOT_VALIDATED = (
    "There is no validation of a reward model: it is not trained yet, or the reward is a fixed metric."
)
CORRUPTION_AIM = 0.9  # share of corrupted translations that should be ranked below their original
_MEANINGS = {
    "permuted": "words in another order",
    "repeated": "the sentence, or a phrase of it, said again",
    "truncated": "the end left out",
    "copied": "the source instead of a translation",
    "empty": "nothing at all",
}


def reward_model_section(run: RunFiles) -> Section:
    """Rater, correlations, scatter and corruption table."""
    validation = run.validation
    if validation is None:
        return Section("reward-model", "Reward model", paragraph(NOT_VALIDATED))
    rater = str(validation.get("rater") or "not recorded")
    body = [paragraph(_who_rated(rater), "callout"), facts(_correlations(validation))]
    figures: dict[str, Figure] = {}
    if validation.get("scatter"):
        figures["chart-scatter"] = _scatter_figure(validation)
        body.append(
            chart(
                "chart-scatter",
                "Reward against the rater's score",
                "Each point is a translation of a held-out source; a good reward model puts them in a "
                "rising band, and its rank correlation (Spearman, 1 is best, 0 is chance) is high.",
                380,
            )
        )
    if validation.get("corruptions"):
        body.append(_corruptions(validation))
    return Section("reward-model", "Reward model", "".join(body), figures)


def _who_rated(rater: str) -> str:
    if not rater.startswith("automatic"):
        return f"The rater: {rater}."
    return (
        f"The rater was {rater}. No human judged these translations: the reward model learned to predict an "
        "automatic score without seeing the reference, so it can be no better a judge than that score is."
    )


def _correlations(validation: Json) -> list[tuple[str, str]]:
    pairs = [
        ("Spearman ↑", numbers.number(validation.get("spearman"))),
        ("Kendall ↑", numbers.number(validation.get("kendall"))),
        ("Spearman within a source ↑", numbers.number(validation.get("spearman_within_source"))),
        ("Translations", numbers.count(validation.get("n"))),
        ("Held-out sources", numbers.count(validation.get("sources"))),
    ]
    if validation.get("signature"):
        pairs.append(("Signature", str(validation["signature"])))
    return pairs


def wilson_interval(share: float, count: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927), which stays within [0, 1] and is fair at 0 and 1."""
    centre = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def _corruptions(validation: Json) -> str:
    of_samples = validation.get("corruptions_of_samples") or {}
    rows = []
    for kind, found in validation["corruptions"].items():
        cells = [_share_cell(found)]
        if of_samples:
            cells.append(_share_cell(of_samples.get(kind) or {}))
        rows.append([text(kind), *cells, text(numbers.count(found.get("n"))), text(_MEANINGS.get(kind, ""))])
    columns = [
        Column("Corruption", numeric=False),
        Column("Of references ↑" if of_samples else "Ranked below ↑"),
    ]
    if of_samples:
        columns.append(Column("Of samples ↑", meaning="Harder: the sample may be bad to begin with"))
    columns += [Column("Pairs compared"), Column("What it does", numeric=False)]
    explanation = (
        "The test of broken translations: how often the reward model gives a corrupted translation less "
        "than the one it was made from. Higher is better, 100 % is perfect, 50 % is chance; ▼ marks less "
        f"than {numbers.percent(CORRUPTION_AIM, 0)}."
    )
    return paragraph(explanation) + table(
        columns, rows, "Corrupted translations ranked below their originals"
    )


def _share_cell(found: Json) -> str:
    """A share with its interval, marked where it is below the aim."""
    share, count = found.get("share_below"), found.get("n")
    cell = numbers.percent(share)
    if share is not None and count:
        low, high = wilson_interval(share, count)
        cell += f'<span class="interval">[{100 * low:.1f}, {100 * high:.1f}]</span>'
    if share is not None and share < CORRUPTION_AIM:
        cell = f'<span class="flag" title="Below the aim">▼</span> {cell}'
    return cell


def _scatter_figure(validation: Json) -> Figure:
    points = validation["scatter"]
    trace = {
        "type": "scatter", "mode": "markers", "name": "translation",
        "x": [score for score, _ in points], "y": [reward for _, reward in points],
        "marker": {"color": "$blue", "size": 6, "opacity": 0.5},
        "hovertemplate": "score %{x:.3f}<br>reward %{y:.3f}<extra></extra>",
    }  # fmt: skip
    chart_layout = charts.layout("Score of the rater", "Reward", showlegend=False)
    chart_layout["xaxis"] |= {"range": [-0.02, 1.02], "showgrid": True}
    chart_layout["yaxis"] |= {"range": [-0.02, 1.02]}
    return charts.figure([trace], chart_layout)
