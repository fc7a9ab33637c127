"""Measure what quantising costs in each graph of an export."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from loopexport.export.quantisation import Cost, Divergence
from loopexport.loop.spec import LoopSpec

from .check import load_torch, why_not_run
from .plan import OnnxPlan, Say
from .quantise.cost import divergence, read_text
from .runtime.model import OnnxModel


def measure_costs(
    plan: OnnxPlan, root: Path, path_of: Callable[[str, LoopSpec], Path], say: Say
) -> dict[str, Cost] | str:
    """What quantising costs in each graph, by name; why it was not measured, where it cannot be.

    Args:
        plan: the export's plan.
        root: the export.
        path_of: the path of a graph, which is made if it is not there yet: one of K = 1 is needed for the base.
        say: called with a line at the start of each graph.
    """
    reason = why_not_run(plan.dtype)
    if reason:
        return reason
    base = replace(plan.specs[0], steps=1, schedule=None, damping=None)
    base_name = plan.graph_name(1)
    text = read_text(OnnxModel(root, path_of(base_name, base).name), plan.text)
    if isinstance(text, str):
        return text
    plain = load_torch(root, 1)
    found: dict[str, Divergence] = {}
    for name, spec in {base_name: base, **plan.graphs}.items():
        say(f"measuring what quantising costs: {name}, {text.tokens.size:,} tokens")
        found[name] = divergence(OnnxModel(root, path_of(name, spec).name), plain, spec, text)
    return {name: Cost(text.name, int(text.tokens.size), found[base_name], found[name]) for name in plan.graphs}
