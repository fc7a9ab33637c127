"""Text that a model generates from NaN is no answer. Greedy decoding would take the first token of the vocabulary."""

from __future__ import annotations

from typing import Any

import torch

# Stands in generated text where NaN came. No letters: a stop word of a task must not cut it.
LOST = "\ue0f0\ue0f1"
_NO_TOKEN = -1
_NEVER = torch.iinfo(torch.int64).max


class NanRows:
    """A logits processor that notes where NaN comes, and goes on as if all tokens were equally likely.

    Attributes:
        lengths: how many tokens each row had when NaN came, `(rows,)`; None before the first token.
    """

    def __init__(self):
        self.lengths: Any = None

    def __call__(self, tokens, logits):
        """The logits, `(rows, vocab)`, without NaN. Infinity becomes NaN in a softmax, so it counts as NaN here."""
        is_nan = (logits.isnan() | logits.isposinf()).any(-1)
        now = torch.where(is_nan, tokens.shape[1], _NEVER)
        self.lengths = now if self.lengths is None else torch.minimum(self.lengths, now)
        return logits.masked_fill(is_nan[:, None], 0.0)

    def mark(self, tokens, start: int, ends) -> None:
        """Overwrite what was generated from NaN.

        Args:
            tokens: prompts and generated tokens, `(prompts, length)`; with beams, a prompt has several rows here.
            start: the length of the prompts.
            ends: ids of tokens that end a text; what comes after one of them does not count.
        """
        lengths = self.lengths.view(len(tokens), -1).amin(-1)
        for row, length in zip(tokens, lengths.tolist(), strict=True):
            if length < len(row) and not torch.isin(row[start:length], ends).any():
                row[length:] = _NO_TOKEN


def with_nan_noted(harness: Any) -> Any:
    """The model class of lm-evaluation-harness, but in generated text, `LOST` stands where NaN came."""

    class Noted(harness):
        def _model_generate(self, context, max_length, stop, **options):
            rows = NanRows()
            tokens = super()._model_generate(context, max_length, stop, logits_processor=[rows], **options)
            if rows.lengths is not None:
                rows.mark(tokens, context.shape[1], _ends(self.model, tokens))
            return tokens

        def tok_decode(self, tokens, *args, **kwargs):
            if not isinstance(tokens, list) or _NO_TOKEN not in tokens:
                return super().tok_decode(tokens, *args, **kwargs)
            return super().tok_decode(tokens[: tokens.index(_NO_TOKEN)], *args, **kwargs) + LOST

    return Noted


def _ends(model, tokens):
    """Ids of the tokens that end a text, `(number,)`."""
    ids = model.generation_config.eos_token_id
    ids = [] if ids is None else [ids] if isinstance(ids, int) else ids
    return torch.tensor(ids, device=tokens.device, dtype=tokens.dtype)
