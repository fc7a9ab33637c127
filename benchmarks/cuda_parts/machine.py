"""What the machine is, and how fast its memory is read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

import torch

from .results import Result, attempt, measured, short
from .scale import Scale
from .timing import read_bandwidth

PACKAGES = (
    "torch",
    "transformers",
    "onnx",
    "onnx-ir",
    "onnxscript",
    "onnxruntime",
    "onnxruntime-gpu",
    "triton",
    "numpy",
)


def describe(scale: Scale) -> Iterator[Result]:
    """Versions, the GPU, whether ONNX Runtime really runs there, and the bandwidth."""
    yield attempt("versions", lambda: measured(**{name: _version(name) for name in PACKAGES if _version(name)}))
    yield attempt("device", lambda: measured(**_device(scale)))
    yield attempt("ONNX Runtime runs there", lambda: measured(provider=_provider(scale)))
    yield attempt("bandwidth", lambda: measured(gigabytes_per_second=short(read_bandwidth(scale) / 1e9)))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _device(scale: Scale) -> dict:
    if scale.device == "cpu":
        return {"name": "CPU", "cores": os.cpu_count()}
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "gibibytes": round(properties.total_memory / 2**30),
        "capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
        "cores": os.cpu_count(),
    }


def _provider(scale: Scale) -> str:
    from onnx import TensorProto, helper

    from .sessions import session

    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Abs", ["x"], ["y"])], "one", value[:1], value[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return session(model.SerializeToString(), scale.provider).get_providers()[0]
