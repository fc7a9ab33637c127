"""The decoder of a looped model: only its own forward finds visits in its layer list; everybody else finds the layers.

Every export has a copy of this file. It needs only torch.

The decoder is the module that owns the layer list. It keeps its native class name, its modules and its parameters; its
class gets two things: a forward that runs the native forward as a `Walk`, and a property in place of the layer list.
The property gives the visits of the walk to the native forward alone. Hooks, training scripts, other threads and
everything outside of a forward read the native `nn.ModuleList`.
"""

from __future__ import annotations

import functools
import sys
import threading
from typing import Any, cast

import torch
from torch import nn
from transformers import Cache

from .looped_arguments import CACHE_ARGUMENTS, find_cache_argument, self_attention
from .looped_cache import (
    add_slots,
    check_filled_by,
    mark_filled,
)
from .looped_call import HANDED_OVER, LayerTraits
from .looped_fit import (
    ADDED_FEATURES,
    CROSS_ATTENTION,
    REUSED_KEYS,
    check_added_features,
    check_cross_attention,
    check_depth,
    check_layer_types,
    check_paged,
    check_reused_keys,
)
from .looped_routing import ROUTERS, own_routing
from .looped_spec import LoopSpec
from .looped_vllm import VllmSeam
from .looped_walk import Walk

LOOP = "_loop"  # the attribute of a looped decoder that holds its `DecoderLoop`
FIRST_REUSER = "first_kv_shared_layer_idx"  # attribute of decoders whose late layers reuse the keys of earlier ones


class _Thread(threading.local):
    """The innermost forward that runs in this thread; modules hold no state of a call, since threads share them.

    Attributes:
        decoder: whose forward it is; None outside of a forward.
        walk: its walk; None if it is the base model's.
    """

    def __init__(self):  # once in each thread
        self.decoder: nn.Module | None = None
        self.walk: Walk | None = None


_THREAD = _Thread()


class DecoderLoop:
    """What a decoder knows about its loop.

    Attributes:
        config: the model's config; each forward reads the loop from it, so `config.loop_steps = 6` works at any time.
        text_config: the config that describes the layers: the same or, in a multimodal model, its language model's.
        list_name: the attribute of the decoder that holds the layer list.
        traits: what the walk needs to know about each layer.
        cache_argument: the decoder's argument for the K/V cache, or None.
        vllm: the seam to vLLM's attention layers; None outside vLLM.
    """

    def __init__(self, config, decoder: nn.Module, list_name: str):
        self.config = config
        self.text_config = config.get_text_config(decoder=True)
        self.list_name = list_name
        self.traits = [LayerTraits.of(index, layer) for index, layer in enumerate(self.layers_of(decoder))]
        self.cache_argument = find_cache_argument(decoder)
        self.vllm: VllmSeam | None = None

    def layers_of(self, decoder: nn.Module) -> Any:
        """The native layer list, an `nn.ModuleList`."""
        return decoder._modules[self.list_name]

    def checked_spec(self, layers: nn.ModuleList) -> LoopSpec:
        """The loop in the config.

        Raises:
            ValueError: a looped layer does not exist or cannot be run again.
        """
        spec = LoopSpec.from_config(self.config)
        check_depth(spec, len(layers))
        check_layer_types(spec, getattr(self.text_config, "layer_types", None))
        check_layer_types(spec, getattr(self.text_config, "layers_block_type", None))
        check_reused_keys(
            spec, getattr(self.text_config, REUSED_KEYS, None), getattr(self.text_config, "layer_types", None)
        )
        check_cross_attention(spec, getattr(self.text_config, CROSS_ATTENTION, None))
        check_added_features(spec, getattr(getattr(self.config, "vision_config", None), ADDED_FEATURES, None))
        for index in spec.layers:
            self._check_layer(index, layers, spec)
        return spec

    def _check_layer(self, index: int, layers: nn.ModuleList, spec: LoopSpec) -> None:
        if self.traits[index].cache_argument is None:
            raise ValueError(
                f"cannot loop layer {index}: {type(layers[index]).__name__} takes no K/V cache "
                f"(none of {', '.join(CACHE_ARGUMENTS)}); choose another span"
            )
        if self.traits[index].is_handed_over:
            raise ValueError(
                f"cannot loop layer {index}: {type(layers[index]).__name__} also takes {HANDED_OVER} from the layer "
                "before it, which an iteration would not renew; choose another span"
            )
        self.traits[index].mixers.check(index, spec.kv)
        if not hasattr(Cache, "update_indexer") and _has_indexer(layers[index]):
            raise ValueError(
                f"cannot loop layer {index}: in this release of transformers, its indexer keeps keys outside of the "
                "cache; use a newer release, or choose another span"
            )
        missing = self.traits[index].routers.missing
        if spec.frozen_routing and missing:
            raise ValueError(
                f"cannot freeze the routing of layer {index}: {', '.join(missing)} has experts "
                f"but no known router ({', '.join(ROUTERS)} or gate); switch frozen_routing off"
            )

    def num_layers(self, layers: nn.ModuleList) -> int:
        """How many layers a forward runs: fewer than there are while a model drafts for itself with early exit."""
        return min(len(layers), self.text_config.num_hidden_layers)

    def begin(self, layers: nn.ModuleList, args, kwargs) -> Walk | None:
        """The walk of a forward with these arguments; None if the forward is the base model's."""
        spec = self.checked_spec(layers)
        self._check_cache(spec, layers, args, kwargs)
        if spec.is_identity:
            return None
        return Walk(spec, self.num_layers(layers), self.traits, self.vllm, _num_tokens(args, kwargs))

    def _check_cache(self, spec: LoopSpec, layers: nn.ModuleList, args, kwargs) -> None:
        """Raise ValueError if this loop cannot go on with the cache, before any layer stores there."""
        cache = self_attention(None if self.cache_argument is None else self.cache_argument.value_in(args, kwargs))
        if cache is None:
            return
        check_paged(cache, spec)
        check_filled_by(cache, spec, self.num_layers(layers))
        if spec.has_extra_slots:
            add_slots(cache, spec, self.num_layers(layers))
        if spec.is_identity:
            mark_filled(cache, spec)


def loop_decoder(decoder: nn.Module, list_name: str, config, native: type | None = None) -> DecoderLoop:
    """Make a native decoder a looped one, in place.

    Args:
        decoder: the module that owns the layer list.
        list_name: its attribute for the list.
        config: the model's config.
        native: the native class of the decoder if its class is ours already, else None.
    """
    loop = DecoderLoop(config, decoder, list_name)
    setattr(decoder, LOOP, loop)
    # Change the class instead of wrapping modules: everything that depends on module paths, such as parameter names,
    # device maps and tensor-parallel plans, stays the native model's.
    cls: Any = type(decoder)
    if native is None:
        decoder.__class__ = looped_decoder_class(cls, list_name)
    elif list_name not in vars(cls):  # not another class: vLLM wraps the constructor of the class that it finds
        for name, member in _members(native, list_name).items():
            setattr(cls, name, member)
    return loop


@functools.lru_cache(maxsize=None)
def looped_decoder_class(native: type, list_name: str) -> type:
    """The class of a looped decoder: a subclass of the native class, with the same name."""

    def reduce(self, protocol):
        _, _, *state = cast(tuple, native.__reduce_ex__(self, protocol))
        return (_new_decoder, (native, list_name), *state)

    body = {
        "__module__": native.__module__,
        "__qualname__": native.__qualname__,
        "__doc__": native.__doc__,
        "__reduce_ex__": reduce,  # pickle finds a class by its name, and this name is the native class's
    }
    return type(native.__name__, (native,), body | _members(native, list_name))


def _members(native: Any, list_name: str) -> dict[str, Any]:
    """What the class of a looped decoder has in place of the native layer list and the native forward."""

    def layers(self):
        return _layers_for(self, sys._getframe(1) if not torch.compiler.is_compiling() else None)

    @functools.wraps(native.forward)
    def forward(self, *args, **kwargs):
        return _run(self, native, args, kwargs)

    return {list_name: property(layers), "forward": forward}


def _new_decoder(native: type, list_name: str):
    return object.__new__(looped_decoder_class(native, list_name))


def _run(decoder: nn.Module, native: Any, args, kwargs):
    """The decoder's forward.

    Raises:
        ValueError: the native forward did not run the looped layers through the list that it was given.
    """
    loop = vars(decoder)[LOOP]
    walk = loop.begin(loop.layers_of(decoder), args, kwargs)
    if walk is None and _THREAD.decoder is None:
        return native.forward(decoder, *args, **kwargs)
    # A hook may run a forward, of this decoder or another one, in the middle of a forward.
    outer, _THREAD.decoder, _THREAD.walk = (_THREAD.decoder, _THREAD.walk), decoder, walk
    try:
        with own_routing():
            output = native.forward(decoder, *args, **_all_tokens(decoder, walk, kwargs))
    finally:
        _THREAD.decoder, _THREAD.walk = outer
    if walk is not None:
        walk.check_complete(native.__name__)
    return output


def _layers_for(decoder: nn.Module, caller):
    """The layer list: with visits for the decoder's own forward, the native one for everybody else.

    Args:
        decoder: the decoder.
        caller: the frame that reads the list; None in a compiled graph, which has no frames.
    """
    loop = vars(decoder)[LOOP]
    layers, walk = loop.layers_of(decoder), None
    if caller is not None and caller.f_locals.get("self") is not decoder:
        return layers
    if _THREAD.decoder is decoder:
        walk = _THREAD.walk
    elif caller is not None and caller.f_code.co_name == "forward":
        walk = loop.begin(layers, (), {})  # somebody replaced this module's forward by their own
    return layers if walk is None else walk.visit(layers)


def _all_tokens(decoder: nn.Module, walk: Walk | None, kwargs: dict) -> dict:
    """The arguments of a forward, without `logits_to_keep` if a span needs all tokens.

    Gemma 4 drops all other tokens before the first layer that reuses keys. A span on both sides of it would then run
    its layers on different tokens.
    """
    first = getattr(decoder, FIRST_REUSER, None)
    if walk is None or first is None or not any(body.crosses(first) for body in walk.spec.bodies):
        return kwargs
    return {name: value for name, value in kwargs.items() if name != "logits_to_keep"}


def _has_indexer(layer: nn.Module) -> bool:
    """Whether a layer chooses the positions that it attends to by keys of an indexer."""
    return any(name.rpartition(".")[2] == "indexer" for name, _ in layer.named_modules())


def _num_tokens(args, kwargs) -> int | None:
    """The number of tokens of a forward, from its token ids or embeddings; None if neither is among the arguments."""
    given = (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args[:1])
    return next((each.shape[1] for each in given if isinstance(each, torch.Tensor)), None)
