"""How each parameter of the native model is made of the checkpoint's tensors.

transformers changes tensors while it loads them: it stacks experts, joins projections, converts dtypes. A recorder
watches these operations, so that we need no table of families.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Operations whose result has the same elements in the same order and dtype.
_PASS_THROUGH = ("detach", "alias", "clone", "contiguous", "lift_fresh")


@dataclass(frozen=True)
class Recipe:
    """How a parameter is made of stored tensors.

    Attributes:
        stored: name of the stored tensor that it equals; None if `function` makes it.
        function: an operator of torch.
        args, kwargs: the operator's arguments, with recipes in place of tensors.
        item: index of the result, for an operator with several; else None.
        rank: number of dimensions.
    """

    stored: str | None = None
    function: Any = None
    args: tuple = ()
    kwargs: Mapping = field(default_factory=dict)
    item: int | None = None
    rank: int = 0

    def evaluate(self, read) -> torch.Tensor:
        """The parameter's value; `read(name)` gives a stored tensor."""
        if self.stored is not None:
            return read(self.stored)
        args, kwargs = _map_leaves((self.args, dict(self.kwargs)), Recipe, lambda recipe: recipe.evaluate(read))
        result = self.function(*args, **kwargs)
        return result if self.item is None else result[self.item]

    @property
    def names(self) -> set[str]:
        """Names of the stored tensors that it is made of."""
        return {each.stored for each in self._all() if each.stored is not None}

    @property
    def operators(self) -> set[str]:
        """Names of the operators that make it."""
        return {each.function.overloadpacket.__name__ for each in self._all() if each.stored is None}

    def _all(self) -> Iterator[Recipe]:
        """This recipe and those that it is made of."""
        yield self
        for each in _leaves((self.args, dict(self.kwargs)), Recipe):
            yield from each._all()


class Recorder(TorchDispatchMode):
    """While active, records the recipe of each tensor that is made of stored ones.

    Args:
        stored: the stored tensors by name.
    """

    def __init__(self, stored: Mapping[str, torch.Tensor]):
        super().__init__()
        self._recipes = {id(tensor): Recipe(name) for name, tensor in stored.items()}
        self._alive: list = [*stored.values()]  # Python may reuse the id of a tensor that is gone

    def recipe(self, tensor: torch.Tensor) -> Recipe | None:
        """The recipe of a tensor; None if it is not made of stored ones."""
        return self._recipes.get(id(tensor))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        args, kwargs = _map_leaves((args, kwargs), torch.Tensor, lambda tensor: self.recipe(tensor) or tensor)
        sources = _leaves((args, kwargs), Recipe)
        if not sources:
            return result
        if func.overloadpacket.__name__ in _PASS_THROUGH and isinstance(result, torch.Tensor):
            self._keep(result, sources[0])
        elif isinstance(result, torch.Tensor):
            self._keep(result, Recipe(None, func, args, kwargs, rank=result.dim()))
        elif isinstance(result, (list, tuple)):
            for item, tensor in enumerate(result):
                self._keep(tensor, Recipe(None, func, args, kwargs, item, tensor.dim()))
        return result

    def _keep(self, tensor, recipe: Recipe) -> None:
        self._recipes[id(tensor)] = recipe
        self._alive.append(tensor)


def _map_leaves(value, leaf_type: type, function):
    """Apply a function to all values of a type inside nested lists, tuples and dicts."""
    if isinstance(value, leaf_type):
        return function(value)
    if isinstance(value, (list, tuple)):
        return type(value)(_map_leaves(each, leaf_type, function) for each in value)
    if isinstance(value, dict):
        return {key: _map_leaves(each, leaf_type, function) for key, each in value.items()}
    return value


def _leaves(value, leaf_type: type) -> list:
    found: list = []
    _map_leaves(value, leaf_type, found.append)
    return found
