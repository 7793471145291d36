"""The head of the page: what ran, what came of it, what is missing, and how long each phase took.

Floor 7.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rest_jax.report import numbers
from rest_jax.report.markup import Column, Section, details, facts, paragraph, table, text
from rest_jax.report.run_files import RunFiles
from rest_jax.report.summary import compare_with_baseline, divergence_sentence, divergences

NOT_RECORDED = "not recorded"


def overview_section(run: RunFiles) -> Section:
    """Verdict, key figures and facts of the run."""
    verdict = compare_with_baseline(run)
    risen = verdict.disjoint and (verdict.gain or 0) > 0
    body = [paragraph(verdict.sentence, "callout good" if risen else "callout")]
    if divergences(run):
        body.append(paragraph(divergence_sentence(run), "callout warn"))
    body.append(_key_figures(run))
    if run.missing:
        items = "".join(f"<li>{text(note)}</li>" for note in run.missing)
        body.append(f'<div class="callout warn"><p>This report is partial.</p><ul>{items}</ul></div>')
    body.append(facts(_what_ran(run)))
    return Section("overview", "Overview", "".join(body))


def run_section(run: RunFiles) -> Section:
    """Wall time of each phase, and the configuration, folded."""
    body = ""
    seconds = run.seconds_by_phase
    if seconds:
        total = sum(seconds.values()) or 1.0
        rows = [
            [text(phase), text(numbers.duration(spent)), _share_bar(spent / total)]
            for phase, spent in seconds.items()
        ]
        columns = (Column("Phase", numeric=False), Column("Wall time"), Column("Share", numeric=False))
        body += paragraph(
            "Wall time of each phase, summed over its finished steps, as the ledger of the run has it."
        )
        body += table(columns, rows, "Wall time by phase")
    else:
        body += paragraph("No wall times are recorded.")
    if run.config:
        body += details("Operative configuration (config.gin)", f"<pre>{text(run.config)}</pre>")
    return Section("run", "How it ran", body)


def _key_figures(run: RunFiles) -> str:
    """Reward, chrF and BLEU of the last step, large, with the difference to BC."""
    cards = []
    for key, name, digits in (("reward", "Reward", 3), ("chrf", "chrF", 1), ("bleu", "BLEU", 1)):
        last, before = run.last.get(key), (run.baseline or {}).get(key)
        if not last:
            continue
        change = ""
        if before and run.last is not run.baseline:
            gain = f"{last['mean'] - before['mean']:+.{digits}f}".replace("-", "\u2212")
            change = f"{gain} to BC’s {numbers.number(before['mean'], digits)}"
        cards.append(
            f'<div><span class="name">{name}</span>'
            f'<span class="value">{numbers.number(last["mean"], digits)}</span>'
            f'<span class="change">{text(change or numbers.interval(last, digits))}</span></div>'
        )
    return f'<div class="cards" role="group" aria-label="{text(run.last["name"])}">{"".join(cards)}</div>'


def _what_ran(run: RunFiles) -> list[tuple[str, str]]:
    seconds = run.seconds_by_phase
    languages = [code for code in run.languages if code]
    return [
        ("Corpus", str(run.corpus.get("__class__") or NOT_RECORDED)),
        ("Languages", " → ".join(languages) or NOT_RECORDED),
        ("Pairs", _listed({split: numbers.count(pairs) for split, pairs in run.pairs.items()})),
        ("Seed", NOT_RECORDED if run.seed is None else str(run.seed)),
        ("Versions and device", _listed(run.versions)),
        ("Mesh", _listed(run.mesh)),
        ("Wall time", numbers.duration(sum(seconds.values())) if seconds else NOT_RECORDED),
    ]


def _listed(pairs: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in pairs.items()) or NOT_RECORDED


def _share_bar(share: float) -> str:
    bar = f'<span class="bar"><span style="width:{100 * share:.1f}%"></span></span>'
    return bar + text(numbers.percent(share, 0))
