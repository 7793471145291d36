"""What a training step costs with each of the paper's losses, relative to behaviour cloning.

    python benchmarks/losses.py --out losses.json

The step is the trainer's own, all its checks and metrics included, on one batch of 32 rows of 32 + 32 tokens
and the network of benchmarks/train.py. Steps of BC and of the other loss take turns, so that a busy machine
is busy for both; the ratio is that of the fastest steps. Some losses read or train a second network, and the
table says how many passes through a network of the policy's size a step has: forward and backward for what
is trained, forward alone for what is read.

    --repeats 5        turns of each
    --losses …         a subset, as in the table
    --layers 6         layers on each side
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.train import CONFIG
from benchmarks.train_work import random_batch
from rest_jax.network import init, mesh
from rest_jax.network.config import T5Config
from rest_jax.objectives import actor_critic, gold, policy, ppo, v_mpo, values
from rest_jax.phases import losses
from rest_jax.training import state, step
from rest_jax.training.companions import Companions, make_optimizers
from rest_jax.training.optimizers import OptimizerConfig
from rest_jax.types import ContextLossFn, LossFn, Params, Seq2SeqBatch

OPTIMIZER = OptimizerConfig("adamw", learning_rate=1e-4, weight_decay=0.01)
BC = "BC"


class Case(NamedTuple):
    """A loss ready to be measured.

    Attributes:
      loss_fn: the loss.
      params: what is trained.
      companions: what else there is, or None.
      trained: networks with a forward and a backward pass.
      read: networks with a forward pass alone.
    """

    loss_fn: LossFn | ContextLossFn
    params: Params
    companions: Companions | None
    trained: int = 1
    read: int = 0


def cases(config: T5Config) -> dict[str, Callable[[], Case]]:
    """All losses by their names in tables; parameters are made when one is asked for."""
    start = init.init_params(config, jax.random.key(0))
    value_settings = values.ValueConfig()

    def critic() -> Params:
        return init.init_value_params(config, jax.random.key(1), start)

    def gold_case(sync_period: int) -> Case:
        settings = gold.GoldConfig(sync_period=sync_period)
        lagging = {} if sync_period == 1 else {losses.LAGGING: losses.POLICY}
        companions = Companions(lagging=lagging, sync_period=sync_period, result=losses.POLICY)
        return Case(
            losses.gold_loss(config, settings), {losses.POLICY: start}, companions, read=int(sync_period > 1)
        )

    def v_mpo_case(behaviour_weight: float | None) -> Case:
        settings = v_mpo.VMPOConfig(behaviour_weight=behaviour_weight)
        with_prior = behaviour_weight is not None
        companions = Companions(
            frozen={losses.PRIOR: start} if with_prior else {},
            lagging={losses.LAGGING: losses.POLICY},
            sync_period=settings.sync_period,
            optimizers={losses.DUALS: OptimizerConfig("adam", settings.dual_learning_rate)},
            project=lambda p: {**p, losses.DUALS: v_mpo.project_duals(p[losses.DUALS])},
        )
        params = {losses.POLICY: start, losses.CRITIC: critic(), losses.DUALS: settings.initial_duals()}
        loss_fn = losses.v_mpo_loss(config, config, settings, value_settings)
        return Case(loss_fn, params, companions, trained=2, read=1 + with_prior)

    def bve_case() -> Case:
        companions = Companions(lagging={losses.LAGGING: losses.POLICY}, sync_period=100)
        return Case(losses.bve_loss(config, values.BVEConfig()), {losses.POLICY: start}, companions, read=1)

    def ppo_case() -> Case:
        params = {losses.POLICY: start, losses.CRITIC: critic()}
        return Case(losses.ppo_loss(config, ppo.PPOConfig()), params, Companions(), trained=2)

    return {
        BC: lambda: Case(losses.policy_loss(config, policy.BehaviourCloningConfig()), start, None),
        "GOLD-s (own weights)": lambda: gold_case(1),
        "GOLD-s": lambda: gold_case(3000),
        "OAC": lambda: Case(losses.oac_loss(config, actor_critic.OACConfig()), start, None),
        "value": lambda: Case(losses.value_regression(config, value_settings), critic(), None),
        "BVE": bve_case,
        "V-MPO": lambda: v_mpo_case(None),
        "BVMPO": lambda: v_mpo_case(1.0),
        "PPO": ppo_case,
    }


def batch_of(config: T5Config, rows: int = 32, length: int = 32) -> Seq2SeqBatch:
    """Random tokens with every column that any loss reads."""
    batch = random_batch(config.vocab_size, rows, length)
    draw = np.random.Generator(np.random.Philox(key=1))
    log_probs = (losses.MLE, losses.BEHAVIOUR, "old_log_prob")
    numbers = (losses.REWARD, losses.VALUE, "advantage", "return", "old_value")
    shape = np.shape(batch.decoder_target_tokens)
    columns = {name: -draw.exponential(2.0, shape).astype(np.float32) for name in log_probs}
    columns |= {name: draw.uniform(0, 1, shape).astype(np.float32) for name in numbers}
    return dataclasses.replace(batch, token_columns=columns)


class Stepper:
    """One loss compiled, with its state: call it for one step, in seconds."""

    def __init__(self, case: Case, batch: Seq2SeqBatch):
        self._mesh = mesh.make_mesh(mesh.MeshConfig())
        companions = case.companions or Companions()
        optimizer, schedule = make_optimizers(OPTIMIZER, companions, case.params)
        abstract = state.abstract_state(case.params, optimizer, self._mesh, None, companions.lagging)
        objective = step.Objective(case.loss_fn, case.companions, train_steps=1000)
        self._step = step.make_train_step(objective, optimizer, schedule, 1, self._mesh, abstract)
        self._state = state.init_state(case.params, optimizer, abstract, companions.lagging)
        self._frozen = companions.frozen
        self._batch = step.place_batch(batch, self._mesh)
        self._key_data = np.asarray(jax.random.key_data(jax.random.key(0)))

    def __call__(self) -> float:
        """Makes one step and returns its seconds."""
        began = time.perf_counter()
        with mesh.use_mesh(self._mesh):
            self._state, metrics = self._step(self._state, self._batch, self._key_data, self._frozen)
        jax.block_until_ready(self._state)
        seconds = time.perf_counter() - began
        if metrics["skipped"]:
            raise ValueError("a step was not finite: its time means nothing")
        return seconds


def measure(config: T5Config, names: list[str], repeats: int) -> list[dict[str, Any]]:
    """The fastest step of each loss, and of BC in turns with it."""
    made, batch = cases(config), batch_of(config)
    rows = []
    baseline = Stepper(made[BC](), batch)
    baseline()
    for name in names:
        case = made[name]()
        stepper = Stepper(case, batch)
        stepper()  # compiles
        pairs = [(baseline(), stepper()) for _ in range(repeats)]
        of_bc, own = (min(seconds) for seconds in zip(*pairs, strict=True))
        rows.append(
            {
                "loss": name,
                "ms": 1000 * own,
                "bc_ms": 1000 * of_bc,
                "ratio": own / of_bc,
                "networks_trained": case.trained,
                "networks_read": case.read,
            }
        )
    return rows


def table_of(rows: list[dict[str, Any]]) -> Table:
    """The rows for a terminal."""
    table = Table(title="a training step by its loss", title_justify="left")
    for heading in ("loss", "ms", "BC beside it, ms", "ratio", "networks trained", "networks read"):
        table.add_column(heading, justify="left" if heading == "loss" else "right")
    for row in rows:
        counts = str(row["networks_trained"]), str(row["networks_read"])
        table.add_row(row["loss"], f"{row['ms']:.0f}", f"{row['bc_ms']:.0f}", f"{row['ratio']:.2f}", *counts)
    return table


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--losses", nargs="+", default=None)
    parser.add_argument("--layers", type=int, default=CONFIG.num_encoder_layers)
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    config = dataclasses.replace(
        CONFIG, num_encoder_layers=arguments.layers, num_decoder_layers=arguments.layers
    )
    rows = measure(
        config, arguments.losses or [name for name in cases(config) if name != BC], arguments.repeats
    )
    Console(width=100).print(table_of(rows))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps({"losses": rows}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
