"""Build the native model of an export without its weights: all parameters have a shape and a recipe, and no memory.

transformers itself loads the checkpoint, from tensors that have a name, a dtype and a shape but no values.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from loopexport.errors import OnnxError
from loopexport.onnx.weights.source import Weights

from .recipes import Recipe, Recorder

STORED_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}


@dataclass(frozen=True)
class Skeleton:
    """A native model without weights.

    Attributes:
        model: the model; its parameters and its stored buffers are fake tensors of `fake_mode`.
        fake_mode: the mode in which the model runs without values.
        recipes: the recipe of each parameter and stored buffer, by name.
    """

    model: torch.nn.Module
    fake_mode: FakeTensorMode
    recipes: dict[str, Recipe]


def build_skeleton(config, weights: Weights, dtype: torch.dtype, **implementations) -> Skeleton:
    """Build the native model of a config over tensors without values.

    Args:
        config: the base's config object of transformers.
        weights: the checkpoint's tensors.
        dtype: the dtype in which the model computes.
        **implementations: `attn_implementation`, `experts_implementation`.

    Raises:
        OnnxError: a tensor is missing, stored in a dtype that has no ONNX export, or made in an unknown way; convert
            another checkpoint of the model.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
    with fake_mode:
        tensors = {
            name: torch.empty(tensor.shape, dtype=dtype if name in weights.matrices else _torch_dtype(name, tensor))
            for name, tensor in weights.tensors.items()
        }  # a quantised matrix has no dtype yet; without a conversion, its recipe is that of its codes, too
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    recorder = Recorder(tensors)
    with _loading_in_this_thread(), recorder:
        model, report = model_class.from_pretrained(
            None, config=config, state_dict=dict(tensors), dtype=dtype, output_loading_info=True, **implementations
        )
    if weights.matrices:
        _check_orientation(model)
    missing = sorted(report["missing_keys"] | set(report["mismatched_keys"]))
    if missing:
        raise OnnxError(
            f"the checkpoint has no tensor for {missing[0]}, which {model_class.__name__} needs; "
            "check that base/config.json belongs to the weights"
        )
    return Skeleton(model.eval(), fake_mode, _recipes(model, recorder))


def _check_orientation(model: Any) -> None:
    """Refuse matrices that the native model has as `(in, out)`: all formats of quantised ones have `(out, in)`."""
    from transformers.pytorch_utils import Conv1D

    transposed = [path for path, module in model.named_modules() if isinstance(module, Conv1D)]
    if transposed:
        raise OnnxError(
            f"the base is quantised, and {type(model).__name__} has its matrices transposed ({transposed[0]}), which "
            "graphs of quantised bases do not support; convert the checkpoint that was not quantised"
        )


def _recipes(model, recorder: Recorder) -> dict[str, Recipe]:
    recipes = {}
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]:
        if not isinstance(tensor, FakeTensor):
            continue  # a buffer that the model computes, such as the frequencies of a rotary embedding
        recipe = recorder.recipe(tensor)
        if recipe is None:
            raise OnnxError(f"cannot tell which stored tensors make up {name}; this family has no ONNX export")
        recipes[name] = recipe
    return recipes


def _torch_dtype(name: str, tensor) -> torch.dtype:
    if tensor.dtype not in STORED_DTYPES:
        raise OnnxError(
            f"{name} is stored as {tensor.dtype}: a quantised checkpoint has no ONNX export; "
            f"allowed are {', '.join(STORED_DTYPES)}"
        )
    return STORED_DTYPES[tensor.dtype]


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Hide the progress bar of transformers."""
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
    """Keep transformers from loading in other threads: a dispatch mode is active in its own thread only."""
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
