from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy

from rest_jax import errors
from rest_jax.interop import huggingface, parameter_names
from rest_jax.network.transformer import Transformer
from tests.interop.conftest import random_params, tiny_config

BATCH = (
    np.array([[5, 9, 40, 7, 1, 0, 0], [300, 8, 8, 77, 120, 6, 1]], np.int32),
    np.array([[0, 4, 383, 10], [0, 17, 2, 0]], np.int32),
)


def _same(left, right) -> bool:
    left, right = parameter_names.flatten(left), parameter_names.flatten(right)
    return left.keys() == right.keys() and all(np.array_equal(left[k], right[k]) for k in left)


def _logits(config, params):
    return Transformer(config).apply({"params": params}, *BATCH)


def _torch_logits(folder, sources, inputs, **options):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.T5ForConditionalGeneration.from_pretrained(folder, local_files_only=True, **options)
    with torch.no_grad():
        logits = model.eval()(
            input_ids=torch.tensor(sources, dtype=torch.long),
            attention_mask=torch.tensor(sources != 0, dtype=torch.long),
            decoder_input_ids=torch.tensor(inputs, dtype=torch.long),
        ).logits
    return model, logits.numpy()


@pytest.mark.parametrize("tied", [False, True])
def test_plain_from_pretrained_gives_our_logits(tmp_path, vocabulary_file, tied):
    config = tiny_config(logits_via_embedding=tied)
    params = random_params(config)
    report = huggingface.export_huggingface(params, config, vocabulary_file, tmp_path, max_length=20)
    model, theirs = _torch_logits(tmp_path, *BATCH)
    np.testing.assert_allclose(theirs, _logits(config, params), atol=1e-4)
    assert np.std(theirs) > 0.01
    assert (model.lm_head.weight.data_ptr() == model.shared.weight.data_ptr()) == tied
    assert report.bitwise_equal
    assert report.max_logit_difference is not None and report.max_logit_difference <= 1e-4
    assert f"{report.max_logit_difference:.1e}" in report.note


def test_following_transformers_advice_gives_our_logits_too(tmp_path, vocabulary_file):
    # Its warning says to set this; the embeddings of both stacks must then be in the file.
    transformers = pytest.importorskip("transformers")
    config = tiny_config()
    params = random_params(config)
    huggingface.export_huggingface(params, config, vocabulary_file, tmp_path, max_length=20, check=False)
    untied = transformers.T5Config.from_pretrained(tmp_path)
    untied.tie_word_embeddings = False
    _, theirs = _torch_logits(tmp_path, *BATCH, config=untied)
    np.testing.assert_allclose(theirs, _logits(config, params), atol=1e-4)


def test_generate_is_our_greedy_search_without_a_cache(tmp_path, vocabulary_file):
    # More decoder than encoder layers, as tiny_config has, breaks generate() of transformers 5 unless told.
    torch = pytest.importorskip("torch")
    config = tiny_config()
    params = random_params(config)
    huggingface.export_huggingface(params, config, vocabulary_file, tmp_path, max_length=6, check=False)
    model, _ = _torch_logits(tmp_path, *BATCH)
    sources = BATCH[0]
    generated = model.generate(
        input_ids=torch.tensor(sources, dtype=torch.long),
        attention_mask=torch.tensor(sources != 0, dtype=torch.long),
    ).numpy()
    tokens = np.zeros((2, 7), np.int32)
    for place in range(6):  # causal: what stands behind `place` changes nothing
        logits = Transformer(config).apply({"params": params}, sources, tokens)
        tokens[:, place + 1] = np.argmax(logits[:, place], -1)
    for ours, theirs in zip(tokens, generated, strict=True):
        end = int(np.argmax(ours[1:] == 1)) + 2 if 1 in ours[1:] else len(ours)
        assert theirs[:end].tolist() == ours[:end].tolist()
    assert generated.shape[1] <= 7  # the start symbol and max_length tokens


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"logits_via_embedding": True},
        {"mlp_activations": ("relu",), "num_encoder_layers": 3},
        {"mlp_activations": ("silu", "linear"), "relpos_max_distance": 77, "dropout_rate": 0.25},
    ],
)
def test_import_is_the_inverse_of_export(tmp_path, vocabulary_file, changes):
    config = tiny_config(**changes)
    params = random_params(config)
    huggingface.export_huggingface(params, config, vocabulary_file, tmp_path, 20, check=False)
    found, found_config, found_vocabulary = huggingface.import_huggingface(tmp_path)
    assert found_config == config
    assert _same(found, params)
    assert found_vocabulary.read_bytes() == vocabulary_file.read_bytes()


@pytest.mark.parametrize("tied", [False, True])
def test_imports_what_transformers_saves(tmp_path, tied):
    # Weights made by PyTorch, in several files, so that nothing of ours has touched them.
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(3)
    values = huggingface.config_to_hf(tiny_config(logits_via_embedding=tied))
    model = transformers.T5ForConditionalGeneration(transformers.T5Config.from_dict(values)).eval()
    if not tied:
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.shared.weight))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    params, config, vocabulary = huggingface.import_huggingface(tmp_path)
    assert config.logits_via_embedding == tied
    assert vocabulary is None
    sources, inputs = BATCH
    with torch.no_grad():
        theirs = model(
            input_ids=torch.tensor(sources, dtype=torch.long),
            attention_mask=torch.tensor(sources != 0, dtype=torch.long),
            decoder_input_ids=torch.tensor(inputs, dtype=torch.long),
        ).logits.numpy()
    np.testing.assert_allclose(_logits(config, params), theirs, atol=1e-4)


def test_imports_what_transformers_saves_again(tmp_path, vocabulary_file):
    # transformers 5 writes `tie_word_embeddings: true` for an untied model.
    config = tiny_config()
    params = random_params(config)
    huggingface.export_huggingface(params, config, vocabulary_file, tmp_path / "a", 20, check=False)
    model, _ = _torch_logits(tmp_path / "a", *BATCH)
    model.save_pretrained(tmp_path / "b")
    found, found_config, _ = huggingface.import_huggingface(tmp_path / "b")
    assert found_config == config
    assert _same(found, params)


def test_imports_bfloat16(tmp_path, vocabulary_file):
    torch = pytest.importorskip("torch")
    config = tiny_config()
    params = random_params(config)
    huggingface.export_huggingface(params, config, vocabulary_file, tmp_path / "a", 20, check=False)
    model, _ = _torch_logits(tmp_path / "a", *BATCH)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "b")
    found, _, _ = huggingface.import_huggingface(tmp_path / "b")
    rounded = jax.tree.map(lambda x: np.asarray(x.astype("bfloat16").astype("float32")), params)
    assert _same(found, rounded)


def test_names_are_those_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = tiny_config(num_encoder_layers=2, num_decoder_layers=3)
    model = transformers.T5ForConditionalGeneration(
        transformers.T5Config.from_dict(huggingface.config_to_hf(config))
    )
    copies = {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}
    state = {name: tuple(value.shape) for name, value in model.state_dict().items() if name not in copies}
    assert state == {
        p.hf_name: p.shape[::-1] if p.transposed else p.shape for p in parameter_names.parameters(config)
    }


def test_export_needs_neither_torch_nor_transformers(tmp_path, vocabulary_file):
    # In a process where neither can be found; exporting must work and say that PyTorch was not asked.
    program = f"""
import importlib.util, sys
for package in ("torch", "transformers"):
    sys.modules[package] = None
find, absent = importlib.util.find_spec, ("torch", "transformers")
importlib.util.find_spec = lambda name, *rest: None if name in absent else find(name, *rest)
from pathlib import Path
from rest_jax.interop import huggingface
from tests.interop.conftest import random_params, tiny_config
config = tiny_config()
report = huggingface.export_huggingface(
    random_params(config), config, Path({str(vocabulary_file)!r}), Path({str(tmp_path)!r}), 20)
assert report.bitwise_equal and report.max_logit_difference is None
print(report.note)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert "not run" in run.stdout


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nonfinite_weights_are_refused_before_anything_is_written(tmp_path, vocabulary_file, value):
    config = tiny_config()
    params = jax.tree.map(np.array, random_params(config))
    params["decoder"]["layers_1"]["mlp"]["wo"]["kernel"][3, 2] = value
    with pytest.raises(
        errors.NonFiniteError, match=r"1 of 864 .*decoder\.block\.1\.layer\.2\.DenseReluDense\.wo"
    ):
        huggingface.export_huggingface(params, config, vocabulary_file, tmp_path / "out", 20)
    assert not (tmp_path / "out").exists()


def test_wrong_logits_are_found(tmp_path, vocabulary_file):
    pytest.importorskip("transformers")
    config = tiny_config()
    params = jax.tree.map(np.array, random_params(config))
    huggingface.export_huggingface(params, config, vocabulary_file, tmp_path, 20, check=False)
    params["encoder"]["layers_0"]["mlp"]["wi_0"]["kernel"] *= 1.1
    with pytest.raises(errors.IntegrityError, match="PyTorch's logits differ"):
        huggingface.compare_with_pytorch(params, config, tmp_path)


def test_damaged_weights_are_found(tmp_path, vocabulary_file, monkeypatch):
    config = tiny_config()
    save = safetensors.numpy.save_file

    def damaging_save(state, path, metadata):
        state = {**state, "shared.weight": state["shared.weight"] + np.float32(1e-6)}
        save(state, path, metadata=metadata)

    monkeypatch.setattr(safetensors.numpy, "save_file", damaging_save)
    with pytest.raises(errors.IntegrityError, match="does not hold the parameters"):
        huggingface.export_huggingface(random_params(config), config, vocabulary_file, tmp_path, 20)


def test_parameters_of_another_network_are_refused(tmp_path, vocabulary_file):
    params = random_params(tiny_config())
    with pytest.raises(errors.ConfigError, match=r"wi_0/kernel has shape \[24, 36\], not \[24, 40\]"):
        huggingface.export_huggingface(params, tiny_config(mlp_dim=40), vocabulary_file, tmp_path, 20)
    with pytest.raises(errors.ConfigError, match="layers_1.* is missing"):
        huggingface.params_to_hf_state(params, tiny_config(num_encoder_layers=2))
    with pytest.raises(errors.ConfigError, match="logits_dense/kernel has no place"):
        huggingface.params_to_hf_state(params, tiny_config(logits_via_embedding=True))


def test_vocabularies_that_do_not_fit_are_refused_before_anything_is_written(tmp_path, vocabulary_file):
    small = tiny_config(vocab_size=100)
    with pytest.raises(errors.ConfigError, match="the embedding 100 rows"):
        huggingface.export_huggingface(random_params(small), small, vocabulary_file, tmp_path / "a", 20)
    config = tiny_config()
    with pytest.raises(errors.MissingInputError, match="no vocabulary"):
        huggingface.export_huggingface(random_params(config), config, tmp_path / "none", tmp_path / "a", 20)
    assert not (tmp_path / "a").exists()


def _exported(tmp_path, vocabulary_file):
    config = tiny_config()
    huggingface.export_huggingface(random_params(config), config, vocabulary_file, tmp_path, 20, check=False)
    return tmp_path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mt5"}, "mt5"),
        ({"feed_forward_proj": "gated-quick_gelu"}, "gated-quick_gelu"),
        ({"layer_norm_epsilon": 1e-5}, "layer_norm_epsilon"),
        ({"num_layers": 2}, r"no encoder\.block\.1"),
        ({"num_decoder_layers": 1}, r"decoder\.block\.1.* no place"),
        ({"d_kv": 20}, "has shape"),
    ],
)
def test_import_refuses_other_models(tmp_path, vocabulary_file, change, message):
    folder = _exported(tmp_path, vocabulary_file)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **change}))
    with pytest.raises(errors.ConfigError, match=message):
        huggingface.import_huggingface(folder)


def test_import_names_what_is_missing_or_broken(tmp_path, vocabulary_file):
    with pytest.raises(errors.MissingInputError, match=r"no config\.json"):
        huggingface.import_huggingface(tmp_path)
    folder = _exported(tmp_path, vocabulary_file)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    with pytest.raises(errors.IntegrityError, match=r"model\.safetensors"):
        huggingface.import_huggingface(folder)
    weights.unlink()
    with pytest.raises(errors.MissingInputError, match=r"model\.safetensors"):
        huggingface.import_huggingface(folder)


def test_import_refuses_nonfinite_weights(tmp_path, vocabulary_file):
    folder = _exported(tmp_path, vocabulary_file)
    state = safetensors.numpy.load_file(folder / "model.safetensors")
    state["lm_head.weight"][0, 0] = np.nan
    safetensors.numpy.save_file(state, folder / "model.safetensors")
    with pytest.raises(errors.NonFiniteError, match="logits_dense"):
        huggingface.import_huggingface(folder)


def test_bfloat16_policy_is_compared_in_float32(tmp_path, vocabulary_file):
    pytest.importorskip("transformers")
    config = dataclasses.replace(tiny_config(), dtype="bfloat16")
    report = huggingface.export_huggingface(random_params(config), config, vocabulary_file, tmp_path, 20)
    assert report.max_logit_difference < 1e-4
