"""The oldest onnxruntime that runs a graph, as measured on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from loopexport.loop.spec import LoopSpec

OLDEST = (1, 23, 1)  # older ones store a shared weight twice, and 1.23.0 computes `Attention` wrongly


@dataclass(frozen=True)
class Newer:
    """A part of a graph that needs a newer onnxruntime than `OLDEST`.

    Attributes:
        release: the oldest release that runs it.
        part: its name for users.
        without: the option that writes a graph without it.
    """

    release: tuple[int, ...]
    part: str
    without: str


# In these graphs, GroupQueryAttention adds no key: 1.23 to 1.26 refuse to load them, 1.27 to 1.30 crash.
SHARED_GQA = Newer((1, 31), "attention gqa with kv shared", "--attention portable")
# The first release whose `QMoE` takes the weights of the chosen experts.
WHOLE_EXPERTS = Newer((1, 25), "a QMoE of sparse experts", "--dtype fp32")


def newer_parts(spec: LoopSpec, attention: str, whole_experts: bool) -> Iterator[Newer]:
    """The parts of a loop's graph that need a newer onnxruntime; see `min_onnxruntime`."""
    if attention == "gqa" and spec.kv == "shared" and not spec.is_identity:
        yield SHARED_GQA
    if whole_experts:
        yield WHOLE_EXPERTS


def min_onnxruntime(spec: LoopSpec, attention: str, whole_experts: bool) -> tuple[int, ...]:
    """The oldest release that runs the graph of a loop, such as `(1, 31)`.

    Args:
        spec: the loop.
        attention: the attention layout, "portable" or "gqa".
        whole_experts: whether sparse experts are quantised, too.
    """
    return max([OLDEST, *(each.release for each in newer_parts(spec, attention, whole_experts))])


def release_text(release: tuple[int, ...]) -> str:
    """A release as users write it, `1.31`."""
    return ".".join(map(str, release))
