"""Rewards by overlap with a reference: sacreBLEU's sentence chrF and sentence BLEU, in [0, 1].

Floor 4. They need references, so they rate where there are some: they are the automatic rater that a
reference-free reward model can be trained on, and a second opinion beside it.

Sources: Popović 2015 (chrF); Papineni et al. 2002 and Chen and Cherry 2014, method 3 (smoothed BLEU).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import sacrebleu
from sacrebleu.metrics import BLEU, CHRF
from sacrebleu.metrics.base import Metric

from rest_jax import errors
from rest_jax.metrics.corpus import bleu_tokenizer
from rest_jax.rewards.protocol import RewardSpec, check_texts

_SCALE = 100.0


class _SentenceOverlap:
    """A sacreBLEU metric, sentence by sentence."""

    def __init__(self, name: str, metric: Metric):
        self._metric = metric
        self._spec = RewardSpec(name=name, version=f"sacrebleu-{sacrebleu.__version__}", needs_reference=True)

    @property
    def spec(self) -> RewardSpec:
        """Range [0, 1]; needs a reference."""
        return self._spec

    def score(
        self, sources: Sequence[str], hypotheses: Sequence[str], references: Sequence[str] | None = None
    ) -> np.ndarray:
        """Overlap of each hypothesis with its reference, float64 [n]; the sources are not read.

        A hypothesis without text scores 0, and so does any hypothesis of a reference without text.

        Raises:
          DataError: no references, or lists of different lengths.
        """
        check_texts(self._spec, sources, hypotheses, references)
        assert references is not None
        known: dict[tuple[str, str], float] = {}  # a policy repeats itself: equal samples are scored once
        scores = np.empty(len(hypotheses))
        for row, pair in enumerate(zip(hypotheses, references, strict=True)):
            if pair not in known:
                known[pair] = self._score_one(*pair)
            scores[row] = known[pair]
        return scores

    def _score_one(self, hypothesis: str, reference: str) -> float:
        # An exact match comes out as 100.00000000000004.
        return min(float(self._metric.sentence_score(hypothesis, [reference]).score) / _SCALE, 1.0)

    def signature(self) -> str:
        """sacreBLEU's signature of the metric, after the reward's name."""
        self._metric.num_refs = 1  # it is known to sacreBLEU only after a first score
        return f"{self._spec.name}|{self._metric.get_signature()}"


class SentenceChrf(_SentenceOverlap):
    """Sentence chrF (character 6-grams, β = 2) over 100."""

    def __init__(self) -> None:
        super().__init__("sentence_chrf", CHRF())


class SentenceBleu(_SentenceOverlap):
    """Sentence BLEU (exponential smoothing, effective order) over 100.

    Args:
      target_language: ISO code ("en", "zh"); decides the tokenizer, see `metrics.corpus.bleu_tokenizer`.

    Raises:
      ConfigError: the language is empty.
    """

    def __init__(self, target_language: str) -> None:
        if not target_language:
            raise errors.ConfigError(
                "sentence BLEU does not know its target language", remedy='Give it, e.g. "en"'
            )
        tokenizer = bleu_tokenizer(target_language)
        super().__init__("sentence_bleu", BLEU(tokenize=tokenizer, effective_order=True, force=True))
