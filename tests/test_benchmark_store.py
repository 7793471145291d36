"""The benchmark of the candidate store, small: it runs, is right, and cleans up. Times are not judged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from rest_jax.data import candidates

ROOT = Path(__file__).resolve().parents[1]
ROWS = 20_000


def benchmark(*arguments: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "benchmarks" / "store.py"), *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def test_a_small_store_is_written_measured_and_kept_only_if_asked(tmp_path):
    folder, out = tmp_path / "kept", tmp_path / "results.json"
    given = ("--rows", str(ROWS), "--shards", "3", "--folder", str(folder), "--out", str(out))
    done = benchmark(*given, "--keep")
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    results = {line["what"]: line.get("result") for line in found["table"]}
    assert len(results) == 9
    assert all(what in done.stdout for what in results)
    assert (found["rows"], found["sources"]) == (ROWS, 200)
    assert found["bytes_on_disk"]["samples"] == sum(p.stat().st_size for p in folder.glob("samples-*"))

    # The same again, of all rows at once.
    parts = list(candidates.read_scored(folder, "learned"))
    rewards = np.concatenate([rewards for _, rewards in parts])
    truncated = np.concatenate([shard.truncated for shard, _ in parts])
    pairs = [pair for shard, _ in parts for pair in zip(shard.example_id.tolist(), shard.text, strict=True)]
    assert len(rewards) == len(pairs) == ROWS
    assert found["tokens"] == sum(len(shard.tokens.values) for shard, _ in parts)
    kept = int(((rewards > 0.95) & ~truncated).sum())
    assert results["threshold by value (0.95)"] == f"{kept:,} survivors with their tokens"
    # Per source, with the truncated ones out; rewards of this benchmark do not tie.
    a_source = np.where(truncated, np.nan, rewards).reshape(200, 100)
    best = above = 0
    for row in a_source:
        ranked = np.sort(row[np.isfinite(row)])
        best += min(4, len(ranked))
        above += len(ranked) - -(-9 * len(ranked) // 10)
    assert results["best 4 of each source"] == f"{best:,} survivors; 0 sources have none"
    assert results["percentile 0.9 of each source"] == f"{above:,} survivors; 0 sources have none"
    finite = np.sort(rewards[np.isfinite(rewards)])
    rank = -(-9 * len(finite) // 10)
    assert results["threshold by percentile (0.9)"] == f"tau = {float(finite[rank - 1])!r}"
    assert results["summary"].endswith(f", {ROWS - len(set(pairs)):,} duplicates")

    assert benchmark(*given).returncode == 2  # the folder is not empty
    done = benchmark(*given[:4], "--folder", str(tmp_path / "gone"))
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept", "results.json"]


def test_rows_are_whole_sources():
    done = benchmark("--rows", "150")
    assert done.returncode == 2
    assert "--rows 150 is no multiple of --samples 100" in done.stderr
