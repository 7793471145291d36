"""Trains the toy classifier, as a program to be killed: python -m tests.training.toy_fit RUN_DIR …"""

from __future__ import annotations

import argparse
import sys
import time

import jax

from rest_jax.network.mesh import MeshConfig, make_mesh
from rest_jax.training.evaluators import LossEvaluator
from rest_jax.training.logbook import Logbook
from rest_jax.training.optimizers import OptimizerConfig
from rest_jax.training.trainer import Trainer, TrainerConfig
from tests.training import toys


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run_dir")
    parser.add_argument("--optimizer", default="adamw")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--microbatches", type=int, default=1)
    parser.add_argument("--step-seconds", type=float, default=0.0)
    parser.add_argument("--slow-evaluation-at", type=int, default=-1)
    parser.add_argument("--process", type=int, default=0)
    parser.add_argument("--coordinator", default="")
    args = parser.parse_args()
    if args.coordinator:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(args.coordinator, num_processes=2, process_id=args.process)
    mesh = make_mesh(MeshConfig())
    config = TrainerConfig(
        train_steps=args.steps,
        batch_size=8,
        microbatches=args.microbatches,
        eval_period=5,
        checkpoint_period=3,
        log_period=2,
        optimizer=OptimizerConfig(args.optimizer, learning_rate=0.02, schedule="rsqrt", warmup_steps=2),
    )

    def batch_at(step):
        print("batch", step, flush=True)
        time.sleep(args.step_seconds)
        return toys.classifier_batch(step)

    loss = LossEvaluator(toys.classifier_loss, [toys.classifier_batch(100)], mesh)

    def evaluate(params, step):
        if step == args.slow_evaluation_at:
            print("slow evaluation", flush=True)
            time.sleep(60)
        return loss(params, step)

    with Logbook(args.run_dir, stream=sys.stderr) as logbook:
        trainer = Trainer(config, toys.classifier_loss, mesh)
        result = trainer.fit(toys.classifier_params(), batch_at, [evaluate], f"{args.run_dir}/bc", logbook, 3)
    print("digest", result.params_digest, flush=True)


if __name__ == "__main__":
    main()
