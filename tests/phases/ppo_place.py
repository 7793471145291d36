"""A run in which PPO learns something in seconds: a random tiny policy, and a reward for even token ids.

As a program, to be killed: python -m tests.phases.ppo_place FOLDER [BINDING …]
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rest_jax import files, gin_setup
from rest_jax.network import init
from rest_jax.phases import ppo, reward_model
from rest_jax.phases.lineage import BC
from rest_jax.phases.workspace import Workspace
from rest_jax.rewards.protocol import RewardSpec
from rest_jax.training import checkpoints
from rest_jax.types import EOS_ID, Examples, RaggedTokens, TokenPairs
from tests.phases import places
from tests.tiny import GIN_FILE

SETTINGS = (
    'RewardModelConfig.kind="chrf"',  # stands for the reward below, which needs no folder
    "T5Config.vocab_size=64",
    "MAX_DECODE_LENGTH=8",
    'TASK_FEATURE_LENGTHS={"inputs": 16, "targets": 16}',
    "DecodeBatching.source_batch=8",
    "DecodeBatching.source_lengths=(16,)",
    "DecodeBatching.row_batch=16",
    "DecodeBatching.queue_samples=32",
    "PPOSettings.samples=256",
    "PPOSettings.sources_per_rollout=16",
    "PPOSettings.samples_per_source=4",
    "ppo/TrainerConfig.train_steps=12",  # 4 rollouts, 3 steps on each
    "ppo/TrainerConfig.batch_size=8",
    "ppo/TrainerConfig.eval_period=6",
    "ppo/TrainerConfig.checkpoint_period=2",
    "ppo/TrainerConfig.log_period=1",
    "ppo/OptimizerConfig.learning_rate=2e-3",
    "ppo/OptimizerConfig.warmup_steps=0",
    "ppo_value/OptimizerConfig.learning_rate=2e-3",
    "ppo_value/OptimizerConfig.warmup_steps=0",
)


class Numerals:
    """A vocabulary whose pieces are the ids, written out."""

    size = 64

    def decode_batch(self, rows: Sequence[np.ndarray]) -> list[str]:
        return [" ".join(str(token) for token in row if token != EOS_ID) for row in rows]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [[int(word) for word in text.split()] for text in texts]


@dataclasses.dataclass
class EvenReward:
    """The share of even ids in a translation; `missing` texts have no reward."""

    missing: tuple[str, ...] = ()
    spec = RewardSpec("even")

    def score(self, sources: Any, hypotheses: Sequence[str], references: Any = None) -> np.ndarray:
        def one(text: str) -> float:
            if text in self.missing:
                return float("nan")
            words = text.split()
            return sum(int(word) % 2 == 0 for word in words) / len(words) if words else 0.0

        return np.array([one(text) for text in hypotheses])

    def signature(self) -> str:
        return "even"


def examples(count: int, first: int) -> Examples:
    """Sources of one to six tokens."""
    draw = np.random.Generator(np.random.Philox(key=first))
    rows = [[*draw.integers(3, 64, draw.integers(1, 7)).tolist(), EOS_ID] for _ in range(count)]
    texts = [" ".join(map(str, row[:-1])) for row in rows]
    tokens = RaggedTokens.from_lists(rows)
    return Examples(texts, texts, TokenPairs(np.arange(first, first + count), tokens, tokens))


def place(folder: Path, *bindings: str, reward: Any = None) -> Workspace:
    """A run with data and a BC policy; `patched_reward` must be called beside it."""
    given = [f'MODEL_DIR="{folder}/run"', f'TRAIN_TSV="{folder}/pairs.tsv"', *SETTINGS, *bindings]
    gin_files = [GIN_FILE, "gin_configs/objectives/ppo.gin"]
    made = Workspace(gin_setup.load_experiment(gin_files, given))
    made.__dict__["vocabulary"] = Numerals()
    if files.read_seal(made.policy_folder(BC)) is None:
        places.put_text(made, train=examples(40, 1000), valid=examples(12, 5000))
        params = init.init_params(made.experiment.policy, jax.random.key(5))
        checkpoints.save_params(made.policy_folder(BC) / "params", params)
        files.write_seal(made.policy_folder(BC), "pretrain", "bc")
    reward_model.load_reward = lambda workspace, kind=None: reward or EvenReward()
    return made


if __name__ == "__main__":
    ppo.train(place(Path(sys.argv[1]), *sys.argv[2:]))
