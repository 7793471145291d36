"""One engine of benchmarks/train.py, in a process of its own: `python train_engines.py ENGINE FOLDER`.

An engine reads the work (`train_work.write`), compiles, and then does what single lines of JSON on its
standard input say, answering each with one:

    {"workload": W, "steps": K, "fresh": true}   K steps from the first weights: {"losses": [K]}
    {"workload": W, "steps": K}                  K steps more: {"losses": [K], "seconds": [K]}

So that several engines can be measured in turns, each with all cores while the others wait.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.peak import peak_bytes
from benchmarks.train_work import Work

CORES = os.cpu_count() or 1
# One update with a batch: waits for its end and returns the mean loss of a target token.
Step = Callable[[Any], float]


class Engine:
    """What an engine can do: get a batch ready, start anew, make a step.

    Attributes:
      prepare: from the arrays of a batch to what a step takes; not timed.
      start: puts the first weights and an empty optimiser in place and returns what makes a step.
    """

    def __init__(self, prepare: Callable[[dict[str, np.ndarray]], Any], start: Callable[[], Step]):
        self.prepare, self.start = prepare, start


def rest_jax(work: Work) -> Engine:
    """The step that the trainer runs, all its checks and metrics included."""
    import jax

    from rest_jax.network import mesh as meshes
    from rest_jax.phases.experiment import BehaviourCloningConfig
    from rest_jax.phases.losses import policy_loss
    from rest_jax.training import optimizers, state, step
    from rest_jax.types import Seq2SeqBatch

    mesh = meshes.make_mesh(meshes.MeshConfig())
    optimizer, schedule = optimizers.make_optimizer(work.optimizer)
    abstract = state.abstract_state(work.params, optimizer, mesh)
    objective = step.Objective(policy_loss(work.config, BehaviourCloningConfig()))
    train_step = step.make_train_step(objective, optimizer, schedule, 1, mesh, abstract)
    key_data = np.asarray(jax.random.key_data(jax.random.key(0)))

    def start() -> Step:
        held = [state.init_state(work.params, optimizer, abstract)]

        def update(batch: Any) -> float:
            with meshes.use_mesh(mesh):
                held[0], metrics = train_step(held[0], batch, key_data, {})
            jax.block_until_ready(held[0].params)
            loss, weight = metrics["sums"]["loss"]
            return float(loss) / float(weight)

        return update

    return Engine(lambda arrays: step.place_batch(Seq2SeqBatch(**arrays), mesh), start)


def pytorch(work: Work) -> Engine:
    """Hugging Face's T5 with PyTorch's fused AdamW."""
    import torch
    import transformers

    from rest_jax.interop import huggingface

    torch.set_num_threads(CORES)
    settings = transformers.T5Config(**{**huggingface.config_to_hf(work.config), "use_cache": False})
    # transformers 5 ties whatever it is told, unless it is said again (see rest_jax/interop/huggingface.py).
    settings.tie_word_embeddings = work.config.logits_via_embedding
    weights = huggingface.params_to_hf_state(work.params, work.config)
    chosen = work.optimizer

    def start() -> Step:
        model = transformers.T5ForConditionalGeneration(settings)
        model.load_state_dict({name: torch.tensor(array) for name, array in weights.items()}, strict=False)
        model.set_input_embeddings(model.shared)  # one table again, with one gradient
        model.train()  # there is no dropout: its rate is 0
        parameters = list(model.parameters())
        optimizer = torch.optim.AdamW(
            parameters, lr=chosen.learning_rate, betas=(chosen.b1, chosen.b2), eps=chosen.eps,
            weight_decay=chosen.weight_decay, fused=True,
        )  # fmt: skip

        def update(batch: dict[str, Any]) -> float:
            optimizer.zero_grad(set_to_none=True)
            loss = model(**batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, chosen.clip_norm)
            optimizer.step()
            return loss.item()

        return update

    def prepare(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
        sources, targets = arrays["encoder_input_tokens"], arrays["decoder_target_tokens"]
        labels = np.where(arrays["decoder_loss_weights"] > 0, targets, -100)
        return {
            "input_ids": torch.from_numpy(sources).long(),
            "attention_mask": torch.from_numpy(sources != 0).long(),
            "decoder_input_ids": torch.from_numpy(arrays["decoder_input_tokens"]).long(),
            "labels": torch.from_numpy(labels).long(),
        }

    return Engine(prepare, start)


def t5x(work: Work) -> Engine:
    """T5X's network and loss under `jit`, with optax's AdamW; its parameter tree is ours."""
    import jax
    import optax
    import seqio
    from t5x import models
    from t5x.examples.t5 import network

    from rest_jax.training import optimizers

    same = ("vocab_size", "emb_dim", "num_heads", "num_encoder_layers", "num_decoder_layers", "head_dim",
            "mlp_dim", "mlp_activations", "dtype", "logits_via_embedding")  # fmt: skip
    module = network.Transformer(
        network.T5Config(**{name: getattr(work.config, name) for name in same}, dropout_rate=0.0)
    )
    vocabulary = seqio.PassThroughVocabulary(size=work.config.vocab_size, eos_id=1)
    model = models.EncoderDecoderModel(module, vocabulary, vocabulary, optimizer_def=None)
    optimizer, _ = optimizers.make_optimizer(work.optimizer)

    def one(params: Any, statistics: Any, batch: Any) -> tuple[Any, Any, jax.Array]:
        weight = batch["decoder_loss_weights"].sum()

        def mean_loss(p: Any) -> jax.Array:
            return model.loss_fn(p, batch, None)[0] / weight

        loss, gradients = jax.value_and_grad(mean_loss)(params)
        updates, statistics = optimizer.update(gradients, statistics, params)
        return optax.apply_updates(params, updates), statistics, loss

    program = jax.jit(one, donate_argnums=(0, 1))

    def start() -> Step:
        params = jax.tree.map(lambda leaf: jax.numpy.array(leaf, copy=True), work.params)
        held = [params, optimizer.init(params)]

        def update(batch: Any) -> float:
            *held[:], loss = program(*held, batch)
            jax.block_until_ready(held)
            return float(loss)

        return update

    return Engine(jax.device_put, start)


ENGINES: dict[str, Callable[[Work], Engine]] = {"rest_jax": rest_jax, "pytorch": pytorch, "t5x": t5x}


def serve(engine: Engine, workloads: dict[str, list[dict[str, np.ndarray]]]) -> None:
    """Answers the lines of standard input until it ends."""
    batches = {name: [engine.prepare(arrays) for arrays in each] for name, each in workloads.items()}
    step: Step | None = None
    for line in sys.stdin:
        asked = json.loads(line)
        if step is None or asked.get("fresh"):
            step = None  # lets go of the old weights before the new ones are there
            step = engine.start()
        answer = run(step, batches[asked["workload"]], asked["steps"])
        answer["peak_mib"] = peak_bytes() / 2**20
        print(json.dumps(answer), flush=True)


def run(step: Step, batches: Sequence[Any], steps: int) -> dict[str, Any]:
    """Steps over the batches in turn, with the seconds of each."""
    losses, seconds = [], []
    for number in range(steps):
        started = time.perf_counter()
        losses.append(step(batches[number % len(batches)]))
        seconds.append(time.perf_counter() - started)
    return {"losses": losses, "seconds": seconds}


def main(name: str, folder: str) -> None:
    """Runs one engine."""
    work = Work.read(Path(folder))
    serve(ENGINES[name](work), work.of_engine(name))


if __name__ == "__main__":
    main(*sys.argv[1:])
