"""The section on training: learning curves of policy, reward model and every Improve step.

Floor 7.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rest_jax.report import charts, numbers
from rest_jax.report.markup import Column, Figure, Section, chart, paragraph, table, text
from rest_jax.report.run_files import Curve, RunFiles, improve_of

MOST_POINTS = 600
_METRICS = {"improve-reward": "reward", "ppo-reward": "reward", "ppo-kl": "kl_per_token"}  # others: the loss
_Y_TITLES = {"loss": "Loss", "reward": "Mean reward", "kl_per_token": "KL, nats a token"}
_EXPLANATIONS = {
    "policy": (
        "Policy pretraining",
        "Loss of the supervised policy, nats a target token, lower is better: train and validation should "
        "fall together; where validation turns up, the policy has begun to learn its data by heart.",
    ),
    "reward": (
        "Reward model",
        "Loss of the reward model on the rater's scores; lower is better.",
    ),
    "improve-loss": (
        "Improve steps: loss",
        "Each line is one fine-tuning on what passed the filter; lower is better, but lines of different "
        "steps see different data.",
    ),
    "improve-reward": (
        "Improve steps: reward on validation sources",
        "Mean reward while fine-tuning; higher is better, and the checkpoint with the best value is kept.",
    ),
    "ppo-reward": (
        "PPO: reward",
        "Mean reward of each rollout's samples, and of samples on validation sources, at their own "
        "temperatures; higher is better, and the checkpoint with the best value on validation is kept.",
    ),
    "ppo-kl": (
        "PPO: distance from BC",
        "KL divergence from the BC policy a target token, in nats, on the rollouts' own samples. Where it "
        "grows and the reward with it, look at BLEU and chrF too: the reward model may be exploited.",
    ),
}


def learning_section(run: RunFiles) -> Section:
    """Curves of all phases that logged metrics, and which checkpoint each kept."""
    body, figures = [], {}
    for key, (title, explanation) in _EXPLANATIONS.items():
        drawn = _lines(run, key)
        if not drawn:
            continue
        identifier = f"curve-{key}"
        figures[identifier] = _curve_figure(drawn, _METRICS.get(key, "loss"))
        legend = 12 * max(0, len(drawn) - 6)  # a long legend takes rows, on a phone most of all
        body.append(chart(identifier, title, explanation, 340 + legend))
    if not body:
        body.append(paragraph("No learning curves were logged."))
    if run.fits:
        body.append(_fits_table(run))
    return Section("learning", "Learning curves", "".join(body), figures)


def _lines(run: RunFiles, key: str) -> list[tuple[str, Curve]]:
    """Named curves of one chart: which phases, and which of their metrics."""
    in_chart: dict[str, Callable[[str], bool]] = {
        "policy": lambda phase: improve_of(phase) is None and "reward" not in phase and not _is_ppo(phase),
        "reward": lambda phase: improve_of(phase) is None and "reward" in phase,
        "improve-loss": lambda phase: improve_of(phase) is not None,
        "improve-reward": lambda phase: improve_of(phase) is not None,
        "ppo-reward": _is_ppo,
        "ppo-kl": _is_ppo,
    }
    wanted = _METRICS.get(key, "loss")
    lines = []
    phases = [phase for phase in run.curves if in_chart[key](phase)]
    for phase in sorted(phases, key=lambda name: (improve_of(name) or (0, 0), name)):
        metrics = {m: c for m, c in run.curves[phase].items() if m.rsplit("/", 1)[-1] == wanted}
        for metric, curve in metrics.items():
            lines.append((_line_name(phase, metric, len(phases), len(metrics)), curve))
    return lines


def _is_ppo(phase: str) -> bool:
    return phase.rsplit("/", 1)[-1] == "ppo"


def _line_name(phase: str, metric: str, phases: int, metrics: int) -> str:
    step = improve_of(phase)
    where = f"G={step[0]} I={step[1]}" if step else phase
    kind = metric.rsplit("/", 1)[0] if "/" in metric else metric
    kind = {"valid": "validation"}.get(kind, kind)
    if step is None and phases == 1:
        return kind
    return f"{where} {kind}" if metrics > 1 else where


def _curve_figure(lines: list[tuple[str, Curve]], metric: str) -> Figure:
    traces = []
    for index, (name, curve) in enumerate(lines):
        look, thinned = charts.style(index), thin(curve)
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers" if len(thinned.steps) <= 12 else "lines",
                "name": charts.label(name),
                "x": thinned.steps,
                "y": thinned.values,
                "line": {"color": look["color"], "dash": look["dash"], "width": 2},
                "marker": {"color": look["color"], "symbol": look["symbol"], "size": 7},
                "hovertemplate": f"{charts.label(name)}<br>step %{{x:,}}: %{{y:.4f}}<extra></extra>",
            }
        )
    chart_layout = charts.layout("Training step", _Y_TITLES[metric], showlegend=len(traces) > 1)
    if metric == "reward":
        chart_layout["yaxis"] |= {"tickformat": charts.REWARD_TICKS}
    return charts.figure(traces, chart_layout)


def thin(curve: Curve, most: int = MOST_POINTS) -> Curve:
    """At most `most` evenly spaced points of a curve, its last one among them."""
    stride = -(-len(curve.steps) // most)
    if stride <= 1:
        return curve
    return Curve(curve.steps[::-stride][::-1], curve.values[::-stride][::-1])


def _fits_table(run: RunFiles) -> str:
    columns = (
        Column("Training", numeric=False),
        Column("Best checkpoint at step"),
        Column("Steps done"),
        Column("By metric", numeric=False),
        Column("Value"),
    )
    ordered: list[tuple[str, Mapping[str, Any]]] = sorted(
        run.fits.items(), key=lambda item: (improve_of(item[0]) or (0, 0), item[0])
    )
    rows = [
        [
            text(phase),
            text(numbers.count(fit.get("best_step"))),
            text(numbers.count(fit.get("steps"))),
            text(fit.get("best_metric") or numbers.ABSENT),
            text(numbers.number(fit.get("best_value"), 4)),
        ]
        for phase, fit in ordered
    ]
    return table(columns, rows, "Checkpoints that were kept")
