"""Looped layers under vLLM, whose Transformers backend runs this code unchanged; used nowhere else.

Every export has a copy of this file. It needs only torch and transformers.

vLLM stores keys and values itself: each attention module of the model has an attention layer of vLLM, which writes the
keys and values (with MLA, the latents) that it gets into the slots of their tokens, and then attends. vLLM calls the
model without a cache, on one row with the tokens of all requests, in chunks of its own choice. So an iteration runs a
layer with a stand-in for its attention layer. With `shared`, the stand-in hands on the recorded keys and values of the
natural pass: they are written again into the slots that hold them already. With `per_step`, it is a copy of the
attention layer with slots of its own. With `reference`, it writes the iterate's keys and values; after the iterations,
the natural ones are written back.
"""

from __future__ import annotations

import copy
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import nn

from .looped_body import Body
from .looped_routing import RecordRoute, ReplayRoute, split
from .looped_rules import run_loop
from .looped_spec import LoopSpec
from .looped_vllm_settings import check_vllm, layers_with_own_routers, not_on_vllm

# The attention implementations that vLLM sets in the config: before it builds the model, and with MLA afterwards.
VLLM_IMPLEMENTATIONS = ("vllm", "vllm_mla")
VLLM_ATTENTION = "attn"  # the attribute of an attention module that holds its attention layer of vLLM


def serve_on_vllm(model: Any, loop, layers: nn.ModuleList, spec: LoopSpec) -> None:
    """Prepare a model that vLLM builds.

    Args:
        model: the looped model.
        loop: the `DecoderLoop` of its decoder.
        layers: the decoder layers.
        spec: the loop.

    Raises:
        ValueError: vLLM does not serve the loop exactly with its current settings.
    """
    # Not an import statement: transformers would then require vLLM from everyone who loads this file.
    engine = import_module("vllm.config").get_current_vllm_config()
    check_vllm(engine, loop.config, spec)
    _scale_logits(loop.config)
    _size_latents(engine, loop.text_config)
    for index in layers_with_own_routers(engine, spec, len(layers)):
        for path in loop.traits[index].routers.known:
            layers[index].get_submodule(split(path)[0]).loop_own_router = UnknownState()
    if spec.is_identity:
        return
    # Or else a compiled model finds its experts by counting calls, and a loop calls them more often.
    engine.compilation_config.fast_moe_cold_start = False
    loop.vllm = VllmSeam(layers, spec)
    model.loop_slots = VllmSlots(loop.vllm, engine.compilation_config.static_forward_context)


class VllmSeam:
    """Runs looped layers on vLLM's attention layers.

    Attributes:
        layers: the decoder layers.
        spec: the loop.
        paths: for each looped layer, by number, the path of its attention module.
        slots: with `per_step`, the attention layers of iterations, by layer number and iteration.
    """

    def __init__(self, layers: nn.ModuleList, spec: LoopSpec):
        self.layers = layers
        self.spec = spec
        self.paths = {index: _attention_path(layers[index], index) for index in spec.layers}
        self.slots: dict[tuple[int, int], nn.Module] = {}

    def run_natural(self, call):
        """The output of a layer in the natural pass; records in the call what its attention layer got."""
        with call.frozen(RecordRoute), self._attending(call, self._attention(call.layer, call.index)) as attention:
            output = call.run(call.hidden, call.cache)
        call.handed = attention.handed
        return output

    def run_iteration(self, call, hidden, k: int):
        """The output of a layer for other hidden states, in iteration k >= 1."""
        attention = self._attention(call.layer, call.index, k if self.spec.kv == "per_step" else 0)
        given = call.handed if self.spec.kv == "shared" else None
        with call.frozen(ReplayRoute), self._attending(call, attention, given):
            return call.run(hidden, call.cache, k)

    def run_loop(self, initial, body: Body, spec: LoopSpec):
        """The hidden states after the loop, `(1, tokens, hidden)`; see `looped_rules.run_loop`."""
        prompts = self._tokens_of_prompts(body.calls[0]) if spec.decode == "bypass" else None
        if prompts is not None and not prompts.any():
            return body.natural
        hidden = run_loop(initial, body, spec)
        for call in body.calls if spec.kv == "reference" else ():
            hidden = self._write_back(call, hidden)
        return hidden if prompts is None else torch.where(prompts[:, None], hidden, body.natural)

    def _write_back(self, call, hidden):
        """Store the natural keys and values of a layer again; returns the hidden states, unchanged.

        A compiler drops a call whose output nobody uses, and a call that repeats an earlier one. So this one adds zeros
        made of the hidden states, which also makes it the last one, and they add zeros made of its output.
        """
        query, new, options = call.handed
        zeros = _zeros_of(hidden[0])
        new = [each + zeros.view(-1, *[1] * (each.dim() - 1)) for each in new]
        attended = self._attention(call.layer, call.index).forward(query, *new, **options)
        return hidden + _zeros_of(attended)

    def _tokens_of_prompts(self, call):
        """Which tokens of this forward belong to a prompt, `(tokens,)`; None for all of them.

        A prompt comes whole, so a single token that is not its request's first one was generated.
        """
        metadata = import_module("vllm.forward_context").get_forward_context().attn_metadata
        if metadata is None:  # vLLM measures its memory
            return None
        metadata = metadata[self._attention(call.layer, call.index).layer_name]
        lengths = metadata.query_start_loc.diff()
        prompts = ((lengths > 1) | (lengths == metadata.seq_lens)).repeat_interleave(lengths)
        return nn.functional.pad(prompts, (0, call.hidden.shape[1] - len(prompts)))

    def add_slots(self, known: dict) -> None:
        """With `per_step`, make the attention layers of iterations: copies that differ in name and K/V cache.

        Args:
            known: all attention layers of the engine, by name; vLLM gives each of them a K/V cache.
        """
        for index, k in self.spec.extra_slots:
            if isinstance(self.layers[index], nn.Identity):  # a placeholder: another pipeline stage has the layer
                continue
            slot = copy.copy(self._attention(self.layers[index], index))
            slot.layer_name = f"loop_slots.{k * len(self.layers) + index}.{VLLM_ATTENTION}"
            self.slots[index, k] = known[slot.layer_name] = slot

    def _attention(self, layer: nn.Module, index: int, k: int = 0) -> Any:
        """The attention layer of a layer or, with k > 0, of its iteration k."""
        attention = getattr(layer.get_submodule(self.paths[index]), VLLM_ATTENTION, None)
        attention = self.slots.get((index, k)) if k else attention
        if attention is None:
            raise ValueError(not_on_vllm("this release keeps its attention layers elsewhere; use vLLM 0.30 or newer"))
        return attention

    @contextmanager
    def _attending(self, call, attention, given=None):
        """Let a layer call a stand-in for its attention layer."""
        module = call.layer.get_submodule(self.paths[call.index])
        stand_in = VllmAttention(attention, given)
        vars(module)[VLLM_ATTENTION] = stand_in
        try:
            yield stand_in
        finally:
            del vars(module)[VLLM_ATTENTION]
        if stand_in.count != 1:
            raise ValueError(not_on_vllm(f"layer {call.index} called its attention {stand_in.count} times, not once"))


class VllmAttention:
    """Stands in for an attention layer of vLLM during one pass of a layer.

    Attributes:
        attention: the attention layer.
        given: what it gets instead of the keys and values of this pass: `handed` of another pass; None for none.
        handed: what this pass handed to it: the query, the keys and values (or latents), and options.
        count: how often the layer called it.
    """

    def __init__(self, attention, given):
        self.attention = attention
        self.given = given
        self.handed: tuple = ()
        self.count = 0

    def forward(self, query, *new, **options):
        """The output of vLLM's attention layer, `(tokens, heads * head_size)`."""
        self.count += 1
        self.handed = query, new, options
        return self.attention.forward(query, *(new if self.given is None else self.given[1]), **options)

    def __getattr__(self, name):
        return getattr(self.attention, name)


class VllmSlots(nn.Module):
    """Adds the slots of `per_step` at the right moment.

    That is when vLLM switches the model to evaluation: it has made its attention layers by then, and loaded the
    weights, and next it asks which attention layers there are.
    """

    def __init__(self, seam: VllmSeam, known: dict):
        super().__init__()
        self.seam = seam
        self.known = known

    def train(self, mode: bool = True):
        """Add the slots on `eval()`."""
        if not (mode or self.seam.slots) and self.known and self.seam.spec.kv == "per_step":
            self.seam.add_slots(self.known)
        return super().train(mode)


class UnknownState(nn.Module):
    """A buffer in a sparse block. vLLM fuses only blocks of which it knows all state, so this one keeps its router."""

    def __init__(self):
        super().__init__()
        self.register_buffer("marker", torch.zeros(1, device="cpu"), persistent=False)


def _zeros_of(rows):
    """A zero for each row, `(tokens, 1)`, that a compiler does not know to be zero; it knows a product with zero."""
    return rows[:, :1].clamp(0, 0)


def _attention_path(layer: nn.Module, index: int) -> str:
    """Path of the attention module of a layer: the only one with the layer's number in `layer_idx`, and a `scaling`."""
    modules = [(path, module) for path, module in layer.named_modules() if path and hasattr(module, "scaling")]
    paths = [path for path, module in modules if getattr(module, "layer_idx", None) == index]
    if len(paths) != 1:
        raise ValueError(not_on_vllm(f"layer {index} has {len(paths)} attention modules with its number, not one"))
    return paths[0]


def _scale_logits(config) -> None:
    """Set `logit_scale`: vLLM computes the logits itself, without the division of the family's code."""
    if hasattr(config, "logits_scaling"):
        config.logit_scale = 1 / config.logits_scaling


def _size_latents(engine, config) -> None:
    """Tell vLLM the width of what MLA stores, which it looks up by model types that it knows."""
    if getattr(engine.model_config, "use_mla", False):
        engine.model_config.model_arch_config.head_size = config.kv_lora_rank + config.qk_rope_head_dim
