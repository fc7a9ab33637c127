"""Names of ONNX files, as other ONNX tools expect them."""

from __future__ import annotations

import re

from loopexport.templates.looped_spec import Steps

from .quantisation import Quantisation

DTYPES = ("fp32", "fp16", "bf16")
GENAI_CONFIG = "genai_config.json"
DATA_SUFFIX = ".onnx_data"

# All names that `loopexport onnx` writes.
FILES = re.compile(rf"model(_[a-z0-9]+)*(\.onnx|{re.escape(DATA_SUFFIX)})|{re.escape(GENAI_CONFIG)}")

# The part of a name that says how weights are stored, and its options: fp16, int8, q4, q4f16.
_QUANTISED = {"q4": "int4", "int8": "int8"}
_SUFFIXES = {"fp32": "", "fp16": "f16", "bf16": "bf16"}
_OPTIONS = {
    **{dtype: f" --dtype {dtype}" for dtype in DTYPES},
    **{
        stem + suffix: f" --dtype {dtype}" + (f" --compute {compute}" if suffix else "")
        for stem, dtype in _QUANTISED.items()
        for compute, suffix in _SUFFIXES.items()
    },
}


def weights_variant(dtype: str, quantisation: Quantisation | None) -> str:
    """The part of a name that says how weights are stored.

    Args:
        dtype: the number format that the graph computes in.
        quantisation: of its weights; None for plain ones.
    """
    if quantisation is None:
        return dtype
    stem = next(stem for stem, name in _QUANTISED.items() if name == quantisation.dtype)
    return stem + _SUFFIXES[dtype]


def graph_name(steps: Steps, own_steps: Steps, variant: str = "") -> str:
    """Name a graph: `model.onnx` for the export's own K, `model_k8.onnx` for K=8, `model_fp16.onnx` for a variant."""
    return (
        "_".join(["model", *([f"k{steps}"] if steps != own_steps else []), *([variant] if variant else [])]) + ".onnx"
    )


def data_name(variant: str) -> str:
    """Name of the data file that all graphs of a `weights_variant` share."""
    return f"model_{variant}{DATA_SUFFIX}"


def data_of(name: str) -> str | None:
    """Name of the data file that a graph of this name reads; None if it reads the shards."""
    variants = [part for part in _parts(name) if part in _OPTIONS]
    return data_name(variants[0]) if variants else None


def options_for(name: str, quantisation: Quantisation | None = None) -> str:
    """The options of `loopexport onnx` that write a graph of this name, each with a space before it.

    Args:
        name: of the graph.
        quantisation: of its weights, for the options that the name does not say.
    """
    return "".join(map(_option_for, _parts(name))) + ("" if quantisation is None else quantisation.options)


def _parts(name: str) -> list[str]:
    return name.removesuffix(".onnx").split("_")[1:]


def _option_for(part: str) -> str:
    if re.fullmatch(r"k\d+", part):
        return f" --steps {part[1:]}"
    return _OPTIONS.get(part, f" --attention {part}")


def steps_in_name(name: str) -> int | None:
    """The K in the name of a graph, such as 8 in `model_k8.onnx`; None if it has none."""
    match = re.match(r"\.?model_k(\d{1,10})[_.]", name)
    return int(match[1]) if match else None
