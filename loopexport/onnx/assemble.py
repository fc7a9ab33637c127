"""From an export to the graph of one loop: trace the native model, quantise it, unroll the loop, bind the weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loopexport.errors import OnnxError
from loopexport.export.directory import Export
from loopexport.files.staging import explain_os_errors
from loopexport.loop.spec import LoopSpec
from loopexport.onnx.graph.positions import max_positions
from loopexport.onnx.graph.releases import min_onnxruntime, release_text

from .plan import OnnxPlan, native_config
from .weights.source import Weights, open_weights

if TYPE_CHECKING:
    import onnx_ir as ir

    from loopexport.onnx.trace.skeleton import Skeleton
    from loopexport.onnx.trace.tracer import Traced


def trace_export(
    export: Export, dtype: str, attention: str = "portable", experts: str = "single"
) -> tuple[Skeleton, Traced]:
    """Build the skeleton of an export's native model, and trace it.

    Args:
        export: the export.
        dtype: the number format in which the model computes.
        attention: one of `ATTENTION_LAYOUTS`.
        experts: "whole" for sparse experts as one node, which `quantise_experts` has to replace.

    Raises:
        OnnxError: the family cannot be traced.
    """
    import torch
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    from loopexport.onnx.trace.attention import ATTENTION, register
    from loopexport.onnx.trace.experts import IMPLEMENTATION, register_experts
    from loopexport.onnx.trace.skeleton import build_skeleton
    from loopexport.onnx.trace.tracer import trace

    register()
    config = native_config(export)
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    can_choose = model_class._can_set_attn_implementation()
    if attention == "gqa" and not can_choose:
        raise OnnxError(f"{model_class.__name__} implements attention itself; use --attention portable")
    options = {"attn_implementation": ATTENTION[attention] if can_choose else "eager"}
    if model_class._can_set_experts_implementation():
        register_experts()
        options["experts_implementation"] = IMPLEMENTATION[experts]
    torch_dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    skeleton = build_skeleton(config, open_weights(export), torch_dtype, **options)
    return skeleton, trace(skeleton)


def prepare(plan: OnnxPlan, weights: Weights, skeleton: Skeleton, traced: Traced) -> tuple[Skeleton, Traced]:
    """A trace for a data file of ours: quantised, with the other weights as the graph multiplies by them.

    Returns:
        Copies; the recipes of the skeleton now say what is in the data file.
    """
    from loopexport.onnx.graph.direct_weights import use_weights_directly
    from loopexport.onnx.quantise.nodes import quantise_products

    traced = replace(traced, model=traced.model.clone())
    recipes: Any = skeleton.recipes
    if plan.quantisation is not None:
        recipes = quantise_products(traced, skeleton.model, recipes, plan.quantisation, weights)
    recipes = use_weights_directly(traced.model.graph, recipes)
    return replace(skeleton, recipes=recipes), traced


def build_graph(plan: OnnxPlan, export: Export, skeleton, traced, spec: LoopSpec, layout) -> ir.Model:
    """The graph of one loop, with its weights bound.

    Raises:
        OnnxError: a graph cannot express the loop, or would store weights twice.
    """
    from loopexport.onnx.graph.bind_weights import attach_file, attach_stored, stored_bytes
    from loopexport.onnx.graph.unroll import unroll
    from loopexport.onnx.trace.rope import recomputed_beyond

    graphs = []
    for each in (spec, replace(spec, steps=1, schedule=None, damping=None)):
        model = unroll(traced, each)
        if plan.data is None:
            attach_stored(model, skeleton.recipes, export.base)
        else:
            attach_file(model, layout, plan.data)
        graphs.append(model)
    read, stored = (stored_bytes(each) for each in graphs)
    if not read.items() <= stored.items() or (read != stored and not spec.path):
        raise OnnxError("the unrolled graph and the graph of the base read different weights; please report this")
    model = graphs[0]
    model.producer_name = "loopexport"
    model.metadata_props["attention"] = plan.attention
    oldest = min_onnxruntime(spec, plan.attention, plan.whole_experts)
    model.metadata_props["min_onnxruntime"] = release_text(oldest)
    if plan.quantisation is not None:
        model.metadata_props["quantised"] = json.dumps(plan.quantisation.to_dict())
    limit = recomputed_beyond(skeleton.model)
    if limit is not None:
        model.metadata_props["recomputed_beyond"] = str(limit)
    positions = max_positions(traced.model.graph, skeleton.model.config)
    if positions is not None:
        model.metadata_props["max_positions"] = str(positions)
    model.metadata_props.update({f"loop_{key}": json.dumps(value) for key, value in loop_fields(spec).items()})
    return model


def loop_fields(spec: LoopSpec) -> dict[str, Any]:
    """The fields of a loop, by name without the prefix."""
    return {name.removeprefix("loop_"): value for name, value in spec.to_config_fields().items()}


def save_graph(model: ir.Model, path: Path) -> None:
    """Write a graph; its weights stay in their files."""
    import onnx_ir as ir

    with explain_os_errors(path):
        ir.save(model, path, format="protobuf")
