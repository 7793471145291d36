"""Logits against PyTorch's T5 v1.1 with the same weights: an independent implementation as the oracle."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from rest_jax.network.config import T5Config
from tests.network.test_init import flat
from tests.network.tiny import TIED, TINY, params_of, policy_logits, rows

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


def _names(config: T5Config) -> dict[str, str]:
    """Our name -> the PyTorch name; every kernel and bias table is transposed there."""
    names = {"token_embedder/embedding": "shared.weight", "decoder/logits_dense/kernel": "lm_head.weight"}
    for side, layers in (("encoder", config.num_encoder_layers), ("decoder", config.num_decoder_layers)):
        first = f"{side}.block.0.layer.0.SelfAttention"
        names[f"{side}/relpos_bias/rel_embedding"] = f"{first}.relative_attention_bias.weight"
        names[f"{side}/{side}_norm/scale"] = f"{side}.final_layer_norm.weight"
        blocks = [("attention", "attention", "SelfAttention")]
        if side == "decoder":
            blocks = [
                ("self_attention", "self_attention", "SelfAttention"),
                ("encoder_decoder_attention", "cross_attention", "EncDecAttention"),
            ]
        for i in range(layers):
            ours, theirs = f"{side}/layers_{i}", f"{side}.block.{i}.layer"
            for j, (module, norm, attention) in enumerate(blocks):
                names[f"{ours}/pre_{norm}_layer_norm/scale"] = f"{theirs}.{j}.layer_norm.weight"
                for kernel in ("query", "key", "value", "out"):
                    letter = "o" if kernel == "out" else kernel[0]
                    names[f"{ours}/{module}/{kernel}/kernel"] = f"{theirs}.{j}.{attention}.{letter}.weight"
            j = len(blocks)
            names[f"{ours}/pre_mlp_layer_norm/scale"] = f"{theirs}.{j}.layer_norm.weight"
            for kernel in ("wi_0", "wi_1", "wo"):
                names[f"{ours}/mlp/{kernel}/kernel"] = f"{theirs}.{j}.DenseReluDense.{kernel}.weight"
    return names


def _torch_model(config: T5Config, params):
    settings = transformers.T5Config(
        vocab_size=config.vocab_size,
        d_model=config.emb_dim,
        d_kv=config.head_dim,
        d_ff=config.mlp_dim,
        num_layers=config.num_encoder_layers,
        num_decoder_layers=config.num_decoder_layers,
        num_heads=config.num_heads,
        relative_attention_num_buckets=config.relpos_num_buckets,
        relative_attention_max_distance=config.relpos_max_distance,
        feed_forward_proj="gated-gelu",
        layer_norm_epsilon=1e-6,
        dropout_rate=0.0,
        tie_word_embeddings=config.logits_via_embedding,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    # Version 5 forgets the argument and ties whatever it is told, unless it is said again.
    settings.tie_word_embeddings = config.logits_via_embedding
    model = transformers.T5ForConditionalGeneration(settings).eval()
    names, state = _names(config), {}
    for name, leaf in flat(params).items():
        transposed = "kernel" in name or "rel_embedding" in name
        state[names[name]] = torch.tensor(leaf.T if transposed else leaf)
    embedding = state["shared.weight"]
    state["encoder.embed_tokens.weight"] = state["decoder.embed_tokens.weight"] = embedding
    if config.logits_via_embedding:
        state["lm_head.weight"] = embedding
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not missing
    assert not unexpected
    return model


@pytest.mark.parametrize("config", [TINY, TIED], ids=["untied", "tied"])
def test_logits_equal_pytorch_s(config):
    config = dataclasses.replace(
        config, num_encoder_layers=3
    )  # both stacks of the same depth would hide a mix-up
    params = params_of(config)
    # Longer than the largest distance with a bucket of its own, so that every bucket is used.
    source, target = rows([150, 20, 3], 150, seed=1), rows([140, 9, 140], 140, seed=2, shifted=True)
    ours = policy_logits(config, params, source, target)
    with torch.no_grad():
        theirs = _torch_model(config, params)(
            input_ids=torch.tensor(source, dtype=torch.long),
            attention_mask=torch.tensor(source != 0, dtype=torch.long),
            decoder_input_ids=torch.tensor(target, dtype=torch.long),
        ).logits.numpy()
    assert np.abs(theirs).max() > 1
    np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0)
