"""Group decoder layers by kind: layers of one kind differ only in their weights and their own index."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

_ATTRIBUTES_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


def group_by_kind(layers: Sequence[nn.Module]) -> list[list[int]]:
    """Indices of the layers of each kind, in order."""
    if _share_weights(layers):  # a copy would need weights of its own
        return [[index] for index in range(len(layers))]
    found: dict[tuple, list[int]] = {}
    for index, layer in enumerate(layers):
        found.setdefault(_signature(layer, index), []).append(index)
    return list(found.values())


def _share_weights(layers: Sequence[nn.Module]) -> bool:
    weights = [id(weight) for layer in layers for weight in layer.parameters()]
    return len(set(weights)) < len(weights)


def _signature(module: nn.Module, index: int) -> tuple:
    """Everything in a module except the values of its weights and its own index."""
    own = {name: value for name, value in vars(module).items() if name not in _ATTRIBUTES_OF_EVERY_MODULE}
    return (
        type(module),
        tuple(sorted((name, _attribute_text(name, value, index)) for name, value in own.items())),
        tuple((name, _tensor_signature(value)) for name, value in module._parameters.items()),
        tuple((name, _tensor_signature(value)) for name, value in module._buffers.items()),
        tuple((name, _signature(child, index)) for name, child in module.named_children()),
    )


def _attribute_text(name: str, value: Any, index: int) -> str:
    """An attribute as text; for an object that is no plain value, its identity."""
    if isinstance(value, int) and value == index and not isinstance(value, bool) and re.search("layer|block|idx", name):
        return "its own index"
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device, torch.Size)):
        return repr(value)
    if isinstance(value, (list, tuple)):
        return str([_attribute_text("", each, -1) for each in value])
    if isinstance(value, functools.partial):
        return f"partial {_attribute_text('', (value.func, *value.args), -1)} {value.keywords}"
    return f"{type(value).__qualname__} {id(value)}"


def _tensor_signature(value) -> tuple | None:
    """Shape and dtype; the values too, for a buffer that the model computes."""
    if value is None:
        return None
    signature = (tuple(value.shape), value.dtype)
    is_weight = isinstance(value, (nn.Parameter, FakeTensor))
    return signature if is_weight else (*signature, value.detach().float().numpy().tobytes())
