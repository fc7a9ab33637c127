"""Replace torch functions that a graph cannot express by equivalent ones, while a family's own code is traced."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

# Methods that only move elements: they apply to the real and the imaginary part alike.
_BY_PARTS = ("unsqueeze", "squeeze", "transpose", "expand", "contiguous")


class ComplexPair:
    """A complex tensor as two real ones, since ONNX has no complex numbers; it does what rotary embeddings need.

    Attributes:
        real, imag: tensors of one shape.
    """

    def __init__(self, real: Any, imag: Any):
        self.real = real
        self.imag = imag

    @property
    def device(self) -> torch.device:
        """The device of both parts."""
        return self.real.device

    def to(self, device: torch.device) -> ComplexPair:
        """The same numbers on another device."""
        return ComplexPair(self.real.to(device), self.imag.to(device))

    def __mul__(self, other) -> ComplexPair:
        if isinstance(other, ComplexPair):
            real = self.real * other.real - self.imag * other.imag
            return ComplexPair(real, self.real * other.imag + self.imag * other.real)
        return ComplexPair(self.real * other, self.imag * other)

    __rmul__ = __mul__

    def __getitem__(self, index) -> ComplexPair:
        return ComplexPair(self.real[index], self.imag[index])

    def __getattr__(self, name: str):
        if name not in _BY_PARTS:
            raise AttributeError(
                f"complex numbers have no {name} in an ONNX export; allowed are {', '.join(_BY_PARTS)}"
            )
        return lambda *args: ComplexPair(getattr(self.real, name)(*args), getattr(self.imag, name)(*args))

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        """Torch calls this for its functions that get a pair."""
        if func is torch.view_as_real:
            return torch.stack([args[0].real, args[0].imag], dim=-1)
        if func in (torch.mul, torch.Tensor.mul, torch.Tensor.__mul__, torch.Tensor.__rmul__):
            pair, other = args if isinstance(args[0], ComplexPair) else args[::-1]
            return pair * other
        return NotImplemented


class OnnxSubstitutes(TorchFunctionMode):
    """While active, torch functions whose translation fails or has limits are replaced by equivalent ones."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """The function's result, or its substitute's."""
        if func is torch.polar:
            length, angle = args
            return ComplexPair(length * angle.cos(), length * angle.sin())
        if func is torch.view_as_complex:
            return ComplexPair(*args[0].unbind(-1))
        if func is torch.Tensor.__getitem__:
            return _get_item(*args)
        if func is torch.Tensor.view:
            return func(_with_plain_strides(args[0]), *args[1:], **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _get_item(tensor: torch.Tensor, index):
    """`tensor[index]`; picks rows one by one where a slice stops at a number known only when the graph runs.

    Torch would trace the slice for exactly as many rows as the tensor has (a table of positions, say) and silently
    cut off the rest. Picking a row that does not exist is an error instead.
    """
    parts = index if isinstance(index, tuple) else (index,)
    if all(isinstance(part, slice) for part in parts):
        for dim, part in enumerate(parts):
            if _stops_at_unknown(part) and type(tensor.shape[dim]) is int:
                rows = torch.arange(part.start or 0, part.stop, device=tensor.device)
                tensor = tensor.index_select(dim, rows)
                parts = (*parts[:dim], slice(None), *parts[dim + 1 :])
        index = parts
    return tensor[index]


def _stops_at_unknown(part: slice) -> bool:
    """Whether the slice stops at a number known only when the graph runs."""
    return isinstance(part.stop, torch.SymInt) and part.step in (None, 1)


def _with_plain_strides(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor; a contiguous copy if its strides depend on the number of rows, which torch would then fix."""
    if any(isinstance(stride, torch.SymInt) and "Min" in str(stride) for stride in tensor.stride()):
        return tensor.clone(memory_format=torch.contiguous_format)
    return tensor
