"""The one trainer: policy, reward model and Improve differ only in a loss function and a batch.

Floor 5. Training in a folder can be killed anywhere; the same call goes on from the newest intact checkpoint
and ends in the same parameters, bit for bit, on the same devices. What it leaves behind:

    folder/checkpoints/   see `checkpoints`; `checkpoints.discard_checkpoints` deletes them when all is done
    folder/params/        the best parameters
    folder/fit.json       which step was best, and every evaluation; written last
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from rest_jax import errors, files
from rest_jax.keys import Stream, stream_key
from rest_jax.network.init import count_params
from rest_jax.network.mesh import DATA_AXIS, use_mesh
from rest_jax.training import checkpoints
from rest_jax.training import history as histories
from rest_jax.training import state as states
from rest_jax.training.averages import StepAverages, mean
from rest_jax.training.companions import Companions, make_optimizers
from rest_jax.training.evaluators import Evaluator
from rest_jax.training.interrupts import Interrupts, StopAsked
from rest_jax.training.logbook import Logbook, Meter
from rest_jax.training.optimizers import OptimizerConfig
from rest_jax.training.step import Objective, StepMetrics, make_train_step, place_batch
from rest_jax.types import ContextLossFn, LossFn, Params

FIT_NAME = "fit.json"
PARAMS_NAME = "params"
CHECKPOINTS_NAME = "checkpoints"

# Steps launched before the numbers of the first of them are read: the device never waits for the host.
_STEPS_AHEAD = 2


@dataclasses.dataclass(frozen=True)
class TrainerConfig:
    """How long to train, on how much at once, and how to judge it.

    Attributes:
      train_steps: steps in all; one batch each.
      batch_size: rows of a batch, over all devices.
      microbatches: parts that a batch is cut into to save memory; the gradients are those of the whole batch.
      optimizer: the optimiser.
      eval_period: steps between evaluations; 0 evaluates only at the end. The last step is always evaluated.
      checkpoint_period: steps between checkpoints; 0 saves only at evaluations, where one is always saved.
      keep_checkpoints: how many of the newest checkpoints to keep beside the best.
      log_period: steps between lines of `metrics.jsonl`; each has the averages since the line before.
      best_metric: the metric that chooses the best step, as an evaluator names it.
      best_mode: "min" or "max".
      evaluate_first: also evaluate the starting parameters, which then compete: training never ends worse
        by `best_metric` than it began.
      patience: stop after this many evaluations without a better one; 0 never does.
      nonfinite_limit: stop with an error after this many steps in a row whose loss or gradient is NaN or
        infinite. Each such step is left out.
    """

    train_steps: int = 1000
    batch_size: int = 32
    microbatches: int = 1
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    eval_period: int = 100
    checkpoint_period: int = 0
    keep_checkpoints: int = 2
    log_period: int = 20
    best_metric: str = "valid/loss"
    best_mode: str = "min"
    evaluate_first: bool = False
    patience: int = 0
    nonfinite_limit: int = 3

    def __post_init__(self) -> None:
        may_be_0 = ("eval_period", "checkpoint_period", "patience")
        for field in dataclasses.fields(self):
            if field.type != "int":
                continue
            name, value, minimum = field.name, getattr(self, field.name), int(field.name not in may_be_0)
            if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
                raise errors.ConfigError(
                    f"{name} = {value!r} must be a whole number of {minimum} or more",
                    where=f"TrainerConfig.{name}",
                    remedy="Mend the binding",
                )
        histories.check_mode(self.best_mode, "TrainerConfig.best_mode")
        if self.batch_size % self.microbatches:
            raise errors.ConfigError(
                f"batch_size = {self.batch_size} cannot be cut into {self.microbatches} equal parts",
                where="TrainerConfig.microbatches",
                remedy="Choose a batch_size that is a multiple of microbatches",
            )


@dataclasses.dataclass(frozen=True)
class FitResult:
    """How a training ended.

    Attributes:
      best_step: the step whose parameters are the result; the last step if nothing was evaluated.
      best_metrics: the evaluation at that step; empty if nothing was evaluated.
      params: the parameters of that step, on the trainer's shardings; of several parts the one that counts
        (`Companions.result`).
      steps: the last step; below `train_steps` if patience ended it.
      history: all evaluations, rows {"step": …, metric: value, …}.
      params_digest: `checkpoints.params_digest` of `params`.
    """

    best_step: int
    best_metrics: dict[str, float]
    params: Params
    steps: int
    history: list[dict[str, Any]]
    params_digest: str


class Trainer:
    """Trains parameters with one loss function.

    Args:
      config: how long, how much, how judged.
      loss_fn: (params, batch, dropout key or None) -> LossSums; pure, traced under `use_mesh(mesh)`.
      mesh: the devices, of `network.mesh.make_mesh`.
      param_shardings: a NamedSharding for each parameter, of `network.mesh.param_shardings`; None keeps
        them whole on every device.
      companions: further networks and optimisers; then the loss takes a `LossContext` as a fourth argument.

    Raises:
      ConfigError: a micro-batch cannot be spread evenly over the mesh.
    """

    def __init__(
        self,
        config: TrainerConfig,
        loss_fn: LossFn | ContextLossFn,
        mesh: Mesh,
        param_shardings: Any = None,
        companions: Companions | None = None,
    ):
        rows, ways = config.batch_size // config.microbatches, mesh.shape[DATA_AXIS]
        if rows % ways:
            raise errors.ConfigError(
                f"a micro-batch of {rows} rows cannot be spread over {ways} devices",
                where="TrainerConfig.batch_size",
                remedy=f"Choose a batch_size that is a multiple of {ways * config.microbatches}",
            )
        self.config, self.mesh, self.param_shardings = config, mesh, param_shardings
        self.companions = Companions() if companions is None else companions
        self.objective = Objective(loss_fn, companions, config.train_steps)

    def fit(
        self,
        init_params: Params,
        batch_at: Callable[[int], Any],
        evaluators: Sequence[Evaluator],
        folder: str | Path,
        logbook: Logbook,
        seed: int,
        before_batch: Callable[[int, Params], None] | None = None,
    ) -> FitResult:
        """Trains from `init_params`, or goes on with what is in `folder`; at once if it is all there.

        Args:
          init_params: where training starts; they are copied and not changed.
          batch_at: the host batch of a step, a pure function of its number from 0; the same in all processes.
          evaluators: judges (params, step) -> metrics. They must not keep the parameters. Of several parts
            they are given the one that counts.
          folder: where checkpoints and results go.
          logbook: where metrics and messages go; the phase is the folder's path below the run's.
          seed: of the dropout keys.
          before_batch: called with a step and all parameters at that moment, just before the batch of the
            step is asked for: for batches that the policy in training makes itself. It must not keep the
            parameters, and may be called for a step again after a restart.

        Raises:
          NonFiniteError: `nonfinite_limit` steps in a row were not finite.
          ConfigError: the checkpoints are of another network, or `best_metric` is not among the metrics.
          OutputError: the disk is full.
          SystemExit: with code 42 after SIGTERM, once a checkpoint is saved.
        """
        fit = _Fit(self, batch_at, evaluators, Path(folder), logbook, seed)
        fit.before_batch = before_batch
        with use_mesh(self.mesh), fit.interrupts.watch():
            result = fit.run(init_params)
            if fit.interrupts.asked(result.steps):
                fit.interrupts.leave()
        return result


class _Fit:
    """One call of `Trainer.fit`: the state of the loop."""

    def __init__(
        self,
        trainer: Trainer,
        batch_at: Callable[[int], Any],
        evaluators: Sequence[Evaluator],
        folder: Path,
        logbook: Logbook,
        seed: int,
    ):
        self.trainer, self.config, self.mesh = trainer, trainer.config, trainer.mesh
        self.batch_at, self.evaluators, self.folder = batch_at, evaluators, folder
        self.logbook, self.interrupts = logbook, Interrupts()
        self.before_batch: Callable[[int, Params], None] | None = None
        self.phase = _phase_name(folder, logbook.run_dir)
        self.key_data = np.asarray(jax.random.key_data(stream_key(seed, Stream.DROPOUT)))
        self.history: list[dict[str, Any]] = []
        self.step = 0
        self.saved: tuple[int, int] | None = None  # the step of the newest checkpoint, its evaluations
        self.pending: collections.deque[tuple[int, StepMetrics]] = collections.deque()
        self.window = StepAverages()

    def run(self, init_params: Params) -> FitResult:
        config, trainer = self.config, self.trainer
        self.lagging, self.frozen = trainer.companions.lagging, trainer.companions.frozen
        self.optimizer, self.schedule = make_optimizers(config.optimizer, trainer.companions, init_params)
        abstract = states.abstract_state(
            init_params, self.optimizer, self.mesh, trainer.param_shardings, self.lagging
        )
        finished = read_fit(self.folder)
        if finished is not None and finished["train_steps"] == config.train_steps:
            return self._result(finished, abstract.params)
        self.store = checkpoints.CheckpointStore(
            self.folder / CHECKPOINTS_NAME,
            config.keep_checkpoints,
            config.best_metric,
            config.best_mode,
            self.logbook.say,
        )
        self._begin(init_params, abstract)
        with self.logbook.progress(self.phase, config.train_steps, self.step) as meter:
            self._visit()
            while not self._ended():
                self._train_one(meter)
                self._visit()
        return self._finish(abstract.params)

    def _begin(self, init_params: Params, abstract: states.TrainState) -> None:
        self.train_step = make_train_step(
            self.trainer.objective,
            self.optimizer,
            self.schedule,
            self.config.microbatches,
            self.mesh,
            abstract,
        )
        resumed = self.store.resume_step()
        self.store.delete_after(resumed)
        if resumed is None:
            self.state = states.init_state(init_params, self.optimizer, abstract, self.lagging)
        else:
            self.state = self.store.restore(resumed, abstract)
            self.step = resumed
            self.history = [dict(row) for row in self.store.record(resumed).history]
            self.saved = (self.step, len(self.history))
        if self.step > self.config.train_steps:
            raise errors.ConfigError(
                f"{self.folder} has been trained for {self.step} steps, and train_steps is "
                f"{self.config.train_steps}",
                where="TrainerConfig.train_steps",
                remedy="Restore the old value, or use a new folder",
            )
        shapes = sorted({str(tuple(np.shape(leaf))) for leaf in jax.tree.leaves(self._batch(self.step))})
        start = "from the start" if resumed is None else f"from the checkpoint of step {resumed}"
        self.logbook.say(
            f"{self.phase}: {count_params(abstract.params):,} parameters; mesh "
            f"{' x '.join(f'{name}={size}' for name, size in self.mesh.shape.items())}; "
            f"{states.bytes_per_device(abstract) / 1e6:.1f} MB of state per device; "
            f"batch {', '.join(shapes)}; {start}"
        )

    def _batch(self, step: int) -> Any:
        if self.before_batch is not None:
            self.before_batch(step, self.state.params)
        batch = self.batch_at(step)
        for leaf in jax.tree.leaves(batch):
            if np.shape(leaf)[:1] != (self.config.batch_size,):
                raise errors.ConfigError(
                    f"the batch of step {step} has an array of shape {np.shape(leaf)}, "
                    f"and batch_size is {self.config.batch_size}",
                    where="TrainerConfig.batch_size",
                    remedy="Give the batches and the trainer the same number of rows",
                )
        return batch

    def _train_one(self, meter: Meter) -> None:
        """Launches one step and reads the numbers of an earlier one."""
        batch = place_batch(self._batch(self.step), self.mesh)
        self.state, metrics = self.train_step(self.state, batch, self.key_data, self.frozen)
        self.step += 1
        self.pending.append((self.step, metrics))
        self._read(keep=_STEPS_AHEAD)
        meter.advance(note=self.window.note)

    def _read(self, keep: int) -> None:
        """Reads the numbers of all launched steps but the last `keep`, and logs where a window ends."""
        while len(self.pending) > keep:
            step, on_device = self.pending.popleft()
            metrics = jax.device_get(on_device)
            self.window.add(metrics)
            if metrics["skipped"]:
                self._skipped(step, metrics)
            if step % self.config.log_period == 0 or self._save_due(step):
                self.logbook.log(self.phase, step, self.window.close())

    def _skipped(self, step: int, metrics: StepMetrics) -> None:
        loss, weight = metrics["sums"]["loss"]
        what = f"loss {mean(float(loss), float(weight)):.4g}, gradient norm {float(metrics['grad_norm']):.4g}"
        in_a_row = int(metrics["skipped_in_a_row"])
        self.logbook.say(f"{self.phase}: step {step} is left out: {what}")
        if in_a_row >= self.config.nonfinite_limit:
            good = "none" if self.saved is None else self.store.path(self.saved[0])
            raise errors.NonFiniteError(
                f"{in_a_row} steps in a row up to step {step} were not finite ({what}); "
                f"last good checkpoint: {good}",
                where=self.phase,
                remedy="Lower OptimizerConfig.learning_rate, lengthen its warm-up, or look at that batch",
            )

    def _evaluation_due(self, step: int) -> bool:
        config = self.config
        if not self.evaluators:
            return False
        if step == 0:
            return config.evaluate_first
        return step == config.train_steps or (config.eval_period > 0 and step % config.eval_period == 0)

    def _save_due(self, step: int) -> bool:
        period = self.config.checkpoint_period
        at_period = step > 0 and period > 0 and step % period == 0
        return at_period or step == self.config.train_steps or self._evaluation_due(step)

    def _visit(self) -> None:
        """What there is to do between two steps: evaluate, save, and stop if a signal asked for it."""
        if self._evaluation_due(self.step) and not self._evaluated():
            self._read(keep=0)
            with contextlib.suppress(StopAsked), self.interrupts.cut_short():
                self.history.append(self._evaluate())
        stop = self.interrupts.asked(self.step)
        if (stop or self._save_due(self.step)) and self.saved != (self.step, len(self.history)):
            self._save()
        if stop and not self._ended():
            self.logbook.say(f"{self.phase}: told to stop; step {self.step} is saved. Run it again to go on")
            self.interrupts.leave()

    def _evaluated(self) -> bool:
        """Whether the present step has been evaluated, perhaps before a restart."""
        return bool(self.history) and self.history[-1]["step"] == self.step

    def _evaluate(self) -> dict[str, Any]:
        metrics: dict[str, float] = {}
        began = time.monotonic()
        for evaluator in self.evaluators:
            found = evaluator(self.trainer.companions.result_of(self.state.params), self.step)
            metrics |= {name: float(value) for name, value in found.items()}
        if self.config.best_metric not in metrics:
            raise errors.ConfigError(
                f'best_metric "{self.config.best_metric}" is not among the metrics',
                where="TrainerConfig.best_metric",
                remedy=f"Choose one of: {', '.join(sorted(metrics))}",
            )
        self.logbook.log(self.phase, self.step, metrics)
        shown = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        self.logbook.say(f"{self.phase}: step {self.step}: {shown} ({time.monotonic() - began:.1f} s)")
        return {"step": self.step, **metrics}

    def _save(self) -> None:
        self._read(keep=0)  # a step that must stop the training stops it before it is saved
        metrics = _metrics(self.history[-1]) if self._evaluated() else {}
        self.store.save(self.step, self.state, metrics, self.history)
        self.saved = (self.step, len(self.history))

    def _ended(self) -> bool:
        config = self.config
        if self._evaluation_due(self.step) and not self._evaluated():
            return False
        if self.step >= config.train_steps:
            return True
        waited = histories.evaluations_since_best(self.history, config.best_metric, config.best_mode)
        return 0 < config.patience <= waited

    def _finish(self, abstract_params: Params) -> FitResult:
        """Publishes the best parameters, and last the file that says training is over."""
        config = self.config
        best = histories.best_row(self.history, config.best_metric, config.best_mode)
        best_step = self.step if best is None else best["step"]
        params = self.trainer.companions.result_of(self.store.restore_params(best_step, abstract_params))
        fit = {
            "best_step": best_step,
            "best_metric": config.best_metric,
            "best_value": None if best is None else best[config.best_metric],
            "steps": self.step,
            "train_steps": config.train_steps,
            "params_digest": checkpoints.save_params(self.folder / PARAMS_NAME, params),
            "history": [histories.to_json(row) for row in self.history],
        }
        files.failpoint("before-fit")
        if jax.process_index() == 0:
            files.write_json(self.folder / FIT_NAME, fit)
        return self._result(fit, abstract_params)

    def _result(self, fit: dict[str, Any], abstract_params: Params) -> FitResult:
        history = [histories.from_json(row) for row in fit["history"]]
        best = next((row for row in history if row["step"] == fit["best_step"]), {})
        return FitResult(
            best_step=fit["best_step"],
            best_metrics=_metrics(best),
            params=checkpoints.load_params(
                self.folder / PARAMS_NAME, self.trainer.companions.result_of(abstract_params)
            ),
            steps=fit["steps"],
            history=history,
            params_digest=fit["params_digest"],
        )


def read_fit(folder: str | Path) -> dict[str, Any] | None:
    """What `fit.json` of a finished training says; None if there is none."""
    path = Path(folder) / FIT_NAME
    return files.read_json(path) if path.exists() else None


def _metrics(row: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in row.items() if name != "step"}


def _phase_name(folder: Path, run_dir: Path | None) -> str:
    """ "policy/bc" for RUN/policy/bc; the last part of a folder outside the run's."""
    if run_dir is not None and folder.absolute().is_relative_to(run_dir.absolute()):
        return folder.absolute().relative_to(run_dir.absolute()).as_posix()
    return folder.name
