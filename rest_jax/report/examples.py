"""The section of texts: best and worst samples of Grow, and BC beside the last step.

Floor 7.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rest_jax.report import numbers
from rest_jax.report.markup import Section, details, paragraph, text
from rest_jax.report.run_files import Json, RunFiles

MOST_EXAMPLES = 12


def examples_section(run: RunFiles) -> Section:
    """Texts to read before the numbers are believed."""
    body = [_evaluation_examples(run, *run.languages)]
    body += [_grow_examples(summary, *run.languages) for summary in run.grows if summary.get("examples")]
    found = "".join(part for part in body if part)
    return Section("examples", "Examples", found or paragraph("No example texts are recorded yet."))


def _evaluation_examples(run: RunFiles, source_language: Any, target_language: Any) -> str:
    last, baseline = run.last, run.baseline
    if not last.get("examples"):
        return ""
    before = {example["id"]: example for example in (baseline or {}).get("examples") or []}
    shown = []
    for example in last["examples"][:MOST_EXAMPLES]:
        columns = [(str(last["name"]), example)]
        if baseline is not None and baseline is not last and example["id"] in before:
            columns.insert(0, (str(baseline["name"]), before[example["id"]]))
        sides = "".join(_side(name, side, target_language) for name, side in columns)
        shown.append(
            f'<article class="example">{_pair(example, source_language, target_language)}'
            f'<div class="sides">{sides}</div></article>'
        )
    heading = (
        "BC and the last step, side by side"
        if baseline is not None and baseline is not last
        else last["name"]
    )
    return (
        f"<h3>{text(heading)}</h3>"
        + paragraph(
            "Greedy translations of evaluation sources with their rewards; their samples unfold below each."
        )
        + "".join(shown)
    )


def _grow_examples(summary: Json, source_language: Any, target_language: Any) -> str:
    shown = []
    for example in summary["examples"][:MOST_EXAMPLES]:
        sides = "".join(
            f"<div><h4>{title}</h4>{_texts(_ranked(example, key), target_language)}</div>"
            for key, title in (("best", "Best samples"), ("worst", "Worst samples"))
        )
        shown.append(
            f'<article class="example">{_pair(example, source_language, target_language)}'
            f'<div class="sides">{sides}</div></article>'
        )
    explanation = (
        "What the reward likes best and least among the samples of one source. Reward hacking shows here "
        "first."
    )
    return details(
        f"<h3>Grow {text(summary['grow'])}: best and worst samples of {len(shown)} sources</h3>",
        paragraph(explanation) + "".join(shown),
        is_open=summary["grow"] == 1,
    )


def _ranked(example: Json, key: str) -> list[Json]:
    """The best samples best first, the worst samples worst first."""
    sign = -1 if key == "best" else 1
    return sorted(example.get(key) or [], key=lambda sample: sign * (sample.get("reward") or 0.0))


def _pair(example: Json, source_language: Any, target_language: Any) -> str:
    sides = (("Source", "source", source_language), ("Reference", "reference", target_language))
    terms = (
        f"<dt>{term}</dt><dd{_language(code)}>{text(example.get(key) or '')}</dd>"
        for term, key, code in sides
    )
    return f'<dl class="pair">{"".join(terms)}</dl>'


def _side(name: str, example: Json, language: Any) -> str:
    greedy = _texts([{"text": example.get("greedy"), "reward": example.get("greedy_reward")}], language)
    samples = example.get("samples") or []
    folded = details(f"{len(samples)} samples", _texts(samples, language)) if samples else ""
    return f"<div><h4>{text(name)}</h4>{greedy}{folded}</div>"


def _texts(samples: Sequence[Json], language: Any) -> str:
    if not samples:
        return '<p class="absent">(too few different samples)</p>'
    items = []
    for sample in samples:
        written = sample.get("text")
        shown = text(written) if written else '<span class="absent">(empty)</span>'
        items.append(
            f'<li><span class="reward" title="Reward">{text(numbers.number(sample.get("reward")))}</span>'
            f"<span{_language(language)}>{shown}</span></li>"
        )
    return f'<ul class="texts">{"".join(items)}</ul>'


def _language(code: Any) -> str:
    """Language and direction of a text, so that a reader's fonts and screen reader follow it."""
    return f' lang="{text(code)}" dir="auto"' if code else ' dir="auto"'
