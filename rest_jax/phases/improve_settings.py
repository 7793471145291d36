"""The settings of Improve: the filters, the loss, and the value function that some losses read.

Floor 6.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from rest_jax import errors
from rest_jax.network import config as network_config
from rest_jax.objectives import actor_critic, filters, gold, guards, selections, v_mpo, values
from rest_jax.objectives.policy import BehaviourCloningConfig
from rest_jax.training import trainer

Selection = (
    filters.ThresholdSchedule
    | selections.PercentileSchedule
    | selections.MeanMaxSchedule
    | selections.TopKSchedule
)

PolicyLoss = (
    BehaviourCloningConfig | gold.GoldConfig | v_mpo.VMPOConfig | actor_critic.OACConfig | values.BVEConfig
)
READ_VALUES = (v_mpo.VMPOConfig, actor_critic.OACConfig)


@dataclasses.dataclass(frozen=True)
class ImproveConfig:
    """The Improve steps of one Grow step (Algorithm 1).

    Attributes:
      selection: the filter of each Improve step, ever stricter; their number is I.
      later_selection: the same for the Grow steps from the second on; None is no difference.
      loss: what is minimised on the survivors.
      trainer: how; its learning rate is that of the first Improve step.
      learning_rate_decay: factor from each Improve step to the next, over all Grow steps: the paper lowers
        the rate with every new policy (section 3).
      unfiltered: whether each Grow step also gives a policy that is trained on all of D_g without a filter
        ("G=1 I=0"), to compare with; it starts where the first Improve step does, and nothing comes from it.
      start_from: which policy an Improve step fine-tunes: the one "before" it (ReST), or always the BC
        policy, the "base" (ReST-EM).
      dataset: what becomes of the original data D. "filtered": its pairs are candidates beside the samples
        and must pass too, as the paper has it (eq. 3); a filter that judges each source sees them there.
        "whole" keeps all of it; a global quantile or mean is of it too, but it does not compete within a
        source. "none" leaves it out, as ReST-EM and RAFT do.
      accumulate: Grow step g is improved on the samples of the Grow steps 1 to g, judged together; the paper
        takes those of g alone.
      guards: which samples are out before any reward is looked at.
      max_per_source: at most so many samples of a source are kept after the filter, chosen by chance and not
        by reward (ReST-EM: 10), against sources that are easy; pairs of D do not count. None is no cap.
      model_share: λ, the share of samples among the training pairs; None is the natural union. The side that
        has more than its share is kept whole and the other is repeated; 0 and 1 drop one side.
      require_above_mean: whether τ of the first step must exceed the mean reward of the Grow set
        (Algorithm 1), or only warns; filters that judge each source have no such τ.
      validation_sources: sources of the validation set whose samples choose the best checkpoint.
      validation_samples: samples of each of them.
    """

    selection: Selection
    trainer: trainer.TrainerConfig
    later_selection: Selection | None = None
    loss: PolicyLoss = BehaviourCloningConfig()
    learning_rate_decay: float = 0.5
    unfiltered: bool = False
    start_from: Literal["before", "base"] = "before"
    dataset: Literal["filtered", "whole", "none"] = "filtered"
    accumulate: bool = False
    guards: guards.GuardConfig = guards.GuardConfig()
    max_per_source: int | None = None
    model_share: float | None = None
    require_above_mean: bool = True
    validation_sources: int = 500
    validation_samples: int = 1

    def __post_init__(self) -> None:
        errors.require(
            0.0 < self.learning_rate_decay <= 1.0,
            f"learning rate decay {self.learning_rate_decay} is not in (0, 1]",
            "ImproveConfig.learning_rate_decay",
            "The paper lowers the rate from step to step; 0.5 halves it",
        )
        errors.require(
            self.max_per_source is None or self.max_per_source >= 1,
            f"a cap of {self.max_per_source} keeps nothing of a source",
            "ImproveConfig.max_per_source",
            "Give at least 1 (ReST-EM: 10), or None for no cap",
        )
        share = self.model_share
        errors.require(
            share is None or 0.0 <= share <= 1.0,
            f"model share {share} is not in [0, 1]",
            "ImproveConfig.model_share",
            "Give the share of samples among the training pairs, or None for the natural union",
        )
        errors.require(
            self.dataset != "none" or share in (None, 1.0),
            f'model share {share} needs pairs of D, and dataset = "none" leaves them out',
            "ImproveConfig.model_share",
            'Give None, or ImproveConfig.dataset = "filtered"',
        )

    def selection_of(self, grow: int) -> Selection:
        """The filters of a Grow step."""
        return self.selection if grow <= 1 or self.later_selection is None else self.later_selection

    def steps_of(self, grow: int) -> int:
        """I, the number of Improve steps in a Grow step."""
        return len(self.selection_of(grow))


@dataclasses.dataclass(frozen=True)
class ValueFunctionConfig:
    """The value function of the behaviour policy, V(x, y_{<t}) (A.8.4), for the losses that read one.

    Attributes:
      trainer: how it is trained on the Grow set.
      loss: what it is regressed on.
      network: its size; None takes the policy's.
      start_from_policy: copies the encoder and decoder of the behaviour policy before training.
      report_pairs: training pairs on which its ranking is compared with the rewards'.
    """

    trainer: trainer.TrainerConfig
    loss: values.ValueConfig = values.ValueConfig()
    network: network_config.T5Config | None = None
    start_from_policy: bool = True
    report_pairs: int = 10000

    def __post_init__(self) -> None:
        errors.require(
            self.report_pairs >= 2,
            f"report_pairs is {self.report_pairs}",
            "ValueFunctionConfig.report_pairs",
            "Give at least 2: one pair has no rank",
        )
