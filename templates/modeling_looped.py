"""A causal language model whose middle layers are applied several times, in small damped steps, without training.

Copied byte for byte into every exported directory. It needs `torch` and `transformers` and nothing else, subclasses the
native model of the base's family, and changes one thing: what iterating the decoder's layer list yields. Weights,
parameter names, masks, position embeddings and the forward are the native model's own.

How a forward runs: the native model walks its layer list. Outside the span it meets the layers themselves. Inside, it
meets a `_Visit`, which runs the layer as asked (the natural pass) and records the call; at the end of the span (or of
each layer, in layer mode) the recorded calls are replayed K-1 times on the iterates, see `LoopSpec` for the formula.

Source: "Training-Free Looped Transformers" (arXiv 2605.23872).
"""

from __future__ import annotations

import copy
import inspect
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING, DynamicCache

from .configuration_looped import CLASS_PREFIX, LoopSpec, looped_config_class

# What native layers call the argument that carries the K/V cache, newest name first.
CACHE_ARGUMENTS = ("cache", "past_key_values", "past_key_value", "layer_past")

# Attribute that we set on a cache: decode steps since its latest longer chunk, counted as far as `first_n`.
DECODE_STEPS = "loop_decode_steps"


# ---------------------------------------------------------------------------------------------------------------------
# The update rule: a pure function of the hidden states and g.
# ---------------------------------------------------------------------------------------------------------------------


def run_loop(x, natural, g, spec: LoopSpec):
    """The output of the loop, from the hidden states that entered the span and those that left it.

        h_1 = x + s (n - x);   h_{k+1} = h_k + s (g(h_k) - h_k);   out = beta n + (1 - beta) h_K

    Args:
        x: hidden states before the natural pass, `(batch, seq, hidden)`.
        natural: hidden states after it, n = g(x).
        g: `g(k, h)` runs iteration k (1 .. K-1) of the span on h.
        spec: the loop.

    Blends are computed in the model's dtype. A step size of 1 and an anchor of 0 leave no arithmetic behind, so that
    naive looping is bitwise g applied K times.

    Source: paper section 3, equations of the damped sub-step and the anchor.
    """
    h = _step(x, natural, spec.step_size)
    for k in range(1, spec.steps):
        h = _step(h, g(k, h), spec.step_size)
    return h if spec.anchor == 0 else spec.anchor * natural + (1 - spec.anchor) * h


def _step(h, target, step_size: float):
    if step_size == 1:
        return target
    h = h.to(target.device)  # the span may cross devices under a device_map
    return h + step_size * (target - h)


# ---------------------------------------------------------------------------------------------------------------------
# Stand-ins for the K/V cache, handed to a layer in its place. No Cache subclass: those break on upgrades.
# ---------------------------------------------------------------------------------------------------------------------


class _CacheProxy:
    """Answers everything but `update` as the cache behind it; as an empty one where the model runs without cache."""

    def __init__(self, cache):
        self.cache = cache

    def __getattr__(self, name):
        return getattr(DynamicCache() if self.cache is None else self.cache, name)


class _NaturalPass(_CacheProxy):
    """Stores as usual, and remembers the keys and values that came in (`new`) and that attention read (`read`)."""

    new: tuple = ()
    read: tuple = ()
    rest: tuple = ((), {})  # what else the layer handed to `update`

    def update(self, keys, values, layer_idx, *args, **kwargs):
        self.new, self.rest = (keys, values), (args, kwargs)
        self.read = self.new if self.cache is None else self.cache.update(keys, values, layer_idx, *args, **kwargs)
        return self.read


class _SharedRead(_CacheProxy):
    """Stores nothing and answers with the natural pass's keys and values."""

    def __init__(self, cache, read):
        super().__init__(cache)
        self.read = read

    def update(self, keys, values, *args, **kwargs):
        return self.read


class _OwnChunk(_CacheProxy):
    """Stores nothing and answers with what the natural pass read, its chunk replaced by the iterate's own."""

    def __init__(self, cache, read, start):
        super().__init__(cache)
        self.read = read
        self.start = start

    def update(self, keys, values, *args, **kwargs):
        return self._replace_chunk(self.read[0], keys), self._replace_chunk(self.read[1], values)

    def _replace_chunk(self, read, own):
        length = own.shape[-2]
        if self.start is None:  # the chunk is the end of what was read
            return torch.cat([read[..., : read.shape[-2] - length, :], own], dim=-2)
        positions = self.start + torch.arange(length, device=read.device)
        return read.index_copy(-2, positions, own)


class _OwnSlot(_CacheProxy):
    """Stores into, and reads from, the cache slot of this layer and pass."""

    def __init__(self, cache, read, slot):
        super().__init__(cache)
        self.read = read
        self.slot = slot

    def update(self, keys, values, layer_idx, *args, **kwargs):
        own = self.cache.update(keys, values, self.slot, *args, **kwargs)
        if own[0].shape[-2] != self.read[0].shape[-2]:
            raise ValueError(_foreign_cache(f"slot {self.slot} and layer {layer_idx} differ in length"))
        return own


def _chunk_start(cache, layer_idx: int, length: int, read_length: int, cache_kwargs):
    """Where the chunk just stored, of `length`, starts in the `read_length` positions that the cache returned.

    None means at their end, as everywhere but in a static layer, which returns a buffer longer than what it holds.
    """
    layer = cache.layers[layer_idx]
    if not layer.is_compileable or read_length != layer.max_cache_len:
        return None
    last = read_length - length
    if cache_kwargs is not None and cache_kwargs.get("cache_position") is not None:  # transformers 4
        return cache_kwargs["cache_position"][0].clamp(max=last)
    if hasattr(layer, "cumulative_length_int"):  # a sliding window, which stays at its end once it is full
        return min(layer.cumulative_length_int - length, last)
    return layer.cumulative_length - length


def _is_empty(cache, layer_idx: int) -> bool:
    """Whether the cache holds nothing yet for this layer."""
    if layer_idx >= len(cache.layers) or not cache.layers[layer_idx].is_initialized:
        return True
    # A static cache knows its length as a tensor only, which a compiled graph cannot branch on. What is compiled on an
    # initialised static cache are decode steps.
    return not torch.compiler.is_compiling() and int(cache.get_seq_length(layer_idx)) == 0


def _add_slots(cache, spec: LoopSpec, num_layers: int) -> None:
    """Give the cache one slot for each span layer and further pass, of the kind that the layer itself has.

    A cache that was made without a config adds slots by itself when they are first stored into.

    Raises:
        ValueError: the cache was filled under another loop setting.
    """
    start, stop = spec.span
    count = len(cache.layers)
    if count < num_layers or count == num_layers + spec.extra_kv_slots:
        return
    if count != num_layers or not _is_empty(cache, start):
        raise ValueError(_foreign_cache(f"it has {count} slots, not {num_layers + spec.extra_kv_slots}"))
    for _ in range(1, spec.steps):
        cache.layers.extend(_empty_slot_like(cache.layers[index]) for index in range(start, stop))


def _empty_slot_like(layer):
    slot = copy.deepcopy(layer)
    slot.reset()
    return slot


def _foreign_cache(why: str) -> str:
    return f"the K/V cache was filled under another loop setting ({why}); start with a new cache"


# ---------------------------------------------------------------------------------------------------------------------
# One forward: calls of span layers, recorded and replayed.
# ---------------------------------------------------------------------------------------------------------------------


class _LayerCall:
    """A call of one span layer by the native model: run as asked first, then again on other hidden states.

    Attributes:
        layer, index: the module, and its number in the decoder.
        hidden: the hidden states it was called with, `(batch, seq, hidden)`.
        cache: the cache it was called with, or None.
        natural: the keys and values that the natural pass stored and read, once it has run.
    """

    def __init__(self, layer, index, cache_argument, args, kwargs):
        self.layer = layer
        self.index = index
        self.cache_argument = cache_argument
        self.args = list(args)
        self.kwargs = kwargs
        self.hidden = args[0] if args else kwargs["hidden_states"]
        name, position = cache_argument
        self.cache = kwargs.get(name, args[position] if position < len(args) else None)
        self.natural = _NaturalPass(None)

    def run(self, hidden, cache):
        """The layer's output for other hidden states and another cache; all other arguments as recorded."""
        args, kwargs = list(self.args), dict(self.kwargs)
        if args:
            args[0] = hidden
        else:
            kwargs["hidden_states"] = hidden
        name, position = self.cache_argument
        if position < len(args):
            args[position] = cache
        else:
            kwargs[name] = cache
        return self.layer(*args, **kwargs)

    def run_natural(self, kv: str):
        """The layer's output as the native model asked for it; keeps the keys and values that iterations need."""
        if not self._is_checkpointing():
            self.natural = _NaturalPass(self.cache)
            return self.run(self.hidden, self.natural)
        # Gradient checkpointing takes the cache from a layer; without one, only `shared` needs the natural K/V.
        self.cache = None
        return self._run_natural_checkpointed() if kv == "shared" else self.run(self.hidden, None)

    def run_iteration(self, k: int, hidden, spec: LoopSpec, num_layers: int):
        """The hidden states after this layer in iteration k (1 .. K-1)."""
        if spec.kv == "shared" and self._is_checkpointing():
            return self.layer._gradient_checkpointing_func(self._run_shared, hidden, *self.natural.read)
        return _hidden_of(self.run(hidden, self._iteration_cache(k, spec, num_layers)))

    def store_natural(self, spec: LoopSpec, num_layers: int) -> None:
        """Fill the slots of all passes with the natural keys and values: those of a token that does not loop."""
        for k in range(1, spec.steps):
            args, kwargs = self.natural.rest
            self.cache.update(*self.natural.new, self._slot(k, spec, num_layers), *args, **kwargs)

    def _iteration_cache(self, k, spec, num_layers):
        if spec.kv == "shared":
            return _SharedRead(self.cache, self.natural.read)
        if self.cache is None:
            return None  # a layer without cache attends to its own keys and values
        if spec.kv == "per_step":
            return _OwnSlot(self.cache, self.natural.read, self._slot(k, spec, num_layers))
        return _OwnChunk(self.cache, self.natural.read, self._chunk_start())

    def _slot(self, k, spec, num_layers) -> int:
        return num_layers + (k - 1) * spec.width + self.index - spec.span[0]

    def _chunk_start(self):
        cache_kwargs = next(iter(self.natural.rest[0]), None)
        lengths = self.natural.new[0].shape[-2], self.natural.read[0].shape[-2]
        return _chunk_start(self.cache, self.index, *lengths, cache_kwargs)

    # Under gradient checkpointing the natural K/V travel as inputs and outputs of the checkpointed functions, so that
    # gradients reach them, reentrant or not.

    def _is_checkpointing(self) -> bool:
        layer = self.layer
        # Since 5.24, a layer in training mode keeps its cache where no gradients are wanted, and checkpoints nothing.
        pauses_itself = hasattr(layer, "_can_checkpoint_with_cache") and not torch.is_grad_enabled()
        return layer.training and getattr(layer, "gradient_checkpointing", False) and not pauses_itself

    def _run_natural_checkpointed(self):
        first_output = []

        def forward(hidden):
            natural = _NaturalPass(None)
            with _checkpointing_paused(self.layer):
                output = self.run(hidden, natural)
            first_output.append(output)
            return (_hidden_of(output), *natural.read)

        hidden, *read = self.layer._gradient_checkpointing_func(forward, self.hidden)
        self.natural.read = tuple(read)
        return _with_hidden(first_output[0], hidden)

    def _run_shared(self, hidden, keys, values):
        with _checkpointing_paused(self.layer):
            return _hidden_of(self.run(hidden, _SharedRead(None, (keys, values))))


@contextmanager
def _checkpointing_paused(layer):
    layer.gradient_checkpointing = False
    try:
        yield
    finally:
        layer.gradient_checkpointing = True


def _hidden_of(output):
    return output[0] if isinstance(output, tuple) else output


def _with_hidden(output, hidden):
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


class _Walk:
    """One walk of the native model over its layer list, that is, one forward."""

    def __init__(self, spec: LoopSpec, num_layers: int):
        self.spec = spec
        self.num_layers = num_layers
        self.calls: dict[int, _LayerCall] = {}  # by layer number, so that a recomputed call replaces itself
        self.loops: bool | None = None

    def run(self, call: _LayerCall):
        """Run the natural pass of a span layer and, where the loop's body ends with it, the iterations."""
        if self.loops is None:
            self.loops = self._begin(call)
        if not (self.loops or self.spec.kv == "per_step"):
            return call.run(call.hidden, call.cache)
        output = call.run_natural(self.spec.kv)
        self.calls[call.index] = call
        if not self.loops:
            if call.cache is not None:
                call.store_natural(self.spec, self.num_layers)
            return output
        start, stop = (call.index, call.index + 1) if self.spec.mode == "layer" else self.spec.span
        if call.index != stop - 1:
            return output
        body = [self.calls[index] for index in range(start, stop)]

        def g(k, hidden):
            for each in body:
                hidden = each.run_iteration(k, hidden, self.spec, self.num_layers)
            return hidden

        return _with_hidden(output, run_loop(body[0].hidden, _hidden_of(output), g, self.spec))

    def _begin(self, call: _LayerCall) -> bool:
        """Prepare the cache and decide whether this forward loops, see `LoopSpec.decode`."""
        spec, cache = self.spec, call.cache
        if cache is None:
            return True
        if spec.kv == "per_step":
            _add_slots(cache, spec, self.num_layers)
        if spec.decode == "full":
            return True
        if call.hidden.shape[1] > 1 or _is_empty(cache, call.index):
            setattr(cache, DECODE_STEPS, 0)
            return True
        if spec.decode == "bypass":
            return False
        step = min(getattr(cache, DECODE_STEPS, 0) + 1, spec.first_n + 1)
        setattr(cache, DECODE_STEPS, step)
        return step <= spec.first_n


class _Visit:
    """What the native model meets in place of a span layer: calls go to the walk, attributes to the layer."""

    def __init__(self, walk: _Walk, layer, index: int, cache_argument):
        vars(self).update(walk=walk, layer=layer, index=index, cache_argument=cache_argument)

    def __call__(self, *args, **kwargs):
        return self.walk.run(_LayerCall(self.layer, self.index, self.cache_argument, args, kwargs))

    def __getattr__(self, name):
        return getattr(self.layer, name)

    def __setattr__(self, name, value):
        setattr(self.layer, name, value)


# ---------------------------------------------------------------------------------------------------------------------
# The model classes.
# ---------------------------------------------------------------------------------------------------------------------


class LoopedLayers(nn.ModuleList):
    """The decoder's layer list. Iterating it (or a slice) is one forward of the looped model; indexing is as ever.

    The loop is read from `config` at each forward, so `model.config.loop_steps = 6` takes effect at once.

    Attributes:
        config: the model's config.
        cache_arguments: for each layer, name and position of the argument in which it takes the K/V cache.
    """

    config: Any
    cache_arguments: list[tuple[str, int]]

    def __iter__(self):
        layers: list = list(super().__iter__())
        spec = LoopSpec.from_config(self.config)
        spec.check_depth(len(layers))
        if spec.is_identity:
            return iter(layers)
        walk = _Walk(spec, len(layers))
        for index in range(*spec.span):
            layers[index] = _Visit(walk, layers[index], index, self.cache_arguments[index])
        return iter(layers)

    def __getitem__(self, index):
        return list(self)[index] if isinstance(index, slice) else super().__getitem__(index)


class LoopedModelMixin:
    """Turns the native model that it is mixed into into a looped one, once its layers exist."""

    def __init__(self, config, *inputs, **kwargs):
        super().__init__(config, *inputs, **kwargs)
        layers: Any = _layer_list(self.base_model, config.num_hidden_layers)
        LoopSpec.from_config(config).check_depth(len(layers))
        # The class is swapped, rather than the list replaced, so that parameter names, device maps, tensor-parallel
        # plans and everything else that goes by module paths stay the native model's.
        layers.__class__ = LoopedLayers
        layers.config = config
        layers.cache_arguments = [_cache_argument(layer) for layer in layers._modules.values()]


def _layer_list(model: nn.Module, num_layers: int) -> nn.ModuleList:
    """The decoder's layer list: the outermost ModuleList of `num_layers` modules."""
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


def _cache_argument(layer: nn.Module) -> tuple[str, int]:
    """Name and position of the argument in which a decoder layer takes the K/V cache."""
    names = list(inspect.signature(layer.forward).parameters)
    for name in CACHE_ARGUMENTS:
        if name in names:
            return name, names.index(name)
    raise ValueError(
        f"cannot loop {type(layer).__name__}: it takes no K/V cache (none of {', '.join(CACHE_ARGUMENTS)})"
    )


def __getattr__(name: str) -> type:
    """Make `Looped<Family>ForCausalLM` or `Looped<Family>Model` when first asked for, as `auto_map` and pickle do."""
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
    return type(name, (LoopedModelMixin, native), body)
