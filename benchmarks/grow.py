"""How fast Grow samples, beside Hugging Face, CTranslate2 and (where it can be imported) T5X.

    python benchmarks/grow.py --out results.json

One policy, the same sources, temperature 0.8, real stopping at EOS; each engine in a process of its own,
one after the other, with all cores. The policy is trained first if its run folder is not there (some ten
minutes on two cores; benchmarks/grow.gin). Printed: tokens up to EOS a second, the ratio to each peer,
distinct samples, peak memory, and the share of the machine's matrix-product limit. Checked: all engines
sample one distribution, by mean length and mean log-probability under one scorer.

    --run F            a finished `pretrain` run (default: runs/benchmark_grow)
    --tsv F            train on these pairs instead of the demo's corpus; with --languages=de,en
    --samples 16 100   N, one table each; 2 or more
    --sources 64       as many sources for every N, not as many samples: how sharing grows with N
    --repeats 3        how often the whole comparison is done
    --engines …        a subset of rest_jax rest_jax_bfloat16 huggingface ctranslate2_float32 ctranslate2_int8
                       t5x, with rest_jax among them
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

OURS = ("rest_jax", "rest_jax_bfloat16")
PEERS = ("huggingface", "ctranslate2_float32", "ctranslate2_int8", "t5x")
NEEDS = {
    "huggingface": ("torch", "transformers"),
    "ctranslate2_float32": ("ctranslate2", "transformers"),
    "ctranslate2_int8": ("ctranslate2", "transformers"),
    "t5x": ("t5x", "seqio"),
}
# int8 weights and roundings to bfloat16 make another model: near the policy's distribution, not equal to it.
EXACT = ("rest_jax", "huggingface", "ctranslate2_float32", "t5x")
STANDARD_ERRORS = 4.0


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, default=Path("runs/benchmark_grow"))
    parser.add_argument("--gin_file", default=str(ROOT / "benchmarks" / "grow.gin"))
    parser.add_argument("--tsv", default=None)
    parser.add_argument("--languages", default="de,en", help="of --tsv: source,target")
    parser.add_argument("--samples", type=int, nargs="+", default=[16, 100])
    parser.add_argument("--total_samples", type=int, default=6400, help="sources times N, of each run")
    parser.add_argument("--sources", type=int, default=None, help="in place of --total_samples")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--engines", nargs="+", default=[*OURS, *PEERS])
    parser.add_argument("--out", type=Path, default=None, help="where the results go as JSON")
    options = parser.parse_args()
    if min(options.samples) < 2:
        parser.error("--samples: 2 or more, since the check goes by differences within a source")
    if "rest_jax" not in options.engines:
        parser.error("--engines: rest_jax has to be among them, since all others are compared with it")
    return options


def settings(options: argparse.Namespace) -> list[str]:
    """The flags that say which policy."""
    flags = [f"--gin_file={options.gin_file}", f'--gin.MODEL_DIR="{options.run}"']
    if options.tsv:
        source, target = options.languages.split(",")
        bindings = {
            "Experiment.corpus": "@TsvCorpus()",
            "TsvCorpus.train": f'"{options.tsv}"',
            "TsvCorpus.source_language": f'"{source}"',
            "TsvCorpus.target_language": f'"{target}"',
        }
        flags += [f"--gin.{key}={value}" for key, value in bindings.items()]
    return flags


def program(*words: str) -> None:
    """Runs a verb of rest_jax, showing what it says."""
    subprocess.run([sys.executable, "-m", "rest_jax.main", *words], check=True, cwd=ROOT)


def prepare(options: argparse.Namespace) -> Path:
    """Trains the policy if need be and exports it; the folder of the exports."""
    options.run = options.run.absolute()
    for verb in ("vocab", "pretrain"):
        program(verb, *settings(options))
    exports = options.run / "exports"
    if not (exports / "hf" / "config.json").exists():
        program("export", *settings(options), "--policy=bc", f"--output={exports / 'hf'}")
    if importlib.util.find_spec("ctranslate2") is not None:
        for quantization in ("float32", "int8"):
            convert_for_ctranslate2(exports, quantization)
    return exports


def convert_for_ctranslate2(exports: Path, quantization: str) -> None:
    """Converts the Hugging Face export.

    transformers 5 says of every T5 that its head is tied, whatever its configuration file says, and the
    converter would scale the logits of an untied one: it is told what the file says.
    """
    import ctranslate2

    says_tied = json.loads((exports / "hf" / "config.json").read_text())["tie_word_embeddings"]

    class Converter(ctranslate2.converters.TransformersConverter):
        def load_model(self, *words: Any, **more: Any) -> Any:
            model = super().load_model(*words, **more)
            model.config.tie_word_embeddings = says_tied
            return model

    folder = exports / f"ctranslate2_{quantization}"
    if not (folder / "model.bin").exists():
        Converter(str(exports / "hf")).convert(str(folder), quantization=quantization, force=True)


def write_work(options: argparse.Namespace, exports: Path, num_samples: int) -> tuple[Path, Any]:
    """The sources of one comparison, as a file for the engines, and what scores the samples."""
    from benchmarks import grow_scoring

    scoring = grow_scoring.Scoring(settings(options))
    sources = scoring.sources(options.sources or max(1, options.total_samples // num_samples))
    path = exports / f"work_{num_samples}.json"
    work = {
        "sources": sources,
        "ids": scoring.ids[: len(sources)],
        "num_samples": num_samples,
        "max_length": scoring.max_length,
        "temperature": 0.8,
        "exports": str(exports),
        "settings": settings(options),
        "vocab_size": scoring.vocab_size,
    }
    path.write_text(json.dumps(work), encoding="utf-8")
    return path, scoring


def run_engine(name: str, work: Path) -> dict[str, Any]:
    """One engine in its own process: seconds, samples, peak memory."""
    output = work.with_name(f"{work.stem}_{name}.npz")
    command = [sys.executable, str(ROOT / "benchmarks" / "grow_engines.py"), name, str(work), str(output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
    return {**json.loads(done.stdout.strip().splitlines()[-1]), "output": output}


def compare(options: argparse.Namespace, exports: Path, num_samples: int) -> dict[str, Any]:
    """All engines on the same work; the row of `results.json`."""
    work, scoring = write_work(options, exports, num_samples)
    engines = [name for name in options.engines if all(map(importlib.util.find_spec, NEEDS.get(name, ())))]
    found: dict[str, dict[str, Any]] = {}
    for name in engines:
        result = run_engine(name, work)
        samples = np.load(result.pop("output"))
        lengths = (samples["tokens"] != 0).sum(-1)
        scores = scoring.log_probs(samples["tokens"], work)
        found[name] = {
            **result,
            "tokens": int(lengths.sum()),
            "tokens_per_s": float(lengths.sum() / result["seconds"]),
            "distinct_samples": scoring.distinct(samples["tokens"]),
            "mean_length": mean_of_sources(lengths),
            "mean_log_prob": mean_of_sources(scores),
        }
        print(
            f"N={num_samples} {name}: {found[name]['tokens_per_s']:.0f} tokens/s", file=sys.stderr, flush=True
        )
    ours = found["rest_jax"]
    limit = scoring.matmul_limit()
    same = {name: same_distribution(ours, other) for name, other in found.items() if name in EXACT}
    return {
        "n": num_samples,
        "sources": len(json.loads(work.read_text())["sources"]),
        "tokens_per_s": ours["tokens_per_s"],
        "rows_per_s": ours["rows_computed"] / ours["seconds"],
        "sharing": ours["tokens"] / ours["rows_computed"],
        "matmul_limit_rows_per_s": limit,
        "share_of_matmul_limit": ours["rows_computed"] / ours["seconds"] / limit,
        "tokens_over_matmul_limit": ours["tokens_per_s"] / limit,
        **ratios_to_peers(found),
        "same_distribution": same,
        "engines": found,
    }


def ratios_to_peers(found: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """How many times as fast as each peer we are: {"ratios": {peer: …}, "ratios_bfloat16": {peer: …}}."""
    speeds = {name: engine["tokens_per_s"] for name, engine in found.items()}
    return {
        ours.replace("rest_jax", "ratios"): {n: speeds[ours] / speeds[n] for n in speeds if n not in OURS}
        for ours in OURS
        if ours in speeds
    }


def mean_of_sources(values_SxN: np.ndarray) -> list[float]:
    """Mean and its standard error, [mean, error], over whole sources."""
    means = values_SxN.mean(axis=1)
    within = values_SxN.var(axis=1, ddof=1) / values_SxN.shape[1]
    # The sources are the same for all engines, so only the draws are random.
    return [float(means.mean()), float(math.sqrt(within.sum()) / len(means))]


def same_distribution(left: dict[str, Any], right: dict[str, Any]) -> bool:
    """Whether mean length and mean log-probability differ by no more than chance lets them."""
    for key in ("mean_length", "mean_log_prob"):
        error = math.hypot(left[key][1], right[key][1])
        if abs(left[key][0] - right[key][0]) > STANDARD_ERRORS * error:
            return False
    return True


def print_table(row: dict[str, Any]) -> None:
    """One comparison as a table."""
    table = Table(title=f"N = {row['n']}, {row['sources']} sources, T = 0.8", title_justify="left")
    ours = {"rest_jax is": row["ratios"], "bfloat16 is": row.get("ratios_bfloat16", {})}
    for name in ("engine", "tokens/s", *ours, "distinct", "length", "log-prob", "peak MiB"):
        table.add_column(name, justify="left" if name == "engine" else "right")
    for name, found in row["engines"].items():
        table.add_row(
            name,
            f"{found['tokens_per_s']:,.0f}",
            *(f"{ratios[name]:.2f} x" if name in ratios else "" for ratios in ours.values()),
            f"{found['distinct_samples']:,}",
            f"{found['mean_length'][0]:.2f}",
            f"{found['mean_log_prob'][0]:.2f}",
            f"{found['peak_mib']:,.0f}",
        )
    console = Console(width=110)
    console.print(table)
    console.print(
        f"{row['sharing']:.2f} tokens a row computed; {row['rows_per_s']:,.0f} rows/s are "
        f"{100 * row['share_of_matmul_limit']:.0f} % of the matrix-product limit "
        f"({row['matmul_limit_rows_per_s']:,.0f} rows/s); same distribution: {row['same_distribution']}"
    )


def main() -> int:
    """Runs the comparison; 1 if two engines that should sample the same distribution do not."""
    options = arguments()
    started = time.monotonic()
    exports = prepare(options)
    rows = []
    for _ in range(options.repeats):
        for num_samples in options.samples:
            rows.append(compare(options, exports, num_samples))
            print_table(rows[-1])
            if options.out is not None:
                report = {"runs": rows, "cores": os.cpu_count(), "seconds": time.monotonic() - started}
                options.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0 if all(all(row["same_distribution"].values()) for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
