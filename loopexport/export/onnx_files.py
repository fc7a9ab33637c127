"""Names of ONNX files, as other ONNX tools expect them."""

from __future__ import annotations

import re

DTYPES = ("fp32", "fp16", "bf16")
GENAI_CONFIG = "genai_config.json"
DATA_SUFFIX = ".onnx_data"

# All names that `loopexport onnx` writes.
FILES = re.compile(rf"model(_[a-z0-9]+)*(\.onnx|{re.escape(DATA_SUFFIX)})|{re.escape(GENAI_CONFIG)}")


def graph_name(steps: int, own_steps: int, variant: str = "") -> str:
    """Name a graph: `model.onnx` for the export's own K, `model_k8.onnx` for K=8, `model_fp16.onnx` for a variant."""
    return (
        "_".join(["model", *([f"k{steps}"] if steps != own_steps else []), *([variant] if variant else [])]) + ".onnx"
    )


def data_name(dtype: str) -> str:
    """Name of the data file that all graphs of a dtype share."""
    return f"model_{dtype}{DATA_SUFFIX}"


def options_for(name: str) -> str:
    """The options of `loopexport onnx` that write a graph of this name, each with a space before it."""
    parts = name.removesuffix(".onnx").split("_")[1:]
    return "".join(f" {_option_for(part)}" for part in parts)


def _option_for(part: str) -> str:
    if re.fullmatch(r"k\d+", part):
        return f"--steps {part[1:]}"
    return f"--dtype {part}" if part in DTYPES else f"--attention {part}"


def steps_in_name(name: str) -> int | None:
    """The K in the name of a graph, such as 8 in `model_k8.onnx`; None if it has none."""
    match = re.match(r"\.?model_k(\d{1,10})[_.]", name)
    return int(match[1]) if match else None
