"""Choose how the weights of a graph are quantised, from the options and from what the base stores."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loopexport.errors import OnnxError
from loopexport.export.onnx_files import DTYPES
from loopexport.export.quantisation import BITS, BLOCK_SIZES, Quantisation
from loopexport.onnx.weights.source import Weights

from .size import expert_arrays


@dataclass(frozen=True)
class QuantiseOptions:
    """Options that only quantised weights have; see `plan_onnx`."""

    compute: str | None = None
    block_size: int = 32
    symmetric: bool = False
    quantise_head: bool = False
    mixed: bool = False
    text: str | Path | None = None

    @property
    def given(self) -> dict[str, bool]:
        """Whether each option differs from its default, by its name on the command line."""
        default = QuantiseOptions()
        return {f"--{name.replace('_', '-')}": value != getattr(default, name) for name, value in vars(self).items()}


def choose_quantisation(dtype: str, kept: Quantisation | None, options: QuantiseOptions) -> Quantisation | None:
    """How a graph's weights are quantised; None for weights in one dtype.

    Args:
        dtype: the value of `--dtype`.
        kept: how the base was quantised already; None for a plain base.
        options: the other options.

    Raises:
        OnnxError: options do not fit each other or the base; the message says which.
    """
    keeps = kept is not None and dtype in ("as-is", *BITS)
    if dtype not in BITS and not keeps:
        _refuse(options, options.given, f"is for --dtype int4 and int8, not for {dtype}; leave it out")
        return None
    if options.compute not in (None, *DTYPES):
        raise OnnxError(f"compute {options.compute!r} must be one of {', '.join(DTYPES)}")
    if kept is not None:
        _check_kept(kept, dtype, options)
        return kept
    if options.block_size not in BLOCK_SIZES:
        raise OnnxError(f"block_size {options.block_size} must be one of {', '.join(map(str, BLOCK_SIZES))}")
    if options.mixed and dtype != "int4":
        raise OnnxError(f"--mixed puts 8 bits in the place of 4, and {dtype} has 8 everywhere; leave it out")
    return Quantisation(BITS[dtype], options.block_size, not options.symmetric, options.quantise_head, options.mixed)


def _check_kept(kept: Quantisation, dtype: str, options: QuantiseOptions) -> None:
    if dtype in BITS and dtype != kept.dtype:
        raise OnnxError(
            f"the base is quantised in {kept.dtype} already, and its codes stay as they are: use --dtype {kept.dtype} "
            "or as-is, or convert the checkpoint that was not quantised"
        )
    names = [name for name in options.given if name != "--compute"]
    _refuse(options, names, "is for a base that is not quantised; the codes of this one stay as they are")


def _refuse(options: QuantiseOptions, names: Iterable[str], why: str) -> None:
    for name in names:
        if options.given[name]:
            raise OnnxError(f"{name} {why}")


def has_whole_experts(config: Any, is_sparse: bool, weights: Weights, dtype: str, quantisation: Quantisation) -> bool:
    """Whether a graph has sparse experts in 4 bits: if one `QMoE` is exact for them.

    Args:
        config: the native model's config, an object of transformers.
        is_sparse: whether the model has sparse experts.
        weights: the weights.
        dtype: the number format in which the graph computes.
        quantisation: how the weights are quantised.
    """
    if not is_sparse or dtype != "fp32" or quantisation.bits != 4:
        return False
    if quantisation.kept and not _have_one_layout(weights, expert_arrays(weights)):
        return False
    from loopexport.onnx.trace.experts import are_whole

    return are_whole(config, quantisation.block_size)


def _have_one_layout(weights: Weights, names: Iterable[str]) -> bool:
    """Whether all these matrices are stored in 4 bits in one layout."""
    layouts = {weights.matrices[name].layout if name in weights.matrices else None for name in names}
    layout = layouts.pop() if len(layouts) == 1 else None
    return layout is not None and layout.bits == 4
