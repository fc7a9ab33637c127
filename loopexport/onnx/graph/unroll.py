"""Unroll the loop in a traced graph: each iteration of a layer is a copy of the layer's nodes on the same weights.

Which nodes are copied is what the K/V policies are about:

    shared      copies stop at the natural keys and values, so that nothing of their projections is copied
    per_step    copies have a cache slot of their own: an input and an output more for each
    reference   copies join the natural past with their own keys and values, and store nothing

Under frozen routing they stop at the natural routers' answers too. Under decode bypass all copies stand in a branch
that decode steps do not take.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import onnx_ir as ir

from loopexport.errors import OnnxError
from loopexport.loop.spec import LoopSpec
from loopexport.onnx.limits import check_spec
from loopexport.onnx.trace.attention import FUSED, FUSED_DOMAIN
from loopexport.onnx.trace.marks import LAYER_INPUT, LAYER_OUTPUT, READ, ROUTE, is_mark
from loopexport.onnx.trace.tracer import Traced

from .rule_graph import RUN_LAYER, rule_graph


def unroll(traced: Traced, spec: LoopSpec) -> ir.Model:
    """The graph of a loop; the trace is left as it is.

    Raises:
        OnnxError: no graph can do what the spec asks for.
    """
    check_spec(spec)
    if spec.extra_kv_slots and traced.num_slots != traced.num_layers:
        raise OnnxError("kv per_step has no ONNX export where layers reuse the keys of others; use kv shared")
    model = traced.model.clone()
    if not spec.is_identity:
        unrolling = _Unrolling(model.graph, traced, spec)
        for start, stop in _bodies(spec):
            unrolling.add_loop(start, stop)
        unrolling.add_slots()
    _remove_marks(model.graph)
    from onnx_ir.passes.common import RemoveUnusedNodesPass, RemoveUnusedOpsetsPass

    for clean in (RemoveUnusedNodesPass(), RemoveUnusedOpsetsPass()):
        clean(model)
    return model


def _bodies(spec: LoopSpec) -> Iterable[tuple[int, int]]:
    return spec.spans if spec.mode == "block" else [(layer, layer + 1) for layer in spec.layers]


class _Layer:
    """A decoder layer in the graph.

    Attributes:
        entry: the value that entered it, behind its mark.
        output: the value that left it, before its mark; `mark_out` is the mark's node.
        nodes: those between, in order, which depend on `entry`.
        reads, routes: among them, the marks of what attention read and of what routers answered.
        fused: among them, attentions that join past and new by themselves.
    """

    def __init__(self, nodes: list[ir.Node], index: int):
        bounds = {
            node.op_type: position
            for position, node in enumerate(nodes)
            if node.op_type in (LAYER_INPUT, LAYER_OUTPUT) and node.attributes["layer"].as_int() == index
        }
        start, stop = bounds[LAYER_INPUT], bounds[LAYER_OUTPUT]
        self.entry = nodes[start].outputs[0]
        self.mark_out = nodes[stop]
        output = self.mark_out.inputs[0]
        assert output is not None
        self.output: ir.Value = output
        self.nodes = _dependents(self.entry, nodes[start + 1 : stop])
        self.reads = [node for node in self.nodes if is_mark(node, READ)]
        self.routes = [node for node in self.nodes if is_mark(node, ROUTE)]
        self.fused = [node for node in self.nodes if _is_fused(node)]

    def copy(self, values: dict[ir.Value, ir.Value | None], suffix: str) -> list[ir.Node]:
        """Copies of the nodes that the output needs; `values` maps what is given, and gets what they make."""
        copies = []
        for node in _needed(self.output, self.nodes, values):
            copies.append(_copy_node(node, values, f"{node.name}/{suffix}"))
        return copies


@dataclass
class _Slot:
    """The keys, or the values, of an iteration's own cache slot.

    Attributes:
        natural_layer: the layer that it is an iteration of.
        past, present: what goes in and what comes out.
        natural: what the natural pass reads in the slot's place.
    """

    natural_layer: int
    past: ir.Value
    present: ir.Value
    natural: ir.Value


class _Unrolling:
    """The loops that are added to one graph."""

    def __init__(self, graph: ir.Graph, traced: Traced, spec: LoopSpec):
        self.graph = graph
        self.traced = traced
        self.spec = spec
        nodes = list(graph)
        self.layers = {index: _Layer(nodes, index) for index in spec.layers}
        self.empty: dict[ir.Value, ir.Value] = {}  # keys and values of no token, by those of the natural pass
        self.slots: dict[int, list[_Slot]] = {}  # keys and values of new cache slots
        self.is_decode_step = _decode_step(graph) if spec.decode == "bypass" else None

    def add_loop(self, start: int, stop: int) -> None:
        """Put the loop over a body of layers behind it."""
        layers = [self.layers[index] for index in range(start, stop)]
        natural = layers[-1].mark_out.outputs[0]
        uses = list(natural.uses())
        rule = rule_graph(self.spec, stop - start, self.traced.hidden_size, self.traced.dtype)
        entries = [layers[0].entry, *(layer.mark_out.outputs[0] for layer in layers)]
        values: dict[ir.Value, ir.Value | None] = dict(zip(rule.inputs, entries, strict=True))
        for value in rule.initializers.values():
            values[value] = self._own_constant(value, start, stop)
        new: list[ir.Node] = []
        for node in rule:
            if is_mark(node, RUN_LAYER):
                new += self._run_layer(node, start, values)
            else:
                new.append(_copy_node(node, values, f"loop.{start}_{stop}/{node.name}"))
        output = values[rule.outputs[0]]
        if self.is_decode_step is not None:
            new, output = self._unless_decoding(new, natural, output, start, stop)
        self.graph.insert_after(layers[-1].mark_out, new)
        for use in uses:
            use.node.replace_input_with(use.idx, output)

    def _unless_decoding(self, loop: list[ir.Node], natural: ir.Value, output, start: int, stop: int):
        """The loop's nodes as a branch, beside one that leaves the natural pass as it is, and the result.

        Without a loop, cache slots of iterations get the natural keys and values of the token.
        """
        slots = [each for slot in self.slots.values() for each in slot if each.natural_layer in range(start, stop)]
        prefix = f"loop.{start}_{stop}"
        looped, plain = ir.tape.Tape(), ir.tape.Tape()
        results = [looped.op("Identity", [each]) for each in (output, *(slot.present for slot in slots))]
        kept = [plain.op("Identity", [natural])]
        for slot in slots:
            bounds = [self._constant(number) for number in (-1, 2**62, -2)]
            kept.append(plain.op("Concat", [slot.past, plain.op("Slice", [slot.natural, *bounds])], {"axis": -2}))
        branches = {
            "then_branch": _branch(plain.nodes, kept, f"{prefix}/decode"),
            "else_branch": _branch([*loop, *looped.nodes], results, f"{prefix}/loop"),
        }
        choice = ir.node("If", [self.is_decode_step], branches, num_outputs=len(results), name=f"{prefix}/If")
        for value, chosen in zip((natural, *(slot.present for slot in slots)), choice.outputs, strict=True):
            chosen.type, chosen.name = value.type, f"{prefix}/{value.name}"
        for slot, chosen in zip(slots, choice.outputs[1:], strict=True):
            slot.present = chosen
        return [choice], choice.outputs[0]

    def _own_constant(self, value: ir.Value, start: int, stop: int) -> ir.Value:
        """A constant of the rule, as one of the graph."""
        name = f"loop.{start}_{stop}/{value.name}"
        if name not in self.graph.initializers:
            own = ir.Value(name=name, type=value.type, shape=value.shape, const_value=value.const_value)
            self.graph.register_initializer(own)
        return self.graph.initializers[name]

    def _run_layer(self, node: ir.Node, start: int, values: dict) -> list[ir.Node]:
        index = start + node.attributes["position"].as_int()
        iteration = node.attributes["iteration"].as_int()
        layer = self.layers[index]
        known: dict[ir.Value, ir.Value | None] = {layer.entry: values[node.inputs[0]]}
        if self.spec.frozen_routing:
            known |= {route.outputs[0]: route.outputs[0] for route in layer.routes}
        if self.spec.kv == "shared":
            known |= {read.outputs[0]: read.outputs[0] for read in layer.reads}
            for fused in layer.fused:
                known |= self._nothing_new(fused)
        if self.spec.kv == "per_step":
            slot = self._slot(index, iteration)
            pasts = {value: self._past(value, slot) for value in _pasts(layer)}
            known |= pasts
        copies = layer.copy(known, f"pass{iteration + 1}")
        if self.spec.kv == "shared":
            _drop_presents(copies)
        if self.spec.kv == "per_step":
            self.slots[slot] = [self._own_cache(index, read, known, pasts) for read in layer.reads]
        values[node.outputs[0]] = known.get(layer.output, layer.output)
        return copies

    def _own_cache(self, index: int, read: ir.Node, known, pasts) -> _Slot:
        return _Slot(index, pasts[_past_of(read)], known[read.inputs[0]], read.outputs[0])

    def _nothing_new(self, fused: ir.Node) -> dict[ir.Value, ir.Value | None]:
        """Inputs by which a copy of a fused attention reads the natural keys and values, and adds none."""
        _, keys, values, past_keys, past_values = fused.inputs[:5]
        assert keys is not None
        assert values is not None
        assert past_keys is not None
        assert past_values is not None
        if keys not in self.empty:
            for value in (keys, values):
                bounds = [self._constant(number) for number in (0, 0, 1)]
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

    def _constant(self, number: int) -> ir.Value:
        name = f"loop.number_{number}"
        if name not in self.graph.initializers:
            self.graph.register_initializer(ir.Value(name=name, const_value=ir.tensor([number], name=name)))
        return self.graph.initializers[name]

    def _slot(self, index: int, iteration: int) -> int:
        """As in the exported model: behind the layers' own slots, pass by pass."""
        layers = self.spec.layers
        return self.traced.num_slots + (iteration - 1) * len(layers) + layers.index(index)

    def _past(self, natural: ir.Value, slot: int) -> ir.Value:
        part = str(natural.name).rsplit(".", 1)[1]
        return ir.Value(name=f"past_key_values.{slot}.{part}", type=natural.type, shape=natural.shape)

    def add_slots(self) -> None:
        """Make inputs and outputs of the new cache slots, in their order, behind the others."""
        end = sum(1 for value in self.graph.inputs if _is_plain_input(value))
        for slot in sorted(self.slots):
            for each in self.slots[slot]:
                self.graph.inputs.insert(end, each.past)
                end += 1
                self.graph.outputs.append(_as_present(each.present, each.past))


def _decode_step(graph: ir.Graph) -> ir.Value:
    """Whether the graph runs a single token on a cache that is not empty, `(1,)`."""
    inputs = {value.name: value for value in graph.inputs}
    one = ir.Value(name="loop.one", const_value=ir.tensor([1], name="loop.one"))
    graph.register_initializer(one)
    tape = ir.tape.Tape()
    new, total = (tape.op("Shape", [inputs[name]], {"start": 1, "end": 2}) for name in ("input_ids", "attention_mask"))
    result = tape.op("And", [tape.op("Equal", [new, one]), tape.op("Greater", [total, new])])
    _name(tape.nodes, "loop.decoding")
    graph.insert_before(next(iter(graph)), tape.nodes)
    return result


def _branch(nodes: Iterable[ir.Node], outputs: list[ir.Value], prefix: str) -> ir.Graph:
    """Nodes as a branch of an `If`, which takes all that it needs from around it."""
    nodes = list(nodes)
    _name([node for node in nodes if node.name is None], prefix)
    return ir.Graph([], outputs, nodes=nodes, name=prefix)


def _name(nodes: Iterable[ir.Node], prefix: str) -> None:
    for number, node in enumerate(nodes):
        node.name = node.outputs[0].name = f"{prefix}/{node.op_type}_{number + 1}"


def _is_plain_input(value: ir.Value) -> bool:
    """Whether an input is one of the finished model, and not a weight."""
    return value.name in ("input_ids", "attention_mask", "position_ids") or str(value.name).startswith(
        "past_key_values."
    )


def _pasts(layer: _Layer) -> list[ir.Value]:
    return [_past_of(read) for read in layer.reads]


def _past_of(read: ir.Node) -> ir.Value:
    """The cache input that a read joins with what is new."""
    joined = read.inputs[0]
    assert joined is not None
    join = joined.producer()
    assert join is not None
    past = join.inputs[3 + read.attributes["value"].as_int()] if _is_fused(join) else join.inputs[0]
    assert past is not None
    assert str(past.name).startswith("past_key_values."), past.name
    return past


def _as_present(value: ir.Value | None, past: ir.Value) -> ir.Value:
    """A read's value as the output that belongs to a cache input."""
    assert value is not None
    assert past.shape is not None
    value.name = str(past.name).replace("past_key_values.", "present.")
    value.shape = ir.Shape(["batch_size", past.shape[1], "total_sequence_length", past.shape[3]])
    return value


def _dependents(entry: ir.Value, nodes: list[ir.Node]) -> list[ir.Node]:
    reached, found = {entry}, []
    for node in nodes:
        if any(value in reached for value in node.inputs):
            reached.update(node.outputs)
            found.append(node)
    return found


def _needed(output: ir.Value, nodes: list[ir.Node], given) -> list[ir.Node]:
    """Those of the nodes that `output` depends on, without what only makes values that are given."""
    wanted, found = {output}, []
    for node in reversed(nodes):
        if any(value in wanted and value not in given for value in node.outputs):
            wanted.update(value for value in node.inputs if value is not None)
            found.append(node)
    return found[::-1]


def _copy_node(node: ir.Node, values: dict, name: str) -> ir.Node:
    if any(attribute.type == ir.AttributeType.GRAPH for attribute in node.attributes.values()):
        raise OnnxError(f"cannot unroll {node.name}: it holds a graph of its own")
    inputs = [values.get(value, value) for value in node.inputs]
    copy = ir.Node(
        node.domain, node.op_type, inputs, node.attributes.values(), num_outputs=len(node.outputs), name=name
    )
    for number, (value, own) in enumerate(zip(node.outputs, copy.outputs, strict=True)):
        own.name, own.type = (name if len(node.outputs) == 1 else f"{name}.{number}"), value.type
        values[value] = own
    return copy


def _is_fused(node: ir.Node) -> bool:
    return (node.domain, node.op_type) == (FUSED_DOMAIN, FUSED)


def _drop_presents(copies: list[ir.Node]) -> None:
    """Let copies that add no key give no cache back: it would be copied each time, and nothing asks for it.

    Only those: a fused attention that gives none back does not see its own new keys either.
    """
    for node in filter(_is_fused, copies):
        for value in node.outputs[1:]:
            value.name = ""


def _remove_marks(graph: ir.Graph) -> None:
    for node in [node for node in graph.all_nodes() if is_mark(node)]:
        owner = node.graph
        assert owner is not None
        inner, outer = node.inputs[0], node.outputs[0]
        assert inner is not None
        if outer.is_graph_output():
            inner.name, inner.type, inner.shape = outer.name, outer.type, outer.shape
            outer.name = None
        ir.convenience.replace_all_uses_with(outer, inner, replace_graph_outputs=True)
        owner.remove(node, safe=True)
