"""Rollouts: what a policy in training translates, what that is worth, and batches of it.

Floor 6. A rollout belongs to a range of the trainer's steps. It is made from the parameters before the first
of them and written, whole, before a batch of it is used, so that a training that was killed in between goes
on with the very same numbers. Nothing of it is part of the result.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors import numpy as tensors

from rest_jax import errors, files, keys, processes
from rest_jax.data import batches
from rest_jax.objectives import ppo, returns
from rest_jax.phases import losses, reward_model, token_numbers
from rest_jax.phases.lineage import BC
from rest_jax.phases.ppo_settings import PPOSettings
from rest_jax.phases.texts import decode_rows, repeat_each
from rest_jax.phases.workspace import Workspace
from rest_jax.rewards.protocol import checked_scores
from rest_jax.training import checkpoints, trainer
from rest_jax.types import Params, RaggedTokens, Seq2SeqBatch, TokenPairs

ROLLOUTS_NAME = "rollouts"
# Numbers of each target token that the loss reads.
COLUMNS = (losses.OLD_LOG_PROB, losses.OLD_VALUE, losses.ADVANTAGE, losses.RETURN)
_DIGEST = "digest"


@dataclasses.dataclass(frozen=True)
class Rollout:
    """Translations with what PPO learns from them.

    Attributes:
      number: which of the training, from 0.
      rows: int64 [n], the example in `train` that each pair's source is of.
      targets: the n translations.
      columns: float32 [target tokens] by the names of `COLUMNS`.
    """

    number: int
    rows: np.ndarray
    targets: RaggedTokens
    columns: dict[str, np.ndarray]


class Rollouts:
    """Makes, keeps and finds again the rollouts of one training, and gives the trainer its batches.

    Args:
      workspace: the run, with settings of PPO, a BC policy and a reward.
      folder: of the training; rollouts lie in a subfolder of it, beside the trainer's checkpoints.

    Raises:
      ConfigError: D has fewer sources than a rollout takes.
    """

    def __init__(self, workspace: Workspace, folder: Path):
        settings = workspace.experiment.ppo
        assert settings is not None  # the phase sees to it
        self._workspace, self._folder, self._settings = workspace, folder, settings
        self._examples = workspace.split("train")
        if settings.sources_per_rollout > len(self._examples):
            raise errors.ConfigError(
                f"a rollout takes {settings.sources_per_rollout} sources, and D has {len(self._examples)}",
                where="PPOSettings.sources_per_rollout",
                remedy="Lower it",
            )
        self._reward = reward_model.load_reward(workspace)
        self._start = workspace.policy_params(BC)
        self._began = False
        self._current: tuple[int, batches.PackedBatches] | None = None

    def before_batch(self, step: int, params: Params) -> None:
        """Sees to it that the rollout of a step is there; makes it if the step is its first.

        Args:
          step: of the trainer.
          params: {"policy": …, "value": …} before that step.

        Raises:
          MissingInputError, IntegrityError: a training is to go on within a rollout that is not there.
        """
        if not self._began:
            self._forget_from(-(-step // self._settings.steps_per_rollout))
            self._began = True
        number = self._number(step)
        if self._current is not None and self._current[0] == number:
            return
        if step != number * self._settings.steps_per_rollout:
            self._use(self._read(number))
            return
        rollout, metrics = self._make(number, params)
        self._write(rollout)
        self._use(rollout)
        self._tell(number, step, metrics)

    def batch_at(self, step: int) -> Seq2SeqBatch:
        """The batch of a step, a function of the step and of the rollout that it belongs to."""
        number = self._number(step)
        if self._current is None or self._current[0] != number:
            self._use(self._read(number))
        assert self._current is not None
        return self._current[1].at(step - number * self._settings.steps_per_rollout)

    def _number(self, step: int) -> int:
        """The rollout of a step; a training that is through looks at its last one again."""
        return min(step // self._settings.steps_per_rollout, self._settings.rollouts - 1)

    def _use(self, rollout: Rollout) -> None:
        experiment = self._workspace.experiment
        pairs = self._pairs(rollout.rows, rollout.targets).with_columns(rollout.columns)
        made = batches.PackedBatches(
            pairs,
            self._settings.trainer.batch_size,
            experiment.source_length,
            experiment.target_length,
            keys.derived_seed(experiment.seed, "ppo", rollout.number),
        )
        self._current = rollout.number, made

    def _pairs(self, rows: np.ndarray, targets: RaggedTokens) -> TokenPairs:
        return TokenPairs(self._examples.ids[rows], self._examples.tokens.sources.take(rows), targets)

    # Making one.

    def _make(self, number: int, params: Params) -> tuple[Rollout, dict[str, float]]:
        settings, workspace = self._settings, self._workspace
        seed = workspace.experiment.seed
        rows = source_rows(len(self._examples), settings.sources_per_rollout, seed, number)
        examples = self._examples.take(rows)
        translations = workspace.translator(params[losses.POLICY]).sample(
            examples.tokens.sources,
            examples.ids,
            settings.samples_per_source,
            keys.stream_key(seed, keys.Stream.PPO, number),
            settings.sampling,
        )
        times = settings.samples_per_source
        rewards_n = checked_scores(
            self._reward,
            repeat_each(examples.sources, times),
            decode_rows(workspace.vocabulary, translations.tokens),
            repeat_each(examples.targets, times),
        )
        scored = np.flatnonzero(np.isfinite(rewards_n))  # a missing reward teaches nothing
        if not len(scored):
            raise errors.DataError(
                f"none of the {len(rewards_n)} translations of rollout {number} has a reward",
                where="ppo",
                remedy="Look at the reward: it gives NaN for all of them",
            )
        shaped_n = shaped_rewards(rewards_n.reshape(-1, times), settings).reshape(-1)
        targets = translations.tokens.take(scored)
        rows_n = np.repeat(rows, times)[scored]
        columns, metrics = self._judge(self._pairs(rows_n, targets), shaped_n[scored], params)
        metrics = {
            "reward": float(np.mean(rewards_n[scored])),
            "reward_std_in_source": _deviation_in_source(rewards_n.reshape(-1, times)),
            "truncated": float(np.mean(~translations.finished)),
            **metrics,
        }
        return Rollout(number, rows_n, targets, columns), metrics

    def _judge(
        self, pairs: TokenPairs, rewards_n: np.ndarray, params: Params
    ) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        """What the networks say of each token, its advantage and its return; and numbers to tell of it."""
        settings, workspace, objective = self._settings, self._workspace, self._settings.objective
        size = settings.trainer.batch_size
        old = token_numbers.log_probs(workspace, params[losses.POLICY], pairs, size)
        reference = token_numbers.log_probs(workspace, self._start, pairs, size)
        network, critic = workspace.experiment.policy, params[losses.CRITIC]
        values = token_numbers.values(workspace, network, critic, pairs, size)
        advantages = _advantages(pairs, rewards_n, (old, reference, values), settings)
        targets = advantages + values
        metrics = {
            "kl_per_token": float(np.mean(old - reference)),
            "kl_per_sequence": float(np.sum(old - reference) / len(pairs)),
            "entropy_per_token": float(-np.mean(old)),
            "length": float(np.mean(pairs.targets.lengths)),
            "value_explained_variance": explained_variance(values, targets),
        }
        if objective.normalise_advantages:
            advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-6)
        columns = dict(zip(COLUMNS, (old, values, advantages, targets), strict=True))
        return columns, metrics

    def _tell(self, number: int, step: int, metrics: dict[str, float]) -> None:
        assert self._current is not None
        settings, made = self._settings, self._current[1]
        passes = settings.steps_per_rollout * settings.trainer.batch_size / made.rows_per_epoch()
        sampled = (number + 1) * settings.samples_per_rollout
        line = {**metrics, "passes": passes, "samples": float(sampled)}
        phase = self._folder.relative_to(self._workspace.run_dir).as_posix()
        self._workspace.logbook.log(phase, step, {f"rollout/{name}": value for name, value in line.items()})
        self._workspace.logbook.say(
            f"{phase}: rollout {number + 1} of {settings.rollouts}: mean reward {metrics['reward']:.4f}, "
            f"KL to BC {metrics['kl_per_token']:.4f} a token; {passes:.1f} passes; {sampled:,} samples so far"
        )

    # Keeping it.

    def _path(self, number: int) -> Path:
        return self._folder / ROLLOUTS_NAME / f"{number:06d}.safetensors"

    def _numbers(self) -> list[int]:
        names = [path.stem for path in self._path(0).parent.glob("*.safetensors")]
        return [int(name) for name in names if name.isdecimal()]

    def _forget_from(self, number: int) -> None:
        """Deletes rollouts that parameters made which are no more: they are made anew, to the same bits."""
        if processes.is_lead():
            for other in self._numbers():
                if other >= number:
                    self._path(other).unlink()
        processes.barrier("rollouts-forgotten")

    def _write(self, rollout: Rollout) -> None:
        arrays = {"rows": rollout.rows, "tokens": rollout.targets.values, "offsets": rollout.targets.offsets}
        arrays |= rollout.columns
        if processes.is_lead():
            with files.atomic_path(self._path(rollout.number)) as temporary:
                tensors.save_file(arrays, temporary, metadata={_DIGEST: _digest(arrays)})
            self._delete_old(rollout.number)
        files.failpoint(f"rollout-written:{rollout.number}")
        processes.barrier(f"rollout-written:{rollout.number}")

    def _delete_old(self, number: int) -> None:
        """Keeps this rollout and those within which a checkpoint stands."""
        steps = self._settings.steps_per_rollout
        standing = checkpoints.committed_steps(self._folder / trainer.CHECKPOINTS_NAME)
        needed = {number, *(step // steps for step in standing if step % steps)}
        for other in self._numbers():
            if other not in needed:
                self._path(other).unlink()

    def _read(self, number: int) -> Rollout:
        path = self._path(number)
        remedy = f"Delete the folder {self._folder} and run `rest-jax ppo` again: training begins anew"
        if not path.is_file():
            raise errors.MissingInputError(f"no rollout {path}, and training stands within it", remedy=remedy)
        try:
            with safe_open(path, "np") as handle:
                stated = (handle.metadata() or {}).get(_DIGEST)
                arrays = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise errors.IntegrityError(f"rollout {path} cannot be read: {error}", remedy=remedy) from error
        if stated != _digest(arrays):
            raise errors.IntegrityError(f"rollout {path} has other bytes than were written", remedy=remedy)
        targets = RaggedTokens(arrays["tokens"], arrays["offsets"])
        return Rollout(number, arrays["rows"], targets, {name: arrays[name] for name in COLUMNS})


def _digest(arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def source_rows(count: int, wanted: int, seed: int, number: int) -> np.ndarray:
    """The rows of D that a rollout translates, int64 [wanted], all different.

    Each pass over D is a permutation of its own, cut into rollouts; what is left at its end is passed over.

    Args:
      count: examples in D.
      wanted: sources in a rollout, at most `count`.
      seed: of the run.
      number: the rollout, from 0.
    """
    per_pass = count // wanted
    a_pass, place = divmod(number, per_pass)
    address = np.array([keys.derived_seed(seed, "ppo", "sources"), a_pass], np.uint64)
    order = np.random.Generator(np.random.Philox(key=address)).permutation(count)
    return order[place * wanted : (place + 1) * wanted]


def shaped_rewards(rewards_SxN: np.ndarray, settings: PPOSettings) -> np.ndarray:
    """Rewards as PPO sees them, float32 [S, N]: normalised by source, or as they are; NaN where missing."""
    if not settings.objective.normalise_rewards:
        return rewards_SxN.astype(np.float32)
    return np.asarray(_normalise(rewards_SxN.astype(np.float32)))


def explained_variance(values: np.ndarray, returns: np.ndarray) -> float:
    """1 - Var(return - value) / Var(return): 1 is a perfect value function, 0 knows no more than the mean."""
    variance = float(np.var(returns))
    return 1.0 - float(np.var(returns - values)) / variance if variance > 0 else float("nan")


def _deviation_in_source(rewards_SxN: np.ndarray) -> float:
    """The mean over sources of the standard deviation of their samples' rewards."""
    whole = rewards_SxN[np.isfinite(rewards_SxN).all(1)]
    return float(np.mean(np.std(whole, axis=1))) if len(whole) else float("nan")


def _advantages(
    pairs: TokenPairs, rewards_n: np.ndarray, networks: tuple[np.ndarray, ...], settings: PPOSettings
) -> np.ndarray:
    """Generalised advantages of each target token, float32 [target tokens].

    Args:
      pairs: the translations.
      rewards_n: of each of them.
      networks: log-probabilities of the policy and of BC, and values, float32 [target tokens].
      settings: of PPO.
    """
    length = settings.sampling.max_length
    counted_nxT = np.arange(length) < pairs.targets.lengths[:, None]

    def padded(numbers: np.ndarray) -> np.ndarray:
        rows_nxT = np.zeros(counted_nxT.shape, np.float32)
        rows_nxT[counted_nxT] = numbers
        return rows_nxT

    rewards = token_numbers.of_each_token(pairs, rewards_n)
    program = _advantage_program(settings.objective)
    found_nxT = program(counted_nxT.astype(np.float32), *map(padded, (rewards, *networks)))
    return np.asarray(found_nxT)[counted_nxT]


_normalise = jax.jit(ppo.normalise_by_source)


@functools.lru_cache(maxsize=8)
def _advantage_program(objective: ppo.PPOConfig) -> Any:
    def advantages(
        weights_BxT: jax.Array,
        rewards_BxT: jax.Array,
        old_BxT: jax.Array,
        reference_BxT: jax.Array,
        values_BxT: jax.Array,
    ) -> jax.Array:
        penalised_BxT = ppo.penalised_rewards(
            rewards_BxT, old_BxT, reference_BxT, weights_BxT, objective.kl_weight
        )
        return returns.generalised_advantages(
            penalised_BxT, values_BxT, weights_BxT, discount=objective.discount, trace=objective.trace
        )

    return jax.jit(advantages)
