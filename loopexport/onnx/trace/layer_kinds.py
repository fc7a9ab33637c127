"""Which decoder layers are of one kind: their modules differ in nothing but weights and their own index."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

_PLAIN_MODULE = frozenset(vars(nn.Module()))


def kinds(layers: Sequence[nn.Module]) -> list[list[int]]:
    """Indices of the layers of each kind, in order."""
    if _share_weights(layers):  # none would be a copy on weights of its own
        return [[index] for index in range(len(layers))]
    found: dict[tuple, list[int]] = {}
    for index, layer in enumerate(layers):
        found.setdefault(_signature(layer, index), []).append(index)
    return list(found.values())


def _share_weights(layers: Sequence[nn.Module]) -> bool:
    weights = [id(weight) for layer in layers for weight in layer.parameters()]
    return len(set(weights)) < len(weights)


def _signature(module: nn.Module, index: int) -> tuple:
    """Everything of a module but the values of its weights, and its own index."""
    own = {name: value for name, value in vars(module).items() if name not in _PLAIN_MODULE}
    return (
        type(module),
        tuple(sorted((name, _plain(name, value, index)) for name, value in own.items())),
        tuple((name, _tensor(value)) for name, value in module._parameters.items()),
        tuple((name, _tensor(value)) for name, value in module._buffers.items()),
        tuple((name, _signature(child, index)) for name, child in module.named_children()),
    )


def _plain(name: str, value: Any, index: int) -> str:
    """An attribute as text; objects that have no value of their own are the same only if they are one."""
    if isinstance(value, int) and value == index and not isinstance(value, bool) and re.search("layer|block|idx", name):
        return "its own index"
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device, torch.Size)):
        return repr(value)
    if isinstance(value, (list, tuple)):
        return str([_plain("", each, -1) for each in value])
    if isinstance(value, functools.partial):
        return f"partial {_plain('', (value.func, *value.args), -1)} {value.keywords}"
    return f"{type(value).__qualname__} {id(value)}"


def _tensor(value) -> tuple | None:
    if value is None:
        return None
    kind = (tuple(value.shape), value.dtype)
    is_weight = isinstance(value, (nn.Parameter, FakeTensor))
    return kind if is_weight else (*kind, value.detach().float().numpy().tobytes())
