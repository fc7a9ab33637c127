"""ONNX Runtime sessions: where a graph runs, and why it does not."""

from __future__ import annotations

import os
import re
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any

from loopexport.choices import Provider
from loopexport.errors import OnnxError, one_line

PROVIDERS = {"cpu": ["CPUExecutionProvider"], "cuda": ["CUDAExecutionProvider", "CPUExecutionProvider"]}
MAX_REASON_CHARS = 300

_CUDA = "CUDAExecutionProvider"
_INSTALL = "run `pip install 'onnxruntime-gpu[cuda,cudnn]'`, which needs a recent driver, or use --provider cpu"
# The part of ONNX Runtime's messages that says why CUDA does not work: a missing library, or an error of the driver.
_REASONS = (
    r"with error: ([^\n]+)",
    r"(CUDA failure \d+: [^;\n]+)",
    r"(Failed to create CUDAExecutionProvider\.[^.]+\.)",
)


def load_session(path: Path, provider: str, threads: int | None):
    """Load a graph into an ONNX Runtime session.

    Args:
        path: the graph.
        provider: "cuda", "cpu", or "auto" for CUDA if it works.
        threads: number of CPU threads; None lets ONNX Runtime choose.

    Raises:
        OnnxError: the provider is unknown or does not work, or ONNX Runtime cannot load the graph.
    """
    import onnxruntime

    if provider not in ("auto", *PROVIDERS):
        raise OnnxError(f"provider {provider!r} must be one of auto, {', '.join(PROVIDERS)}")
    _check_release(path)
    problem = "" if provider == "cpu" else cuda_problem()
    if provider == "cuda" and problem:
        raise OnnxError(f"ONNX Runtime cannot use CUDA: {problem}; {_INSTALL}")
    if provider == "auto" and problem and is_built_for_cuda():
        _warn_once(f"ONNX Runtime computes on the CPU, because it cannot use CUDA: {problem}")
    chosen = PROVIDERS["cpu" if problem or provider == "cpu" else "cuda"]
    try:
        return onnxruntime.InferenceSession(str(path), quiet_options(threads), providers=chosen, enable_fallback=0)
    except Exception as error:  # ONNX Runtime has no public error class of its own
        raise OnnxError(f"ONNX Runtime cannot run {path}: {_load_reason(path, error)}") from None


@cache
def _warn_once(text: str) -> None:
    warnings.warn(text, stacklevel=2)


def provider_of(session) -> Provider:
    """Where a session runs, "cuda" or "cpu"."""
    return "cuda" if _CUDA in session.get_providers() else "cpu"


def quiet_options(threads: int | None = None):
    """Options of a session that logs nothing, and that keeps no memory for each length of the cache."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors are raised anyway
    options.enable_mem_pattern = False
    if threads is not None:
        options.intra_op_num_threads = threads
    return options


def is_built_for_cuda() -> bool:
    """Whether the installed onnxruntime is one for CUDA. That does not mean that CUDA works."""
    import onnxruntime

    return _CUDA in onnxruntime.get_available_providers()


@cache
def cuda_problem() -> str:
    """Why ONNX Runtime cannot use CUDA here, on one line; empty if it can. A small session tries."""
    import onnxruntime

    if not is_built_for_cuda():
        return "the installed onnxruntime is built without it"
    with _captured_log() as log, redirect_stdout(StringIO()):  # the function below prints what it does not find
        _preload_libraries()
        try:
            session = onnxruntime.InferenceSession(
                small_graph("Identity", ["x"], "tensor(float)"), providers=PROVIDERS["cuda"], enable_fallback=0
            )
        except Exception as error:  # ONNX Runtime has no public error class of its own
            return _reason(str(error))
    return "" if provider_of(session) == "cuda" else _reason(log[0])


def small_graph(op_type: str, inputs: list[str], kind: str, **attributes: Any) -> bytes:
    """A graph of one node, whose inputs and whose output `y` are tensors of rank 4 and of one kind."""
    from onnx import TensorProto, helper

    element = {"tensor(float)": TensorProto.FLOAT, "tensor(float16)": TensorProto.FLOAT16}.get(
        kind, TensorProto.BFLOAT16
    )
    *ends, output = (helper.make_tensor_value_info(name, element, [None] * 4) for name in (*inputs, "y"))
    node = helper.make_node(op_type, inputs, ["y"], **attributes)
    graph = helper.make_graph([node], op_type, ends, [output])
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 13)])
    return model.SerializeToString()


def _preload_libraries() -> None:
    """Load the libraries of CUDA and cuDNN that pip installed; what is missing shows when a session is made."""
    import onnxruntime

    preload = getattr(onnxruntime, "preload_dlls", None)
    if preload is not None:
        preload()


def _reason(text: str) -> str:
    """ONNX Runtime's reason for not using CUDA, on one line."""
    for pattern in _REASONS:
        found = re.search(pattern, text)
        if found:
            return one_line(found[1], MAX_REASON_CHARS)
    return one_line(text, MAX_REASON_CHARS) or "ONNX Runtime gives no reason"


@contextmanager
def _captured_log() -> Iterator[list[str]]:
    """Keep back what native code writes to stderr: it is the only place where ONNX Runtime says why CUDA is missing.

    Yields:
        A list, which gets the text in the end.
    """
    log: list[str] = []
    with tempfile.TemporaryFile() as file:
        kept = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield log
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            log.append(file.read().decode(errors="replace"))


def _load_reason(path: Path, error: Exception) -> str:
    reason = one_line(error, MAX_REASON_CHARS)
    if "bfloat16" in reason or "NOT_IMPLEMENTED" in reason:
        reason += "; a graph in bf16 runs on CUDA only: for the CPU use `loopexport onnx --dtype fp32`"
    if "escapes model directory" in reason:
        reason = f"its weights are links out of {path.parent}; copy the directory with `cp -rL`"
    return reason


def _check_release(path: Path) -> None:
    """Check the release of onnxruntime before it loads the graph: some releases crash on graphs that need a newer one.

    Raises:
        OnnxError: the graph's metadata ask for a newer release.
    """
    import onnx
    import onnxruntime

    try:
        properties = onnx.load(path, load_external_data=False).metadata_props
    except Exception:  # a broken file may raise anything, and ONNX Runtime says better what is wrong
        return
    needed = {each.key: each.value for each in properties}.get("min_onnxruntime", "0")
    installed = onnxruntime.__version__
    if _numbers(installed) < _numbers(needed):
        raise OnnxError(
            f"{path} needs onnxruntime {needed} or newer, not {installed}; install it, or write the graph again with "
            "`loopexport onnx`, which says what this one runs"
        )


def _numbers(release: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", release)[:3])
