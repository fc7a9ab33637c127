"""Which graph `genai_config.json` names."""

from __future__ import annotations

from loopexport.export.directory import Export
from loopexport.export.manifest import OnnxRecord
from loopexport.export.onnx_files import GENAI_CONFIG
from loopexport.export.stale_graphs import loop_difference
from loopexport.files.digests import bytes_sha256
from loopexport.files.json_text import json_text
from loopexport.files.staged_files import StagedFiles
from loopexport.loop.spec import LoopSpec, make_spec
from loopexport.onnx.graph.genai import genai_config, genai_graph

from .plan import OnnxPlan, Say


def write_genai_config(plan: OnnxPlan, export: Export, traced, files: StagedFiles, say: Say) -> dict[str, OnnxRecord]:
    """Write the config for onnxruntime-genai, and return its record, unless it already names the best graph."""
    name, spec, attention = _genai_graph(plan, export)
    if name not in plan.graphs and genai_graph(export.root) == name:
        return {}
    config = genai_config(export, name, traced.model.graph, spec, attention)
    if config is None:
        return {}
    if spec.steps != export.spec.steps:
        say(
            f"{GENAI_CONFIG} names {name}, K = {spec.steps}: there is no graph of the export's own K, "
            f"{export.spec.steps}; `loopexport onnx {plan.out or export.root}` writes one"
        )
    content = json_text(config).encode()
    files.write(GENAI_CONFIG, content)
    return {GENAI_CONFIG: OnnxRecord(len(content), bytes_sha256(content))}


def _genai_graph(plan: OnnxPlan, export: Export) -> tuple[str, LoopSpec, str]:
    """The best graph for onnxruntime-genai, with its loop and attention.

    The export's own K comes first, then graphs of this run, then the graph that the config already names.
    """
    graphs = {name: (spec, plan.attention) for name, spec in plan.graphs.items()}
    for name, record in export.manifest.onnx.items():
        if record.spec is not None and name not in graphs and (export.root / name).is_file():
            spec = make_spec(**record.spec)
            if not loop_difference(name, spec, export.spec):
                graphs[name] = spec, record.attention or "portable"
    named = genai_graph(export.root)
    ranks = {
        name: (spec.steps != export.spec.steps, name not in plan.graphs, name != named)
        for name, (spec, _) in graphs.items()
    }
    best = min(graphs, key=ranks.__getitem__)
    return best, *graphs[best]
