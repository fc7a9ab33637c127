"""Loops and models that a single graph cannot run, as the spec and the config show."""

from __future__ import annotations

from typing import Any

from loopexport.errors import OnnxError
from loopexport.loop.spec import LoopSpec


def check_spec(spec: LoopSpec) -> None:
    """Check that one graph can run a spec.

    Raises:
        OnnxError: it cannot; the message says why and what to do.
    """
    if not spec.is_identity and spec.decode == "first_n":
        raise OnnxError(
            "decode first_n counts decode steps, and a graph cannot: set loop_decode to full or bypass in config.json, "
            "or export the base with --steps 1"
        )


def check_memory(config: Any) -> None:
    """Check that a native model remembers nothing but keys and values.

    Args:
        config: its config, an object of transformers.

    Raises:
        OnnxError: a layer remembers more. This includes layers outside the span.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicIndexedLayer, LinearAttentionCacheLayerMixin

    from loopexport.templates.looped_pools import POOLS

    kinds = {
        LinearAttentionCacheLayerMixin: "the state of a recurrence or convolution",
        DynamicIndexedLayer: "the keys of an index",
    }
    for index, slot in enumerate(DynamicCache(config=config).layers):
        kept = [what for kind, what in kinds.items() if isinstance(slot, kind)]
        if hasattr(slot, POOLS):
            kept.append("pools of tokens")
        if kept:
            raise OnnxError(f"layer {index} keeps {kept[0]} in its cache, for which an ONNX graph has no input")
