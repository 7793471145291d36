"""The reward: ratings first, then the model that learns them, then a report on how far it may be trusted.

Floor 6. With a ratings file the model learns from it. Without one, an automatic rater samples the BC
policy on a split of its own and rates the samples by sentence chrF; the report says so.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rest_jax import errors, files, keys, processes
from rest_jax.data import batches
from rest_jax.network import config as network_config
from rest_jax.network import init, mesh
from rest_jax.phases.lineage import BC
from rest_jax.phases.losses import reward_loss
from rest_jax.phases.texts import decode_rows
from rest_jax.phases.workspace import Workspace, layout_of
from rest_jax.rewards import learned, overlap, ratings, validation
from rest_jax.rewards.protocol import Reward
from rest_jax.training import checkpoints, trainer
from rest_jax.training.evaluators import LossEvaluator
from rest_jax.types import EOS_ID, RaggedTokens, TokenPairs

RATINGS_NAME = "ratings.tsv"


def make_reward(workspace: Workspace) -> None:
    """Makes `reward/ratings` and `reward/model`; an overlap metric needs neither."""
    settings = workspace.experiment.reward
    if settings.kind != "learned":
        workspace.logbook.say(f"the reward is sentence {settings.kind}: there is nothing to train")
        return
    workspace.run_step(
        workspace.ratings_folder, "reward_model", _ratings_identity(workspace), lambda: _rate(workspace)
    )
    identity = {
        "settings": _training_settings(workspace),
        "network": network_of(workspace),
        "lengths": lengths_of(workspace),
        "policy": workspace.digest(workspace.policy_folder(BC), "pretrain")
        if settings.start_from_policy
        else "",
        "ratings": workspace.digest(workspace.ratings_folder, "reward_model"),
    }
    workspace.run_step(
        workspace.reward_folder, "reward_model", identity, lambda: _train(workspace), scratch=("checkpoints",)
    )


def network_of(workspace: Workspace) -> network_config.T5Config:
    """The reward model's network: its own, or the policy's sizes."""
    return workspace.experiment.reward.network or workspace.experiment.policy


def lengths_of(workspace: Workspace) -> tuple[int, int]:
    """Tokens of a source and of a hypothesis that the reward model reads at most, EOS included."""
    settings, experiment = workspace.experiment.reward, workspace.experiment
    return (
        settings.max_source_length or experiment.source_length,
        settings.max_hypothesis_length or experiment.target_length,
    )


def reward_digest(workspace: Workspace, kind: str | None = None) -> str:
    """What rewards depend on, for the identity of what uses them: those of the run, or of this kind."""
    if (kind or workspace.experiment.reward.kind) != "learned":
        return load_reward(workspace, kind).signature()
    return workspace.digest(workspace.reward_folder, "reward_model")


def load_reward(workspace: Workspace, kind: str | None = None) -> Reward:
    """The reward of the run; or another kind, where a second opinion is wanted."""
    kind = kind or workspace.experiment.reward.kind
    if kind == "chrf":
        return overlap.SentenceChrf()
    if kind == "bleu":
        return overlap.SentenceBleu(workspace.experiment.corpus.target_language)
    seal = workspace.require(workspace.reward_folder, "reward_model")
    config = network_of(workspace)
    layout = layout_of(workspace.mesh, init.abstract_reward_params(config))
    params = checkpoints.load_params(workspace.reward_folder / "params", layout)
    return _learned_reward(workspace, params, seal.digest)


def _learned_reward(workspace: Workspace, params: Any, digest: str) -> Reward:
    source_length, hypothesis_length = lengths_of(workspace)
    return learned.LearnedReward(
        network_of(workspace),
        params,
        workspace.vocabulary,
        max_source_length=source_length,
        max_hypothesis_length=hypothesis_length,
        batch_size=workspace.experiment.reward.batch_rows,
        mesh=workspace.mesh,
        version=digest[:12],
    )


def _ratings_identity(workspace: Workspace) -> dict[str, Any]:
    settings = workspace.experiment.reward
    if settings.ratings_file is not None:
        try:
            return {"file": files.file_digest(settings.ratings_file), "scale": _scale(workspace)}
        except OSError as error:
            raise errors.MissingInputError(
                f"cannot read ratings {settings.ratings_file}",
                where="RewardModelConfig.ratings_file",
                remedy="Give a TSV of source, hypothesis, score; or None for the automatic rater",
            ) from error
    return {
        "rater": settings.rater,
        "sources": settings.rater_sources,
        "sampling": settings.rater_sampling,
        "decoding": workspace.experiment.decoding,
        "policy": workspace.digest(workspace.policy_folder(BC), "pretrain"),
        "data": workspace.digest(workspace.text_folder, "vocab"),
    }


def _scale(workspace: Workspace) -> tuple[float, float, bool]:
    """Lowest and highest score of the ratings file, and whether higher is better."""
    settings = workspace.experiment.reward
    return settings.ratings_minimum, settings.ratings_maximum, settings.ratings_higher_is_better


def _training_settings(workspace: Workspace) -> dict[str, Any]:
    settings = workspace.experiment.reward
    return {
        "trainer": settings.trainer,
        "loss": settings.loss,
        "start_from_policy": settings.start_from_policy,
        "validation_share": settings.validation_share,
    }


def _rate(workspace: Workspace) -> Mapping[str, Any]:
    settings = workspace.experiment.reward
    if settings.ratings_file is not None:
        rated = ratings.read_ratings(settings.ratings_file, *_scale(workspace))
    else:
        rated = _rate_automatically(workspace)
    if processes.is_lead():
        ratings.write_ratings(workspace.ratings_folder / RATINGS_NAME, rated)
    return {"ratings": len(rated), "rater": _rater_name(workspace)}


def _rater_name(workspace: Workspace) -> str:
    given = workspace.experiment.reward.ratings_file
    return validation.AUTOMATIC_RATER if given is None else f"the ratings file {given}"


def _rate_automatically(workspace: Workspace) -> list[ratings.Rating]:
    experiment, settings = workspace.experiment, workspace.experiment.reward
    examples = workspace.split("rater")
    examples = examples.take(np.arange(len(examples))[: settings.rater_sources])
    times = settings.rater.samples_per_source
    with workspace.logbook.progress("sampling for the automatic rater", len(examples), unit="sources") as bar:
        translations = workspace.translator(workspace.policy_params(BC)).sample(
            examples.tokens.sources,
            examples.ids,
            times,
            keys.stream_key(experiment.seed, keys.Stream.RATE),
            settings.rater_sampling,
            progress=bar.advance,
        )
    texts = decode_rows(workspace.vocabulary, translations.tokens)
    samples = [texts[row * times : (row + 1) * times] for row in range(len(examples))]
    return ratings.rate_automatically(
        examples.sources, examples.targets, samples, examples.ids, experiment.seed, settings.rater
    )


def _held_out(rated: Sequence[ratings.Rating], share: float) -> np.ndarray:
    """Which ratings are for validation, bool [n]: all those of a source or none, by a hash of its text."""
    limit = int(share * 2**32)

    def is_held_out(source: str) -> bool:
        return int.from_bytes(hashlib.sha256(source.encode()).digest()[:4], "big") < limit

    return np.array([is_held_out(rating.source) for rating in rated])


def _train(workspace: Workspace) -> Mapping[str, Any]:
    experiment, settings = workspace.experiment, workspace.experiment.reward
    assert settings.trainer is not None  # RewardModelConfig sees to it
    rated = ratings.read_ratings(workspace.ratings_folder / RATINGS_NAME)
    held_out = _held_out(rated, settings.validation_share)
    train = [rating for rating, out in zip(rated, held_out, strict=True) if not out]
    valid = [rating for rating, out in zip(rated, held_out, strict=True) if out]
    if not train or not valid:
        raise errors.DataError(
            f"{len(train)} ratings to train on and {len(valid)} held out",
            where="RewardModelConfig.validation_share",
            remedy="Give ratings of more sources",
        )
    pairs, scores = _as_pairs(workspace, train)
    source_length, hypothesis_length = lengths_of(workspace)
    # The decoder's rows are one wider than a hypothesis, for the start symbol.
    shape = (settings.trainer.batch_size, source_length, hypothesis_length + 1)
    seed = keys.derived_seed(experiment.seed, "reward_model")
    training_batches = batches.RewardBatches(pairs, scores, *shape, seed=seed)
    config = network_of(workspace)
    loss_fn = reward_loss(config, settings.loss)
    result = trainer.Trainer(
        settings.trainer,
        loss_fn,
        workspace.mesh,
        mesh.param_shardings(workspace.mesh, init.abstract_reward_params(config)),
    ).fit(
        _initial_params(workspace, config),
        training_batches.at,
        [
            LossEvaluator(
                loss_fn, batches.reward_eval_batches(*_as_pairs(workspace, valid), *shape), workspace.mesh
            )
        ],
        workspace.reward_folder,
        workspace.logbook,
        seed,
    )
    checkpoints.discard_checkpoints(workspace.reward_folder)
    return {
        "best_step": result.best_step,
        **result.best_metrics,
        **_validate(workspace, valid, result.params),
    }


def _initial_params(workspace: Workspace, config: network_config.T5Config) -> Any:
    start = workspace.policy_params(BC) if workspace.experiment.reward.start_from_policy else None
    key = keys.stream_key(workspace.experiment.seed, keys.Stream.INIT, round_index=1)
    return init.init_reward_params(config, key, start)


def _as_pairs(workspace: Workspace, rated: Sequence[ratings.Rating]) -> tuple[TokenPairs, np.ndarray]:
    """Token pairs and scores float32 [n]; what is longer than the limits is cut, as when it is scored."""
    source_length, hypothesis_length = lengths_of(workspace)

    def tokens(texts: list[str], limit: int) -> RaggedTokens:
        rows = workspace.vocabulary.encode_batch(texts)
        return RaggedTokens.from_lists([[*row[: limit - 1], EOS_ID] for row in rows])

    sources = tokens([rating.source for rating in rated], source_length)
    hypotheses = tokens([rating.hypothesis for rating in rated], hypothesis_length)
    pairs = TokenPairs(np.arange(len(rated)), sources, hypotheses)
    return pairs, np.array([rating.score for rating in rated], np.float32)


def _validate(workspace: Workspace, valid: Sequence[ratings.Rating], params: Any) -> dict[str, Any]:
    experiment = workspace.experiment
    reward = _learned_reward(workspace, params, checkpoints.params_digest(params))
    report = validation.validate_reward(reward, valid, experiment.seed, _rater_name(workspace))
    if processes.is_lead():
        files.write_json(workspace.reward_folder / "validation.json", report)
    shares = {kind: found["share_below"] for kind, found in report["corruptions"].items() if found["n"]}
    workspace.logbook.say(
        f"reward model on {report['sources']} held-out sources: Spearman {_shown(report['spearman'])} with "
        f"the ratings; ranked below their originals: "
        + ", ".join(f"{kind} {share:.0%}" for kind, share in shares.items())
    )
    return {"spearman": report["spearman"]}


def _shown(correlation: float | None) -> str:
    """A correlation for the log; a reward that is the same everywhere has none."""
    return "undefined (the reward is constant)" if correlation is None else f"{correlation:.3f}"
