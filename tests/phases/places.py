"""Run folders as a phase finds them, filled by hand: small splits, Grow steps with chosen rewards."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rest_jax import files, gin_setup
from rest_jax.data import candidates, examples
from rest_jax.data.candidate_shard import CandidateShard
from rest_jax.phases.grow_set import DATASET_REWARDS_NAME
from rest_jax.phases.workspace import Workspace
from rest_jax.types import EOS_ID, Examples, RaggedTokens, TokenPairs
from tests.tiny import GIN_FILE

FIRST_ID = 10**12  # ids are 64-bit numbers, and not positions


def workspace(folder: Path, *bindings: str, gin_files: Sequence[str] = ()) -> Workspace:
    """A workspace of the tiny run with other settings, and further gin files after its own."""
    given = [f'MODEL_DIR="{folder}/run"', f'TRAIN_TSV="{folder}/pairs.tsv"', *bindings]
    return Workspace(gin_setup.load_experiment([GIN_FILE, *gin_files], given))


def made_up(count: int, first: int = FIRST_ID) -> Examples:
    """Examples that all differ: source k has the tokens [10 + k, EOS], its target [50 + k, EOS]."""
    sources = RaggedTokens.from_lists([[10 + k, EOS_ID] for k in range(count)])
    targets = RaggedTokens.from_lists([[50 + k, EOS_ID] for k in range(count)])
    texts = [f"source {k}" for k in range(count)], [f"target {k}" for k in range(count)]
    return Examples(*texts, TokenPairs(np.arange(first, first + count), sources, targets))


def put_text(place: Workspace, **splits: Examples) -> None:
    """Writes and seals tokenised splits, as the vocab phase does."""
    for split, rows in splits.items():
        examples.write_examples(place.text_folder / f"{split}.parquet", rows)
    files.write_seal(place.text_folder, "vocab", "text")


def put_policy(place: Workspace, name: str = "bc") -> None:
    """Seals a policy that is a name only."""
    folder = place.run_dir / "policy" / name
    files.write_text(folder / "params", "no parameters")
    files.write_seal(folder, "pretrain" if name == "bc" else "improve", name)


def put_grow(
    place: Workspace,
    ids: Sequence[int],
    samples: Sequence[int],
    texts: Sequence[str],
    truncated: Sequence[bool] | None = None,
    number: int = 1,
    tokens: RaggedTokens | None = None,
    **flags: np.ndarray,
) -> None:
    """Writes and seals a Grow step of one shard; by default sample k has the tokens [100 + k, EOS]."""
    count = len(ids)
    never = np.zeros(count, bool)
    if tokens is None:
        tokens = RaggedTokens.from_lists([[100 + k, EOS_ID] for k in range(count)])
    flags = {"copy_of_source": never, "repeated_ngram": never, "round_trip": ~never, **flags}
    shard = CandidateShard(
        example_id=np.array(ids, np.int64),
        sample=np.array(samples, np.int32),
        source=[f"source {k - FIRST_ID}" for k in ids],
        text=list(texts),
        tokens=tokens,
        log_probs=np.full(len(tokens.values), -1.0, np.float32),
        tempered_log_probs=np.full(len(tokens.values), -1.0, np.float32),
        truncated=never if truncated is None else np.array(truncated),
        empty=np.array([not text for text in texts]),
        **flags,
    )
    writer = candidates.CandidateWriter(place.grow_folder(number), 1, identity="grow")
    writer.write_shard(0, shard)
    writer.seal()


def put_rewards(
    place: Workspace, rewards: Sequence[float], of_dataset: Sequence[float], number: int = 1
) -> None:
    """Writes and seals the rewards of the Grow step and of D."""
    folder = place.grow_folder(number)
    writer = candidates.RewardWriter(folder, place.experiment.reward.kind, identity="reward")
    writer.write_shard(0, writer.samples(0), np.array(rewards, np.float64))
    writer.seal()
    folder = place.dataset_rewards_folder
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / DATASET_REWARDS_NAME, np.array(of_dataset, np.float64), allow_pickle=False)
    files.write_seal(folder, "annotate", "reward")


def lists(ragged: RaggedTokens) -> list[list[int]]:
    """Ragged tokens as lists."""
    return [ragged[row].tolist() for row in range(len(ragged))]
