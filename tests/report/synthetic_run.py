"""A made-up run folder with every file that the report reads: two Grow steps of three Improve steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

SIGNATURE = "nrefs:1|bs:1000|seed:0|case:mixed|eff:no|tok:13a|smooth:exp|version:2.6.0"
CHRF_SIGNATURE = "nrefs:1|bs:1000|seed:0|case:mixed|eff:yes|nc:6|nw:0|space:no|version:2.6.0"
HOSTILE = "<script>alert('sample')</script> & \"quoted\" </script><!-- -->"
CONFIG = """SEED = 7
MODEL_PARALLEL = 1
MeshConfig.data = -1
MeshConfig.model = %MODEL_PARALLEL
TsvCorpus.train = '<b>not markup</b>'
"""
SENTENCES = [
    ("他昨天晚上没有来参加会议。", "He did not come to the meeting last night."),
    ("如果明天下雨，我们就待在家里。", "If it rains tomorrow, we will stay at home."),
    ("这本书对我来说太难了。", "This book is too difficult for me."),
    ("你能告诉我去火车站怎么走吗？", "Can you tell me how to get to the railway station?"),
    ("汤姆忘了把门锁上。", "Tom forgot to lock the door."),
    ("我从来没有见过这么漂亮的日落。", "I have never seen such a beautiful sunset."),
    (
        "她决定下个月去上海看望她的祖父母，然后和朋友们一起去杭州旅行。",
        "She decided to go to Shanghai next month to visit her grandparents, and then to Hangzhou.",
    ),
    ("别担心，一切都会好起来的。", "Don't worry, everything is going to be all right."),
]


def write_json(path: Path, value: Any) -> None:
    """Writes JSON, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def estimate(mean: float, half_width: float, signature: str) -> dict[str, Any]:
    """An estimate as the evaluation writes it."""
    return {"mean": mean, "ci95": [mean - half_width, mean + half_width], "signature": signature}


def _samples(
    generator: np.random.Generator, reference: str, low: float, high: float, count: int
) -> list[dict[str, Any]]:
    words = reference.split()
    texts = [" ".join(generator.permutation(words)) if low < 0.4 else reference for _ in range(count)]
    return [
        {"text": t, "reward": float(r)}
        for t, r in zip(texts, generator.uniform(low, high, count), strict=True)
    ]


def evaluation(grow: int, improve: int, reward: float, bleu: float, chrf: float) -> dict[str, Any]:
    """One eval/*.json; `improve` 0 of `grow` 0 is the BC policy."""
    generator = np.random.Generator(np.random.Philox(key=100 * grow + improve))
    drift = 3 * (grow - 1) + improve if grow else 0
    examples = []
    for number, (source, reference) in enumerate(SENTENCES):
        samples = _samples(generator, reference, reward - 0.2, min(1.0, reward + 0.2), 4)
        greedy = reference if drift > 2 else reference.rsplit(" ", 1)[0] + "."
        if number == 1:
            samples[0]["text"] = HOSTILE
        examples.append(
            {
                "id": 900 + number,
                "source": source,
                "reference": reference,
                "greedy": greedy,
                "greedy_reward": reward + 0.01 * number,
                "samples": samples,
            }
        )
    filtered = grow_summary(grow)["thresholds"][improve - 1] if grow else {}
    return {
        "name": f"BC G={grow} I={improve}",
        "grow": grow,
        "improve": improve,
        "loss": "BC",
        "threshold": filtered.get("threshold"),
        "threshold_quantile": filtered.get("quantile"),
        "kept": filtered["kept_samples"] + filtered["kept_dataset"] if grow else None,
        "samples": 96_000 if grow else None,
        "split": "test",
        "sources": 1000,
        "samples_per_source": 4,
        "reward": estimate(reward, 0.0085, "learned:chrf|T=0.8|n:4|version:1|digest:0f3a9c"),
        "reward_greedy": estimate(reward + 0.03, 0.009, "learned:chrf|greedy|version:1|digest:0f3a9c"),
        "bleu": estimate(bleu, 1.3, SIGNATURE),
        "chrf": estimate(chrf, 1.1, CHRF_SIGNATURE),
        "bleu_samples": estimate(bleu - 3.1, 1.1, SIGNATURE),
        "chrf_samples": estimate(chrf - 3.4, 0.9, CHRF_SIGNATURE),
        "diagnostics": {
            "length_ratio": 0.97 + 0.01 * drift,
            "copy_rate": 0.004,
            "empty_rate": 0.001,
            "truncated_rate": 0.0125 / (1 + drift),
            "distinct_1": 0.21 - 0.01 * drift,
            "distinct_2": 0.58 - 0.02 * drift,
            "repeated_ngram_rate": 0.031 / (1 + drift),
        },
        "seconds": 14.2,
        "examples": examples,
    }


def grow_summary(grow: int) -> dict[str, Any]:
    """One grow/g*/summary.json."""
    generator = np.random.Generator(np.random.Philox(key=grow))
    rewards = generator.beta(4 + 1.5 * grow, 3.6, 96_000)
    dataset = generator.beta(7, 3, 12_000)
    edges = np.linspace(0, 1, 51)
    thresholds = []
    for improve, quantile in enumerate((0.6, 0.75, 0.9), start=1):
        tau = float(np.quantile(rewards, quantile))
        thresholds.append(
            {
                "improve": improve,
                "quantile": quantile,
                "threshold": tau,
                "kept_samples": int((rewards > tau).sum()),
                "kept_dataset": int((dataset > tau).sum()),
                "sources_with_none": 140 * improve * improve,
            }
        )
    examples = []
    for number, (source, reference) in enumerate(SENTENCES):
        best = sorted(_samples(generator, reference, 0.85, 0.97, 3), key=lambda s: -s["reward"])
        worst = sorted(_samples(generator, reference, 0.05, 0.3, 3), key=lambda s: s["reward"])
        if number == 0:
            worst[0]["text"] = HOSTILE
            worst[1]["text"] = ""
        examples.append(
            {"id": number, "source": source, "reference": reference, "best": best, "worst": worst}
        )
    return {
        "grow": grow,
        "samples": 96_000,
        "sources": 12_000,
        "duplicates": 8_211,
        "truncated": 402,
        "empty": 31,
        "copies_of_source": 0,
        "dataset_reward": {"mean": float(dataset.mean()), "pairs": 12_000},
        "reward": {
            "mean": float(rewards.mean()),
            "quantiles": {str(q): float(np.quantile(rewards, q)) for q in (0.1, 0.25, 0.5, 0.75, 0.9)},
        },
        "histogram": {
            "edges": edges.tolist(),
            "samples": np.histogram(rewards, edges)[0].tolist(),
            "dataset": np.histogram(dataset, edges)[0].tolist(),
        },
        "thresholds": thresholds,
        "examples": examples,
    }


def validation() -> dict[str, Any]:
    """reward/model/validation.json."""
    generator = np.random.Generator(np.random.Philox(key=7))
    chrf = generator.beta(3, 2.5, 400)
    reward = np.clip(0.15 + 0.7 * chrf + generator.normal(0, 0.09, 400), 0, 1)
    shares = {"permuted": 0.952, "repeated": 0.991, "truncated": 0.874, "copied": 0.999, "empty": 1.0}
    return {
        "spearman": 0.71,
        "kendall": 0.53,
        "spearman_within_source": 0.58,
        "n": 4000,
        "sources": 500,
        "corruptions": {kind: {"share_below": share, "n": 500} for kind, share in shares.items()},
        "corruptions_of_samples": {
            kind: {"share_below": share - 0.06, "n": 480} for kind, share in shares.items()
        },
        "rater": "automatic: sentence chrF against references",
        "signature": "learned:chrf|version:1|digest:0f3a9c",
        "scatter": np.stack([chrf, reward], axis=1).round(4).tolist(),
    }


def _metrics_lines() -> list[dict[str, Any]]:
    generator = np.random.Generator(np.random.Philox(key=3))
    lines: list[dict[str, Any]] = []
    for phase, start, end, steps in (("policy/bc", 8.3, 2.1, 3000), ("reward/model", 0.69, 0.55, 800)):
        for step in range(20, steps + 1, 20):
            loss = end + (start - end) * np.exp(-step / (steps / 6)) + generator.normal(0, 0.02 * end)
            lines.append(
                {
                    "time": 1.0,
                    "phase": phase,
                    "step": step,
                    "metrics": {"train/loss": float(loss), "train/learning_rate": 1e-3},
                }
            )
            if step % 200 == 0:
                lines.append(
                    {"time": 1.0, "phase": phase, "step": step, "metrics": {"valid/loss": float(loss + 0.08)}}
                )
    for grow, improve in _steps():
        for step in range(20, 401, 20):
            loss = 1.6 - 0.05 * improve - 0.1 * grow + 0.3 * np.exp(-step / 80) + generator.normal(0, 0.02)
            metrics = {"train/loss": float(loss)}
            if step % 100 == 0:
                metrics["valid/reward"] = 0.6 + 0.02 * (3 * (grow - 1) + improve) + step / 20_000
            lines.append(
                {"time": 1.0, "phase": f"policy/g{grow}_i{improve}", "step": step, "metrics": metrics}
            )
    return lines


def _steps() -> list[tuple[int, int]]:
    return [(grow, improve) for grow in (1, 2) for improve in (1, 2, 3)]


def _ledger_lines() -> list[dict[str, Any]]:
    splits = {"train": 48_300, "rater": 4_000, "valid": 1_000, "test": 1_000}
    steps: list[tuple[str, str, float, dict[str, Any]]] = [
        ("vocab", "vocab", 4.1, {"size": 4096}),
        ("data", "vocab", 21.9, {split: {"pairs": pairs, "left_out": 3} for split, pairs in splits.items()}),
        ("policy/bc", "pretrain", 188.0, {"best_step": 2800}),
        ("reward/ratings", "reward_model", 31.5, {}),
        ("reward/model", "reward_model", 74.9, {}),
        ("eval/bc", "evaluate", 14.2, {}),
    ]
    for grow in (1, 2):
        steps.append((f"grow/g{grow}", "grow", 41.0 + grow, {}))
        steps.append((f"grow/g{grow}/rewards/learned", "annotate", 12.3, {}))
        for improve in (1, 2, 3):
            steps.append((f"policy/g{grow}_i{improve}", "improve", 29.4 - improve, {}))
            steps.append((f"eval/g{grow}_i{improve}", "evaluate", 14.0, {}))
    versions = {"rest_jax": "0.1.0", "jax": "0.10.2", "device": "cpu"}
    return [
        {
            "time": "2026-01-01T10:00:00+00:00",
            "step": step,
            "phase": phase,
            "seconds": seconds,
            "identity": "a" * 64,
            "digest": "b" * 64,
            "facts": {**found, "seconds": seconds, "versions": versions},
        }
        for step, phase, seconds, found in steps
    ]


def _write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")


def build_run(run_dir: Path) -> Path:
    """Writes the whole run below `run_dir` and returns it. In Grow 2 the reward outruns chrF and BLEU."""
    run_dir.mkdir(parents=True, exist_ok=True)
    write_json(run_dir / "eval/bc.json", evaluation(0, 0, 0.602, 21.4, 43.1))
    gains = [
        (0.640, 22.6, 44.0),
        (0.662, 23.1, 44.9),
        (0.671, 23.0, 44.6),
        (0.699, 22.0, 43.6),
        (0.716, 20.9, 42.5),
        (0.729, 19.4, 41.3),
    ]
    for (grow, improve), (reward, bleu, chrf) in zip(_steps(), gains, strict=True):
        write_json(run_dir / f"eval/g{grow}_i{improve}.json", evaluation(grow, improve, reward, bleu, chrf))
        write_json(
            run_dir / f"policy/g{grow}_i{improve}/fit.json",
            {
                "best_step": 300,
                "best_metric": "valid/reward",
                "best_value": reward,
                "steps": 400,
                "history": [
                    {"step": 300, "valid/reward": reward},
                    {"step": 400, "valid/reward": reward - 0.004},
                ],
            },
        )
    write_json(
        run_dir / "policy/bc/fit.json",
        {
            "best_step": 2800,
            "best_metric": "valid/loss",
            "best_value": 2.16,
            "steps": 3000,
            "history": [{"step": 2800, "valid/loss": 2.16}],
        },
    )
    for grow in (1, 2):
        summary = grow_summary(grow)
        if grow == 2:  # as the phases write it: thresholds in the stories of the Improve steps
            for story in summary.pop("thresholds"):
                story = {**story, "threshold_quantile": story["quantile"], "started_from": "…"}
                write_json(run_dir / f"policy/g2_i{story.pop('improve')}/improve.json", story)
        write_json(run_dir / f"grow/g{grow}/summary.json", summary)
    write_json(run_dir / "reward/model/validation.json", validation())
    _write_lines(run_dir / "metrics.jsonl", _metrics_lines())
    _write_lines(run_dir / "ledger.jsonl", _ledger_lines())
    (run_dir / "config.gin").write_text(CONFIG, encoding="utf-8")
    corpus = {"__class__": "HsgTatoebaCorpus", "source_language": "zh", "target_language": "en"}
    write_json(run_dir / "data/IDENTITY.json", {"phase": "vocab", "seed": 7, "corpus": corpus})
    return run_dir
