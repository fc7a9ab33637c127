"""Names of ONNX files, as the ecosystem spells them."""

from __future__ import annotations

DTYPES = ("fp32", "fp16", "bf16")


def graph_name(steps: int, own_steps: int, variant: str = "") -> str:
    """`model.onnx` for the export's own K, `model_k8.onnx` for another; `model_fp16.onnx` for a variant."""
    return (
        "_".join(["model", *([f"k{steps}"] if steps != own_steps else []), *([variant] if variant else [])]) + ".onnx"
    )


def data_name(dtype: str) -> str:
    """Name of the one data file of all graphs in a dtype."""
    return f"model_{dtype}.onnx_data"
