"""The oldest onnxruntime that runs a graph, as measured on the CPU."""

from __future__ import annotations

from loopexport.loop.spec import LoopSpec

OLDEST = (1, 23, 1)  # older ones store a shared weight twice, and 1.23.0 computes `Attention` wrongly
# In these graphs, GroupQueryAttention adds no key: 1.23 to 1.26 refuse to load them, 1.27 to 1.30 crash.
OLDEST_SHARED_GQA = (1, 31)


def min_onnxruntime(spec: LoopSpec, attention: str) -> tuple[int, ...]:
    """The oldest release that runs the graph of a loop, such as `(1, 31)`.

    Args:
        spec: the loop.
        attention: the attention layout, "portable" or "gqa".
    """
    is_shared_gqa = attention == "gqa" and spec.kv == "shared" and not spec.is_identity
    return OLDEST_SHARED_GQA if is_shared_gqa else OLDEST


def release_text(release: tuple[int, ...]) -> str:
    """A release as users write it, `1.31`."""
    return ".".join(map(str, release))
