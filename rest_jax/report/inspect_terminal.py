"""`inspect` in a terminal: a Grow step in numbers and bars, or the samples of sources.

Floor 7. What comes from a run is shown as plain text: neither rich's markup nor a terminal's control codes in
it have any effect.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from rest_jax.report import numbers
from rest_jax.report.inspect_data import BINS, FLAGS, GrowCounts, RewardCounts, Threshold
from rest_jax.report.inspect_sources import Source

_HEIGHT = 8  # lines of a histogram
_BLOCKS = " ▁▂▃▄▅▆▇█"
_MARGIN = "  "


def grow_view(counts: GrowCounts, width: int) -> RenderableType:
    """A Grow step: what was drawn, each reward's histogram with its thresholds, survivors and flags.

    Args:
      counts: the Grow step.
      width: columns of the terminal.
    """
    cells = 2 if width > 2 * BINS + len(_MARGIN) else 1
    parts: list[RenderableType] = [Text(f"Grow {counts.number}", style="bold"), Text(drawn(counts))]
    for name, reward in counts.rewards.items():
        here = [threshold for threshold in counts.thresholds if threshold.reward == name]
        parts += [Text(), Text(f"{name}: {described(reward)}"), *map(Text, histogram(reward, here, cells))]
    if not counts.rewards:
        parts += [Text(), Text("No rewards yet: run annotate.")]
    if counts.thresholds:
        parts += [Text(), _thresholds_table(counts)]
    return Group(*parts, Text(), _flags_table(counts), Text())


def drawn(counts: GrowCounts) -> str:
    """How many samples of how many sources there are, in a sentence."""
    each = f" ({counts.samples / counts.sources:.3g} each)" if counts.sources else ""
    return f"{numbers.count(counts.samples)} samples of {numbers.count(counts.sources)} sources{each}"


def described(reward: RewardCounts) -> str:
    """Mean and range of a reward, in a sentence."""
    if not reward.count:
        return "no sample has one"
    said = f"mean {reward.mean:.4f}, from {reward.low:.4f} to {reward.high:.4f}"
    if reward.missing:
        said += f"; {numbers.count(reward.missing)} samples have none"
    if reward.outside:
        said += f"; {numbers.count(reward.outside)} outside [0, 1] are not drawn"
    return said


def histogram(reward: RewardCounts, thresholds: Sequence[Threshold], cells: int = 1) -> Iterator[str]:
    """The lines of a histogram over [0, 1] that stands on its axis; thresholds are dotted lines through it.

    Args:
      reward: what is drawn.
      thresholds: of this reward.
      cells: characters that a bin is wide.
    """
    width = BINS * cells
    marks: dict[int, str] = {}
    for threshold in thresholds:
        if threshold.value is None:
            continue
        place = min(max(int(threshold.value * width), 0), width - 1)
        marks[place] = f"{marks[place]},{threshold.improve}" if place in marks else f"τ{threshold.improve}"
    yield from _labels(marks)
    top = max(int(reward.histogram.max()), 1)
    eighths = [-(-int(number) * 8 * _HEIGHT // top) for number in reward.histogram]
    for line in range(_HEIGHT - 1, -1, -1):
        blocks = [_BLOCKS[min(max(height - 8 * line, 0), 8)] for height in eighths]
        drawn = ["┊" if place in marks else blocks[place // cells] for place in range(width)]
        yield _MARGIN + "".join(drawn).rstrip()
    ticks = range(0, width + 1, width // 5)
    yield _MARGIN + "".join("┴" if place in ticks else "─" for place in range(width + 1))
    yield from _labels({max(place - 1, 0): f"{place / width:.1f}" for place in ticks})


def _labels(labels: dict[int, str]) -> list[str]:
    """Labels by the column that they begin in, on as many lines as they need not to touch."""
    lines: list[str] = []
    for place, label in sorted(labels.items()):
        start = len(_MARGIN) + place
        level = next((level for level, line in enumerate(lines) if len(line) < start), None)
        if level is None:
            level = len(lines)
            lines.append("")
        lines[level] = lines[level].ljust(start) + label
    return lines


def _thresholds_table(counts: GrowCounts) -> Table:
    table = _table("improve", "reward", "quantile", "τ", "samples kept", "share", "sources with none")
    for threshold in counts.thresholds:
        table.add_row(
            f"I={threshold.improve}",
            plain(threshold.reward),
            numbers.ABSENT if threshold.quantile is None else f"{threshold.quantile:g}",
            threshold.words if threshold.value is None else numbers.number(threshold.value, 4),
            numbers.count(threshold.kept),
            numbers.percent(threshold.kept / counts.samples if counts.samples else None),
            numbers.count(threshold.sources_with_none),
        )
    return table


def _flags_table(counts: GrowCounts) -> Table:
    table = _table("flag", "samples", "share", "meaning")
    table.columns[-1].justify = "left"
    found = {**counts.flags, "duplicate": counts.duplicates}
    meanings = {**FLAGS, "duplicate": "another sample of its source has its text"}
    for name, number in found.items():
        share = numbers.percent(number / counts.samples if counts.samples else None, 2)
        table.add_row(name, numbers.count(number), share, meanings[name])
    return table


def source_view(source: Source, names: Sequence[str]) -> RenderableType:
    """A source with its samples, a line each."""
    head = Text.assemble((f"{source.example_id}  ", "bold"), plain(source.text))
    parts: list[RenderableType] = [head]
    if source.reference is not None:
        parts.append(Text.assemble(("reference  ", "dim"), plain(source.reference)))
    table = _table(*map(plain, names), "log p", "tempered", "sample", "tokens", "text", "flags")
    for column in table.columns[-2:]:
        column.justify = "left"
    for sample in source.samples:
        table.add_row(
            *(numbers.number(sample.rewards[name], 4) for name in names),
            numbers.number(sample.log_prob, 2),
            numbers.number(sample.tempered_log_prob, 2),
            str(sample.number),
            str(sample.tokens),
            plain(sample.text) if sample.text.strip() else Text("(empty)", style="dim italic"),
            Text(", ".join(sample.flags), style="yellow"),
        )
    return Group(*parts, table, Text())


def match_view(sources: Sequence[Source], names: Sequence[str], wanted: str) -> Table:
    """Sources that contain a text, or of which a sample does: the best such sample of each beside it."""
    table = _table("example", *map(plain, names), "source", "sample")
    for column in table.columns[-2:]:
        column.justify = "left"
    for source in sources:
        hits = [s for s in source.samples if wanted.casefold() in s.text.casefold()]
        shown = (hits or source.samples)[0]
        rewards = (numbers.number(shown.rewards[name], 4) for name in names)
        table.add_row(str(source.example_id), *rewards, plain(source.text), plain(shown.text))
    return table


def plain(text: str) -> Text:
    """Text of a run, its control characters made visible."""
    return Text(
        "".join(f"\\x{ord(c):02x}" if unicodedata.category(c) == "Cc" else c for c in text), overflow="fold"
    )


def _table(first: str | Text, *others: str | Text) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column(first, justify="left" if first in ("improve", "flag") else "right")
    for heading in others:
        table.add_column(heading, justify="right")
    return table
