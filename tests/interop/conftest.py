from __future__ import annotations

from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import pytest
import sentencepiece

from rest_jax.network.config import T5Config
from rest_jax.network.init import abstract_params

CORPUS = [
    "We are going to Beijing tomorrow.", "The cat sat on the mat, and the dog barked at the cat.",
    "Wir fahren morgen mit dem Zug nach München.", "Die Straße ist heute sehr ruhig.",
    "我们明天去北京。", "这只猫坐在垫子上，狗对着猫叫。", "他昨天没有来上课。", "今天的街道非常安静。",
]  # fmt: skip


def train_vocabulary(
    prefix: Path, model_type: str = "unigram", byte_fallback: bool = True, **options
) -> Path:
    """A SentencePiece model with T5's special ids."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 4),
        model_prefix=str(prefix),
        vocab_size=360 if byte_fallback else 104,
        hard_vocab_limit=False,
        model_type=model_type,
        byte_fallback=byte_fallback,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=options.pop("bos_id", -1),
        minloglevel=2,
        **options,
    )
    return prefix.with_suffix(".model")


@pytest.fixture(scope="session")
def vocabulary_file(tmp_path_factory) -> Path:
    return train_vocabulary(tmp_path_factory.mktemp("vocabulary") / "spm")


def tiny_config(**changes) -> T5Config:
    """A network whose dimensions are all different, so that no transpose or mix-up goes unseen."""
    sizes = dict(vocab_size=384, emb_dim=24, num_heads=4, head_dim=10, mlp_dim=36, relpos_num_buckets=16)
    return T5Config(**{**sizes, "num_encoder_layers": 1, "num_decoder_layers": 2, **changes})


def random_params(config: T5Config, seed: int = 0) -> dict:
    """Parameters that are random everywhere: fresh norms are all ones, and would hide a mix-up."""
    draw = np.random.Generator(np.random.Philox(key=seed))
    shapes = nn.unbox(abstract_params(config))
    return jax.tree.map(lambda x: draw.normal(0.1, 0.2, x.shape).astype(np.float32), shapes)
