"""Choose the next token."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from loopexport.errors import OnnxError, OnnxInputError


@dataclass(frozen=True)
class Sampling:
    """How to choose the next token.

    Attributes:
        temperature: 0 is greedy.
        top_k: keep only the k likeliest tokens; 0 keeps all.
        top_p: keep only the likeliest tokens, until they reach this total probability.
        seed: random seed; None for a new one each time.

    Raises:
        OnnxInputError: a value is out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self):
        if not 0 <= self.temperature < math.inf:
            raise OnnxInputError(f"temperature {self.temperature} must be 0 (greedy) or more, and finite")
        if self.top_k < 0:
            raise OnnxInputError(f"top_k {self.top_k} must be 0 (all tokens) or more")
        if not 0 < self.top_p <= 1:
            raise OnnxInputError(f"top_p {self.top_p} must be in (0, 1]")
        if self.seed is not None and self.seed < 0:
            raise OnnxInputError(f"seed {self.seed} must be 0 or more")

    def choose(self, logits: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """Choose a token for each row of `(batch, vocab)`.

        Raises:
            OnnxError: the largest logit of a row is not a finite number.
        """
        if not np.isfinite(logits.max(-1)).all():
            raise OnnxError("the graph computes logits that are not finite numbers; try `loopexport onnx --dtype fp32`")
        if self.temperature == 0:
            return logits.argmax(-1)
        return np.array([random.choice(len(row), p=self._probabilities(row)) for row in logits.astype(np.float64)])

    def _probabilities(self, row: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):  # with a tiny temperature, -inf is right
            row = (row - row.max()) / self.temperature
        if 0 < self.top_k < len(row):
            row = np.where(row < np.partition(row, -self.top_k)[-self.top_k], -np.inf, row)
        weights = np.exp(row)
        probabilities = weights / weights.sum()
        if self.top_p < 1:
            order = np.argsort(-probabilities)
            before = np.cumsum(probabilities[order]) - probabilities[order]
            probabilities[order[before >= self.top_p]] = 0
            probabilities /= probabilities.sum()
        return probabilities
