"""Many samples of a set of sources as a store of shards: what Grow and `sample` have in common.

Floor 6. A shard covers a range of the sorted example ids and is committed when it is whole; a killed run
makes only the missing ones. What a shard holds depends on the seed, the stream, the policy and the sources
alone.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rest_jax import keys, processes
from rest_jax.data import candidates
from rest_jax.generation.batching import plan_rows
from rest_jax.generation.memory import SamplerMemory, sampler_memory
from rest_jax.generation.sampler import SamplingConfig
from rest_jax.generation.translator import Progress, Translations, Translator
from rest_jax.metrics import diagnostics, words
from rest_jax.phases.jobs import Job, what_is_left
from rest_jax.phases.lineage import PolicyName
from rest_jax.phases.texts import decode_rows, repeat_each
from rest_jax.phases.workspace import Workspace
from rest_jax.types import EOS_ID, Examples


@dataclasses.dataclass(frozen=True)
class SampleSet:
    """What a store of samples is to hold.

    Attributes:
      name: in messages ("Grow 1").
      verb: which makes it.
      folder: of the store.
      policy: which is sampled.
      examples: whose sources are sampled, sorted by id.
      samples_per_source: N.
      sampling: how they are drawn.
      num_shards: files at most; there are never more than sources.
      stream: of the random numbers.
      round_index: of that stream.
    """

    name: str
    verb: str
    folder: Path
    policy: PolicyName
    examples: Examples
    samples_per_source: int
    sampling: SamplingConfig
    num_shards: int
    stream: keys.Stream
    round_index: int = 0

    @property
    def shard_rows(self) -> list[np.ndarray]:
        """The rows of `examples` in each shard."""
        return np.array_split(np.arange(len(self.examples)), min(self.num_shards, len(self.examples)))


def sample_all(workspace: Workspace, wanted: SampleSet) -> Mapping[str, Any]:
    """Makes the shards that are missing; returns the facts of the whole store."""
    writer, origin = _writer(workspace, wanted)
    _sample_missing(workspace, wanted, writer, writer.missing_shards())
    return {"sources": len(wanted.examples), **origin, **writer.totals()}


def sample_share(workspace: Workspace, wanted: SampleSet, job: Job) -> None:
    """Makes what is missing of one job's share of the shards, and says what is left."""
    writer, _ = _writer(workspace, wanted)
    total = len(wanted.shard_rows)
    share = job.share(total)
    _sample_missing(workspace, wanted, writer, writer.missing_shards(share))
    left = len(writer.uncommitted())
    workspace.logbook.say(f"{wanted.name}: {what_is_left(job, len(share), left, total, wanted.verb)}")


def translator_of(workspace: Workspace, wanted: SampleSet) -> Translator:
    """What samples the policy of a store."""
    return workspace.translator(workspace.policy_params(wanted.policy))


def draw(
    workspace: Workspace,
    wanted: SampleSet,
    translator: Translator,
    examples: Examples,
    progress: Progress | None = None,
) -> Translations:
    """Samples some of the sources, row i * N + j sample j of source i.

    Args:
      workspace: the run.
      wanted: the store.
      translator: of `translator_of`; it keeps its memory for the next call.
      examples: n of its sources.
      progress: called with the number of sources that were finished since the last call.
    """
    return translator.sample(
        examples.tokens.sources,
        examples.ids,
        wanted.samples_per_source,
        keys.stream_key(workspace.experiment.seed, wanted.stream, wanted.round_index),
        wanted.sampling,
        progress=progress,
    )


def sampled_together(
    workspace: Workspace, wanted: SampleSet, shard: np.ndarray, chosen: np.ndarray
) -> Iterator[np.ndarray]:
    """Which sources of a shard are to be sampled in one call so that the chosen ones get the bits they have.

    In float32 a sample has the same bits in any company: the chosen sources are sampled alone, in one call.
    In bfloat16 the size of a tile may decide a last bit, and that depends on the sources of the same queue:
    they are sampled along.

    Args:
      workspace: the run.
      wanted: the store.
      shard: int64 [n], the rows of the shard's sources, in the order in which they were sampled.
      chosen: int64 [m], some of them.

    Yields:
      int64, the rows of one call; each chosen row is in one of them.
    """
    experiment = workspace.experiment
    if experiment.policy.dtype == "float32":
        yield shard[np.isin(shard, chosen)]
        return
    queue = experiment.decoding.queue_sources(wanted.samples_per_source)
    lengths = wanted.examples.tokens.sources.lengths[shard]
    for batch in plan_rows(lengths, experiment.decoding.source_lengths, queue):
        if np.isin(shard[batch], chosen).any():
            yield shard[batch]


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


def policy_digest(workspace: Workspace, name: PolicyName) -> str:
    """The digest of a policy, for the identity of what is made from it.

    Raises:
      MissingInputError: the policy is not there.
    """
    return workspace.digest(workspace.policy_folder(name), "improve" if name.grow else "pretrain")


def _writer(workspace: Workspace, wanted: SampleSet) -> tuple[candidates.CandidateWriter, dict[str, Any]]:
    """The writer, and what the samples come from, stated beside them: whoever finds the folder can tell."""
    origin = {
        "policy": wanted.policy.folder,
        "policy_digest": policy_digest(workspace, wanted.policy),
        "sampling": dataclasses.asdict(wanted.sampling),
        "samples_per_source": wanted.samples_per_source,
    }
    return candidates.CandidateWriter(wanted.folder, len(wanted.shard_rows), origin=origin), origin


def _sample_missing(
    workspace: Workspace, wanted: SampleSet, writer: candidates.CandidateWriter, missing: list[int]
) -> None:
    """Samples and commits these shards."""
    processes.barrier(f"sample:{wanted.folder}")
    if missing:
        workspace.logbook.say(f"{wanted.name}: sampling takes up to {_memory(workspace, wanted)}")
        _sample_shards(workspace, wanted, writer, missing)
    processes.barrier(f"sampled:{wanted.folder}")


def _sample_shards(
    workspace: Workspace, wanted: SampleSet, writer: candidates.CandidateWriter, numbers: list[int]
) -> None:
    """One shard is written while the next is sampled."""
    translator, shards = translator_of(workspace, wanted), wanted.shard_rows
    rows = slots = tokens = 0
    with (
        workspace.logbook.progress(wanted.name, sum(len(shards[n]) for n in numbers), unit="sources") as bar,
        concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="shards") as writing,
    ):

        def write(shard: int, part: Examples, translations: Translations) -> None:
            writer.write_shard(shard, as_candidates(workspace, part, translations))

        written: concurrent.futures.Future[None] | None = None
        for shard in numbers:
            part = wanted.examples.take(shards[shard])
            translations = draw(workspace, wanted, translator, part, progress=bar.advance)
            rows, slots = rows + translations.rows_computed, slots + translations.slots_computed
            tokens += len(translations.tokens.values)
            if written is not None:
                written.result()  # one at a time: memory for two shards at the most, and its error is raised
            if processes.is_lead():
                written = writing.submit(write, shard, part, translations)
        if written is not None:
            written.result()
    workspace.logbook.say(
        f"{wanted.name}: {tokens:,} tokens from {rows:,} rows of the decoder, {tokens / rows:.2f} a row; "
        f"its tiles were {100 * rows / slots:.0f} % full"
    )


def _memory(workspace: Workspace, wanted: SampleSet) -> SamplerMemory:
    experiment = workspace.experiment
    return sampler_memory(
        experiment.policy,
        experiment.decoding,
        wanted.sampling,
        wanted.samples_per_source,
        int(wanted.examples.tokens.sources.lengths.max()),
        experiment.mesh.model,
    )
