"""Looped models as training leaves them: other weights, saved by `save_pretrained`."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM


def save_trained(export, out, *, vocab=None, dtype=None, **saving):
    """Load an export, change every weight a little, and save it.

    Args:
        export: its directory.
        out: the directory to write.
        vocab: resize the vocabulary.
        dtype: of the saved weights; None is the export's own.
        saving: options of `save_pretrained`.
    """
    model = AutoModelForCausalLM.from_pretrained(export, trust_remote_code=True, dtype=dtype)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    if vocab is not None:
        model.resize_token_embeddings(vocab, mean_resizing=False)
    model.save_pretrained(out, **saving)
    return out
