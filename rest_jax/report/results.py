"""The sections on what each step reached: table, reward by Improve step, overlap beside it, diagnostics.

Floor 7.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rest_jax.report import charts, numbers
from rest_jax.report.markup import (
    Column,
    Figure,
    Section,
    chart,
    details,
    estimate_cell,
    facts,
    paragraph,
    table,
    text,
)
from rest_jax.report.run_files import Json, RunFiles, is_rival
from rest_jax.report.summary import below_interval, divergence_sentence, divergences, threshold_text

_STEP_COLUMNS = (
    Column("Step", numeric=False),
    Column("Reward ↑", meaning="Mean reward of samples; higher is better"),
    Column("Greedy reward ↑", meaning="Mean reward of the greedy translation; higher is better"),
    Column("BLEU ↑", meaning="Greedy translations against references, 0 to 100; higher is better"),
    Column("chrF ↑", meaning="Greedy translations against references, 0 to 100; higher is better"),
    Column(
        "τ",
        meaning="Only samples with a reward strictly above τ are trained on; q is the quantile it comes "
        "from. Where words stand here, each source is judged by its own samples",
    ),
    Column("Samples", meaning="Drawn in the Grow step"),
    Column("Kept", meaning="Training pairs that passed the filter"),
)
_DIAGNOSTICS = (
    ("length_ratio", "Length ratio", "Output length over reference length; 1 is best", False),
    ("copy_rate", "Copies ↓", "Outputs that repeat their source", True),
    ("empty_rate", "Empty ↓", "Outputs without text", True),
    ("truncated_rate", "Truncated ↓", "Outputs cut off at the maximum length", True),
    ("repeated_ngram_rate", "Repetition ↓", "Outputs with a repeated n-gram", True),
    ("distinct_1", "Distinct-1 ↑", "Different words over all words: variety", False),
    ("distinct_2", "Distinct-2 ↑", "Different word pairs over all word pairs: variety", False),
)


def steps_section(run: RunFiles) -> Section:
    """The table of steps, with the signatures that make its numbers comparable."""
    diverged = {divergence.step: divergence.metrics for divergence in divergences(run)}
    rows = []
    for evaluation in run.evaluations:
        fallen = diverged.get(evaluation["name"], ())
        rows.append(
            [
                text(evaluation["name"]),
                estimate_cell(evaluation["reward"]),
                estimate_cell(evaluation.get("reward_greedy")),
                *(_flagged(estimate_cell(evaluation.get(key), 1), key in fallen) for key in ("bleu", "chrf")),
                text(threshold_text(evaluation)),
                text(numbers.count(evaluation.get("samples"))),
                text(numbers.count(evaluation.get("kept"))),
            ]
        )
    explanation = (
        "One row a policy. BC G=0 I=0 is the supervised policy that ReST starts from; G counts Grow steps "
        "(new samples drawn), I the Improve steps after each (fine-tuning on samples with a reward above "
        "τ). Small figures are bootstrap 95 % intervals; higher is better in every column marked ↑. "
        f"{_evaluation_size(run.last)}"
    )
    if diverged:
        explanation += " ▼ marks BLEU or chrF below BC's interval where the reward is above BC's."
    body = paragraph(explanation) + table(_STEP_COLUMNS, rows, "Steps of the run with 95 % intervals")
    return Section("steps", "Steps", body + _signatures(run.last))


def _flagged(cell: str, is_flagged: bool) -> str:
    return f'<span class="flag" title="Below the 95 % interval of BC">▼</span> {cell}' if is_flagged else cell


def _evaluation_size(evaluation: Json) -> str:
    sources, drawn = evaluation.get("sources"), evaluation.get("samples_per_source")
    if not sources:
        return ""
    sampled = f", {numbers.count(drawn)} samples each for the reward" if drawn else ""
    return (
        f"Measured on {numbers.count(sources)} sources of the {evaluation.get('split') or 'evaluation'} "
        f"split{sampled}; BLEU and chrF are of greedy translations."
    )


def _signatures(evaluation: Json) -> str:
    names = (
        ("Reward", "reward"), ("Greedy reward", "reward_greedy"), ("BLEU", "bleu"), ("chrF", "chrf"),
        ("BLEU of samples", "bleu_samples"), ("chrF of samples", "chrf_samples"),
    )  # fmt: skip
    pairs = [
        (
            name,
            f"{numbers.estimate(evaluation[key], 3 if 'reward' in key else 1)} · "
            f"{evaluation[key]['signature']}",
        )
        for name, key in names
        if evaluation.get(key) and evaluation[key].get("signature")
    ]
    if not pairs:
        return ""
    return details(
        f"Signatures of the metrics, and further metrics of {text(evaluation['name'])}", facts(pairs)
    )


def reward_section(run: RunFiles) -> Section:
    """Mean reward by Improve step for each Grow step, BC as a line: the paper's Figures 3 and 4."""
    improved = [e for e in run.evaluations if e["grow"] > 0]
    title = "Mean reward of samples by Improve step"
    explanation = (
        "Each point is one fine-tuned policy, bars are 95 % intervals; the dashed line with its band is "
        "the supervised policy. Higher is better; a bar clear of the band is a gain beyond the noise of "
        "evaluation."
    )
    if not improved:
        return Section("reward", "Reward by step", paragraph("No Improve step is evaluated yet."))
    return Section(
        "reward",
        "Reward by step",
        chart("chart-reward", title, explanation, 380),
        {"chart-reward": _reward_figure(run.baseline, improved)},
    )


def _reward_figure(baseline: Json | None, improved: list[Json]) -> Figure:
    traces = []
    for index, grow in enumerate(sorted({e["grow"] for e in improved})):
        steps = [e for e in improved if e["grow"] == grow]
        look = charts.style(index)
        estimates = [e["reward"] for e in steps]
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": f"Grow {grow}",
                "x": [f"I={e['improve']}" for e in steps],
                "y": [e["mean"] for e in estimates],
                "error_y": charts.error_bars(estimates, look["color"]),
                "marker": {"color": look["color"], "symbol": look["symbol"], "size": 10},
                "line": {"color": look["color"], "dash": look["dash"], "width": 1.5},
                "customdata": [[charts.label(e["name"]), numbers.estimate(e["reward"])] for e in steps],
                "hovertemplate": "%{customdata[0]}<br>reward %{customdata[1]}<extra></extra>",
            }
        )
    order = [f"I={i}" for i in sorted({e["improve"] for e in improved})]
    chart_layout = charts.layout("Improve step", "Mean reward", scattermode="group", scattergap=0.7)
    shown = [e["reward"] for e in improved] + ([baseline["reward"]] if baseline is not None else [])
    chart_layout["yaxis"] |= {"tickformat": charts.REWARD_TICKS, "range": charts.span(shown)}
    chart_layout["xaxis"] |= {"categoryorder": "array", "categoryarray": order, "type": "category"}
    if baseline is not None:
        chart_layout |= charts.band(baseline["reward"], f"BC {numbers.number(baseline['reward']['mean'])}")
    return charts.figure(traces, chart_layout)


def overlap_section(run: RunFiles) -> Section:
    """BLEU and chrF under the reward, step by step: the check for over-optimisation."""
    shown = [("reward", "Reward")] + [
        (key, name)
        for key, name in (("chrf", "chrF"), ("bleu", "BLEU"))
        if any(e.get(key) for e in run.evaluations)
    ]
    sentence = paragraph(divergence_sentence(run), "callout warn" if divergences(run) else "callout")
    if len(run.evaluations) < 2 or len(shown) < 2:
        return Section("overlap", "Reward against overlap", sentence)
    explanation = (
        "All three are better when higher. A policy that learns to please the reward model instead of "
        "translating better goes on rising in the first panel and falls in the others: open markers lie "
        "below BC's 95 % band."
    )
    body = sentence + chart("chart-overlap", "Reward, chrF and BLEU over the whole run", explanation, 560)
    return Section("overlap", "Reward against overlap", body, {"chart-overlap": _overlap_figure(run, shown)})


def _overlap_figure(run: RunFiles, shown: list[tuple[str, str]]) -> Figure:
    chart_layout: dict[str, Any] = {
        **charts.base_layout(),
        "showlegend": False,
        "shapes": [],
        "annotations": [],
    }
    gap = 0.06
    height = (1 - gap * (len(shown) - 1)) / len(shown)
    traces = []
    for index, (key, name) in enumerate(shown):
        suffix = "" if index == 0 else str(index + 1)
        top = 1 - index * (height + gap)
        is_lowest = index == len(shown) - 1
        chart_layout[f"yaxis{suffix}"] = charts.axis(name, domain=[max(0.0, top - height), top], nticks=5)
        if key == "reward":
            chart_layout[f"yaxis{suffix}"]["tickformat"] = charts.REWARD_TICKS
        chart_layout[f"xaxis{suffix}"] = charts.axis(
            "Step" if is_lowest else "",
            anchor=f"y{suffix}",
            type="category",
            showgrid=False,
            showticklabels=is_lowest,
        )
        if index:
            chart_layout[f"xaxis{suffix}"]["matches"] = "x"
        traces.append(_overlap_trace(run, key, name, index, suffix))
        baseline = (run.baseline or {}).get(key)
        if baseline:
            drawn = charts.band(baseline, "BC", f"y{suffix}")
            chart_layout["shapes"] += drawn["shapes"]
            chart_layout["annotations"] += drawn["annotations"]
    return charts.figure(traces, chart_layout)


def _overlap_trace(run: RunFiles, key: str, name: str, index: int, suffix: str) -> Mapping[str, Any]:
    steps = [e for e in run.evaluations if e.get(key)]
    look, digits = charts.style(index), 3 if key == "reward" else 1
    baseline = (run.baseline or {}).get(key)
    fallen = [below_interval(e[key], baseline) for e in steps]
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": name,
        "x": [_short_name(e) for e in steps],
        "y": [e[key]["mean"] for e in steps],
        "xaxis": f"x{suffix}",
        "yaxis": f"y{suffix}",
        "error_y": charts.error_bars([e[key] for e in steps], look["color"]),
        "marker": {
            "color": look["color"],
            "size": 9,
            "symbol": [look["symbol"] + ("-open" if below else "") for below in fallen],
            "line": {"width": 2, "color": look["color"]},
        },
        "line": {"color": look["color"], "width": 1.5},
        "customdata": [[charts.label(e["name"]), numbers.estimate(e[key], digits)] for e in steps],
        "hovertemplate": f"%{{customdata[0]}}<br>{name} %{{customdata[1]}}<extra></extra>",
    }


def _short_name(evaluation: Json) -> str:
    grow, improve, loss = evaluation["grow"], evaluation["improve"], evaluation.get("loss")
    if is_rival(evaluation):
        return str(evaluation["name"])
    if grow == 0 and improve == 0:
        return "BC"
    step = f"G{grow} I{improve}"
    return step if loss in (None, "BC") else f"{charts.label(loss)} {step}"


def diagnostics_section(run: RunFiles) -> Section:
    """How the text itself looks: length, copies, repetitions, variety."""
    columns = [Column("Step", numeric=False)]
    columns += [Column(heading, meaning=meaning) for _, heading, meaning, _ in _DIAGNOSTICS]
    rows = []
    for evaluation in run.evaluations:
        found = evaluation.get("diagnostics") or {}
        cells = [
            numbers.percent(found.get(key), 2) if is_share else numbers.number(found.get(key), 3)
            for key, _, _, is_share in _DIAGNOSTICS
        ]
        rows.append([text(evaluation["name"]), *map(text, cells)])
    explanation = (
        "Faults that a reward model may overlook. The length ratio is best near 1; copies, empty, "
        "truncated and repetitive outputs are better when fewer (↓); a fall of distinct-1 and distinct-2 "
        "means that the policy has narrowed to fewer wordings (↑ is more varied)."
    )
    return Section(
        "diagnostics", "Diagnostics", paragraph(explanation) + table(columns, rows, "Diagnostics by step")
    )
