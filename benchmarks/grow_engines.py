"""One engine of benchmarks/grow.py, in a process of its own: `python grow_engines.py ENGINE WORK OUTPUT`.

An engine loads the policy, warms up (compilation included), then draws all samples once against the clock. It
writes `tokens` (int32 [S, N, T], padded with 0) and prints one line of JSON.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.peak import peak_bytes

CORES = os.cpu_count() or 1
ROWS_AT_A_TIME = 800  # of Hugging Face and T5X: 8 sources of 100 samples
Work = dict[str, Any]
# What draws everything, given the sources; returns tokens [S, N, T] and further facts.
Draw = Callable[[list[list[int]]], tuple[np.ndarray, dict[str, Any]]]


def padded(rows: list[list[int]], length: int) -> np.ndarray:
    """Token rows as one array."""
    tokens = np.zeros((len(rows), length), np.int32)
    for place, row in enumerate(rows):
        tokens[place, : len(row)] = row
    return tokens


def by_length(sources: list[list[int]]) -> np.ndarray:
    """The order in which peers take sources, so that batches hold little padding."""
    return np.argsort([len(source) for source in sources], kind="stable")


def rest_jax(work: Work, dtype: str = "float32") -> Draw:
    """Our own sampler, through the class that Grow uses, with activations of some type."""
    from benchmarks.grow_scoring import load_experiment
    from rest_jax import keys
    from rest_jax.phases.lineage import BC
    from rest_jax.phases.workspace import Workspace
    from rest_jax.types import RaggedTokens

    workspace = Workspace(load_experiment([*work["settings"], f'--gin.T5Config.dtype="{dtype}"']))
    translator = workspace.translator(workspace.policy_params(BC))
    key = keys.stream_key(0, keys.Stream.GROW, 1)

    def draw(sources: list[list[int]]) -> tuple[np.ndarray, dict[str, Any]]:
        ids = np.asarray(work["ids"][: len(sources)], np.int64)
        sampling = workspace.experiment.grow.sampling
        drawn = translator.sample(RaggedTokens.from_lists(sources), ids, work["num_samples"], key, sampling)
        rows = [drawn.tokens[i] for i in range(len(drawn.tokens))]
        tokens = padded([row.tolist() for row in rows], work["max_length"])
        return tokens.reshape(len(sources), work["num_samples"], -1), {"rows_computed": drawn.rows_computed}

    return draw


def huggingface(work: Work) -> Draw:
    """`generate` of the exported model."""
    import torch
    import transformers

    torch.set_num_threads(CORES)
    torch.manual_seed(0)
    folder = f"{work['exports']}/hf"
    model = transformers.T5ForConditionalGeneration.from_pretrained(folder).eval()
    at_a_time = max(1, ROWS_AT_A_TIME // work["num_samples"])

    def draw(sources: list[list[int]]) -> tuple[np.ndarray, dict[str, Any]]:
        tokens = np.zeros((len(sources), work["num_samples"], work["max_length"]), np.int32)
        order = by_length(sources)
        for first in range(0, len(order), at_a_time):
            rows = order[first : first + at_a_time]
            batch = torch.from_numpy(padded([sources[r] for r in rows], max(len(sources[r]) for r in rows)))
            with torch.inference_mode():
                drawn = model.generate(
                    input_ids=batch.long(), attention_mask=(batch != 0).long(), do_sample=True,
                    temperature=work["temperature"], top_k=0, top_p=1.0, suppress_tokens=[0],
                    num_return_sequences=work["num_samples"], max_new_tokens=work["max_length"],
                )  # fmt: skip
            found = drawn[:, 1:].numpy().reshape(len(rows), work["num_samples"], -1)
            tokens[rows, :, : found.shape[-1]] = found
        return tokens, {}

    return draw


def ctranslate2(work: Work, quantization: str) -> Draw:
    """CTranslate2 with the exported model in float32 or int8."""
    import ctranslate2 as library
    from transformers import AutoTokenizer

    library.set_random_seed(0)
    folder = f"{work['exports']}/ctranslate2_{quantization}"
    translator = library.Translator(
        folder, device="cpu", compute_type=quantization, inter_threads=1, intra_threads=CORES
    )
    tokenizer = AutoTokenizer.from_pretrained(f"{work['exports']}/hf")
    at_a_time = max(1, ROWS_AT_A_TIME // work["num_samples"])

    def draw(sources: list[list[int]]) -> tuple[np.ndarray, dict[str, Any]]:
        order = by_length(sources)
        pieces = [tokenizer.convert_ids_to_tokens(sources[r]) for r in order]
        results = []
        for first in range(0, len(order), at_a_time):
            results += translator.translate_batch(
                pieces[first : first + at_a_time], beam_size=1, num_hypotheses=work["num_samples"],
                sampling_topk=0, sampling_temperature=work["temperature"],
                suppress_sequences=[[tokenizer.pad_token]], max_decoding_length=work["max_length"],
                return_end_token=True,
            )  # fmt: skip
        tokens = np.zeros((len(sources), work["num_samples"], work["max_length"]), np.int32)
        for row, result in zip(order, results, strict=True):
            for sample, hypothesis in enumerate(result.hypotheses):
                ids = tokenizer.convert_tokens_to_ids(hypothesis)[: work["max_length"]]
                tokens[row, sample, : len(ids)] = ids
        return tokens, {}

    return draw


def t5x(work: Work) -> Draw:
    """T5X's network and its `temperature_sample`, with our parameters, which have its tree."""
    import functools

    import jax
    import seqio
    from t5x import decoding, models
    from t5x.examples.t5 import network

    from benchmarks.grow_scoring import load_experiment
    from rest_jax.phases.lineage import BC
    from rest_jax.phases.workspace import Workspace

    workspace = Workspace(load_experiment(work["settings"]))
    ours = workspace.experiment.policy
    same = ("vocab_size", "emb_dim", "num_heads", "num_encoder_layers", "num_decoder_layers", "head_dim",
            "mlp_dim", "mlp_activations", "dtype", "logits_via_embedding")  # fmt: skip
    module = network.Transformer(
        network.T5Config(**{name: getattr(ours, name) for name in same}, dropout_rate=0.0)
    )
    vocabulary = seqio.PassThroughVocabulary(size=work["vocab_size"], eos_id=1)
    model = models.EncoderDecoderModel(
        module, vocabulary, vocabulary, optimizer_def=None,
        decode_fn=functools.partial(decoding.temperature_sample, temperature=work["temperature"], topk=0),
    )  # fmt: skip
    params = workspace.policy_params(BC)
    at_a_time = max(1, ROWS_AT_A_TIME // work["num_samples"])

    @jax.jit
    def program(params: Any, batch: Any, key: jax.Array) -> jax.Array:
        drawn, _ = model.predict_batch_with_aux(
            params, batch, rng=key, num_decodes=work["num_samples"], return_all_decodes=True
        )
        return drawn

    def draw(sources: list[list[int]]) -> tuple[np.ndarray, dict[str, Any]]:
        order, longest = by_length(sources), max(map(len, sources))
        tokens = np.zeros((len(sources), work["num_samples"], work["max_length"]), np.int32)
        for first in range(0, len(order), at_a_time):
            rows = order[first : first + at_a_time]
            chosen = [sources[r] for r in rows] + [[1]] * (at_a_time - len(rows))
            batch = {
                "encoder_input_tokens": padded(chosen, longest),
                "decoder_input_tokens": np.zeros((at_a_time, work["max_length"]), np.int32),
            }
            found = np.array(program(params, batch, jax.random.PRNGKey(first)))[: len(rows)]
            ended = np.cumsum(np.cumsum(found == 1, axis=-1), axis=-1) > 1  # what stands behind the first EOS
            tokens[rows] = np.where(ended, 0, found)
        return tokens, {}

    return draw


ENGINES: dict[str, Callable[[Work], Draw]] = {
    "rest_jax": rest_jax,
    "rest_jax_bfloat16": lambda work: rest_jax(work, "bfloat16"),
    "huggingface": huggingface,
    "ctranslate2_float32": lambda work: ctranslate2(work, "float32"),
    "ctranslate2_int8": lambda work: ctranslate2(work, "int8"),
    "t5x": t5x,
}


def main(name: str, work_path: str, output: str) -> None:
    """Runs one engine."""
    work = json.loads(Path(work_path).read_text(encoding="utf-8"))
    draw = ENGINES[name](work)
    started = time.perf_counter()
    draw(work["sources"][: max(1, ROWS_AT_A_TIME // work["num_samples"])])
    warmed_up = time.perf_counter()
    tokens, facts = draw(work["sources"])
    seconds = time.perf_counter() - warmed_up
    np.savez(output, tokens=tokens)
    peak = peak_bytes() / 2**20
    print(json.dumps({"seconds": seconds, "warm_up_s": warmed_up - started, "peak_mib": peak, **facts}))


if __name__ == "__main__":
    main(*sys.argv[1:])
