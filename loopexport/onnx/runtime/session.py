"""ONNX Runtime sessions: where a graph runs, and why it does not."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from loopexport.errors import OnnxError, one_line

PROVIDERS = {"cpu": ["CPUExecutionProvider"], "cuda": ["CUDAExecutionProvider", "CPUExecutionProvider"]}
_NUMPY = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
_BFLOAT16 = 16  # onnx.TensorProto.BFLOAT16; numpy has no such type

MAX_REASON_CHARS = 300


def choose_provider(provider: str) -> str:
    """The provider to use, "cuda" or "cpu"; "auto" is CUDA if it is available.

    Raises:
        OnnxError: the provider is unknown or not available.
    """
    import onnxruntime

    has_cuda = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    if provider == "auto":
        return "cuda" if has_cuda else "cpu"
    if provider not in PROVIDERS:
        raise OnnxError(f"provider {provider!r} must be one of auto, {', '.join(PROVIDERS)}")
    if provider == "cuda" and not has_cuda:
        raise OnnxError("CUDA is not available to ONNX Runtime; install loopexport[onnx-cuda], or use --provider cpu")
    return provider


def load_session(path: Path, provider: str, threads: int | None):
    """Load a graph into an ONNX Runtime session.

    Raises:
        OnnxError: ONNX Runtime cannot load it.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors are raised anyway
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=PROVIDERS[provider])
    except Exception as error:  # ONNX Runtime has no public error class of its own
        reason = one_line(error, MAX_REASON_CHARS)
        if "bfloat16" in reason or "NOT_IMPLEMENTED" in reason:
            reason += "; a graph in bf16 runs on CUDA only: for the CPU use `loopexport onnx --dtype fp32`"
        if "escapes model directory" in reason:
            reason = f"its weights are links out of {path.parent}; copy the directory with `cp -rL`"
        raise OnnxError(f"ONNX Runtime cannot run {path}: {reason}") from None


def empty_tensor(shape: list[int], type_name: str, device: str):
    """An uninitialised tensor of ONNX Runtime on a device."""
    import onnxruntime

    create = onnxruntime.OrtValue.ortvalue_from_shape_and_type
    return create(shape, _NUMPY.get(type_name, _BFLOAT16), device, 0)
