"""What some families ask of torch and a graph cannot say, said otherwise while their code is traced."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

# What moves elements about, and works on the real and on the imaginary parts alike.
_BY_PARTS = ("unsqueeze", "squeeze", "transpose", "expand", "contiguous")


class Pair:
    """A tensor of complex numbers, which ONNX does not have, for as much of torch as rotary embeddings ask of one.

    Attributes:
        real, imag: tensors of one shape.
    """

    def __init__(self, real: Any, imag: Any):
        self.real = real
        self.imag = imag

    @property
    def device(self) -> torch.device:
        """Where both parts are."""
        return self.real.device

    def to(self, device: torch.device) -> Pair:
        """The same numbers elsewhere."""
        return Pair(self.real.to(device), self.imag.to(device))

    def __mul__(self, other) -> Pair:
        if isinstance(other, Pair):
            real = self.real * other.real - self.imag * other.imag
            return Pair(real, self.real * other.imag + self.imag * other.real)
        return Pair(self.real * other, self.imag * other)

    __rmul__ = __mul__

    def __getitem__(self, index) -> Pair:
        return Pair(self.real[index], self.imag[index])

    def __getattr__(self, name: str):
        if name not in _BY_PARTS:
            raise AttributeError(f"complex numbers have no {name} in an ONNX export")
        return lambda *args: Pair(getattr(self.real, name)(*args), getattr(self.imag, name)(*args))

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        """Functions of torch that are handed a pair."""
        if func is torch.view_as_real:
            return torch.stack([args[0].real, args[0].imag], dim=-1)
        if func in (torch.mul, torch.Tensor.mul, torch.Tensor.__mul__, torch.Tensor.__rmul__):
            pair, other = args if isinstance(args[0], Pair) else args[::-1]
            return pair * other
        return NotImplemented


class Expressible(TorchFunctionMode):
    """Within it, functions of torch whose translation fails or has limits give way to others of equal result."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Torch's own function, or what stands in for it."""
        if func is torch.polar:
            length, angle = args
            return Pair(length * angle.cos(), length * angle.sin())
        if func is torch.view_as_complex:
            return Pair(*args[0].unbind(-1))
        if func is torch.Tensor.__getitem__:
            return _get_item(*args)
        if func is torch.Tensor.view:
            return func(_with_plain_strides(args[0]), *args[1:], **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _get_item(tensor: torch.Tensor, index):
    """`tensor[index]`, with rows picked one by one where a slice ends at a number that only a run knows.

    Torch would trace the slice for as many rows as there are, such as a table of positions has, and silently cut the
    rest; a row picked beyond them is an error.
    """
    parts = index if isinstance(index, tuple) else (index,)
    if all(isinstance(part, slice) for part in parts):
        for dim, part in enumerate(parts):
            if _is_open(part) and type(tensor.shape[dim]) is int:
                rows = torch.arange(part.start or 0, part.stop, device=tensor.device)
                tensor = tensor.index_select(dim, rows)
                parts = (*parts[:dim], slice(None), *parts[dim + 1 :])
        index = parts
    return tensor[index]


def _is_open(part: slice) -> bool:
    """Whether a slice has a stop, which is only known when a graph runs."""
    return isinstance(part.stop, torch.SymInt) and part.step in (None, 1)


def _with_plain_strides(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, copied if torch cannot tell how its rows lie for every number of them, and would fix the number."""
    if any(isinstance(stride, torch.SymInt) and "Min" in str(stride) for stride in tensor.stride()):
        return tensor.clone(memory_format=torch.contiguous_format)
    return tensor
