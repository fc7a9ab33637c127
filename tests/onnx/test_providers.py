"""Where a graph runs: ONNX Runtime lists CUDA where it does not work, too."""

from __future__ import annotations

import json
import os
import shutil

import onnx
import onnxruntime
import pytest

import loopexport
from loopexport.onnx import OnnxModel
from loopexport.onnx.check.comparison import why_not_run
from loopexport.onnx.runtime import session
from loopexport.onnx.runtime.directory import find_end_tokens
from support.commands import run
from support.made_onnx import refused

# What onnxruntime-gpu 1.31.1 says without libraries, and with a driver that is too old.
LOG = (
    "[E:onnxruntime:Default, provider_bridge_ort.cc:2458 operator()] FAIL : Failed to load library "
    "capi/libonnxruntime_providers_cuda.so with error: libcublasLt.so.13: cannot open shared object file\n"
    "[W:onnxruntime:Default] Failed to create CUDAExecutionProvider. Require cuDNN 9.* and CUDA 13.*.\n"
)
FAILURE = (
    "cuda_call.cc:154 CudaCall(ERRTYPE, const char*) [with ERRTYPE = cudaError; bool THRW = true] CUDA failure 35: "
    "CUDA driver version is insufficient for CUDA runtime version ; GPU=-1 ; hostname=here"
)


@pytest.fixture(params=["falls back", "raises"])
def listed(request, monkeypatch):
    """An onnxruntime that lists CUDA and cannot use it; what it says."""
    real = onnxruntime.InferenceSession

    def create(graph, *options, providers, **named):
        if providers == session.PROVIDERS["cuda"]:
            print("this must not be seen")
            os.write(2, LOG.encode())
            if request.param == "raises":
                raise RuntimeError(FAILURE)
        return real(graph, *options, providers=["CPUExecutionProvider"], **named)

    def preload_dlls():
        print("this must not be seen")

    monkeypatch.setattr(onnxruntime, "InferenceSession", create)
    monkeypatch.setattr(onnxruntime, "preload_dlls", preload_dlls, raising=False)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: session.PROVIDERS["cuda"])
    session.cuda_problem.cache_clear()
    session._warn_once.cache_clear()
    yield "CUDA failure 35: CUDA driver" if request.param == "raises" else "libcublasLt.so.13: cannot open"
    session.cuda_problem.cache_clear()
    session._warn_once.cache_clear()


def test_cuda_that_does_not_work_is_told_with_its_reason(export, listed, capfd):
    line = refused("run", export, "it is", "--provider", "cuda")
    assert f"ONNX Runtime cannot use CUDA: {listed}" in line
    assert "onnxruntime-gpu[cuda,cudnn]" in line
    assert "must not be seen" not in "".join(capfd.readouterr()) + line


def test_auto_goes_on_with_the_cpu_and_says_so_once(export, listed, capfd):
    first, second = (run("run", export, "it is", "--max-new-tokens", "2") for _ in range(2))
    assert f"Note: ONNX Runtime computes on the CPU, because it cannot use CUDA: {listed}" in first.stderr
    assert (second.exit_code, second.stderr) == (0, "")
    assert first.stdout == second.stdout
    assert capfd.readouterr().err == ""
    assert run("run", export, "it is", "--max-new-tokens", "2", "--provider", "cpu").stdout == first.stdout
    assert listed in why_not_run("bf16")


def test_provider_is_where_the_session_runs(made):
    assert OnnxModel(made, provider="cpu").provider == "cpu"
    with pytest.raises(loopexport.LoopExportError, match="provider 'tpu' must be one of auto, cpu, cuda"):
        OnnxModel(made, provider="tpu")


def test_graph_for_a_newer_onnxruntime_is_not_loaded(export, monkeypatch):
    """Some older releases crash on such graphs."""
    graph = onnx.load(export / "model.onnx", load_external_data=False)
    for each in graph.metadata_props:
        if each.key == "min_onnxruntime":
            each.value = "1.99"
    onnx.save(graph, export / "model.onnx")
    monkeypatch.setattr(onnxruntime, "InferenceSession", None)
    line = refused("run", export, "it is")
    assert f"model.onnx needs onnxruntime 1.99 or newer, not {onnxruntime.__version__}" in line


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [2, 7]}, 5, (2, 7)),
        ({"eos_token_id": None}, 5, ()),
        ({}, 5, ()),
        (None, 5, (5,)),
        (None, [5, 6], (5, 6)),
        (None, None, ()),
    ],
)
def test_end_tokens_are_those_of_transformers(made, tmp_path, generation, config, expected):
    shutil.copy(made / "config.json", tmp_path)
    values = json.loads((tmp_path / "config.json").read_text()) | {"eos_token_id": config}
    (tmp_path / "config.json").write_text(json.dumps(values))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert find_end_tokens(tmp_path) == expected
