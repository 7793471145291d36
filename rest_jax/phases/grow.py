"""The Grow step: N samples of each source from the latest policy, written shard by shard.

Floor 6. A shard covers a range of the sorted example ids and is committed when it is whole; a killed run
makes only the missing ones. What a shard holds depends on the seed, the Grow step, the policy and the
sources alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from rest_jax import keys, processes
from rest_jax.data import candidates
from rest_jax.generation.translator import Translations
from rest_jax.metrics import diagnostics, words
from rest_jax.phases.grow_set import SUMMARY_NAME
from rest_jax.phases.lineage import PolicyName, behaviour_policy, check_grow_step
from rest_jax.phases.texts import decode_rows, repeat_each
from rest_jax.phases.workspace import Workspace
from rest_jax.types import EOS_ID, Examples


def grow(workspace: Workspace, number: int) -> None:
    """Makes `grow/gN`.

    Args:
      workspace: the run.
      number: g, from 1.

    Raises:
      ConfigError: the run has no such Grow step.
    """
    experiment = workspace.experiment
    check_grow_step(number, experiment.grow_steps)
    behaviour = behaviour_policy(number, experiment.improve.steps)
    phase = "improve" if behaviour.grow else "pretrain"
    workspace.run_step(
        workspace.grow_folder(number),
        "grow",
        {
            "grow": number,
            "settings": experiment.grow,
            "decoding": experiment.decoding,
            "policy": workspace.digest(workspace.policy_folder(behaviour), phase),
            "data": workspace.digest(workspace.text_folder, "vocab"),
        },
        lambda: _sample_shards(workspace, number),
        scratch=(candidates.REWARDS_FOLDER, SUMMARY_NAME),
        repairs_itself=True,
    )


def grow_sources(workspace: Workspace, number: int) -> Examples:
    """The training examples whose sources are sampled in a Grow step, sorted by id: x ~ D.

    Where fewer than all are asked for, each Grow step draws its own, without replacement.
    """
    examples, wanted = workspace.split("train"), workspace.experiment.grow.sources
    rows = np.arange(len(examples))
    if wanted is not None and wanted < len(rows):
        address = [workspace.experiment.seed & 0xFFFFFFFFFFFFFFFF, number]
        generator = np.random.Generator(np.random.Philox(key=np.array(address, np.uint64)))
        rows = generator.choice(rows, size=wanted, replace=False)
    return examples.take(rows[np.argsort(examples.ids[rows], kind="stable")])


def _sample_shards(workspace: Workspace, number: int) -> Mapping[str, Any]:
    experiment = workspace.experiment
    examples = grow_sources(workspace, number)
    behaviour = behaviour_policy(number, experiment.improve.steps)
    translator = workspace.translator(workspace.policy_params(behaviour))
    key = keys.stream_key(experiment.seed, keys.Stream.GROW, number)
    shards = np.array_split(np.arange(len(examples)), min(experiment.grow.shards, len(examples)))
    origin = _origin(workspace, behaviour)
    writer = candidates.CandidateWriter(workspace.grow_folder(number), len(shards), origin=origin)
    missing = writer.missing_shards()
    processes.barrier(f"grow:{number}")
    left = sum(len(shards[shard]) for shard in missing)
    with workspace.logbook.progress(f"Grow {number}", left, unit="sources") as bar:
        for shard in missing:
            part = examples.take(shards[shard])
            translations = translator.sample(
                part.tokens.sources,
                part.ids,
                experiment.grow.samples_per_source,
                key,
                experiment.grow.sampling,
                progress=bar.advance,
            )
            if processes.is_lead():
                writer.write_shard(shard, as_candidates(workspace, part, translations))
    processes.barrier(f"grown:{number}")
    return {"sources": len(examples), **origin, **writer.totals()}


def _origin(workspace: Workspace, behaviour: PolicyName) -> dict[str, Any]:
    """What the samples come from, stated beside them: whoever finds the folder alone can tell."""
    settings = workspace.experiment.grow
    phase = "improve" if behaviour.grow else "pretrain"
    return {
        "policy": behaviour.folder,
        "policy_digest": workspace.digest(workspace.policy_folder(behaviour), phase),
        "sampling": dataclasses.asdict(settings.sampling),
        "samples_per_source": settings.samples_per_source,
    }


def as_candidates(
    workspace: Workspace, examples: Examples, translations: Translations
) -> candidates.CandidateShard:
    """Rows of the candidate store, with the flags that tell a degenerate sample."""
    times = translations.num_samples
    texts = decode_rows(workspace.vocabulary, translations.tokens)
    sources = repeat_each(examples.sources, times)
    tokens = translations.tokens
    encoded = workspace.vocabulary.encode_batch(texts)
    return candidates.CandidateShard(
        example_id=np.repeat(examples.ids, times),
        sample=np.tile(np.arange(times, dtype=np.int32), len(examples)),
        source=sources,
        text=texts,
        tokens=tokens,
        log_probs=translations.log_probs,
        tempered_log_probs=translations.tempered_log_probs,
        truncated=~translations.finished.reshape(-1),
        empty=np.array([not text.strip() for text in texts]),
        copy_of_source=np.array([diagnostics.is_copy(s, t) for s, t in zip(sources, texts, strict=True)]),
        repeated_ngram=np.array([diagnostics.has_repeated_ngram(words.split_words(t)) for t in texts]),
        round_trip=np.array([[*encoded[row], EOS_ID] == tokens[row].tolist() for row in range(len(texts))]),
    )
