"""Where looped layers meet vLLM, whose Transformers backend runs this code as it is; it matters nowhere else.

Copied byte for byte into every exported directory; it needs torch and transformers alone.

vLLM keeps keys and values itself, in one attention layer of its own for each number below `num_hidden_layers`. It
calls the model without a cache, on one row that holds the tokens of all requests, cut where it likes. An iteration
therefore runs a layer with a stand-in for its vLLM attention. Under `shared` that asks the same attention layer without
keys and values, so that it reads the natural ones and writes none, as vLLM's own models do whose layers share them.
Under `per_step` it asks an extra one, which vLLM makes because the config then counts more layers than there are.
Whatever was not found to give the greedy tokens of transformers is refused while vLLM builds the model.
"""

from __future__ import annotations

from importlib import import_module

from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_looped import base_model_type
from .looped_spec import LoopSpec
from .looped_vllm_limits import VLLM_EAGER, vllm_context, vllm_refusal

VLLM = "vllm"  # the attention implementation that vLLM sets in the config before it builds the model
VLLM_ATTENTION = "attn"  # where it hangs its attention layers, of late
VLLM_INSTANCES = "attention_instances"  # the argument in which it hands them down, until 0.28 at least

# Attribute that we set on a config: how many layers the model has, where `num_hidden_layers` counts slots too.
VLLM_LAYERS = "vllm_physical_layers"


def check_vllm(config, spec: LoopSpec) -> None:
    """Check that vLLM, as it is set up, serves this loop exactly.

    Raises:
        ValueError: it does not, or that was not tried; the message says what to do.
    """
    # Not an import statement: transformers would demand vLLM of whoever loads this file.
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
        f"beyond {context} positions the rotary embeddings of all requests change with the longest of them; add "
        f"--max-model-len {context}"
    )


def _refused_settings(engine, family: str):
    """Why not, for each setting of an engine under which a loop is not served."""
    parallel = engine.parallel_config
    refusals = (
        (
            parallel.pipeline_parallel_size > 1,
            "each stage of a pipeline would loop its part of a span by itself; use --tensor-parallel-size instead",
        ),
        (engine.quant_config is not None, "quantised models were not tried there; serve one that is not"),
        (engine.speculative_config is not None, "speculative decoding was not tried; leave --speculative-config out"),
        (engine.lora_config is not None, "adapters were not tried; leave --enable-lora out, or merge them first"),
        (parallel.enable_expert_parallel, "expert parallelism was not tried; leave --enable-expert-parallel out"),
        (
            family in VLLM_EAGER and not engine.model_config.enforce_eager,
            f"torch.compile was found to compute loops of {family} wrongly there; add --enforce-eager",
        ),
    )
    return [reason for holds, reason in refusals if holds]


def _not_on_vllm(reason: str) -> str:
    return f"cannot serve this looped model on vLLM: {reason}"


class VllmSeam:
    """Where looped layers meet vLLM's attention.

    Attributes:
        paths: by number of the layer, the path of the module in it that computes attention.
        slots: by number as text, the modules for which vLLM makes the attention layers of iterations.
    """

    def __init__(self, layers: nn.ModuleList, slots: nn.ModuleDict, spec: LoopSpec):
        self.paths = {index: _attention_path(layers[index], index) for index in spec.layers}
        self.slots = slots
        for _ in range(1, spec.evaluations) if spec.kv == "per_step" else ():
            for index in spec.layers:
                number = len(layers) + len(slots)
                slots[str(number)] = VllmSlot(layers[index].get_submodule(self.paths[index]), number)

    def run(self, layer: nn.Module, index: int, slot: int | None, args, kwargs):
        """The output of a layer that attends to its natural keys and values, or to its own in `slot`."""
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
            raise ValueError(_not_on_vllm(f"layer {index} asked its attention {stand_in.count} times a pass, not once"))
        return output

    def _attention(self, module: nn.Module, index: int, slot: int | None, instances):
        if instances is not None:
            attention = instances.get(index if slot is None else slot)
        else:
            attention = getattr(module if slot is None else self.slots[str(slot)], VLLM_ATTENTION, None)
        if attention is None:
            raise ValueError(_not_on_vllm("this release keeps its attention layers elsewhere; use one that was tried"))
        if getattr(module, "sinks", None) is not None and not attention.has_sink:
            raise ValueError(_not_on_vllm("this release drops the attention sinks of this family; use a newer one"))
        return attention


class VllmAttention:
    """Stands in for a vLLM attention layer in an iteration: it may read only, and it is counted how often it does."""

    def __init__(self, attention, writes: bool):
        self.attention = attention
        self.writes = writes
        self.count = 0

    def forward(self, query, key, value):
        """What vLLM's attention answers."""
        self.count += 1
        return self.attention.forward(query, key if self.writes else None, value if self.writes else None)

    def __getattr__(self, name):
        return getattr(self.attention, name)


class VllmSlot(nn.Module):
    """Looks to vLLM like one more module that computes attention, so that it makes one more attention layer."""

    def __init__(self, attention: nn.Module, number: int):
        super().__init__()
        self.config, self.layer_idx, self.scaling = attention.config, number, attention.scaling

    def forward(self, *args, **kwargs):
        """Never called: vLLM reads from this source that it asks the attention interface, and with which scale."""
        attention_interface = ALL_ATTENTION_FUNCTIONS[VLLM]
        return attention_interface(self, *args, scaling=self.scaling, **kwargs)


def _attention_path(layer: nn.Module, index: int) -> str:
    """Path of the one module in a layer that computes attention: it knows the layer's number."""
    paths = [path for path, module in layer.named_modules() if path and getattr(module, "layer_idx", None) == index]
    if len(paths) != 1:
        raise ValueError(_not_on_vllm(f"{len(paths)} modules of layer {index} know its number, not one"))
    return paths[0]


def scale_logits(config) -> None:
    """Tell vLLM, which computes the logits, what the family's code would divide them by."""
    if hasattr(config, "logits_scaling"):
        config.logit_scale = 1 / config.logits_scaling


def count_slots(config, spec: LoopSpec) -> None:
    """Make the config count slots as layers, each of its layer's type: vLLM reads it again once the model is built."""
    layers = [*range(config.num_hidden_layers), *spec.layers * (spec.extra_kv_slots // len(spec.layers))]
    setattr(config, VLLM_LAYERS, config.num_hidden_layers)
    _set_layers(config, layers)


def count_layers(config) -> None:
    """Undo `count_slots`: vLLM builds a model more than once from one config."""
    if hasattr(config, VLLM_LAYERS):
        _set_layers(config, range(getattr(config, VLLM_LAYERS)))


def _set_layers(config, layers) -> None:
    config.num_hidden_layers = len(layers)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[index] for index in layers]
