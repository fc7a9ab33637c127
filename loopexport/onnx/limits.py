"""What no single graph can run, told from the spec and from the config alone."""

from __future__ import annotations

from typing import Any

from loopexport.errors import OnnxError
from loopexport.loop.spec import LoopSpec


def check_spec(spec: LoopSpec) -> None:
    """Check that one graph can do what a spec asks for.

    Raises:
        OnnxError: it cannot; the message says why, and what can be done.
    """
    if not spec.is_identity and spec.decode == "first_n":
        raise OnnxError(
            "decode first_n counts decode steps, of which a graph is told nothing: set loop_decode to full or bypass "
            "in config.json, or export the base with --steps 1"
        )


def check_memory(config: Any) -> None:
    """Check that keys and values are all that a native model remembers.

    Args:
        config: its config object of transformers.

    Raises:
        OnnxError: some layer keeps more, which no layer outside of the span may do either.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicIndexedLayer, LinearAttentionCacheLayerMixin

    kinds = {
        LinearAttentionCacheLayerMixin: "the state of a recurrence or convolution",
        DynamicIndexedLayer: "the keys of an index",
    }
    for index, slot in enumerate(DynamicCache(config=config).layers):
        for kind, what in kinds.items():
            if isinstance(slot, kind):
                raise OnnxError(f"layer {index} keeps {what} in its cache, for which an ONNX graph has no input")
