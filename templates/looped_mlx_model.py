"""Make the looped model in MLX out of the family's own model in mlx-lm.

Every export has a copy of this file. It needs only mlx-lm.

The model is the native one, with the native parameters. Only the class of its decoder changes, to a subclass whose call
runs the native one over a copy of the decoder in which the layers of the loop are `looped_mlx.Visit`s. So everybody
else finds the native list of layers.
"""

from __future__ import annotations

import inspect
from importlib import import_module
from types import SimpleNamespace
from typing import Any, NamedTuple

from .looped_fit import check_depth
from .looped_mlx import Argument, Loop, Walk, twin, visited_layers
from .looped_mlx_limits import MLX_LM, is_too_old, mlx_config_fields, mlx_loop_refusal, not_on_mlx
from .looped_mlx_routing import routers_of
from .looped_spec import LoopSpec

# No statements: transformers, which copies this file too, demands whatever an import statement names.
mlx_lm = import_module("mlx_lm")
make_prompt_cache = import_module("mlx_lm.models.cache").make_prompt_cache
find_classes = import_module("mlx_lm.utils")._get_classes

MODEL_TYPE_PREFIX = "looped_"
CLASS_PREFIX = "Looped"

CACHE = "cache"  # the argument of decoders and layers for it

# Caches of which an iteration can have one of its own, since only the layer changes them.
OWN_CACHES = ("KVCache", "RotatingKVCache", "ArraysCache", "CacheList")


class LoopedArguments(NamedTuple):
    """What mlx-lm reads from config.json: the family's class and arguments, and the loop."""

    model_class: type
    arguments: Any
    spec: LoopSpec

    @classmethod
    def from_dict(cls, config: dict) -> LoopedArguments:
        """Read a config.

        Raises:
            ValueError: mlx-lm is too old or lacks the family, or the loop is impossible.
        """
        if is_too_old(mlx_lm.__version__):
            raise ValueError(f"mlx-lm {mlx_lm.__version__} is older than {MLX_LM}; run `pip install -U mlx-lm`")
        spec = LoopSpec.from_config(SimpleNamespace(**config))
        native = _native_config(config)
        try:
            model_class, arguments_class = find_classes(native)
        except ValueError:
            raise ValueError(
                f"mlx-lm {mlx_lm.__version__} has no family {native['model_type']}; use a newer one, or transformers"
            ) from None
        try:
            return cls(model_class, arguments_class.from_dict(native), spec)
        except TypeError as error:
            raise ValueError(
                f"mlx-lm {mlx_lm.__version__} does not read a config.json of this form, with or without a loop: {error}"
            ) from None


def looped_model(arguments: LoopedArguments):
    """The native model of a family, looped.

    Raises:
        ValueError: the family or the loop does not run in MLX; the message says why.
    """
    model, spec = arguments.model_class(arguments.arguments), arguments.spec
    layers = list(model.layers)
    check_depth(spec, len(layers))
    if spec.is_identity:
        return model
    refusal = mlx_loop_refusal(spec, len(layers))
    if refusal is not None:
        raise ValueError(not_on_mlx(refusal))
    decoder, name = _find_layer_list(model)
    slots = make_prompt_cache(model)
    _check_slots(spec, slots, len(layers))
    loop = Loop(
        spec,
        name,
        len(slots),
        len(layers),
        Argument.of(type(decoder), CACHE),
        {
            index: (Argument.of(type(layers[index])), Argument.of(type(layers[index]), CACHE))
            for index in visited_layers(spec, len(layers))
        },
        {index: _routers(layers[index], index) for index in spec.layers if spec.frozen_routing},
    )
    if spec.frozen_routing and not any(loop.routers.values()):
        raise ValueError(not_on_mlx("no layer of the span has a router to freeze; set loop_frozen_routing to false"))
    decoder.__class__ = _with_loop(type(decoder), loop)
    if spec.has_extra_slots:
        model.__class__ = _with_slots(type(model), spec)
    return model


class LoopedDecoder:
    """Runs the native decoder with visits in its list of layers. A subclass of it and of the native class sets both.

    Attributes:
        native: the native class.
        loop: what every forward needs.
    """

    native: type
    loop: Loop

    def __call__(self: Any, *args, **kwargs):
        loop = self.loop
        cache = loop.cache.value_in(args, kwargs)
        walk = Walk(loop, cache)
        args, kwargs = loop.cache.put(walk.natural_slots, args, kwargs)
        output = self.native.__call__(
            twin(self, {loop.layers: walk.visits(self[loop.layers])}, self.native), *args, **kwargs
        )
        walk.check_complete()
        return output


def _with_loop(native: type, loop: Loop) -> type:
    return type(f"{CLASS_PREFIX}{native.__name__}", (LoopedDecoder, native), {"native": native, "loop": loop})


def _with_slots(native: type, spec: LoopSpec) -> type:
    """The class of the model whose cache has slots for iterations, behind those of the layers."""

    def make_cache(self):
        own = [_native_slots(native, self)[layer] for layer, _ in spec.extra_slots]
        return _native_slots(native, self) + own

    return type(f"{CLASS_PREFIX}{native.__name__}", (native,), {"make_cache": make_cache})


def _native_slots(native: type, model) -> list:
    return list(make_prompt_cache(twin(model, {}, native)))


def _native_config(config: dict) -> dict:
    """The config of the base, in the form that mlx-lm reads."""
    architectures = [name.removeprefix(CLASS_PREFIX) for name in config.get("architectures") or ()]
    model_type = config["model_type"].removeprefix(MODEL_TYPE_PREFIX)
    try:
        fields = mlx_config_fields(model_type, config)
    except ValueError as error:
        raise ValueError(not_on_mlx(f"{error}; use transformers")) from None
    return {**config, **fields, "model_type": model_type, "architectures": architectures}


def _find_layer_list(model) -> tuple[Any, str]:
    """The decoder, and the name of its list of layers."""
    first = model.layers[0]
    for _, module in model.named_modules():
        for name, value in module.items():
            if isinstance(value, list) and value and value[0] is first and CACHE in _parameters(type(module)):
                return module, name
    raise ValueError(not_on_mlx("its decoder has no list of layers that it walks with a cache"))


def _parameters(module_class: type) -> list[str]:
    return list(inspect.signature(module_class.__call__).parameters)


def _check_slots(spec: LoopSpec, slots: list, num_layers: int) -> None:
    """Raise ValueError unless each looped layer has a memory of its own, of a kind that the K/V policy handles."""
    if len(slots) != num_layers:
        raise ValueError(not_on_mlx(f"{num_layers} layers share {len(slots)} caches"))
    for index in spec.layers:
        kind = type(slots[index]).__name__
        if spec.kv == "shared" and not hasattr(slots[index], "update_and_fetch"):
            reason = f"layer {index} remembers more than keys and values ({kind})"
            raise ValueError(not_on_mlx(f"{reason}, which kv shared cannot hand on; set loop_kv to per_step"))
        if spec.kv == "per_step" and kind not in OWN_CACHES:
            raise ValueError(not_on_mlx(f"kv per_step has no slots for layer {index} ({kind}); set loop_kv to shared"))


def _routers(layer, index: int) -> tuple[str, ...]:
    known, missing = routers_of(layer)
    if missing:
        raise ValueError(
            not_on_mlx(f"no router is known in {missing[0]} of layer {index}; set loop_frozen_routing to false")
        )
    return known
