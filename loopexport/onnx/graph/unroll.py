"""Unroll the loop in a traced graph: each iteration of a layer is a copy of the layer's nodes on the same weights.

The K/V policy decides which nodes are copied:

    shared      copies read the natural keys and values, so nothing of their projections is copied
    per_step    copies have a cache slot of their own, which adds inputs and outputs to the graph
    reference   copies join the natural past with their own keys and values, and store nothing

Under frozen routing, copies read what the routers returned in the natural pass. Under decode bypass, all copies are in
a branch that decode steps do not take.
"""

from __future__ import annotations

from collections import Counter

import onnx_ir as ir

from loopexport.errors import OnnxError
from loopexport.loop.spec import LoopSpec
from loopexport.onnx.limits import check_spec
from loopexport.onnx.trace.marks import RUN_LAYER, is_mark, marked_layers, remove_marks
from loopexport.onnx.trace.nodes import int_constant
from loopexport.onnx.trace.tracer import Traced
from loopexport.templates.looped_path import BodySpec
from loopexport.templates.looped_spec import bodies_within

from .decode_bypass import decode_step, unless_decoding
from .left_out import drop_unread_inputs, leave_out
from .loop_layer import LoopLayer, SlotPart, copy_loop_node, drop_presents, is_plain_input, join_of, past_of
from .rule_graph import rule_graph


def unroll(traced: Traced, spec: LoopSpec) -> ir.Model:
    """The graph of a loop, as a new model; the trace stays unchanged.

    Raises:
        OnnxError: a graph cannot express the spec; the message says what to change.
    """
    check_spec(spec)
    skipped = spec.skipped(traced.num_layers)
    if (spec.has_extra_slots or skipped) and traced.num_slots != traced.num_layers:
        what = "kv per_step" if spec.has_extra_slots else "a path that leaves out layers"
        raise OnnxError(
            f"{what} cannot be exported to ONNX where layers reuse the keys of other layers; use kv shared and spans"
        )
    model = traced.model.clone()
    if not spec.is_identity:
        unrolling = _Unrolling(model.graph, traced, spec)
        for body in bodies_within(spec, traced.num_layers):
            unrolling.add_loop(body)
        unrolling.add_slots()
        leave_out(model.graph, skipped)
    remove_marks(model.graph)
    from onnx_ir.passes.common import RemoveUnusedNodesPass, RemoveUnusedOpsetsPass

    for clean in (RemoveUnusedNodesPass(), RemoveUnusedOpsetsPass()):
        clean(model)
    if skipped:
        drop_unread_inputs(model.graph, skipped)
    return model


class _Unrolling:
    """Adds loops to one graph."""

    def __init__(self, graph: ir.Graph, traced: Traced, spec: LoopSpec):
        self.graph = graph
        self.traced = traced
        self.spec = spec
        marked = marked_layers(graph)
        wanted = {*spec.layers, *(body.after for body in spec.bodies)}
        self.layers = {index: LoopLayer(marked[index]) for index in wanted}
        self.iterations: Counter[int] = Counter()  # how often each layer was copied
        self.empty: dict[ir.Value, ir.Value] = {}  # natural keys or values -> the same without any token
        self.slots: dict[int, list[SlotPart]] = {}  # number of a new cache slot -> its keys and its values
        self.is_decode_step = decode_step(graph) if spec.decode == "bypass" else None

    def add_loop(self, body: BodySpec) -> None:
        """Add the loop over one body, after the layer after which it runs again."""
        layers = [self.layers[index] for index in body.layers]
        end = self.layers[body.after].output_mark
        natural = end.outputs[0]
        uses = list(natural.uses())
        rule = rule_graph(self.spec, body, self.traced.hidden_size, self.traced.dtype)
        outputs = [*(layer.output_mark.outputs[0] for layer in layers[:-1]), natural]
        values: dict[ir.Value, ir.Value | None] = dict(zip(rule.inputs, [layers[0].entry, *outputs], strict=True))
        prefix = f"loop.{body.hull.start}_{body.hull.stop}"
        before = set(self.slots)
        for value in rule.initializers.values():
            values[value] = self._rule_constant(value, prefix)
        new: list[ir.Node] = []
        for node in rule:
            if is_mark(node, RUN_LAYER):
                new += self._run_layer(node, body, values)
            else:
                new.append(copy_loop_node(node, values, f"{prefix}/{node.name}"))
        output = values[rule.outputs[0]]
        if self.is_decode_step is not None:
            slots = [each for slot, parts in self.slots.items() if slot not in before for each in parts]
            new, output = unless_decoding(self.graph, self.is_decode_step, new, natural, output, slots, prefix)
        self.graph.insert_after(end, new)
        for use in uses:
            use.node.replace_input_with(use.idx, output)

    def add_slots(self) -> None:
        """Add the inputs and outputs of the new cache slots, in order, after the existing ones."""
        end = sum(1 for value in self.graph.inputs if is_plain_input(value))
        for slot in sorted(self.slots):
            for each in self.slots[slot]:
                self.graph.inputs.insert(end, each.past)
                end += 1
                self.graph.outputs.append(_as_present(each.present, each.past))

    def _rule_constant(self, value: ir.Value, prefix: str) -> ir.Value:
        """A constant of the rule, added to the graph."""
        name = f"{prefix}/{value.name}"
        if name not in self.graph.initializers:
            own = ir.Value(name=name, type=value.type, shape=value.shape, const_value=value.const_value)
            self.graph.register_initializer(own)
        return self.graph.initializers[name]

    def _run_layer(self, node: ir.Node, body: BodySpec, values: dict) -> list[ir.Node]:
        """The nodes of one iteration of one layer, for a `RunLayer` node of the rule."""
        index = body.layers[node.attributes["position"].as_int()]
        self.iterations[index] += 1
        iteration = self.iterations[index]
        layer = self.layers[index]
        known: dict[ir.Value, ir.Value | None] = {layer.entry: values[node.inputs[0]]}
        if self.spec.frozen_routing:
            known |= {route.outputs[0]: route.outputs[0] for route in layer.routes}
        if self.spec.kv == "shared":
            known |= {read.outputs[0]: read.outputs[0] for read in layer.reads}
            for fused in layer.fused:
                known |= self._natural_cache_only(fused)
        if self.spec.kv == "per_step":
            slot = self._slot(index, iteration)
            pasts = {value: self._past(value, slot) for value in layer.pasts}
            known |= pasts
        copies = layer.copy(known, f"pass{iteration + 1}")
        if self.spec.kv == "shared":
            drop_presents(copies)
        if self.spec.kv == "per_step":
            self.slots[slot] = [self._slot_part(index, read, known, pasts) for read in layer.reads]
        values[node.outputs[0]] = known.get(layer.output, layer.output)
        return copies

    def _slot_part(self, index: int, read: ir.Node, known, pasts) -> SlotPart:
        return SlotPart(index, pasts[past_of(read)], known[read.inputs[0]], read.outputs[0], join_of(read))

    def _natural_cache_only(self, fused: ir.Node) -> dict[ir.Value, ir.Value | None]:
        """Inputs with which a copy of a fused attention reads the natural keys and values, and adds none."""
        _, keys, values, past_keys, past_values = fused.inputs[:5]
        assert keys is not None
        assert values is not None
        assert past_keys is not None
        assert past_values is not None
        if keys not in self.empty:
            for value in (keys, values):
                bounds = [int_constant(self.graph, f"loop.number_{number}", number) for number in (0, 0, 1)]
                node = ir.node("Slice", [value, *bounds], name=f"{value.name}/none")
                node.outputs[0].name = node.name
                self.graph.insert_after(fused, node)
                self.empty[value] = node.outputs[0]
        return {
            keys: self.empty[keys],
            values: self.empty[values],
            past_keys: fused.outputs[1],
            past_values: fused.outputs[2],
        }

    def _slot(self, index: int, iteration: int) -> int:
        """The slot's number, as in the exported model: after the layers' own slots, iteration by iteration."""
        return self.traced.num_slots + self.spec.extra_slots.index((index, iteration))

    def _past(self, natural: ir.Value, slot: int) -> ir.Value:
        part = str(natural.name).rsplit(".", 1)[1]
        return ir.Value(name=f"past_key_values.{slot}.{part}", type=natural.type, shape=natural.shape)


def _as_present(value: ir.Value | None, past: ir.Value) -> ir.Value:
    """The keys or values that a slot holds afterwards, as the output that belongs to the input `past`."""
    assert value is not None
    assert past.shape is not None
    value.name = str(past.name).replace("past_key_values.", "present.")
    value.shape = ir.Shape(["batch_size", past.shape[1], "total_sequence_length", past.shape[3]])
    return value
