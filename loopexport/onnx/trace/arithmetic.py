"""Translate `tensor * number` and `tensor / number` into ONNX so that they round as torch does.

Torch multiplies a half-precision tensor by a Python number in fp32 and rounds once. The default translation rounds the
number first: a step size of 1/6 in bf16 is then wrong by 0.2 % in every step.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from onnxscript import opset23 as op

_HALF = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def _scalar_operation(operator: Any):
    def translate(self, other):
        if self.dtype in _HALF and isinstance(other, (int, float)):
            exact = operator(op.Cast(self, to=ir.DataType.FLOAT), op.Constant(value_float=float(other)))
            return op.Cast(exact, to=self.dtype)
        if isinstance(other, (int, float)):
            number: Any = op.Constant(value_float=float(other))
            return operator(self, op.CastLike(number, self))
        return operator(self, other)

    return translate


TRANSLATIONS: dict = {
    torch.ops.aten.mul.Tensor: _scalar_operation(op.Mul),
    torch.ops.aten.div.Tensor: _scalar_operation(op.Div),
}
