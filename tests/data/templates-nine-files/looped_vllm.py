"""Looped layers under vLLM, whose Transformers backend runs this code unchanged; used nowhere else.

Every export has a copy of this file. It needs only torch and transformers.

vLLM stores keys and values itself, in one attention layer of its own for each number below `num_hidden_layers`. It
calls the model without a cache, on one row with the tokens of all requests, in chunks of its own choice. So an
iteration runs a layer with a stand-in for its vLLM attention layer. With `shared`, the stand-in calls that attention
layer without keys and values: it then reads the natural ones and writes none, as in vLLM's own models whose layers
share keys and values. With `per_step`, it calls an extra attention layer; vLLM makes these because the config counts
more layers than there are. While vLLM builds the model, `check_vllm` refuses every setting that was not found to give
the greedy tokens of transformers.
"""

from __future__ import annotations

from importlib import import_module

from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_looped import base_model_type
from .looped_spec import LoopSpec
from .looped_vllm_limits import VLLM_EAGER, vllm_context, vllm_refusal

VLLM = "vllm"  # the attention implementation that vLLM sets in the config before it builds the model
VLLM_ATTENTION = "attn"  # newer releases set their attention layer as this attribute of a module
VLLM_INSTANCES = "attention_instances"  # older releases, 0.28 among them, pass the layers in this argument

# Attribute that we set on a config: the real number of layers, once `num_hidden_layers` counts slots too.
VLLM_LAYERS = "vllm_physical_layers"


def check_vllm(config, spec: LoopSpec) -> None:
    """Check that vLLM serves this loop exactly with its current settings.

    Raises:
        ValueError: it does not, or this was not tested; the message says what to do.
    """
    # Not an import statement: transformers would then require vLLM from everyone who loads this file.
    engine = import_module("vllm.config").get_current_vllm_config()
    family, values = base_model_type(config.model_type), config.to_dict()
    refusals = [vllm_refusal(family, spec, values), _refused_length(engine, values)]
    if not spec.is_identity:
        refusals += _refused_settings(engine, family)
    for refusal in refusals:
        if refusal is not None:
            raise ValueError(_not_on_vllm(refusal))


def _refused_length(engine, config: dict) -> str | None:
    context = vllm_context(config)
    if context is None or engine.model_config.max_model_len <= context:
        return None
    return (
        f"beyond {context} positions, the longest request changes the rotary embeddings of all requests; add "
        f"--max-model-len {context}"
    )


def _refused_settings(engine, family: str):
    """The reason for each setting of the engine with which it cannot serve a loop."""
    parallel = engine.parallel_config
    refusals = (
        (
            parallel.pipeline_parallel_size > 1,
            "each pipeline stage would loop only its own part of a span; use --tensor-parallel-size instead",
        ),
        (engine.quant_config is not None, "quantised models were not tested; serve a model that is not quantised"),
        (engine.speculative_config is not None, "speculative decoding was not tested; leave --speculative-config out"),
        (engine.lora_config is not None, "adapters were not tested; leave --enable-lora out, or merge them first"),
        (parallel.enable_expert_parallel, "expert parallelism was not tested; leave --enable-expert-parallel out"),
        (
            family in VLLM_EAGER and not engine.model_config.enforce_eager,
            f"with torch.compile, vLLM computes loops of {family} wrongly; add --enforce-eager",
        ),
    )
    return [reason for holds, reason in refusals if holds]


def _not_on_vllm(reason: str) -> str:
    return f"cannot serve this looped model on vLLM: {reason}"


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
            raise ValueError(_not_on_vllm(f"layer {index} called its attention {stand_in.count} times, not once"))
        return output

    def _attention(self, module: nn.Module, index: int, slot: int | None, instances):
        if instances is not None:
            attention = instances.get(index if slot is None else slot)
        else:
            attention = getattr(module if slot is None else self.slots[str(slot)], VLLM_ATTENTION, None)
        if attention is None:
            raise ValueError(_not_on_vllm("this release keeps its attention layers elsewhere; use a tested release"))
        if getattr(module, "sinks", None) is not None and not attention.has_sink:
            raise ValueError(_not_on_vllm("this release ignores the attention sinks of this family; use a newer one"))
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
        raise ValueError(_not_on_vllm(f"layer {index} has {len(paths)} modules with its number, not one"))
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
