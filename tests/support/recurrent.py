"""Recurrent layers by hand: a physically unrolled model, and kv shared token by token. No code of the templates."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.nn import functional


def unrolled_copy(model: Any, span: tuple[int, int], steps: int) -> Any:
    """A copy of a plain model that has the layers of a span `steps` times, each with cache slots of its own."""
    start, stop = span
    count = len(model.base_model.layers)
    return unrolled_along(model, [*range(stop), *list(range(start, stop)) * (steps - 1), *range(stop, count)])


def unrolled_along(model: Any, order: list[int]) -> Any:
    """A copy of a plain model that has the layers with these numbers in this order, each with a cache slot."""
    copied = copy.deepcopy(model)
    copied.base_model.layers = nn.ModuleList([copy.deepcopy(model.base_model.layers[index]) for index in order])
    copied.config.num_hidden_layers = len(order)
    if getattr(model.config, "layer_types", None):
        _set_layer_types(copied.config, [model.config.layer_types[index] for index in order])
    for index, layer in enumerate(copied.base_model.layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index
    return copied


def _set_layer_types(config, layer_types: list[str]) -> None:
    """Set a config's layer types, also where its class computes them."""
    native = type(config)
    name = native.attribute_map.get("layer_types", "layer_types")
    if isinstance(getattr(native, name, None), property):
        config.__class__ = type(native.__name__, (native,), {name: layer_types})
    else:
        setattr(config, name, layer_types)


def shared_by_hand(model: Any, tokens, span: tuple[int, int], steps: int):
    """The logits under kv shared, for a span of recurrent layers alone, rule euler with step size 1/K."""
    layers, natural, calls, passes = model.base_model.layers, {}, {}, [0]

    def keep_call(layer, args, kwargs):
        if not passes[0]:
            calls[layer] = (args[0], kwargs)

    def mix(mixer, args, kwargs, output):
        own = args[0] if args else kwargs["hidden_states"]
        if passes[0]:
            return BY_HAND[type(mixer).__name__](mixer, natural[mixer], own)
        natural[mixer] = own

    def loop(layer, args, kwargs, output):
        if passes[0]:
            return None
        x = calls[layers[span[0]]][0]
        h = x + (_hidden(output) - x) / steps
        for passes[0] in range(1, steps):
            g = h
            for each in layers[slice(*span)]:
                g = _hidden(each(g, **calls[each][1]))
            h = h + (g - h) / steps
        passes[0] = 0
        return (h, *output[1:]) if isinstance(output, tuple) else h

    inside = layers[slice(*span)]
    handles = [layer.register_forward_pre_hook(keep_call, with_kwargs=True) for layer in inside]
    mixers = [each for layer in inside for each in layer.modules() if type(each).__name__ in BY_HAND]
    handles += [mixer.register_forward_hook(mix, with_kwargs=True) for mixer in mixers]
    handles.append(layers[span[1] - 1].register_forward_hook(loop, with_kwargs=True))
    try:
        return model(tokens, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()


def _hidden(output):
    return output[0] if isinstance(output, tuple) else output


def _convolution(layer: nn.Conv1d, earlier, last):
    """At each token, a weighted sum of `earlier` at the tokens before it and `last` at this one, `(batch, seq, n)`."""
    weight, rows = layer.weight[:, 0], []
    width = weight.shape[-1]
    for token in range(last.shape[1]):
        row = last[:, token] * weight[:, -1]
        for back in range(1, min(width, token + 1)):
            row = row + earlier[:, token - back] * weight[:, -1 - back]
        rows.append(row if layer.bias is None else row + layer.bias)
    return torch.stack(rows, dim=1)


def _delta_rule(mixer, natural, own):
    sizes = [mixer.key_dim, mixer.key_dim, mixer.value_dim]
    earlier = mixer.in_proj_qkv(natural)
    query = functional.silu(_convolution(mixer.conv1d, earlier, mixer.in_proj_qkv(own))).split(sizes, -1)[0]
    _, key, value = functional.silu(_convolution(mixer.conv1d, earlier, earlier)).split(sizes, -1)
    query, key = (each.unflatten(-1, (mixer.num_k_heads, -1)) for each in (query, key))
    value = value.unflatten(-1, (mixer.num_v_heads, -1))
    repeats = mixer.num_v_heads // mixer.num_k_heads
    query, key = (each / (each.square().sum(-1, True) + 1e-6).sqrt() for each in (query, key))
    query, key = (each.repeat_interleave(repeats, 2) for each in (query, key))
    beta = mixer.in_proj_b(natural).sigmoid()
    decay = (-mixer.A_log.exp() * functional.softplus(mixer.in_proj_a(natural) + mixer.dt_bias)).exp()
    state = torch.zeros(*value.shape[:1], *value.shape[2:3], key.shape[-1], value.shape[-1])
    rows = []
    for t in range(own.shape[1]):
        state = state * decay[:, t, :, None, None]
        known = torch.einsum("bhkv,bhk->bhv", state, key[:, t])
        state = state + torch.einsum("bhk,bhv->bhkv", key[:, t], beta[:, t, :, None] * (value[:, t] - known))
        rows.append(torch.einsum("bhkv,bhk->bhv", state, query[:, t]) * query.shape[-1] ** -0.5)
    read = torch.stack(rows, dim=1)
    gate = mixer.in_proj_z(own).unflatten(-1, (mixer.num_v_heads, -1))
    read = mixer.norm(read.reshape(-1, read.shape[-1]), gate.reshape(-1, read.shape[-1])).reshape(*own.shape[:2], -1)
    return mixer.out_proj(read)


def _state_space(mixer, natural, own):
    sizes = [mixer.intermediate_size, mixer.conv_dim, mixer.num_heads]
    states = mixer.n_groups * mixer.ssm_state_size
    parts = [mixer.intermediate_size, states, states]
    _, earlier, dt = mixer.in_proj(natural).split(sizes, -1)
    gate, last, _ = mixer.in_proj(own).split(sizes, -1)
    x, b, _ = functional.silu(_convolution(mixer.conv1d, earlier, earlier)).split(parts, -1)
    own_x, _, c = functional.silu(_convolution(mixer.conv1d, earlier, last)).split(parts, -1)
    x, own_x = (each.unflatten(-1, (mixer.num_heads, -1)) for each in (x, own_x))
    repeats = mixer.num_heads // mixer.n_groups
    b, c = (each.unflatten(-1, (mixer.n_groups, -1)).repeat_interleave(repeats, 2) for each in (b, c))
    dt = functional.softplus(dt + mixer.dt_bias)
    decay = (-mixer.A_log.exp() * dt).exp()
    state = torch.zeros(x.shape[0], *x.shape[2:], b.shape[-1])
    rows = []
    for t in range(own.shape[1]):
        entry = torch.einsum("bhp,bhn->bhpn", dt[:, t, :, None] * x[:, t], b[:, t])
        state = state * decay[:, t, :, None, None] + entry
        rows.append(torch.einsum("bhpn,bhn->bhp", state, c[:, t]) + mixer.D[:, None] * own_x[:, t])
    return mixer.out_proj(mixer.norm(torch.stack(rows, dim=1).flatten(2), gate))


def _short_convolution(mixer, natural, own):
    b, _, x = mixer.in_proj(natural).chunk(3, -1)
    own_b, own_c, own_x = mixer.in_proj(own).chunk(3, -1)
    return mixer.out_proj(own_c * _convolution(mixer.conv, b * x, own_b * own_x))


# By the name of the class of the native mixer: its output for a natural input and the iterate's own.
BY_HAND = {
    "Qwen3_5GatedDeltaNet": _delta_rule,
    "GraniteMoeHybridMambaLayer": _state_space,
    "Lfm2ShortConv": _short_convolution,
}
