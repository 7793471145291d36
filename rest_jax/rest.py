"""The outer loop of ReST (Algorithm 1) over the other phases.

Floor 7. Every step reads sealed folders and seals one; a run that was killed goes on at the first step
without a seal, so this loop holds no state of its own. The ledger of the run folder lists what was done.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from rest_jax.phases import annotate, evaluate, grow, improve, ppo, pretrain, reward_model, value, vocab
from rest_jax.phases.experiment import Experiment
from rest_jax.phases.lineage import BC, PPO, PolicyName
from rest_jax.phases.workspace import Workspace


class Step(NamedTuple):
    """One step of the loop: a verb, and the policy or Grow step it is about."""

    verb: str
    policy: PolicyName = BC
    grow: int = 0

    def __str__(self) -> str:
        about = dict.fromkeys(("grow", "annotate", "value"), f"g{self.grow}")
        if self.verb in ("improve", "evaluate"):
            return f"{self.verb} {self.policy.folder}"
        return f"{self.verb} {about.get(self.verb, '')}".strip()


def plan(experiment: Experiment) -> Iterator[Step]:
    """The steps of Algorithm 1 in order, for G Grow steps with their Improve steps, and PPO if set."""
    yield Step("vocab")
    yield Step("pretrain")
    yield Step("reward_model")
    yield Step("evaluate", BC)
    for g in range(1, experiment.grow_steps + 1):
        yield Step("grow", grow=g)
        yield Step("annotate", grow=g)
        if experiment.needs_value:
            yield Step("value", grow=g)
        for i in range(0 if experiment.improve.unfiltered else 1, experiment.improve.steps_of(g) + 1):
            name = PolicyName(g, i)
            yield Step("improve", name)
            yield Step("evaluate", name)
    if experiment.ppo is not None:
        yield Step("ppo", PPO)
        yield Step("evaluate", PPO)


def do(workspace: Workspace, step: Step) -> None:
    """Does one step, or finds that it is done."""
    match step.verb:
        case "vocab":
            vocab.prepare_text(workspace)
        case "pretrain":
            pretrain.pretrain(workspace)
        case "reward_model":
            reward_model.make_reward(workspace)
        case "evaluate":
            evaluate.evaluate(workspace, step.policy)
        case "grow":
            grow.grow(workspace, step.grow)
        case "annotate":
            annotate.annotate(workspace, step.grow)
        case "value":
            value.make_value(workspace, step.grow)
        case "improve":
            improve.improve(workspace, step.policy)
        case "ppo":
            ppo.train(workspace)


def run(workspace: Workspace) -> None:
    """Runs what is not sealed yet of the whole plan."""
    steps = list(plan(workspace.experiment))
    for number, step in enumerate(steps, start=1):
        workspace.logbook.say(f"step {number} of {len(steps)}: {step}")
        do(workspace, step)
