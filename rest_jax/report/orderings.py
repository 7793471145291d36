"""The orderings that the paper reports, and whether policies of one's own runs stand in them.

Floor 7. The paper prints few numbers (Table 1) and many orderings (Figures 3 to 5, 11 to 14). A reproduction
at another size can be held to the orderings alone. Two policies are compared source by source on the same
held-out sources, so that what makes a source easy or hard cancels out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from rest_jax.metrics import bootstrap


@dataclasses.dataclass(frozen=True)
class Ordering:
    """One of the paper's orderings by mean reward: `better` is above `worse`.

    Attributes:
      better: name of a policy, as tables write it.
      worse: likewise.
      source: where the paper says so.
    """

    better: str
    worse: str
    source: str


@dataclasses.dataclass(frozen=True)
class Finding:
    """How two policies stand to each other.

    Attributes:
      ordering: what the paper has.
      difference: mean over sources of the reward of `better` less that of `worse`.
      ci95: its bootstrap interval over sources.
      outcome: "holds" or "is reversed" where the interval lies on one side of 0, else "is not shown".
    """

    ordering: Ordering
    difference: float
    ci95: list[float]
    outcome: str


def paper_orderings(names: list[str]) -> list[Ordering]:
    """The paper's orderings between policies of these names, as far as both are there.

    Args:
      names: "BC G=0 I=0", "BC G=1 I=2", "GOLD-s G=1 I=1", "PPO" …
    """
    there = set(names)
    baseline, unfiltered = "BC G=0 I=0", "BC G=1 I=0"
    wanted = [Ordering(unfiltered, baseline, "Table 1")]
    for name in names:
        loss, grow, improve = _parts(name)
        if loss == "BC" and grow and improve:
            before = f"BC G={grow} I={improve - 1}"
            if improve > 1 or grow == 1:
                wanted.append(Ordering(name, before, "Fig. 3"))
        elif loss == "BVE" and grow:
            wanted.append(Ordering(f"BC G={grow} I={improve}", name, "App. A.2"))
        elif loss is not None and loss not in ("BC", "PPO") and grow:
            wanted.append(Ordering(name, baseline, "Fig. 5"))
            wanted.append(Ordering(f"BC G={grow} I={improve}", name, "Fig. 5, 13, 14"))
    last = {grow: _last(names, grow) for grow in (1, 2)}
    if last[1] and last[2]:
        wanted.append(Ordering(last[2], last[1], "Table 1, Fig. 4"))
    for grow in (1, 2):
        if last[grow]:
            wanted.append(Ordering(str(last[grow]), "PPO", "Table 1"))
    wanted.append(Ordering("PPO", baseline, "Table 1"))
    return [o for o in dict.fromkeys(wanted) if {o.better, o.worse} <= there]


def _parts(name: str) -> tuple[str | None, int, int]:
    """("BC", 1, 2) of "BC G=1 I=2"; (None, 0, 0) of a name of another form."""
    words = name.split()
    if len(words) == 3 and words[1].startswith("G=") and words[2].startswith("I="):
        return words[0], int(words[1][2:]), int(words[2][2:])
    return None, 0, 0


def _last(names: list[str], grow: int) -> str | None:
    """The policy of the last Improve step of a Grow step with BC loss."""
    steps = [_parts(name) for name in names]
    improves = [i for loss, g, i in steps if loss == "BC" and g == grow and i > 0]
    return f"BC G={grow} I={max(improves)}" if improves else None


def check(
    orderings: list[Ordering], source_rewards: Mapping[str, np.ndarray], seed: int = 0, resamples: int = 1000
) -> list[Finding]:
    """Compares the policies of each ordering source by source.

    Args:
      orderings: names of policies.
      source_rewards: mean reward of each source, float64 [sources], by the policy's name; the sources are the
        same for all of them. A source that a policy has no reward for is left out of its comparisons.
      seed: of the bootstrap; all comparisons resample the same sources.
      resamples: how many.
    """
    findings = []
    for ordering in orderings:
        differences_S = source_rewards[ordering.better] - source_rewards[ordering.worse]
        found = bootstrap.mean_interval(differences_S, seed, resamples)
        low, high = found["ci95"]
        outcome = "holds" if low > 0 else "is reversed" if high < 0 else "is not shown"
        findings.append(Finding(ordering, found["mean"], found["ci95"], outcome))
    return findings
