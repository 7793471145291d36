"""The configuration of a whole run, as one tree of frozen dataclasses.

Floor 6. `gin_setup` builds it from gin files; phases read it and nothing else. Every verb builds the
whole tree, so a mistake in the settings of the last phase stops the first one.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from rest_jax import errors
from rest_jax.data import corpora, vocabulary
from rest_jax.generation import batching, sampler, search
from rest_jax.network import config as network_config
from rest_jax.network import mesh
from rest_jax.objectives.policy import BehaviourCloningConfig
from rest_jax.phases.improve_settings import READ_VALUES, ImproveConfig, ValueFunctionConfig
from rest_jax.phases.jobs import Job
from rest_jax.phases.ppo_settings import PPOSettings
from rest_jax.rewards import ratings
from rest_jax.training import trainer

Corpus = (
    corpora.HsgTatoebaCorpus
    | corpora.TsvCorpus
    | corpora.ParallelCorpus
    | corpora.TfdsCorpus
    | corpora.SeqioCorpus
)


def _has_rater_split(corpus: Corpus) -> bool:
    given = getattr(corpus, "rater", None) or getattr(corpus, "rater_source", None)
    return given is not None or corpus.rater_size > 0


@dataclasses.dataclass(frozen=True)
class RewardModelConfig:
    """The reward R(source, translation) in [0, 1], higher is better.

    Attributes:
      kind: "learned" trains a reference-free model here; "chrf" and "bleu" score against references.
      network: size of the learned model; None takes the policy's.
      trainer: how it is trained.
      loss: "bce" or "mse" between the model's reward and the rating.
      start_from_policy: copies the encoder and decoder of the BC policy before training.
      ratings_file: TSV of `source, hypothesis, score`; None rates automatically.
      ratings_minimum: lowest score of the file's scale (0 for direct assessment).
      ratings_maximum: highest score of the scale (100 for direct assessment); it is mapped to [0, 1].
      ratings_higher_is_better: False for a scale of errors.
      rater: the automatic rater, used where there is no ratings file.
      rater_sources: how many sources of the "rater" split it samples; None takes all.
      rater_sampling: how the automatic rater samples the BC policy.
      validation_share: share of the rated sources held out for the validation report.
      max_source_length: tokens of a source it reads at most; None takes the length of a training row. Pairs
        are not packed here, so a length that fits the sentences is faster.
      max_hypothesis_length: the same of a translation.
      batch_rows: pairs that a device scores at a time.
    """

    kind: Literal["learned", "chrf", "bleu"] = "learned"
    network: network_config.T5Config | None = None
    trainer: trainer.TrainerConfig | None = None
    loss: Literal["bce", "mse"] = "bce"
    start_from_policy: bool = True
    ratings_file: str | None = None
    ratings_minimum: float = 0.0
    ratings_maximum: float = 1.0
    ratings_higher_is_better: bool = True
    rater: ratings.RaterConfig = ratings.RaterConfig()
    rater_sources: int | None = None
    rater_sampling: sampler.SamplingConfig = sampler.SamplingConfig()
    validation_share: float = 0.1
    max_source_length: int | None = None
    max_hypothesis_length: int | None = None
    batch_rows: int = 256

    def __post_init__(self) -> None:
        errors.require(
            self.kind != "learned" or self.trainer is not None,
            "a learned reward needs a trainer",
            "RewardModelConfig.trainer",
            "Bind RewardModelConfig.trainer = @reward_model/TrainerConfig()",
        )
        errors.require(
            0.0 < self.validation_share < 1.0,
            f"validation share {self.validation_share} is not between 0 and 1",
            "RewardModelConfig.validation_share",
            "Hold out some 0.1 of the rated sources",
        )


@dataclasses.dataclass(frozen=True)
class GrowConfig:
    """The Grow step: N samples a source from the latest policy.

    Attributes:
      samples_per_source: N. The paper: 100 (IWSLT), 25 (WMT), 1,000 (Web Domain).
      sources: how many training sources are sampled, drawn anew in each Grow step; None takes all.
      sampling: temperature 0.8 in the paper (A.3), top-k and top-p off.
      shards: files that the samples are written to; a killed run loses at most the open one.
    """

    samples_per_source: int = 100
    sources: int | None = None
    sampling: sampler.SamplingConfig = sampler.SamplingConfig()
    shards: int = 16

    def __post_init__(self) -> None:
        for name in ("samples_per_source", "shards"):
            value = getattr(self, name)
            errors.require(value >= 1, f"{name} is {value}", f"GrowConfig.{name}", "Give at least 1")


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """How a policy is measured.

    Attributes:
      split: which split ("test" or "valid").
      sources: how many of its sources, from its start; None takes all.
      samples_per_source: samples a source for the mean reward, the paper's metric (section 4).
      sampling: how they are drawn.
      beam: beam search beside greedy decoding; None leaves it out.
      resamples: bootstrap resamples of the 95 % intervals.
      examples: how many sources are shown with their outputs in the report.
    """

    split: Literal["valid", "test"] = "test"
    sources: int | None = None
    samples_per_source: int = 4
    sampling: sampler.SamplingConfig = sampler.SamplingConfig()
    beam: search.BeamConfig | None = None
    resamples: int = 1000
    examples: int = 12


@dataclasses.dataclass(frozen=True)
class BestOfNConfig:
    """Choosing one of n samples (section 4, Figure 6), by a reward and by agreement among them (MBR).

    Attributes:
      split: whose sources are sampled ("test" or "valid").
      sources: how many of them, from its start; None takes all.
      samples_per_source: N. The paper: up to 200.
      sampling: how they are drawn.
      shards: files that the samples are written to; a killed run loses at most the open one.
      counts: the n of the table, rising; None takes 1, 2, 5, 10, 20, 50 … below N, and N.
      select_by: the rewards that choose: "reward" is the run's own; "chrf" and "bleu" see the references, so
        they show the best that choosing could reach.
      report_on: held-out metrics of what was chosen, beside the run's reward.
      mbr: utilities of minimum Bayes risk decoding; () leaves it out.
      choose_truncated: whether a sample that hit the length limit may be chosen.
      resamples: bootstrap resamples of the 95 % intervals.
    """

    split: Literal["valid", "test"] = "test"
    sources: int | None = None
    samples_per_source: int = 200
    sampling: sampler.SamplingConfig = sampler.SamplingConfig()
    shards: int = 16
    counts: tuple[int, ...] | None = None
    select_by: tuple[Literal["reward", "chrf", "bleu"], ...] = ("reward",)
    report_on: tuple[Literal["chrf", "bleu"], ...] = ("chrf", "bleu")
    mbr: tuple[Literal["chrf", "bleu"], ...] = ("chrf",)
    choose_truncated: bool = False
    resamples: int = 1000

    def __post_init__(self) -> None:
        for name in ("samples_per_source", "shards", "resamples", "sources"):
            value = getattr(self, name)
            errors.require(
                value is None or value >= 1, f"{name} is {value}", f"BestOfNConfig.{name}", "Give 1 or more"
            )
        found = list(self.numbers)
        errors.require(
            bool(found)
            and found == sorted(set(found))
            and found[0] >= 1
            and found[-1] <= self.samples_per_source,
            f"counts are {self.counts} of {self.samples_per_source} samples",
            "BestOfNConfig.counts",
            "Give rising numbers from 1 to samples_per_source, or None",
        )
        errors.require(
            bool(self.select_by),
            "no reward is named that chooses",
            "BestOfNConfig.select_by",
            'Give ("reward",), the reward of the run',
        )

    @property
    def numbers(self) -> tuple[int, ...]:
        """The n of the table."""
        if self.counts is not None:
            return tuple(self.counts)
        total = self.samples_per_source
        ladder = (step * 10**power for power in range(len(str(total))) for step in (1, 2, 5))
        return (*(n for n in ladder if n < total), total)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Everything a run depends on.

    Attributes:
      model_dir: the run folder (T5X's MODEL_DIR).
      seed: of every random number in the run.
      corpus: where the parallel text comes from.
      vocabulary: the SentencePiece vocabulary shared by both sides.
      task_feature_lengths: {"inputs": tokens of a source, "targets": tokens of a target}, the shape of a
        training row, into which several pairs may be packed (T5X's TASK_FEATURE_LENGTHS).
      policy: the policy network.
      pretrain: how the BC policy is trained on the parallel text.
      pretrain_loss: its loss.
      reward: the reward.
      grow: the Grow step.
      improve: the Improve steps.
      value: the value function, for the losses that read one.
      evaluation: how each policy is measured.
      best_of_n: how choosing among many samples of a policy is measured.
      ppo: the online-RL baseline; None is a run without.
      grow_steps: G; 0 is a run of BC alone, or of PPO.
      decoding: the fixed shapes that sampling and search run in; part of the identity of what they make.
      mesh: how devices are arranged.
      base_run: the folder of another run; a step that it has sealed and that depends on the very same things
        (settings, seed, inputs) is taken over instead of being done again. No identity has it.
      shard: which of several jobs this is ("2/8"), for grow and annotate; None does all. It is about one
        command and not about the run: no identity has it.
    """

    model_dir: str
    seed: int
    corpus: Corpus
    vocabulary: vocabulary.VocabularyConfig
    task_feature_lengths: dict[str, int]
    policy: network_config.T5Config
    pretrain: trainer.TrainerConfig
    reward: RewardModelConfig
    grow: GrowConfig
    improve: ImproveConfig
    evaluation: EvaluationConfig
    best_of_n: BestOfNConfig = BestOfNConfig()
    pretrain_loss: BehaviourCloningConfig = BehaviourCloningConfig()
    value: ValueFunctionConfig | None = None
    ppo: PPOSettings | None = None
    grow_steps: int = 1
    decoding: batching.DecodeBatching = batching.DecodeBatching()
    mesh: mesh.MeshConfig = mesh.MeshConfig()
    base_run: str | None = None
    shard: str | None = None

    def __post_init__(self) -> None:
        errors.require(
            set(self.task_feature_lengths) == {"inputs", "targets"}
            and all(isinstance(n, int) and n > 1 for n in self.task_feature_lengths.values()),
            f"task feature lengths are {self.task_feature_lengths}",
            "TASK_FEATURE_LENGTHS",
            'Give {"inputs": tokens, "targets": tokens}, each at least 2',
        )
        longest = self.decoding.source_lengths[-1]
        errors.require(
            longest >= self.source_length,
            f"sources have up to {self.source_length} tokens and the longest bucket holds {longest}",
            "DecodeBatching.source_lengths",
            "Add a longer bucket, or lower TASK_FEATURE_LENGTHS",
        )
        longest = max(self.grow.sampling.max_length, self.reward.rater_sampling.max_length)
        longest = max(longest, self.ppo.sampling.max_length if self.ppo else 0)
        errors.require(
            longest <= self.target_length,
            f"samples of up to {longest} tokens do not fit training rows of {self.target_length}",
            "MAX_DECODE_LENGTH",
            "Lower MAX_DECODE_LENGTH, or raise the targets of TASK_FEATURE_LENGTHS",
        )
        needs_raters = self.reward.kind == "learned" and self.reward.ratings_file is None
        errors.require(
            not needs_raters or _has_rater_split(self.corpus),
            "the automatic rater has no split of its own to sample",
            f"{type(self.corpus).__name__}.rater_size",
            "Hold some 8000 pairs out with rater_size, or give RewardModelConfig.ratings_file",
        )
        self._check_value()
        errors.require(
            self.grow_steps >= 0, f"grow_steps is {self.grow_steps}", "GROW_STEPS", "Give 0 or more"
        )
        errors.require(bool(self.model_dir), "MODEL_DIR is empty", "MODEL_DIR", "Name the run folder")
        errors.require(
            0 <= self.seed < 2**63, f"seed {self.seed} is out of range", "SEED", "Give 0 to 2**63 - 1"
        )
        errors.require(
            self.job is None or self.job.count <= self.grow.shards,
            f"SHARD = {self.shard!r} asks for more jobs than the {self.grow.shards} shards of a Grow step",
            "SHARD",
            "Start at most as many jobs as GrowConfig.shards says",
        )

    def _check_value(self) -> None:
        """A loss that reads a value function needs one, of its own discount."""
        loss = self.improve.loss
        if not isinstance(loss, READ_VALUES):
            return
        errors.require(
            self.value is not None,
            f"{loss.name} reads a value function, and the run has none",
            "Experiment.value",
            "Include gin_configs/objectives/value.gin",
        )
        assert self.value is not None
        errors.require(
            self.value.loss.discount == loss.discount,
            f"{loss.name} discounts by {loss.discount}, and its value function by {self.value.loss.discount}",
            f"{type(loss).__name__}.discount",
            "Bind ValueConfig.discount to the same number",
        )

    @property
    def needs_value(self) -> bool:
        """Whether the loss of Improve reads a value function."""
        return isinstance(self.improve.loss, READ_VALUES)

    @property
    def job(self) -> Job | None:
        """Which of several jobs this is; None is a whole run."""
        return None if self.shard is None else Job.parse(self.shard)

    @property
    def source_length(self) -> int:
        """Tokens of a source row."""
        return self.task_feature_lengths["inputs"]

    @property
    def target_length(self) -> int:
        """Tokens of a target row."""
        return self.task_feature_lengths["targets"]
