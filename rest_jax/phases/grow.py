"""The Grow step: N samples of each source from the latest policy, written shard by shard.

Floor 6. A shard covers a range of the sorted example ids and is committed when it is whole; a killed run
makes only the missing ones. What a shard holds depends on the seed, the Grow step, the policy and the
sources alone.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from rest_jax import keys, processes
from rest_jax.data import candidates
from rest_jax.generation.batching import plan_rows
from rest_jax.generation.memory import SamplerMemory, sampler_memory
from rest_jax.generation.translator import Progress, Translations
from rest_jax.metrics import diagnostics, words
from rest_jax.phases.grow_set import SUMMARY_NAME
from rest_jax.phases.jobs import Job, what_is_left
from rest_jax.phases.lineage import PolicyName, behaviour_policy, check_grow_step
from rest_jax.phases.texts import decode_rows, repeat_each
from rest_jax.phases.workspace import Workspace
from rest_jax.types import EOS_ID, Examples


def grow(workspace: Workspace, number: int) -> None:
    """Makes `grow/gN`; as one of several jobs (`Experiment.shard`) its share of the shards, without a seal.

    Args:
      workspace: the run.
      number: g, from 1.

    Raises:
      ConfigError: the run has no such Grow step.
    """
    folder, identity = workspace.grow_folder(number), grow_identity(workspace, number)
    job = workspace.experiment.job
    if job is not None:
        workspace.run_part(folder, "grow", identity, lambda: _sample_share(workspace, number, job))
        return
    workspace.run_step(
        folder,
        "grow",
        identity,
        lambda: _sample_shards(workspace, number),
        scratch=(candidates.REWARDS_FOLDER, SUMMARY_NAME),
        repairs_itself=True,
    )


def grow_identity(workspace: Workspace, number: int) -> dict[str, Any]:
    """What the samples of a Grow step depend on.

    Raises:
      ConfigError: the run has no such Grow step.
      MissingInputError: the policy or the data is not there.
    """
    experiment = workspace.experiment
    check_grow_step(number, experiment.grow_steps)
    behaviour = behaviour_policy(number, experiment.improve.steps_of)
    phase = "improve" if behaviour.grow else "pretrain"
    return {
        "grow": number,
        "settings": experiment.grow,
        "decoding": experiment.decoding,
        "policy": workspace.digest(workspace.policy_folder(behaviour), phase),
        "data": workspace.digest(workspace.text_folder, "vocab"),
    }


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


def draw(
    workspace: Workspace, number: int, examples: Examples, progress: Progress | None = None
) -> Translations:
    """Samples sources from the behaviour policy as a Grow step does, row i * N + j sample j of source i.

    Args:
      workspace: the run.
      number: g, from 1.
      examples: n sources.
      progress: called with the number of sources that were finished since the last call.
    """
    experiment = workspace.experiment
    behaviour = behaviour_policy(number, experiment.improve.steps_of)
    return workspace.translator(workspace.policy_params(behaviour)).sample(
        examples.tokens.sources,
        examples.ids,
        experiment.grow.samples_per_source,
        keys.stream_key(experiment.seed, keys.Stream.GROW, number),
        experiment.grow.sampling,
        progress=progress,
    )


def sampled_together(
    workspace: Workspace, examples: Examples, shard: np.ndarray, chosen: np.ndarray
) -> Iterator[np.ndarray]:
    """Which sources of a shard are to be sampled in one call so that the chosen ones get the bits they have.

    In float32 a sample has the same bits in any company: the chosen sources are sampled alone, in one call.
    In bfloat16 the size of a tile may decide a last bit, and that depends on the sources of the same queue:
    they are sampled along.

    Args:
      workspace: the run.
      examples: the sources of the Grow step.
      shard: int64 [n], the rows of the shard's sources, in the order in which they were sampled.
      chosen: int64 [m], some of them.

    Yields:
      int64, the rows of one call; each chosen row is in one of them.
    """
    experiment = workspace.experiment
    if experiment.policy.dtype == "float32":
        yield shard[np.isin(shard, chosen)]
        return
    queue = experiment.decoding.queue_sources(experiment.grow.samples_per_source)
    lengths = examples.tokens.sources.lengths[shard]
    for batch in plan_rows(lengths, experiment.decoding.source_lengths, queue):
        if np.isin(shard[batch], chosen).any():
            yield shard[batch]


class _Plan(NamedTuple):
    """The sources of a Grow step, the rows of them in each shard, what samples come from, and the writer."""

    examples: Examples
    shards: list[np.ndarray]
    origin: Mapping[str, Any]
    writer: candidates.CandidateWriter


def _plan(workspace: Workspace, number: int) -> _Plan:
    examples = grow_sources(workspace, number)
    count = min(workspace.experiment.grow.shards, len(examples))
    shards = np.array_split(np.arange(len(examples)), count)
    origin = _origin(workspace, behaviour_policy(number, workspace.experiment.improve.steps_of))
    writer = candidates.CandidateWriter(workspace.grow_folder(number), count, origin=origin)
    return _Plan(examples, shards, origin, writer)


def _sample_shards(workspace: Workspace, number: int) -> Mapping[str, Any]:
    plan = _plan(workspace, number)
    _sample_missing(workspace, number, plan, plan.writer.missing_shards())
    return {"sources": len(plan.examples), **plan.origin, **plan.writer.totals()}


def _sample_share(workspace: Workspace, number: int, job: Job) -> None:
    plan = _plan(workspace, number)
    total = len(plan.shards)
    share = job.share(total)
    _sample_missing(workspace, number, plan, plan.writer.missing_shards(share))
    left = len(plan.writer.uncommitted())
    workspace.logbook.say(f"Grow {number}: {what_is_left(job, len(share), left, total, 'grow')}")


def _sample_missing(workspace: Workspace, number: int, plan: _Plan, missing: list[int]) -> None:
    """Samples and commits these shards; one is written while the next is sampled."""
    processes.barrier(f"grow:{number}")
    left = sum(len(plan.shards[shard]) for shard in missing)
    if missing:
        workspace.logbook.say(f"Grow {number}: sampling takes up to {_memory(workspace, plan.examples)}")
    rows = slots = tokens = 0
    with (
        workspace.logbook.progress(f"Grow {number}", left, unit="sources") as bar,
        concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="shards") as writing,
    ):
        written: concurrent.futures.Future[None] | None = None
        for shard in missing:
            part = plan.examples.take(plan.shards[shard])
            translations = draw(workspace, number, part, progress=bar.advance)
            rows, slots = rows + translations.rows_computed, slots + translations.slots_computed
            tokens += len(translations.tokens.values)
            if written is not None:
                written.result()  # one at a time: memory for two shards at the most, and its error is raised
            if processes.is_lead():
                written = writing.submit(_write, workspace, plan, shard, part, translations)
        if written is not None:
            written.result()
    if rows:
        workspace.logbook.say(
            f"Grow {number}: {tokens:,} tokens from {rows:,} rows of the decoder, {tokens / rows:.2f} a row; "
            f"its tiles were {100 * rows / slots:.0f} % full"
        )
    processes.barrier(f"grown:{number}")


def _write(
    workspace: Workspace, plan: _Plan, shard: int, examples: Examples, translations: Translations
) -> None:
    plan.writer.write_shard(shard, as_candidates(workspace, examples, translations))


def _memory(workspace: Workspace, examples: Examples) -> SamplerMemory:
    experiment = workspace.experiment
    return sampler_memory(
        experiment.policy,
        experiment.decoding,
        experiment.grow.sampling,
        experiment.grow.samples_per_source,
        int(examples.tokens.sources.lengths.max()),
        experiment.mesh.model,
    )


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
