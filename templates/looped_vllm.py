"""Looped layers under vLLM, whose Transformers backend runs this code unchanged; used nowhere else.

Every export has a copy of this file. It needs only torch and transformers.

vLLM stores keys and values itself, in one attention layer of its own for each number below `num_hidden_layers`. It
calls the model without a cache, on one row with the tokens of all requests, in chunks of its own choice. So an
iteration runs a layer with a stand-in for its vLLM attention layer. With `shared`, the stand-in calls that attention
layer without keys and values: it then reads the natural ones and writes none, as in vLLM's own models whose layers
share keys and values. With `per_step`, it calls an extra attention layer; vLLM makes these because the config counts
more layers than there are.
"""

from __future__ import annotations

from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .looped_spec import LoopSpec
from .looped_vllm_settings import not_on_vllm

VLLM = "vllm"  # the attention implementation that vLLM sets in the config before it builds the model
VLLM_ATTENTION = "attn"  # newer releases set their attention layer as this attribute of a module
VLLM_INSTANCES = "attention_instances"  # older releases, 0.28 among them, pass the layers in this argument

# Attribute that we set on a config: the real number of layers, once `num_hidden_layers` counts slots too.
VLLM_LAYERS = "vllm_physical_layers"


class VllmSeam:
    """Runs looped layers on vLLM's attention layers.

    Attributes:
        paths: for each looped layer, by number, the path of its attention module.
        slots: with `per_step`, one `VllmSlot` for each looped layer and iteration, by its number as text.
    """

    def __init__(self, layers: nn.ModuleList, slots: nn.ModuleDict, spec: LoopSpec):
        self.paths = {index: _attention_path(layers[index], index) for index in spec.layers}
        self.slots = slots
        for _ in range(1, spec.evaluations) if spec.kv == "per_step" else ():
            for index in spec.layers:
                number = len(layers) + len(slots)
                slots[str(number)] = VllmSlot(layers[index].get_submodule(self.paths[index]), number)

    def run(self, layer: nn.Module, index: int, slot: int | None, args, kwargs):
        """The output of a layer that attends to the natural keys and values or, with a `slot`, to its own there."""
        module = layer.get_submodule(self.paths[index])
        instances = kwargs.get(VLLM_INSTANCES)
        stand_in = VllmAttention(self._attention(module, index, slot, instances), writes=slot is not None)
        if instances is not None:
            output = layer(*args, **{**kwargs, VLLM_INSTANCES: {index: stand_in}})
        else:
            vars(module)[VLLM_ATTENTION] = stand_in
            try:
                output = layer(*args, **kwargs)
            finally:
                del vars(module)[VLLM_ATTENTION]
        if stand_in.count != 1:
            raise ValueError(not_on_vllm(f"layer {index} called its attention {stand_in.count} times, not once"))
        return output

    def _attention(self, module: nn.Module, index: int, slot: int | None, instances):
        if instances is not None:
            attention = instances.get(index if slot is None else slot)
        else:
            attention = getattr(module if slot is None else self.slots[str(slot)], VLLM_ATTENTION, None)
        if attention is None:
            raise ValueError(not_on_vllm("this release keeps its attention layers elsewhere; use a tested release"))
        if getattr(module, "sinks", None) is not None and not attention.has_sink:
            raise ValueError(not_on_vllm("this release ignores the attention sinks of this family; use a newer one"))
        return attention


class VllmAttention:
    """Stands in for a vLLM attention layer in an iteration: can leave out writes, and counts its calls."""

    def __init__(self, attention, writes: bool):
        self.attention = attention
        self.writes = writes
        self.count = 0

    def forward(self, query, key, value):
        """The output of vLLM's attention layer."""
        self.count += 1
        return self.attention.forward(query, key if self.writes else None, value if self.writes else None)

    def __getattr__(self, name):
        return getattr(self.attention, name)


class VllmSlot(nn.Module):
    """Looks to vLLM like one more attention module, so that vLLM makes one more attention layer."""

    def __init__(self, attention: nn.Module, number: int):
        super().__init__()
        self.config, self.layer_idx, self.scaling = attention.config, number, attention.scaling

    def forward(self, *args, **kwargs):
        """Never called: vLLM parses this source to see that it calls the attention interface, and with which scale."""
        attention_interface = ALL_ATTENTION_FUNCTIONS[VLLM]
        return attention_interface(self, *args, scaling=self.scaling, **kwargs)


def _attention_path(layer: nn.Module, index: int) -> str:
    """Path of the attention module of a layer: the only module with the layer's number in `layer_idx`."""
    paths = [path for path, module in layer.named_modules() if path and getattr(module, "layer_idx", None) == index]
    if len(paths) != 1:
        raise ValueError(not_on_vllm(f"layer {index} has {len(paths)} modules with its number, not one"))
    return paths[0]


def scale_logits(config) -> None:
    """Set `logit_scale`: vLLM computes the logits itself, without the division of the family's code."""
    if hasattr(config, "logits_scaling"):
        config.logit_scale = 1 / config.logits_scaling


def count_slots(config, spec: LoopSpec) -> None:
    """Count slots as layers in the config, each of its layer's type; vLLM reads it again after building the model."""
    layers = [*range(config.num_hidden_layers), *spec.layers * (spec.extra_kv_slots // len(spec.layers))]
    setattr(config, VLLM_LAYERS, config.num_hidden_layers)
    _set_layers(config, layers)


def count_layers(config) -> None:
    """Undo `count_slots`, since vLLM builds more than one model from a config."""
    if hasattr(config, VLLM_LAYERS):
        _set_layers(config, range(getattr(config, VLLM_LAYERS)))


def _set_layers(config, layers) -> None:
    config.num_hidden_layers = len(layers)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[index] for index in layers]
