"""How fast a step of behaviour cloning is, beside PyTorch and (where it can be imported) T5X's network.

    python benchmarks/train.py --out results.json

The same first weights, the same batches, AdamW with the same settings, float32, no dropout: rest_jax (the
step that the trainer runs), Hugging Face's T5 with PyTorch, T5X's network and loss under `jit`. The engines
wait in processes of their own and are measured in turns, so that a busy machine is busy for all. Two
comparisons:

  padded  one batch of 32 rows of 32 + 32 tokens: steps a second, and the share of what the machine could do
          if nothing but the products with the weights were computed.
  packed  real sentences: target tokens of text a second. rest_jax packs pairs into rows (T5X's network takes
          the same rows); PyTorch gets the same pairs padded to the longest of a batch, in the same order, and
          once more with sentences of like length in one batch.

Checked before: all engines have the same loss at the first step and at the following ones.

    --run F            where the vocabulary and the tokenised text are kept (default: runs/benchmark_train)
    --tsv F            sentences to take instead of the demo's corpus; with --languages=de,en
    --repeats 5        how often each engine has its turn; best and median are reported
    --engines …        a subset of rest_jax pytorch t5x
    --padded_only      no text is needed
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import train_work
from benchmarks.train_work import IN_ORDER, PACKED, PADDED, SORTED, WORKLOADS, Packing, Work
from rest_jax.network.config import T5Config
from rest_jax.training.optimizers import OptimizerConfig
from rest_jax.types import TokenPairs

ROOT = Path(__file__).resolve().parents[1]
NEEDS = {"pytorch": ("torch", "transformers"), "t5x": ("t5x", "seqio")}
CONFIG = T5Config(
    vocab_size=8192,
    emb_dim=512,
    num_heads=8,
    head_dim=64,
    mlp_dim=1024,
    num_encoder_layers=6,
    num_decoder_layers=6,
    mlp_activations=("gelu", "linear"),
    dropout_rate=0.0,
)
OPTIMIZER = OptimizerConfig(name="adamw", learning_rate=1e-3, weight_decay=0.01, clip_norm=1.0)
# Relative. The first step's loss is one forward pass; behind it stand updates that divide by the root of the
# second moment, which makes much of the rounding error of a small gradient.
FIRST_TOLERANCE, LATER_TOLERANCE = 1e-5, 2e-4
CHECKED_STEPS = 5


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, default=Path("runs/benchmark_train"))
    parser.add_argument("--gin_file", default=str(ROOT / "benchmarks" / "grow.gin"), help="of the text")
    parser.add_argument("--tsv", default=None)
    parser.add_argument("--languages", default="de,en", help="of --tsv: source,target")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="of the padded batch, a turn")
    parser.add_argument("--engines", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--padded_only", action="store_true", help="without text")
    parser.add_argument("--out", type=Path, default=None, help="where the results go as JSON")
    return parser.parse_args(words)


def read_pairs(options: argparse.Namespace, config: T5Config, packing: Packing) -> TokenPairs:
    """The training text in tokens, those pairs that a packed row can hold; made first if need be."""
    from benchmarks.grow import program, settings
    from benchmarks.grow_scoring import load_experiment
    from rest_jax.phases.workspace import Workspace

    options.run = options.run.absolute()
    flags = [*settings(options), f"--gin.VOCAB_SIZE={config.vocab_size}"]
    program("vocab", *flags)
    pairs = Workspace(load_experiment(flags)).split("train").tokens
    fits = (pairs.sources.lengths <= packing.length) & (pairs.targets.lengths <= packing.length)
    return pairs.take(fits.nonzero()[0])


class Peer:
    """An engine that waits in its own process for its turns."""

    def __init__(self, name: str, folder: Path):
        self.name = name
        self._errors = (folder / f"{name}.log").open("w+", encoding="utf-8")
        command = [sys.executable, str(ROOT / "benchmarks" / "train_engines.py"), name, str(folder)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True, cwd=ROOT
        )

    def run(self, workload: str, steps: int, fresh: bool = False) -> dict[str, Any]:
        """Steps over the batches of a workload in turn: the loss and the seconds of each."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(
                json.dumps({"workload": workload, "steps": steps, "fresh": fresh}) + "\n"
            )
            self._process.stdin.flush()
        # What a library prints of itself is passed over.
        answer = next((line for line in self._process.stdout if line.startswith('{"losses"')), None)
        if answer is None:
            self._errors.seek(0)
            raise SystemExit(f"{self.name} failed:\n{self._errors.read()[-3000:]}")
        found: dict[str, Any] = json.loads(answer)
        return found

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        self._errors.close()


@contextlib.contextmanager
def waiting(names: list[str], folder: Path) -> Iterator[list[Peer]]:
    """The engines' processes."""
    peers = [Peer(name, folder) for name in names]
    try:
        yield peers
    finally:
        for peer in peers:
            peer.close()


def compare(work: Work, names: list[str], repeats: int, steps: int) -> dict[str, Any]:
    """Checks the losses, then measures in turns; the report without its frame."""
    with tempfile.TemporaryDirectory() as scratch:
        work.write(Path(scratch))
        with waiting(names, Path(scratch)) as peers:
            losses = {peer.name: first_losses(peer, work) for peer in peers}
            turns: dict[tuple[str, str], list[dict[str, Any]]] = {}
            for turn in range(repeats):
                for peer in peers:
                    for kind in work.of_engine(peer.name):
                        found = peer.run(kind, steps if kind == PADDED else len(work.batches[kind]))
                        turns.setdefault((peer.name, kind), []).append(found)
                print(f"turn {turn + 1} of {repeats} is done", file=sys.stderr, flush=True)
    padded = {name: padded_row(turns[name, PADDED]) for name in names}
    report = {"losses": losses, "agreement": agreement(losses), "padded": with_ratios(padded, "steps_per_s")}
    limit = train_work.matmul_limit(work.config, work.batches[PADDED][0])
    report["padded"] |= {
        "matmul_limit_steps_per_s": limit,
        "share_of_matmul_limit": padded["rest_jax"]["steps_per_s"] / limit,
    }
    if PACKED in work.batches:
        packed = {
            name if kind == PACKED else f"{name}, {kind}": packed_row(turns[name, kind], work.batches[kind])
            for name, kind in turns
            if kind != PADDED
        }
        report["packed"] = with_ratios(packed, "useful_tokens_per_s")
    return report


def first_losses(peer: Peer, work: Work) -> dict[str, list[float]]:
    """The losses of the first steps on each kind of batches, compilation included.

    Only batches of the same pairs at every step can be compared, so sorted ones are compiled and left out.
    """
    found = {}
    for kind in work.of_engine(peer.name):
        number = CHECKED_STEPS if kind == PADDED else len(work.batches[kind])
        losses = peer.run(kind, number, fresh=True)["losses"]
        if kind != SORTED:
            found[PACKED if kind == IN_ORDER else kind] = losses
    return found


def agreement(losses: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, Any]]:
    """The largest relative difference to rest_jax's losses, at the first step and at the later ones."""
    found = {}
    for kind, ours in losses["rest_jax"].items():
        others = [theirs[kind] for name, theirs in losses.items() if name != "rest_jax"]
        apart = [[abs(a - b) / b for a, b in zip(theirs, ours, strict=True)] for theirs in others]
        first = max((each[0] for each in apart), default=0.0)
        later = max((max(each[1:], default=0.0) for each in apart), default=0.0)
        # Written so that a NaN is no agreement.
        same = all(each[0] <= FIRST_TOLERANCE for each in apart) and all(
            difference <= LATER_TOLERANCE for each in apart for difference in each
        )
        found[kind] = {"first": first, "later": later, "same": same}
    return found


def padded_row(turns: list[dict[str, Any]]) -> dict[str, float]:
    """Steps a second, of the fastest step, and milliseconds of that and of the median one."""
    seconds = [second for turn in turns for second in turn["seconds"]]
    return {
        "steps_per_s": 1 / min(seconds),
        "ms": 1000 * min(seconds),
        "median_ms": 1000 * statistics.median(seconds),
        "peak_mib": max(turn["peak_mib"] for turn in turns),
    }


def packed_row(turns: list[dict[str, Any]], batches: list[train_work.Arrays]) -> dict[str, float]:
    """Target tokens of text a second: each batch by its fastest turn, and by the median one."""
    seconds_of_batch = list(zip(*(turn["seconds"] for turn in turns), strict=True))
    best = sum(min(each) for each in seconds_of_batch)
    median = sum(statistics.median(each) for each in seconds_of_batch)
    tokens = train_work.useful_tokens(batches)
    return {
        "useful_tokens_per_s": tokens / best,
        "median_useful_tokens_per_s": tokens / median,
        "ms": 1000 * best,
        "useful_tokens": tokens,
        "fill": train_work.fill(batches),
    }


def with_ratios(rows: dict[str, dict[str, float]], rate: str) -> dict[str, Any]:
    """The rows, and how many times as fast rest_jax is, by the best turns and by the median ones."""
    ours = rows["rest_jax"]
    ratios = {name: ours[rate] / row[rate] for name, row in rows.items() if name != "rest_jax"}
    if rate == "steps_per_s":
        medians = {name: rows[name]["median_ms"] / ours["median_ms"] for name in ratios}
    else:
        medians = {name: ours[f"median_{rate}"] / rows[name][f"median_{rate}"] for name in ratios}
    return {**rows, "ratios": ratios, "median_ratios": medians}


def print_tables(report: dict[str, Any]) -> None:
    """The report as tables."""
    console = Console(width=110)
    wanted = {
        "padded": {"steps/s": ("steps_per_s", ".3f"), "ms": ("ms", ",.0f"),
                   "median ms": ("median_ms", ",.0f"), "peak MiB": ("peak_mib", ",.0f")},
        "packed": {"text tokens/s": ("useful_tokens_per_s", ",.0f"),
                   "median": ("median_useful_tokens_per_s", ",.0f"), "fill": ("fill", ".0%")},
    }  # fmt: skip
    for name, columns in wanted.items():
        if name not in report:
            continue
        found = report[name]
        table = Table(title=name, title_justify="left")
        for title in ("engine", *columns, "rest_jax is", "by medians"):
            table.add_column(title, justify="left" if title == "engine" else "right")
        for engine, row in found.items():
            if not isinstance(row, dict) or "ms" not in row:
                continue
            ratios = [
                f"{found[key][engine]:.2f} x" if engine in found[key] else ""
                for key in ("ratios", "median_ratios")
            ]
            table.add_row(engine, *(format(row[key], form) for key, form in columns.values()), *ratios)
        console.print(table)
    console.print(
        f"{100 * report['padded']['share_of_matmul_limit']:.0f} % of the matrix-product limit "
        f"({report['padded']['matmul_limit_steps_per_s']:.3f} steps/s)"
    )
    for kind, found in report["agreement"].items():
        console.print(
            f"losses, {kind}: they differ by at most {found['first']:.1e} at the first step and "
            f"{found['later']:.1e} later (relative; allowed {FIRST_TOLERANCE:.0e} and {LATER_TOLERANCE:.0e})"
        )


def main() -> int:
    """Runs the comparison; 1 if the losses of two engines differ."""
    options = arguments()
    started, packing = time.monotonic(), Packing()
    pairs = None if options.padded_only else read_pairs(options, CONFIG, packing)
    work = train_work.make_work(CONFIG, OPTIMIZER, train_work.random_batch(CONFIG.vocab_size), pairs, packing)
    names = [name for name in options.engines if all(map(importlib.util.find_spec, NEEDS.get(name, ())))]
    report = compare(work, names, options.repeats, options.steps)
    report |= {"cores": os.cpu_count(), "seconds": time.monotonic() - started}
    print_tables(report)
    if options.out is not None:
        options.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0 if all(found["same"] for found in report["agreement"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
