"""How fast the candidate store is at the size of the paper, and in how much memory.

    python benchmarks/store.py --rows 16000000 --out results.json

writes synthetic samples of the size of the paper's IWSLT Grow step (160,000 sources x 100 samples, some
twelve tokens each) with the package's own writer, and rewards beside them; then does what the program does
with them. Each line of the table opens the store anew, so it includes the hashing of the files that it
reads; the line of writing includes the making of the rows. Memory is the largest resident set that the whole
process has had up to there.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from rest_jax import files
from rest_jax.data import candidates
from rest_jax.objectives import filters, selections
from rest_jax.phases.grow_set import Dataset, GrowSet, Sieve
from rest_jax.phases.grow_summary import describe_samples
from rest_jax.types import RaggedTokens

REWARD = "learned"
TAU, PERCENTILE, BEST = 0.95, 0.9, 4
VOCABULARY = 32_000
PIECE_LETTERS = 5  # of each token's text, a space at the end
SOURCES_AT_ONCE = 250


class Maker:
    """Makes rows that compress about as real ones do: the samples of a source share most of their tokens."""

    def __init__(self, samples_per_source: int):
        self._times = samples_per_source
        letters = np.random.default_rng(0).integers(ord("a"), ord("z") + 1, (VOCABULARY, PIECE_LETTERS))
        letters[:, -1] = ord(" ")
        self._text_of = letters.astype(np.uint8)

    def rows(self, first: int, count: int) -> candidates.CandidateShard:
        """All samples of the sources first, first + 1, …"""
        rng = np.random.default_rng([1, first])
        lengths = rng.integers(6, 19, count)
        sources = RaggedTokens(self._tokens(rng, lengths.sum()), _offsets(lengths))
        row_of = np.repeat(np.arange(count), self._times)
        copied = sources.take(row_of)
        total, rows = len(copied.values), len(row_of)
        changed = rng.random(total, dtype=np.float32) < 0.3
        values = np.where(changed, self._tokens(rng, total), copied.values)
        log_probs = -rng.standard_exponential(total, dtype=np.float32)
        return candidates.CandidateShard(
            example_id=10**12 + 977 * (first + row_of.astype(np.int64)),
            sample=np.tile(np.arange(self._times, dtype=np.int32), count),
            source=self._texts(sources).take(pa.array(row_of)),
            text=self._texts(RaggedTokens(values, copied.offsets)),
            tokens=RaggedTokens(values, copied.offsets),
            log_probs=log_probs,
            tempered_log_probs=log_probs * np.float32(1.25),
            **{name: rng.random(rows, dtype=np.float32) < 0.05 for name in candidates.FLAGS},
        )

    def _tokens(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Ids of which low ones are frequent, as a vocabulary sorted by frequency has them."""
        return (rng.random(count, dtype=np.float32) ** 3 * VOCABULARY).astype(np.int32)

    def _texts(self, tokens: RaggedTokens) -> pa.StringArray:
        buffers = (PIECE_LETTERS * tokens.offsets).astype(np.int32), self._text_of[tokens.values]
        return pa.StringArray.from_buffers(len(tokens), *(pa.py_buffer(b) for b in buffers))


def _offsets(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])


class Stopwatch:
    """The table: what was done, how long it took, and the largest memory up to then."""

    def __init__(self, rows: int):
        self._rows = rows
        self.lines: list[dict[str, object]] = []

    @contextlib.contextmanager
    def measure(self, what: str) -> Iterator[dict[str, object]]:
        """Times a block; what the block puts into the dictionary goes into the line."""
        line: dict[str, object] = {"what": what}
        started, worked = time.perf_counter(), time.process_time()
        yield line
        seconds = time.perf_counter() - started
        line |= {
            "seconds": round(seconds, 2),
            "cpu_seconds": round(time.process_time() - worked, 2),
            "rows_per_second": round(self._rows / seconds),
            "peak_bytes": _peak_bytes(),
        }
        self.lines.append(line)
        print(
            f"{what:<34}{seconds:>9.1f} s{line['rows_per_second']:>14,} rows/s"
            f"{_peak_bytes() / 2**20:>9,.0f} MiB   {line.get('result', '')}",
            flush=True,
        )


def _peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def write_samples(folder: Path, sources: int, samples_per_source: int, shards: int) -> None:
    """Makes and writes all samples, never more of them in memory than a piece and a row group."""
    maker = Maker(samples_per_source)
    writer = candidates.CandidateWriter(folder, shards, "benchmark")
    for index, part in enumerate(np.array_split(np.arange(sources), shards)):
        starts = range(int(part[0]), int(part[-1]) + 1, SOURCES_AT_ONCE)
        ends = [*starts[1:], int(part[-1]) + 1]
        writer.write_shard(index, (maker.rows(a, b - a) for a, b in zip(starts, ends, strict=True)))
    writer.seal()


def write_rewards(folder: Path) -> None:
    """Rewards in [0, 1] that rise towards 1; one in a thousand is missing."""
    writer = candidates.RewardWriter(folder, REWARD, "benchmark")
    for index in writer.missing_shards():
        shard = writer.samples(index, columns=())
        rng = np.random.default_rng([2, index])
        rewards = np.sqrt(rng.random(len(shard)))
        rewards[rng.random(len(shard)) < 0.001] = np.nan
        writer.write_shard(index, shard, rewards)
    writer.seal()


def open_set(folder: Path) -> GrowSet:
    """The store as Improve opens it."""
    nothing = Dataset(np.zeros(0, np.int64), np.zeros(0), np.zeros(0, np.int64))
    return GrowSet({1: candidates.CandidateReader(folder, [REWARD])}, REWARD, nothing)


def run(folder: Path, sources: int, samples_per_source: int, shards: int) -> dict[str, object]:
    """Writes, reads, and returns the table with what it is of."""
    watch = Stopwatch(sources * samples_per_source)
    with watch.measure("write samples"):
        write_samples(folder, sources, samples_per_source, shards)
    with watch.measure("write rewards"):
        write_rewards(folder)
    with watch.measure("verify (digest of every file)"):
        for sealed in (folder, candidates.rewards_folder(folder, REWARD)):
            files.verify_seal(sealed)
    with watch.measure("read all columns and rewards") as line:
        read = sum(len(batch) for batch in candidates.read_batches(folder, rewards=[REWARD]))
        line["result"] = f"{read:,} rows"
    with watch.measure(f"threshold by value ({TAU})") as line:
        survivors = open_set(folder).survivors(Sieve(filters.threshold_rule(TAU)))
        line["result"] = f"{survivors.counts.kept:,} survivors with their tokens"
    del survivors
    per_source = {
        f"percentile {PERCENTILE} of each source": selections.PercentileSchedule((PERCENTILE,)),
        f"best {BEST} of each source": selections.TopKSchedule((BEST,)),
    }
    for what, schedule in per_source.items():
        with watch.measure(what) as line:
            (rule,) = schedule.rules(())
            counts = open_set(folder).survivors(Sieve(rule)).counts
            line["result"] = f"{counts.kept:,} survivors; {counts.sources_with_none:,} sources have none"
    with watch.measure(f"threshold by percentile ({PERCENTILE})") as line:
        rewards = open_set(folder).rewards
        (tau,) = filters.ThresholdSchedule(quantiles=(PERCENTILE,)).absolute(rewards)
        line["result"] = f"tau = {tau!r}"
    with watch.measure("summary") as line:
        summary = describe_samples(candidates.CandidateReader(folder, [REWARD]), REWARD)
        line["result"] = f"mean {summary['reward']['mean']!r}, {summary['duplicates']:,} duplicates"
    facts = files.read_seal(folder)
    assert facts is not None
    return {
        "rows": sources * samples_per_source,
        "sources": sources,
        "tokens": facts.facts["tokens"],
        "bytes_on_disk": {
            "samples": sum(path.stat().st_size for path in folder.glob("samples-*")),
            "rewards": sum(path.stat().st_size for path in folder.glob("rewards/*/rewards-*")),
        },
        "peak_bytes": _peak_bytes(),
        "machine": f"{os.cpu_count()} CPUs, {platform.machine()}, Python {platform.python_version()}, "
        f"pyarrow {pa.__version__}, NumPy {np.__version__}",
        "table": watch.lines,
    }


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=16_000_000, help="samples, a multiple of --samples")
    parser.add_argument("--samples", type=int, default=100, help="samples of each source")
    parser.add_argument("--shards", type=int, default=16, help="files")
    parser.add_argument("--folder", type=Path, help="an empty or new folder; by default a temporary one")
    parser.add_argument("--keep", action="store_true", help="leave the folder there")
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    given = parser.parse_args(arguments)
    if given.samples < 1 or given.rows < 1 or given.rows % given.samples:
        parser.error(f"--rows {given.rows} is no multiple of --samples {given.samples}")
    if not 1 <= given.shards <= given.rows // given.samples:
        parser.error(f"--shards {given.shards} for {given.rows // given.samples} sources")
    if given.folder is not None and given.folder.exists() and any(given.folder.iterdir()):
        parser.error(f"--folder {given.folder} is not empty")
    return given


def main(arguments: list[str] | None = None) -> None:
    """Runs the benchmark."""
    given = parse(arguments)
    folder = given.folder or Path(tempfile.mkdtemp(prefix="rest_jax_store_"))
    try:
        results = run(folder, given.rows // given.samples, given.samples, given.shards)
    finally:
        if not given.keep:
            shutil.rmtree(folder, ignore_errors=True)
    on_disk = results["bytes_on_disk"]
    assert isinstance(on_disk, dict)
    print(
        f"{results['rows']:,} rows, {results['tokens']:,} tokens; on disk "
        f"{on_disk['samples'] / 2**20:,.0f} MiB of samples and {on_disk['rewards'] / 2**20:,.0f} MiB of "
        f"rewards; peak memory {_peak_bytes() / 2**20:,.0f} MiB; {results['machine']}"
    )
    if given.keep:
        print(f"kept: {folder}")
    if given.out is not None:
        given.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
