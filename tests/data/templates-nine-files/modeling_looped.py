"""A causal language model whose middle layers are applied several times, in small damped steps, without training.

Every export has a copy of this file and of the files that it imports. They need only torch and transformers. The model
class is a subclass of the native model of the base's family. It changes one thing: the items that the decoder's layer
list yields. Weights, parameter names, masks, position embeddings and the forward are the native model's.

This file makes the model classes. `looped_walk` runs a forward, `looped_rules` computes the iterates, `looped_cache`
decides what they attend to, `looped_routing` which experts they use. `looped_spec` defines the fields of the loop.
`looped_vllm` is used only under vLLM.

Source: "Training-Free Looped Transformers" (arXiv 2605.23872).
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

from .configuration_looped import CLASS_PREFIX, base_model_type, looped_config_class
from .looped_cache import CACHE_ARGUMENTS
from .looped_routing import ROUTERS
from .looped_rules import run_loop  # noqa: F401  transformers 4 copies only files that this one imports
from .looped_spec import LoopSpec
from .looped_vllm import VLLM, VllmSeam, check_vllm, count_layers, count_slots, scale_logits
from .looped_vllm_limits import vllm_refusal  # noqa: F401  as above
from .looped_walk import LayerTraits, Visit, Walk


class LoopedLayers(nn.ModuleList):
    """The decoder's layer list. To iterate over it (or a slice) is one forward of the looped model.

    Each forward reads the loop from `config`, so `model.config.loop_steps = 6` takes effect immediately. Indexing by a
    number returns the native layer.

    Attributes:
        config: the model's config.
        traits: what the walk needs to know about each layer.
        vllm: the seam to vLLM's attention layers; None outside vLLM.
    """

    config: Any
    traits: list[LayerTraits]
    vllm: VllmSeam | None = None

    def __iter__(self):
        layers: list = list(super().__iter__())
        spec = LoopSpec.from_config(self.config)
        self.check(spec)
        if spec.is_identity:
            return iter(layers)
        walk = Walk(spec, len(layers), self.vllm)
        for index in self._held(spec):
            layers[index] = Visit(walk, layers[index], self.traits[index])
        return iter(layers)

    def _held(self, spec: LoopSpec) -> list[int]:
        """The looped layers in this process; in a pipeline, the layers of other stages are `nn.Identity`.

        Raises:
            ValueError: a stage boundary cuts a span in block mode.
        """
        held = [index for index in spec.layers if not isinstance(self._modules[str(index)], nn.Identity)]
        for start, stop in spec.spans if spec.mode == "block" else ():
            if 0 < len([index for index in held if start <= index < stop]) < stop - start:
                raise ValueError(
                    f"span {start}:{stop} crosses pipeline stages, which block mode cannot loop; choose a span inside "
                    "one stage, or mode layer"
                )
        return held

    def check(self, spec: LoopSpec) -> None:
        """Raise ValueError unless all looped layers exist and can be run again."""
        spec.check_depth(len(self))
        spec.check_layer_types(getattr(self.config, "layer_types", None))
        spec.check_layer_types(getattr(self.config, "layers_block_type", None))
        for index in spec.layers:
            if self.traits[index].cache_argument is None:
                raise ValueError(
                    f"cannot loop layer {index}: {type(self._modules[str(index)]).__name__} takes no K/V cache "
                    f"(none of {', '.join(CACHE_ARGUMENTS)}); choose another span"
                )
            missing = self.traits[index].routers.missing
            if spec.frozen_routing and missing:
                raise ValueError(
                    f"cannot freeze the routing of layer {index}: {', '.join(missing)} has experts "
                    f"but no known router ({', '.join(ROUTERS)} or gate); switch frozen_routing off"
                )

    def __getitem__(self, index):
        return list(self)[index] if isinstance(index, slice) else super().__getitem__(index)


class LoopedModelMixin:
    """Turns a native model into a looped one, after the native constructor has built its layers."""

    def __init__(self, config, *inputs, **kwargs):
        count_layers(config)
        super().__init__(config, *inputs, **kwargs)
        layers: Any = layer_list(self.base_model, config.num_hidden_layers)
        # Change the class of the list instead of wrapping the list: everything that depends on module paths, such as
        # parameter names, device maps and tensor-parallel plans, stays the native model's.
        layers.__class__ = LoopedLayers
        layers.config = config
        layers.traits = [LayerTraits.of(index, layer) for index, layer in enumerate(layers._modules.values())]
        spec = LoopSpec.from_config(config)
        layers.check(spec)
        if config._attn_implementation != VLLM:
            return
        check_vllm(config, spec)
        scale_logits(config)
        if not spec.is_identity:
            self.loop_slots = nn.ModuleDict()
            layers.vllm = VllmSeam(layers, self.loop_slots, spec)
            count_slots(config, spec)


def layer_list(model: nn.Module, num_layers: int) -> nn.ModuleList:
    """The decoder's layer list: the only outermost ModuleList of `num_layers` modules."""
    lists = [
        (name.count("."), module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == num_layers
    ]
    depth = min((depth for depth, _ in lists), default=None)
    outermost = [module for each, module in lists if each == depth]
    if len(outermost) != 1:
        raise ValueError(
            f"cannot loop {type(model).__name__}: it has {len(outermost)} lists of {num_layers} layers, not one"
        )
    return outermost[0]


def __getattr__(name: str) -> type:
    """Make `Looped<Family>ForCausalLM` or `Looped<Family>Model` when `auto_map` or pickle first looks it up."""
    for suffix, mapping in (("ForCausalLM", MODEL_FOR_CAUSAL_LM_MAPPING), ("Model", MODEL_MAPPING)):
        if name.startswith(CLASS_PREFIX) and name.endswith(suffix):
            model_class = _looped_class(name, name[len(CLASS_PREFIX) : -len(suffix)], mapping)
            globals()[name] = model_class
            return model_class
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _looped_class(name: str, family: str, mapping) -> type:
    config_class = looped_config_class(family)
    native = mapping[config_class.native_config_class]
    body = {"config_class": config_class, "__module__": __name__, "__qualname__": name}
    looped = type(name, (LoopedModelMixin, native), body)
    _load_as_native(native, looped)
    _quantise_as_native(looped.config_class.model_type)
    return looped


def _load_as_native(native: type, looped: type) -> None:
    """Let transformers 5 load, save and run the experts of the looped class like those of the native class.

    transformers fuses expert weights by a table of model types that has no looped types. It also decides once, from the
    source of a class, whether faster attention and experts may run. Without this, both go wrong silently.
    """
    try:
        from transformers.conversion_mapping import (
            get_checkpoint_conversion_mapping,
            register_checkpoint_conversion_mapping,
        )
    except ImportError:  # transformers 4
        return
    model_type = looped.config_class.model_type
    for ours, theirs in ((model_type, base_model_type(model_type)), (looped.__name__, native.__name__)):
        conversion = get_checkpoint_conversion_mapping(theirs)
        if conversion is not None:
            register_checkpoint_conversion_mapping(ours, conversion, overwrite=True)
    for name in ("attn", "experts"):
        answer = getattr(native, f"_can_set_{name}_implementation", None)
        if answer is not None:
            setattr(looped, f"_can_set_{name}_implementation_cached_value", answer())


def _quantise_as_native(model_type: str) -> None:
    """Let transformers scale and fuse AWQ modules, whose tables it looks up by model type, like the native model's."""
    try:
        from transformers.integrations import awq
    except ImportError:
        return
    for name in ("AWQ_SCALES_MAPPINGS", "AWQ_FUSED_MAPPINGS"):
        table = getattr(awq, name, {})
        if base_model_type(model_type) in table:
            table[model_type] = table[base_model_type(model_type)]
