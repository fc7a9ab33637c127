"""Decide and check an ONNX export, before anything is written."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from loopexport.base.checkpoint import CONFIG
from loopexport.base.families import onnx_outcome
from loopexport.errors import OnnxError, OutputError, SpecError
from loopexport.export.directory import BASE_FOLDER, Export, is_export, open_export
from loopexport.export.onnx_files import DTYPES, data_name, graph_name
from loopexport.export.own_code import foreign_code
from loopexport.files.staged_directory import check_output, output_path
from loopexport.loop.spec import LoopSpec

from .limits import check_memory, check_spec

ATTENTION_LAYOUTS = ("portable", "gqa")


@dataclass(frozen=True)
class OnnxPlan:
    """What an ONNX export will do, decided and checked before anything is written.

    Attributes:
        export: the export to make a graph of.
        out: another directory, which becomes a copy of the export with the graph in it; None for the export itself.
        specs: one loop for each graph.
        dtype: "fp32", "fp16" or "bf16": what the graph computes in.
        as_is: whether that is what is stored, so that the shards serve as the graph's data.
        attention: one of `ATTENTION_LAYOUTS`.
        overwrite: whether an export at `out` is to be replaced.
        warnings: what the user should know, one line each.
    """

    export: Export
    out: Path | None
    specs: tuple[LoopSpec, ...]
    dtype: str
    as_is: bool
    attention: str
    overwrite: bool
    warnings: tuple[str, ...]

    @property
    def graphs(self) -> dict[str, LoopSpec]:
        """The loop of each graph, by file name."""
        parts = [*([] if self.as_is else [self.dtype]), *([] if self.attention == "portable" else [self.attention])]
        return {graph_name(spec.steps, self.export.spec.steps, "_".join(parts)): spec for spec in self.specs}

    @property
    def data(self) -> str | None:
        """Name of the data file, or None where the shards serve."""
        return None if self.as_is else data_name(self.dtype)

    @property
    def data_bytes(self) -> int:
        """Bytes of weights to be written, but for padding."""
        itemsize = {"fp32": 4, "fp16": 2, "bf16": 2}[self.dtype]
        return 0 if self.as_is else self.export.base.num_params * itemsize

    def to_dict(self) -> dict:
        """The plan for `--json`."""
        return {
            "directory": str(self.out or self.export.root),
            "graphs": {name: spec.to_config_fields() for name, spec in self.graphs.items()},
            "dtype": self.dtype,
            "as_is": self.as_is,
            "attention": self.attention,
            "data": self.data or [shard.name for shard in self.export.base.shards],
            "data_bytes_written": self.data_bytes,
            "warnings": list(self.warnings),
        }


def plan_onnx(
    root: str | Path,
    *,
    out: str | Path | None = None,
    steps: tuple[int, ...] | None = None,
    dtype: str = "as-is",
    attention: str = "portable",
    overwrite: bool = False,
) -> OnnxPlan:
    """Decide and check an ONNX export; writes nothing.

    Args:
        root: an export.
        out: a directory for a copy of the export with the graphs; None puts them into the export itself.
        steps: one graph for each K; None for the export's own.
        dtype: what the graphs compute in, "as-is" for what is stored: then no weights are written.
        attention: one of `ATTENTION_LAYOUTS`.
        overwrite: replace an export that stands at `out`; graphs in the export itself are always made anew.

    Raises:
        LoopExportError: something is wrong; the message says what, and what to do.
    """
    check_installed()
    export = open_export(root)
    _check_code(export)
    if export.lacking:
        raise OnnxError(
            f"{export.lacking[0]} is not in {export.root}, and a graph is made from the weights: convert with them"
        )
    if "quantization_config" in export.base.config:
        raise OnnxError("the base is quantised; ONNX export takes checkpoints in fp32, fp16 or bf16")
    if attention not in ATTENTION_LAYOUTS:
        raise OnnxError(f"attention {attention!r} must be one of {', '.join(ATTENTION_LAYOUTS)}")
    stored = _stored_dtype(export)
    if dtype != "as-is" and dtype not in DTYPES:
        raise OnnxError(f"dtype {dtype!r} must be one of as-is, {', '.join(DTYPES)}")
    chosen = stored if dtype == "as-is" else dtype
    specs = tuple(_spec_for(export.spec, each) for each in dict.fromkeys(steps or (export.spec.steps,)))
    _check_specs(specs)
    check_memory(native_config(export))
    target = _checked_out(export, out, overwrite)
    if chosen == stored and target is None:
        _check_real_shards(export)
    warnings = tuple(_warnings(export, chosen, attention))
    return OnnxPlan(export, target, specs, chosen, chosen == stored, attention, overwrite, warnings)


def check_installed() -> None:
    """Raise OnnxError unless what the export needs is there."""
    missing = [name for name in ("onnx", "onnx_ir", "onnxruntime", "onnxscript") if find_spec(name) is None]
    if missing:
        raise OnnxError(f"{missing[0]} is not installed; `pip install loopexport[onnx]` (or [onnx-cuda]) brings it")
    release = _release("transformers")
    if release and release < (5,):
        raise OnnxError(f"ONNX export needs transformers 5 or newer, not {version('transformers')}")
    for name in ("onnxruntime", "onnxruntime-gpu"):
        release = _release(name)
        if release and release < (1, 23):
            raise OnnxError(
                f"{name} {version(name)} holds weights that a graph reads several times once for each; install 1.23 or "
                "newer"
            )


def _release(package: str) -> tuple[int, ...] | None:
    """Its release, `(major, minor)`; None where it is not installed, or without metadata."""
    try:
        return tuple(int(part) for part in re.findall(r"\d+", version(package))[:2])
    except PackageNotFoundError:
        return None


def _stored_dtype(export: Export) -> str:
    """What most stored numbers are."""
    counts: Counter[str] = Counter()
    for tensor in export.base.tensors.values():
        counts[tensor.dtype] += tensor.num_elements
    names = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}
    stored = counts.most_common(1)[0][0]
    if stored not in names:
        raise OnnxError(f"the weights are stored as {stored}; ONNX export takes {', '.join(names)}")
    return names[stored]


def _spec_for(spec: LoopSpec, steps: int) -> LoopSpec:
    try:
        return replace(spec, steps=steps)
    except ValueError as error:
        raise SpecError(str(error)) from None


def native_config(export: Export) -> Any:
    """The config of the base, as transformers has it."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(export.root / BASE_FOLDER / CONFIG, trust_remote_code=False)


def _check_specs(specs: tuple[LoopSpec, ...]) -> None:
    for spec in specs:
        check_spec(spec)


def _check_code(export: Export) -> None:
    name = foreign_code(export)
    if name is not None:
        raise OnnxError(
            f"{name} in {export.root} is not the installed LoopExport's, and no other code is run for a graph; "
            "convert the base again with this version"
        )


def _check_real_shards(export: Export) -> None:
    """ONNX Runtime reads no weights through a link out of the directory, such as those of the Hub's cache are."""
    root = export.root.resolve()
    for shard in export.base.shards:
        if root not in shard.path.parents:  # which has its links resolved
            raise OnnxError(
                f"{shard.name} in {export.root} is a link out of it, which ONNX Runtime refuses to follow: use --out "
                "COPY, or a --dtype other than the stored one, for which the weights are written once more"
            )


def _checked_out(export: Export, out: str | Path | None, overwrite: bool) -> Path | None:
    path = None if out is None else output_path(out)
    if path is None or path.resolve() == export.root.resolve():
        if not os.access(export.root, os.W_OK | os.X_OK):
            raise OutputError(f"cannot write into {export.root}; use --out for a copy elsewhere")
        return None
    check_output(path, export.root, overwrite=overwrite, is_replaceable=is_export)
    return path


def _warnings(export: Export, dtype: str, attention: str) -> Iterator[str]:
    import onnxruntime

    model_type = export.base.config["model_type"]
    status, reason = onnx_outcome(model_type)
    if status == "refused":
        yield f"a tiny model of family {model_type!r} could not be exported: {reason}"
    if dtype == "bf16" and "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        yield (
            "ONNX Runtime computes in bf16 on CUDA only, so the graph can be neither verified nor run here; "
            "--dtype fp32 or fp16 makes one that runs on the CPU"
        )
    if attention == "gqa":
        yield "attention gqa takes no padded batch, and several tokens on a cache for one prompt at a time only"
        if dtype == "fp32":
            yield "attention gqa computes in fp16 and bf16 only on CUDA; this graph is for the CPU"
