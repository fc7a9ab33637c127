"""A causal language model whose middle layers are applied several times, in small damped steps, without training.

Copied byte for byte into every exported directory. It needs `torch` and `transformers` and nothing else, subclasses the
native model of the base's family, and changes one thing: what iterating the decoder's layer list yields. Weights,
parameter names, masks, position embeddings and the forward are the native model's own.

How a forward runs: the native model walks its layer list. Outside the span it meets the layers themselves. Inside, it
meets a `_Visit`, which runs the layer as asked (the natural pass) and records the call; at the end of the span (or of
each layer, in layer mode) the recorded calls are replayed on the iterates of the update rule, see `LoopSpec`.

Source: "Training-Free Looped Transformers" (arXiv 2605.23872).
"""

from __future__ import annotations

import copy
import inspect
from contextlib import contextmanager
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING, DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_looped import (
    CLASS_PREFIX,
    VLLM_EAGER,
    LoopSpec,
    base_model_type,
    looped_config_class,
    vllm_context,
    vllm_refusal,
)

# What native layers call the argument that carries the K/V cache, newest name first.
CACHE_ARGUMENTS = ("cache", "past_key_values", "past_key_value", "layer_past")

# What native layers call the module that chooses experts, wherever it is; `gate` is another name beside experts only.
ROUTERS = ("router", "router_gate")

# Attribute that we set on a cache: decode steps since its latest longer chunk, counted as far as `first_n`.
DECODE_STEPS = "loop_decode_steps"


# ---------------------------------------------------------------------------------------------------------------------
# The update rules: pure functions of the hidden states and g. `LoopSpec` and `RULES` of the configuration declare them.
# ---------------------------------------------------------------------------------------------------------------------


def run_loop(x, g, spec: LoopSpec):
    """The output of the loop: the rule's last iterate, blended with the natural pass by the anchor.

        out = beta n + (1 - beta) h_K

    Args:
        x: hidden states that entered the span, `(batch, seq, hidden)`.
        g: a `_Body`; its first call is the natural pass.
        spec: the loop.

    Blends are computed in the model's dtype. A step size of 1 and an anchor of 0 leave no arithmetic behind, so that
    naive looping is bitwise g applied K times.

    Source: paper section 3, equations of the damped sub-step and the anchor; the other rules from `_iterate_loop` of
    the authors' published `loop_qwen3.py`.
    """
    h = RULES[spec.rule](x.to(g.natural.device), g, spec)  # the span may cross devices under a device_map
    return h if spec.anchor == 0 else spec.anchor * g.natural + (1 - spec.anchor) * h


def _euler(x, g, spec):
    h, s = x, spec.step_size
    for k in range(1, spec.steps + 1):
        y = g(h)
        h = y if s == 1 else h + s * (y - h)
        if spec.norm_interpolation and k < spec.steps:
            start, stop = _norm(x), _norm(g.natural)
            h = _rescale(h, start + (stop - start) * (k / spec.steps))
    return h


def _residual_scaled(x, g, spec):
    h = x
    for _ in range(spec.steps):
        h = g(h)
    return x + (h - x) / spec.steps


def _ema(x, g, spec):
    h = x
    for s in spec.schedule or (spec.step_size,) * spec.steps:
        h = (1 - s) * h + s * g(h)
    return h


def _midpoint(x, g, spec):
    h, s = x, spec.step_size
    for _ in range(spec.steps):
        middle = h + s / 2 * (g(h) - h)
        h = h + s * (g(middle) - middle)
    return h


def _heun(x, g, spec):
    h, s = x, spec.step_size
    for _ in range(spec.steps):
        k1 = g(h) - h
        end = h + s * k1
        h = h + s / 2 * (k1 + g(end) - end)
    return h


def _rk4(x, g, spec):
    h, s = x, spec.step_size
    for _ in range(spec.steps):
        k1 = g(h) - h
        second = h + s / 2 * k1
        k2 = g(second) - second
        third = h + s / 2 * k2
        k3 = g(third) - third
        fourth = h + s * k3
        k4 = g(fourth) - fourth
        h = h + s / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return h


def _heavy_ball(x, g, spec):
    h = previous = x
    momentum = 0.3 if spec.momentum is None else spec.momentum
    for _ in range(spec.steps):
        h, previous = h + spec.step_size * (g(h) - h) + momentum * (h - previous), h
    return h


def _anderson(x, g, spec):
    """Least squares finds the mix of past changes that would null the residual, over all tokens of the chunk at once.

    As in the authors' code, whose step takes (1 - s) of the mixed points where Walker and Ni (2011) take all of them.
    """
    h, s, history = x, spec.step_size, spec.history or 2
    points, residuals = [], []
    for _ in range(spec.steps):
        points.append(h)
        residuals.append(g(h) - h)
        points, residuals = points[-history - 1 :], residuals[-history - 1 :]
        if len(points) == 1:
            h = h + s * residuals[-1]
            continue
        moves, changes = _differences(points), _differences(residuals)
        mix = _least_squares(changes, residuals[-1].float())
        h = h - (1 - s) * (moves @ mix).to(h.dtype) + s * (residuals[-1] - (changes @ mix).to(h.dtype))
    return h


def _differences(values):
    return torch.stack([values[i + 1] - values[i] for i in range(len(values) - 1)], dim=-1).float()


def _least_squares(columns, target):
    """Coefficients of the last dimension of `columns` that come nearest to `target`, with a touch of Tikhonov."""
    columns = columns.flatten(0, -2)
    gram = columns.T @ columns
    gram = gram + 1e-6 * gram.diagonal().max().clamp_min(1e-8) * torch.eye(len(gram), device=gram.device)
    return torch.linalg.solve(gram, columns.T @ target.flatten())


def _aitken(x, g, spec):
    """Delta-squared on each coordinate, in fp32; no coordinate moves further than one application of g moves it."""
    h = x
    for _ in range(spec.steps // 2):
        once = g(h)
        twice = g(once)
        first, second = (once - h).float(), (twice - 2 * once + h).float()
        bends = second.abs() > 1e-3 * first.abs() + 1e-4
        step = torch.where(bends, -first * first / torch.where(bends, second, 1.0), first)
        h = (h.float() + step.clamp(-first.abs(), first.abs())).to(h.dtype)
    return h


def _norm_stab(x, g, spec):
    h, s = x, spec.step_size
    for _ in range(spec.steps):
        h = _rescale((1 - s) * h + s * g(h), _norm(x))
    return h


def _poly_blend(x, g, spec):
    h, blend = x, spec.schedule[0] * x
    for weight in spec.schedule[1:]:
        h = g(h)
        blend = blend + weight * h
    return blend


def _input_anchor(x, g, spec):
    h, s = x, spec.step_size
    for _ in range(spec.steps):
        h = (1 - s) * x + s * g(h)
    return h


def _uniform(x, g, spec):
    h, sums = g(x), list(g.natural_outputs)
    for k in range(2, spec.steps + 1):

        def mean(position, output, k=k):
            sums[position] = sums[position] + output
            return sums[position] / k

        h = g(h, replace=mean)
    return h


def _norm(h):
    """L2 norm of each token's hidden state in fp32, `(batch, seq, 1)`."""
    return h.float().norm(dim=-1, keepdim=True).clamp_min(1e-6)


def _rescale(h, norm):
    return (h.float() * (norm / _norm(h))).to(h.dtype)


RULES = {
    "euler": _euler,
    "residual_scaled": _residual_scaled,
    "ema": _ema,
    "ema_sched": _ema,
    "midpoint": _midpoint,
    "heun": _heun,
    "rk4": _rk4,
    "heavy_ball": _heavy_ball,
    "anderson": _anderson,
    "aitken": _aitken,
    "norm_stab": _norm_stab,
    "poly_blend": _poly_blend,
    "input_anchor": _input_anchor,
    "uniform": _uniform,
}


# ---------------------------------------------------------------------------------------------------------------------
# Stand-ins for the K/V cache, handed to a layer in its place. No Cache subclass: those break on upgrades.
# ---------------------------------------------------------------------------------------------------------------------


class _CacheProxy:
    """Answers everything but `update` as the cache behind it; as an empty one where the model runs without cache.

    Attributes:
        length: what the layer was told in the natural pass when it asked how long the cache is. Llama 4 places its
            tokens by that, which are stored already when iterations run.
    """

    length: Any = None

    def __init__(self, cache):
        self.cache = cache

    def get_seq_length(self, *args, **kwargs):
        return self._ask_length(*args, **kwargs) if self.length is None else self.length

    def _ask_length(self, *args, **kwargs):
        return self.__getattr__("get_seq_length")(*args, **kwargs)

    def __getattr__(self, name):
        if "conv" in name or "recurrent" in name or "ssm" in name or "linear" in name or "indexer" in name:
            raise ValueError(
                f"cannot loop a layer that keeps more than keys and values in its cache ({name}); choose another span"
            )
        return getattr(DynamicCache() if self.cache is None else self.cache, name)


class _NaturalPass(_CacheProxy):
    """Stores as usual, and remembers the keys and values that came in (`new`) and that attention read (`read`)."""

    new: tuple = ()
    read: tuple = ()
    rest: tuple = ((), {})  # what else the layer handed to `update`

    def get_seq_length(self, *args, **kwargs):
        length = self._ask_length(*args, **kwargs)
        if self.length is None:  # a static cache counts in place
            self.length = length.clone() if isinstance(length, torch.Tensor) else length
        return length

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
    layer = cache.layers[layer_idx] if hasattr(cache, "layers") else None
    if layer is None or not layer.is_compileable or read_length != layer.max_cache_len:
        return None
    last = read_length - length
    if cache_kwargs is not None and cache_kwargs.get("cache_position") is not None:  # transformers 4
        return cache_kwargs["cache_position"][0].clamp(max=last)
    if hasattr(layer, "cumulative_length_int"):  # a sliding window, which stays at its end once it is full
        return min(layer.cumulative_length_int - length, last)
    return layer.cumulative_length - length


def _is_empty(cache, layer_idx: int, num_tokens: int) -> bool:
    """Whether the cache held nothing for this layer before this forward, of `num_tokens`."""
    if not hasattr(cache, "layers"):  # a family's own cache class, transformers 4
        return int(cache.get_seq_length(layer_idx)) == 0
    if layer_idx >= len(cache.layers) or not cache.layers[layer_idx].is_initialized:
        return True
    # A static cache knows its length as a tensor only, which a compiled graph cannot branch on. What is compiled on an
    # initialised static cache are decode steps.
    if torch.compiler.is_compiling():
        return False
    # A layer that reuses the keys of an earlier one holds none; the earlier one has stored this forward's already.
    owner = next(index for index in range(layer_idx, -1, -1) if getattr(cache.layers[index], "keys", None) is not None)
    return int(cache.get_seq_length(owner)) == (0 if owner == layer_idx else num_tokens)


def _add_slots(cache, spec: LoopSpec, num_layers: int, num_tokens: int) -> None:
    """Give the cache one slot for each looped layer and iteration, of the kind that the layer itself has.

    A cache that was made without a config adds slots by itself when they are first stored into.

    Raises:
        ValueError: the cache was filled under another loop setting, or is of a kind that takes no slots.
    """
    if type(cache).__module__.startswith("transformers.models."):  # a family's own, which counts its slots its own way
        raise ValueError(f"kv per_step cannot add slots to a {type(cache).__name__}; use kv shared")
    count = len(cache.layers)
    if count < num_layers or count == num_layers + spec.extra_kv_slots:
        return
    if count != num_layers or not _is_empty(cache, spec.layers[0], num_tokens):
        raise ValueError(_foreign_cache(f"it has {count} slots, not {num_layers + spec.extra_kv_slots}"))
    for _ in range(1, spec.evaluations):
        cache.layers.extend(_empty_slot_like(cache.layers[index]) for index in spec.layers)


def _empty_slot_like(layer):
    slot = copy.deepcopy(layer)
    slot.reset()
    return slot


def _foreign_cache(why: str) -> str:
    return f"the K/V cache was filled under another loop setting ({why}); start with a new cache"


# ---------------------------------------------------------------------------------------------------------------------
# Frozen routing: what the routers of sparse MoE layers answered in the natural pass, used again.
#
# A router is known by its path in the layer, not as a module: quantizers, adapters and parallelisation put others in
# its place. While a layer runs, a stand-in shadows it in the dictionary of the block that asks it, where Python looks
# before nn.Module does. A hook would be lost with its module, and none can be set inside of a compiled graph.
# ---------------------------------------------------------------------------------------------------------------------


class _RecordRoute:
    """Stands in for a router: asks it, and keeps the answers in order."""

    def __init__(self, router, answers: list):
        self.router = router
        self.answers = answers
        self.count = 0

    def __call__(self, *args, **kwargs):
        self.count += 1
        self.answers.append(self.router(*args, **kwargs))
        return self.answers[-1]

    def __getattr__(self, name):
        return getattr(self.router, name)


class _ReplayRoute(_RecordRoute):
    """Stands in for a router: gives the answers that were kept, in order."""

    def __call__(self, *args, **kwargs):
        self.count += 1
        return self.answers[min(self.count, len(self.answers)) - 1]


@contextmanager
def _routing(layer: nn.Module, stand_in, routes: dict[str, list]):
    """While the layer runs, `stand_in` takes the place of its routers.

    Args:
        routes: by path of the router in the layer, its answers in the natural pass.

    Raises:
        ValueError: a router was not asked, or not as often as in the natural pass.
    """
    shadowed = []
    for path, answers in routes.items():
        block, name = _split(path)
        shadowed.append((vars(layer.get_submodule(block)), name))
        shadowed[-1][0][name] = stand_in(layer.get_submodule(path), answers)
    try:
        yield
        for path, (namespace, name) in zip(routes, shadowed, strict=True):
            _check_asked(path, namespace[name])
    finally:
        for namespace, name in shadowed:
            del namespace[name]


def _check_asked(path: str, stand_in) -> None:
    if stand_in.count == 0 or stand_in.count != len(stand_in.answers):
        raise ValueError(
            f"cannot freeze the routing: {path} was asked {stand_in.count} times in a pass, and "
            f"{len(stand_in.answers)} times in the natural one, so something else chooses the experts; switch "
            "frozen_routing off"
        )


def _split(path: str) -> tuple[str, str]:
    """A module's path as its parent's and its own name."""
    parent, _, name = path.rpartition(".")
    return parent, name


class _Routers(NamedTuple):
    """How the experts of a layer are chosen.

    Attributes:
        known: paths of the routers in the layer.
        missing: paths of what has experts but no router that we know.
    """

    known: tuple[str, ...]
    missing: tuple[str, ...]

    @classmethod
    def of(cls, layer: nn.Module) -> _Routers:
        """Routers are called `router` or `router_gate`, or `gate` beside experts; they sit beside or in the experts."""
        paths = [path for path, _ in layer.named_modules() if path]
        experts = [path for path in paths if _has_experts(_split(path)[1], layer.get_submodule(path))]
        blocks = {_split(path)[0] for path in experts}
        known = [path for path in paths if _is_router(*_split(path), blocks)]
        askers = {_split(path)[0] for path in known}
        outermost = [path for path in experts if not any(path.startswith(f"{other}.") for other in experts)]
        missing = [
            path
            for path in outermost
            if _split(path)[0] not in askers and not any(router.startswith(f"{path}.") for router in known)
        ]
        return cls(tuple(known), tuple(missing))


def _is_router(parent: str, name: str, blocks_of_experts: set[str]) -> bool:
    return name in ROUTERS or (name == "gate" and parent in blocks_of_experts)


def _has_experts(name: str, module: nn.Module) -> bool:
    """Whether a module is a choice of experts, by its name or class; those that all tokens share are no choice."""
    names = f"{name} {type(module).__name__}".lower()
    return ("expert" in names and "share" not in names) or names.endswith("moe")


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
        routes: by path of each router in the layer, what it answered in the natural pass, if routing is frozen.
    """

    def __init__(self, layer, index, cache_argument, routers, args, kwargs, vllm=None):
        self.layer = layer
        self.vllm = vllm
        self.index = index
        self.cache_argument = cache_argument
        self.routes: dict[str, list] = {path: [] for path in routers}
        self.args = list(args)
        self.kwargs = kwargs
        self.hidden = args[0] if args else kwargs["hidden_states"]
        name, position = cache_argument
        cache = kwargs.get(name, args[position] if position < len(args) else None)
        self.cache = getattr(cache, "self_attention_cache", cache)  # what a decoder with room for an encoder has
        self.natural = _NaturalPass(None)

    def run(self, hidden, cache):
        """The layer's output for other hidden states and another cache; all other arguments as recorded."""
        args, kwargs = self._arguments(hidden, cache)
        return self.layer(*args, **kwargs)

    def _arguments(self, hidden, cache) -> tuple[list, dict]:
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
        return args, kwargs

    def run_natural(self, spec: LoopSpec):
        """The layer's output as the native model asked for it; keeps what iterations need of it."""
        if not self._is_checkpointing():
            self.natural = _NaturalPass(self.cache)
            with self._frozen(spec, _RecordRoute):
                return self.run(self.hidden, self.natural)
        if spec.frozen_routing and self.routes:
            raise ValueError("frozen routing does not work under gradient checkpointing; switch one of them off")
        # Gradient checkpointing takes the cache from a layer; without one, only `shared` needs the natural K/V.
        self.cache = None
        return self._run_natural_checkpointed() if spec.kv == "shared" else self.run(self.hidden, None)

    def run_iteration(self, k: int, hidden, spec: LoopSpec, num_layers: int):
        """The hidden states after this layer in iteration k, counted from 1."""
        if spec.kv == "shared" and self._is_checkpointing():
            return self.layer._gradient_checkpointing_func(self._run_shared, hidden, *self.natural.read)
        if self.vllm is not None:
            slot = self._slot(k, spec, num_layers) if spec.kv == "per_step" else None
            return _hidden_of(self.vllm.run(self.layer, self.index, slot, *self._arguments(hidden, self.cache)))
        cache = self._iteration_cache(k, spec, num_layers)
        if isinstance(cache, _CacheProxy):
            cache.length = self.natural.length
        with self._frozen(spec, _ReplayRoute):
            return _hidden_of(self.run(hidden, cache))

    def _frozen(self, spec, stand_in):
        return _routing(self.layer, stand_in, self.routes if spec.frozen_routing else {})

    def store_natural(self, spec: LoopSpec, num_layers: int) -> None:
        """Fill the slots of all passes with the natural keys and values: those of a token that does not loop."""
        if not self.natural.new:
            return
        for k in range(1, spec.evaluations):
            args, kwargs = self.natural.rest
            self.cache.update(*self.natural.new, self._slot(k, spec, num_layers), *args, **kwargs)

    def _iteration_cache(self, k, spec, num_layers):
        if spec.kv == "shared":
            return _SharedRead(self.cache, self.natural.read)
        if self.cache is None or not self.natural.new:
            return self.cache  # a layer without cache attends to its own K/V, one that stores none to another layer's
        if spec.kv == "per_step":
            return _OwnSlot(self.cache, self.natural.read, self._slot(k, spec, num_layers))
        return _OwnChunk(self.cache, self.natural.read, self._chunk_start())

    def _slot(self, k, spec, num_layers) -> int:
        return num_layers + (k - 1) * len(spec.layers) + spec.layers.index(self.index)

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


class _Body:
    """g for one span (or, in layer mode, one layer) of one forward: each call runs the recorded layers once more.

    The first call is the natural pass, which the native model has run; it answers with that.

    Attributes:
        natural_outputs: of each layer in the natural pass.
    """

    def __init__(self, walk: _Walk, calls: list[_LayerCall], natural):
        self.walk = walk
        self.calls = calls
        self.natural_outputs = [call.hidden for call in calls[1:]] + [natural]
        self.count = 0

    @property
    def natural(self):
        """n, the hidden states after the natural pass."""
        return self.natural_outputs[-1]

    def __call__(self, hidden, replace=None):
        """The hidden states after the body; `replace(position, output)` may change each layer's output on the way."""
        self.count += 1
        if self.count == 1:
            return self.natural
        for position, call in enumerate(self.calls):
            hidden = call.run_iteration(self.count - 1, hidden, self.walk.spec, self.walk.num_layers)
            hidden = hidden if replace is None else replace(position, hidden)
        return hidden


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
        output = call.run_natural(self.spec)
        self.calls[call.index] = call
        if not self.loops:
            if call.cache is not None:
                call.store_natural(self.spec, self.num_layers)
            return output
        start, stop = self._bounds(call.index)
        if call.index != stop - 1:
            return output
        body = _Body(self, [self.calls[index] for index in range(start, stop)], _hidden_of(output))
        return _with_hidden(output, run_loop(body.calls[0].hidden, body, self.spec))

    def _bounds(self, index: int) -> tuple[int, int]:
        """First layer and end of the body that a layer belongs to."""
        if self.spec.mode == "layer":
            return index, index + 1
        return next((start, stop) for start, stop in self.spec.spans if start <= index < stop)

    def _begin(self, call: _LayerCall) -> bool:
        """Prepare the cache and decide whether this forward loops, see `LoopSpec.decode`."""
        spec, cache, num_tokens = self.spec, call.cache, call.hidden.shape[-2]
        if cache is None:
            return True
        if spec.kv == "per_step":
            _add_slots(cache, spec, self.num_layers, num_tokens)
        if spec.decode == "full":
            return True
        if num_tokens > 1 or _is_empty(cache, call.index, num_tokens):
            setattr(cache, DECODE_STEPS, 0)
            return True
        if spec.decode == "bypass":
            return False
        step = min(getattr(cache, DECODE_STEPS, 0) + 1, spec.first_n + 1)
        setattr(cache, DECODE_STEPS, step)
        return step <= spec.first_n


class _Visit:
    """What the native model meets in place of a span layer: calls go to the walk, attributes to the layer."""

    def __init__(self, walk: _Walk, layer, index: int, cache_argument, routers, vllm):
        vars(self).update(
            walk=walk, layer=layer, index=index, cache_argument=cache_argument, routers=routers, vllm=vllm
        )

    def __call__(self, *args, **kwargs):
        return self.walk.run(
            _LayerCall(self.layer, self.index, self.cache_argument, self.routers, args, kwargs, self.vllm)
        )

    def __getattr__(self, name):
        return getattr(self.layer, name)

    def __setattr__(self, name, value):
        setattr(self.layer, name, value)


# ---------------------------------------------------------------------------------------------------------------------
# vLLM, whose Transformers backend runs this file as it is; nothing below matters anywhere else.
#
# vLLM keeps keys and values itself, in one attention layer of its own for each number below `num_hidden_layers`. It
# calls the model without a cache, on one row that holds the tokens of all requests, cut where it likes. An iteration
# therefore runs a layer with a stand-in for its vLLM attention. Under `shared` that asks the same one without keys and
# values, so that it reads the natural ones and writes none, as models of vLLM do whose layers share them; under
# `per_step` it asks a further one, which vLLM makes because the config then counts more layers than there are.
# Whatever was not found to give the greedy tokens of transformers is refused while vLLM builds the model.
# ---------------------------------------------------------------------------------------------------------------------

VLLM = "vllm"  # the attention implementation that vLLM sets in the config before it builds the model
VLLM_ATTENTION = "attn"  # where it hangs its attention layers, of late
VLLM_INSTANCES = "attention_instances"  # the argument in which it hands them down, until 0.28 at least

# Attribute that we set on a config: how many layers the model has, where `num_hidden_layers` counts slots too.
VLLM_LAYERS = "vllm_physical_layers"


def _check_vllm(config, spec: LoopSpec) -> None:
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


class _VllmSeam:
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
                slots[str(number)] = _VllmSlot(layers[index].get_submodule(self.paths[index]), number)

    def run(self, layer: nn.Module, index: int, slot: int | None, args, kwargs):
        """The output of a layer that attends to its natural keys and values, or to its own in `slot`."""
        module = layer.get_submodule(self.paths[index])
        instances = kwargs.get(VLLM_INSTANCES)
        stand_in = _VllmAttention(self._attention(module, index, slot, instances), writes=slot is not None)
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


class _VllmAttention:
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


class _VllmSlot(nn.Module):
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


def _scale_logits(config) -> None:
    """Tell vLLM, which computes the logits, what the family's code would divide them by."""
    if hasattr(config, "logits_scaling"):
        config.logit_scale = 1 / config.logits_scaling


def _count_slots(config, spec: LoopSpec) -> None:
    """Make the config count slots as layers, each of its layer's type: vLLM reads it again once the model is built."""
    layers = [*range(config.num_hidden_layers), *spec.layers * (spec.extra_kv_slots // len(spec.layers))]
    setattr(config, VLLM_LAYERS, config.num_hidden_layers)
    _set_layers(config, layers)


def _count_layers(config) -> None:
    """Undo `_count_slots`: vLLM builds a model more than once from one config."""
    if hasattr(config, VLLM_LAYERS):
        _set_layers(config, range(getattr(config, VLLM_LAYERS)))


def _set_layers(config, layers) -> None:
    config.num_hidden_layers = len(layers)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[index] for index in layers]


# ---------------------------------------------------------------------------------------------------------------------
# The model classes.
# ---------------------------------------------------------------------------------------------------------------------


class LoopedLayers(nn.ModuleList):
    """The decoder's layer list. Iterating it (or a slice) is one forward of the looped model; indexing is as ever.

    The loop is read from `config` at each forward, so `model.config.loop_steps = 6` takes effect at once.

    Attributes:
        config: the model's config.
        cache_arguments: for each layer, name and position of the argument in which it takes the K/V cache, if any.
        routers: for each layer, how its tokens' experts are chosen.
        vllm: where the layers meet vLLM, if it runs them.
    """

    config: Any
    cache_arguments: list[tuple[str, int] | None]
    routers: list[_Routers]
    vllm: _VllmSeam | None = None

    def __iter__(self):
        layers: list = list(super().__iter__())
        spec = LoopSpec.from_config(self.config)
        self.check(spec)
        if spec.is_identity:
            return iter(layers)
        walk = _Walk(spec, len(layers))
        for index in self._held(spec):
            layers[index] = _Visit(
                walk, layers[index], index, self.cache_arguments[index], self.routers[index].known, self.vllm
            )
        return iter(layers)

    def _held(self, spec: LoopSpec) -> list[int]:
        """The looped layers that this process holds: in a pipeline, those of other stages are identities.

        Raises:
            ValueError: a stage ends inside of a span that loops as one.
        """
        held = [index for index in spec.layers if not isinstance(self._modules[str(index)], nn.Identity)]
        for start, stop in spec.spans if spec.mode == "block" else ():
            if 0 < len([index for index in held if start <= index < stop]) < stop - start:
                raise ValueError(
                    f"span {start}:{stop} crosses the stages of a pipeline, which cannot loop it as one; choose a span "
                    "inside of one stage, or mode layer"
                )
        return held

    def check(self, spec: LoopSpec) -> None:
        """Raise ValueError unless all layers of the spec exist and can be run again."""
        spec.check_depth(len(self))
        spec.check_layer_types(getattr(self.config, "layer_types", None))
        spec.check_layer_types(getattr(self.config, "layers_block_type", None))
        for index in spec.layers:
            if self.cache_arguments[index] is None:
                raise ValueError(
                    f"cannot loop layer {index}: {type(self._modules[str(index)]).__name__} takes no K/V cache "
                    f"(none of {', '.join(CACHE_ARGUMENTS)}); choose another span"
                )
            if spec.frozen_routing and self.routers[index].missing:
                raise ValueError(
                    f"cannot freeze the routing of layer {index}: {', '.join(self.routers[index].missing)} has experts "
                    f"but no router that is known ({', '.join(ROUTERS)} or gate); switch frozen_routing off"
                )

    def __getitem__(self, index):
        return list(self)[index] if isinstance(index, slice) else super().__getitem__(index)


class LoopedModelMixin:
    """Turns the native model that it is mixed into into a looped one, once its layers exist."""

    def __init__(self, config, *inputs, **kwargs):
        _count_layers(config)
        super().__init__(config, *inputs, **kwargs)
        layers: Any = _layer_list(self.base_model, config.num_hidden_layers)
        # The class is swapped, rather than the list replaced, so that parameter names, device maps, tensor-parallel
        # plans and everything else that goes by module paths stay the native model's.
        layers.__class__ = LoopedLayers
        layers.config = config
        layers.cache_arguments = [_cache_argument(layer) for layer in layers._modules.values()]
        layers.routers = [_Routers.of(layer) for layer in layers._modules.values()]
        spec = LoopSpec.from_config(config)
        layers.check(spec)
        if config._attn_implementation != VLLM:
            return
        _check_vllm(config, spec)
        _scale_logits(config)
        if not spec.is_identity:
            self.loop_slots = nn.ModuleDict()
            layers.vllm = _VllmSeam(layers, self.loop_slots, spec)
            _count_slots(config, spec)


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


def _cache_argument(layer: nn.Module) -> tuple[str, int] | None:
    """Name and position of the argument in which a decoder layer takes the K/V cache; None where it takes none."""
    names = list(inspect.signature(layer.forward).parameters)
    for name in CACHE_ARGUMENTS:
        if name in names:
            return name, names.index(name)
    return None


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
    looped = type(name, (LoopedModelMixin, native), body)
    _load_as_native(native, looped)
    _quantise_as_native(looped.config_class.model_type)
    return looped


def _load_as_native(native: type, looped: type) -> None:
    """Let transformers 5 load, save and run the looped class's experts as it does the native one's.

    It fuses the weights of experts by a table of model types that foreign classes are not looked up in, and decides by
    a class's source, and for good, whether faster experts may run: both go wrong without an error.
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
    """Let transformers scale and fuse the modules of an AWQ checkpoint that it looks up by the native model's type."""
    try:
        from transformers.integrations import awq
    except ImportError:
        return
    for name in ("AWQ_SCALES_MAPPINGS", "AWQ_FUSED_MAPPINGS"):
        table = getattr(awq, name, {})
        if base_model_type(model_type) in table:
            table[model_type] = table[base_model_type(model_type)]
