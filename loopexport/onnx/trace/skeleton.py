"""The native model of an export without its weights: every parameter has a shape and a recipe, and takes no memory.

transformers itself loads the checkpoint, handed tensors that hold nothing; what it does to them on the way (experts
stacked, projections joined, dtypes changed) is recorded, so that no table of ours has to know any family.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from loopexport.errors import OnnxError

TORCH_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}

# Calls that give the same elements in the same order and dtype.
_PASS_THROUGH = ("detach", "alias", "clone", "contiguous", "lift_fresh")


@dataclass(frozen=True)
class Recipe:
    """How a parameter is made of what the checkpoint stores.

    Attributes:
        stored: name of the stored tensor that it is; None where it is made by `function`.
        function: an operator of torch, with `args` in which recipes stand for tensors.
        item: which of several results it is; None where there is one.
        rank: number of dimensions.
    """

    stored: str | None = None
    function: Any = None
    args: tuple = ()
    kwargs: Mapping = field(default_factory=dict)
    item: int | None = None
    rank: int = 0

    def evaluate(self, read) -> torch.Tensor:
        """The value, with `read(name)` for the stored tensors."""
        if self.stored is not None:
            return read(self.stored)
        args, kwargs = _map_leaves((self.args, dict(self.kwargs)), Recipe, lambda recipe: recipe.evaluate(read))
        result = self.function(*args, **kwargs)
        return result if self.item is None else result[self.item]


@dataclass(frozen=True)
class Skeleton:
    """A native model without weights.

    Attributes:
        model: the model; its parameters, and the buffers that the checkpoint stores, are fake tensors of `fake_mode`.
        recipes: for each of their names, how it is made.
    """

    model: torch.nn.Module
    fake_mode: FakeTensorMode
    recipes: dict[str, Recipe]


class _Recorder(TorchDispatchMode):
    """Remembers how tensors come about that derive from stored ones."""

    def __init__(self, stored: Mapping[str, torch.Tensor]):
        super().__init__()
        self._recipes = {id(tensor): Recipe(name) for name, tensor in stored.items()}
        self._alive: list = [*stored.values()]  # an id means nothing once its tensor is gone

    def recipe(self, tensor: torch.Tensor) -> Recipe | None:
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


def build_skeleton(config, stored: Mapping[str, Any], dtype: torch.dtype, **implementations) -> Skeleton:
    """The native model of a config, over tensors that only have names, dtypes and shapes.

    Args:
        config: the base's config object of transformers.
        stored: the checkpoint's tensors, see `checkpoint.Checkpoint.tensors`.
        dtype: what the model computes in.
        **implementations: `attn_implementation`, `experts_implementation`.

    Raises:
        OnnxError: the checkpoint and the model do not fit, or are of a kind that cannot be loaded so.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
    with fake_mode:
        tensors = {name: torch.empty(tensor.shape, dtype=_torch_dtype(name, tensor)) for name, tensor in stored.items()}
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    recorder = _Recorder(tensors)
    with _loading_in_this_thread(), recorder:
        model, report = model_class.from_pretrained(
            None, config=config, state_dict=dict(tensors), dtype=dtype, output_loading_info=True, **implementations
        )
    missing = sorted(report["missing_keys"] | set(report["mismatched_keys"]))
    if missing:
        raise OnnxError(f"the checkpoint does not hold {missing[0]}, which {model_class.__name__} needs")
    return Skeleton(model.eval(), fake_mode, _recipes(model, recorder))


def _recipes(model, recorder: _Recorder) -> dict[str, Recipe]:
    recipes = {}
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]:
        if not isinstance(tensor, FakeTensor):
            continue  # a buffer that the model computes, such as the frequencies of a rotary embedding
        recipe = recorder.recipe(tensor)
        if recipe is None:
            raise OnnxError(f"cannot tell which stored tensor {name} is made of; this family cannot be exported")
        recipes[name] = recipe
    return recipes


def _torch_dtype(name: str, tensor) -> torch.dtype:
    if tensor.dtype not in TORCH_DTYPES:
        raise OnnxError(
            f"{name} is stored as {tensor.dtype}: a quantised checkpoint has no ONNX export; "
            f"allowed are {', '.join(TORCH_DTYPES)}"
        )
    return TORCH_DTYPES[tensor.dtype]


@contextmanager
def quiet_loading() -> Iterator[None]:
    """No progress bar of transformers."""
    from transformers.utils import logging

    had_bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if had_bar:
            logging.enable_progress_bar()


@contextmanager
def _loading_in_this_thread() -> Iterator[None]:
    """transformers loads in threads otherwise, in which no dispatch mode of ours is active."""
    name = "HF_DEACTIVATE_ASYNC_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        with quiet_loading():
            yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _map_leaves(value, kind: type, function):
    """Apply a function to all values of a kind inside nested lists, tuples and dicts."""
    if isinstance(value, kind):
        return function(value)
    if isinstance(value, (list, tuple)):
        return type(value)(_map_leaves(each, kind, function) for each in value)
    if isinstance(value, dict):
        return {key: _map_leaves(each, kind, function) for key, each in value.items()}
    return value


def _leaves(value, kind: type) -> list:
    found: list = []
    _map_leaves(value, kind, found.append)
    return found
