"""The verbs `export` and `import`: a run's policy out to, and in from, other frameworks.

Floor 7.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rest_jax import errors, files, processes
from rest_jax.interop import huggingface, parameter_names, t5x
from rest_jax.network.config import T5Config
from rest_jax.phases.lineage import BC, PolicyName
from rest_jax.phases.pretrain import IMPORTED
from rest_jax.phases.translate import newest_policy
from rest_jax.phases.workspace import Workspace
from rest_jax.training import checkpoints

# What decides the shapes of the parameters and their meaning; the rest (dropout, dtype) is the run's choice.
_ARCHITECTURE = (
    "vocab_size",
    "emb_dim",
    "num_heads",
    "head_dim",
    "mlp_dim",
    "num_encoder_layers",
    "num_decoder_layers",
    "mlp_activations",
    "logits_via_embedding",
    "relpos_num_buckets",
    "relpos_max_distance",
)


def export_policy(workspace: Workspace, policy: str | None, folder: Path) -> huggingface.ExportReport:
    """Writes a policy as a Hugging Face folder and says how it was checked.

    Args:
      workspace: the run.
      policy: which policy; None takes the newest.
      folder: where to write.
    """
    name = newest_policy(workspace) if policy is None else PolicyName.parse(policy)
    workspace.require(workspace.vocabulary_folder, "vocab")
    report = huggingface.export_huggingface(
        workspace.policy_params(name),
        workspace.experiment.policy,
        workspace.vocabulary_file,
        folder,
        workspace.experiment.evaluation.sampling.max_length,
    )
    workspace.logbook.say(f"{name.folder} is in {folder}: {report.note}")
    return report


def import_policy(workspace: Workspace, file_format: str, folder: Path) -> None:
    """Takes a checkpoint as the run's BC policy; `pretrain` then has nothing to do.

    Args:
      workspace: the run; it must have the checkpoint's network and vocabulary.
      file_format: "hf" or "t5x".
      folder: the checkpoint.

    Raises:
      ConfigError: the network or the vocabulary is another one.
      MissingInputError: there is no such checkpoint.
    """
    if file_format == "hf":
        params, config, vocabulary_file = huggingface.import_huggingface(folder)
        _check_vocabulary(workspace, vocabulary_file)
    else:
        params, vocabulary_file = t5x.read_t5x(folder), None
        config = t5x.config_from_params(
            params, relpos_max_distance=workspace.experiment.policy.relpos_max_distance
        )
    _check_same_network(workspace.experiment.policy, config)
    parameter_names.check_tree(params, workspace.experiment.policy)

    def work() -> Mapping[str, Any]:
        digest = checkpoints.save_params(workspace.policy_folder(BC) / "params", params)
        return {"imported_from": str(folder), "params_digest": digest}

    workspace.run_step(
        workspace.policy_folder(BC),
        IMPORTED,
        {"policy": workspace.experiment.policy, "params": checkpoints.params_digest(params)},
        work,
    )
    if processes.is_lead():
        workspace.logbook.say(f"policy/bc of {workspace.run_dir} is now {folder}")


def _check_vocabulary(workspace: Workspace, vocabulary_file: Path | None) -> None:
    """A policy is worth nothing with another vocabulary than its own."""
    if vocabulary_file is None:
        return
    wanted = files.file_digest(vocabulary_file)
    if files.read_seal(workspace.vocabulary_folder) is not None:
        used: Path | None = workspace.vocabulary_file
    else:
        path = workspace.experiment.vocabulary.path
        used = Path(path) if path else None
    if used is None or not used.is_file() or files.file_digest(used) != wanted:
        raise errors.ConfigError(
            f"the run's vocabulary ({used or 'one to be trained'}) is not the checkpoint's",
            where="import",
            remedy=f"Use a new MODEL_DIR with '--gin.VocabularyConfig.path=\"{vocabulary_file}\"'",
        )


def _check_same_network(ours: T5Config, theirs: T5Config) -> None:
    left, right = dataclasses.asdict(ours), dataclasses.asdict(theirs)
    differing = [f"T5Config.{name} = {right[name]!r}" for name in _ARCHITECTURE if left[name] != right[name]]
    if differing:
        raise errors.ConfigError(
            "the checkpoint is another network than the run's",
            where="T5Config",
            remedy=f"Set {', '.join(differing)}",
        )
