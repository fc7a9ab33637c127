"""Gradient checkpointing that pauses: a layer runs inside a checkpointed function of ours, and makes none of its own.

Every export has a copy of this file. It needs only torch.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager

import torch

CHECKPOINTS = "gradient_checkpointing"  # attribute of native layers


class _Thread(threading.local):
    """Whether gradient checkpointing is paused in this thread."""

    def __init__(self):  # once in each thread
        self.is_paused = False


_THREAD = _Thread()


class PausableCheckpointing:
    """Replaces True in a layer's `gradient_checkpointing`: true, but for threads in which it is paused."""

    def __bool__(self):
        return not _THREAD.is_paused


@contextmanager
def checkpointing_paused(layer):
    """Let a layer run as if gradient checkpointing were off, in this thread."""
    if getattr(layer, CHECKPOINTS) is True:
        setattr(layer, CHECKPOINTS, PausableCheckpointing())
    before, _THREAD.is_paused = _THREAD.is_paused, True
    try:
        yield
    finally:
        _THREAD.is_paused = before


def is_checkpointing(layer) -> bool:
    """Whether a native layer checkpoints if it runs now."""
    # Since transformers 5.24, a training layer keeps its cache and does not checkpoint if gradients are off.
    pauses_itself = hasattr(layer, "_can_checkpoint_with_cache") and not torch.is_grad_enabled()
    return layer.training and bool(getattr(layer, CHECKPOINTS, False)) and not pauses_itself
