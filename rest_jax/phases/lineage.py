"""Which policy comes from which: the names of the policies of a run.

Floor 6. The paper writes "G=g I=i"; the run folder has `policy/bc`, `policy/g1_i1`, `policy/g1_i2` …
Beside them stands `policy/ppo`, the baseline of online RL.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

from rest_jax import errors


@dataclasses.dataclass(frozen=True, order=True)
class PolicyName:
    """A policy by the Grow and the Improve step that made it.

    (0, 0) is the BC policy. (g, 0) is trained on all of D_g without a filter, as the paper's "G=1 I=0"; it is
    there to be compared with, and nothing is made from it.

    Attributes:
      grow: g, from 1.
      improve: i, from 0.
      rival: what made a policy that ReST is compared with, "ppo"; it has neither Grow nor Improve steps.
    """

    grow: int = 0
    improve: int = 0
    rival: str = ""

    @property
    def folder(self) -> str:
        """The name of its folder: "bc", "g1_i2" or "ppo"."""
        return self.rival or (f"g{self.grow}_i{self.improve}" if self.grow else "bc")

    @property
    def phase(self) -> str:
        """The verb that makes it."""
        return self.rival or ("improve" if self.grow else "pretrain")

    def loss(self, improve_loss: str) -> str:
        """The loss that it was trained with, as tables write it: "BC", "GOLD-s", "PPO".

        Args:
          improve_loss: that of the run's Improve steps; the policy before the first has none of it.
        """
        return self.rival.upper() or (improve_loss if self.grow else "BC")

    def title(self, improve_loss: str) -> str:
        """Its name in tables: "BC G=1 I=2", "PPO"; the argument is that of `loss`."""
        return self.rival.upper() or f"{self.loss(improve_loss)} G={self.grow} I={self.improve}"

    @classmethod
    def parse(cls, text: str) -> PolicyName:
        """Reads a folder name.

        Raises:
          ConfigError: it is not one.
        """
        if text in (BC.folder, PPO.folder):
            return BC if text == BC.folder else PPO
        if match := re.fullmatch(r"g([1-9]\d*)_i(0|[1-9]\d*)", text):
            return cls(int(match.group(1)), int(match.group(2)))
        raise errors.ConfigError(
            f"no policy is called {text!r}", where="--policy", remedy="Say bc, g1_i2 or ppo"
        )


BC = PolicyName()
PPO = PolicyName(rival="ppo")
StepsOf = Callable[[int], int]  # I of each Grow step g


def check_grow_step(number: int, grow_steps: int) -> None:
    """Checks that a run of G Grow steps has this one.

    Raises:
      ConfigError: it has not.
    """
    if not 1 <= number <= grow_steps:
        raise errors.ConfigError(
            f"this run has no Grow step {number}: G = {grow_steps}",
            remedy="Choose --grow_step from 1 to G, or raise GROW_STEPS",
        )


def behaviour_policy(grow: int, steps_of: StepsOf) -> PolicyName:
    """The policy that generates the samples of a Grow step: the last of the Grow step before (Fig. 2)."""
    return PolicyName(grow - 1, steps_of(grow - 1)) if grow > 1 else BC


def starting_policy(name: PolicyName, steps_of: StepsOf, restart: bool = False) -> PolicyName:
    """The policy that an Improve step is fine-tuned from: the one before it (section 3).

    Args:
      name: what the Improve step makes.
      steps_of: I of each Grow step.
      restart: always from the BC policy instead, as ReST-EM does (arXiv:2312.06585).
    """
    if restart:
        return BC
    if name.improve > 1:
        return PolicyName(name.grow, name.improve - 1)
    return behaviour_policy(name.grow, steps_of)


def improve_index(name: PolicyName, steps_of: StepsOf) -> int:
    """How many Improve steps of the whole run lie before this one."""
    return sum(steps_of(grow) for grow in range(1, name.grow)) + max(name.improve - 1, 0)
