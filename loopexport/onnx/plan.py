"""Decide and check an ONNX export before writing anything."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from loopexport._keywords import suggest_keywords
from loopexport.base.checkpoint import CONFIG
from loopexport.base.families import onnx_outcome
from loopexport.choices import Attention, OnnxDtype
from loopexport.errors import OnnxError, OutputError, SpecError
from loopexport.export.directory import BASE_FOLDER, Export, is_export, open_export
from loopexport.export.onnx_files import DTYPES, data_name, graph_name
from loopexport.export.own_code import foreign_code
from loopexport.files.digests import Progress
from loopexport.files.output import check_output, output_path
from loopexport.loop.spec import LoopSpec
from loopexport.onnx.graph.releases import OLDEST, min_onnxruntime, release_text

from .limits import check_memory, check_spec

if TYPE_CHECKING:
    from .build import OnnxOutcome

ATTENTION_LAYOUTS = get_args(Attention)

Say = Callable[[str], object]


@dataclass(frozen=True)
class OnnxPlan:
    """An ONNX export that is checked and ready. `apply` carries it out.

    Attributes:
        export: the export to unroll.
        out: where to write a copy of the export with the graphs; None writes them into the export itself.
        specs: one loop for each graph.
        dtype: the number format of the graphs: "fp32", "fp16" or "bf16".
        as_is: whether the weights are stored in `dtype`, so that the graphs read the shards.
        attention: one of `ATTENTION_LAYOUTS`.
        overwrite: whether to replace an existing export at `out`.
        warnings: one line each.
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
        """Name of the data file; None if the graphs read the shards."""
        return None if self.as_is else data_name(self.dtype)

    @property
    def data_bytes(self) -> int:
        """Bytes of weights to write, without padding."""
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

    def apply(
        self,
        *,
        verify: bool = True,
        say: Say = lambda text: None,
        progress: Progress = lambda count: None,
    ) -> OnnxOutcome:
        """Write the graphs. Nothing changes if one of them differs from torch.

        Args:
            verify: compare each graph with the export in torch, in fp32.
            say: called with a line at the start of each step.
            progress: called with the number of weight bytes just written.

        Raises:
            OnnxError: the model cannot be traced.
            OutputError: the files cannot be written.
        """
        from .build import write_graphs

        return write_graphs(self, verify, say, progress)


@suggest_keywords
def plan_onnx(
    root: str | Path,
    *,
    out: str | Path | None = None,
    steps: Sequence[int] | None = None,
    dtype: OnnxDtype = "as-is",
    attention: Attention = "portable",
    overwrite: bool = False,
) -> OnnxPlan:
    """Decide and check an ONNX export. Writes nothing.

    Args:
        root: the export.
        out: where to write a copy of the export with the graphs; None writes them into the export itself.
        steps: one graph for each K; None for the export's own K.
        dtype: the number format of the graphs; "as-is" keeps the stored one and writes no weights.
        attention: "portable", or "gqa": faster, but without padded batches.
        overwrite: replace an existing export at `out`. Graphs in the export itself are always replaced.

    Raises:
        LoopExportError: something is wrong; the message says what to do.
    """
    check_installed()
    export = open_export(root)
    _check_code(export)
    if export.lacking:
        raise OnnxError(
            f"{export.lacking[0]} is not in {export.root}, and a graph needs the weights: "
            "convert without --weights none"
        )
    if "quantization_config" in export.base.config:
        raise OnnxError("the base is quantised; ONNX export needs a checkpoint in fp32, fp16 or bf16")
    if export.base.is_multimodal:
        raise OnnxError(
            f"{export.root} reads more than text, and these graphs take token ids alone; convert its base with "
            "--text-only, and export that"
        )
    if attention not in ATTENTION_LAYOUTS:
        raise OnnxError(f"attention {attention!r} must be one of {', '.join(ATTENTION_LAYOUTS)}")
    stored = _stored_dtype(export)
    if dtype != "as-is" and dtype not in DTYPES:
        raise OnnxError(f"dtype {dtype!r} must be one of as-is, {', '.join(DTYPES)}")
    chosen = stored if dtype == "as-is" else dtype
    specs = tuple(_spec_for(export.spec, each) for each in dict.fromkeys(steps or (export.spec.steps,)))
    _check_specs(specs)
    _check_releases(specs, attention)
    check_memory(native_config(export))
    target = _checked_out(export, out, overwrite)
    if chosen == stored and target is None:
        _check_real_shards(export)
    warnings = tuple(_warnings(export, chosen, attention, specs))
    return OnnxPlan(export, target, specs, chosen, chosen == stored, attention, overwrite, warnings)


def check_installed() -> None:
    """Raise OnnxError unless the required packages are installed."""
    missing = [name for name in ("onnx", "onnx_ir", "onnxruntime", "onnxscript") if find_spec(name) is None]
    if missing:
        raise OnnxError(f"{missing[0]} is not installed; run `pip install loopexport[onnx]` (or [onnx-cuda])")
    release = _release("transformers")
    if release and release < (5,):
        raise OnnxError(f"ONNX export needs transformers 5 or newer, not {version('transformers')}")
    for name in ("onnxruntime", "onnxruntime-gpu"):
        release = _release(name)
        if release and release < OLDEST:
            raise OnnxError(
                f"{name} {version(name)} loads a weight once for each place that reads it, or computes attention "
                f"wrongly; install {release_text(OLDEST)} or newer"
            )


def _check_releases(specs: tuple[LoopSpec, ...], attention: str) -> None:
    """Check that the installed ONNX Runtime runs the graphs; some releases crash instead of refusing them."""
    needed = _needed_release(specs, attention)
    for name in ("onnxruntime", "onnxruntime-gpu"):
        release = _release(name)
        if release and release < needed:
            raise OnnxError(
                f"{name} {version(name)} cannot run a graph of --attention {attention} with kv shared; install "
                f"{release_text(needed)} or newer, or use --attention portable"
            )


def _needed_release(specs: tuple[LoopSpec, ...], attention: str) -> tuple[int, ...]:
    """The oldest onnxruntime that runs all graphs."""
    return max(min_onnxruntime(spec, attention) for spec in specs)


def _release(package: str) -> tuple[int, ...] | None:
    """`(major, minor, patch)` of an installed package; None if it is not installed or has no metadata."""
    try:
        return tuple(int(part) for part in re.findall(r"\d+", version(package))[:3])
    except PackageNotFoundError:
        return None


def _stored_dtype(export: Export) -> str:
    """The dtype of most stored numbers."""
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
    """The base's config, as an object of transformers."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(export.root / BASE_FOLDER / CONFIG, trust_remote_code=False)


def _check_specs(specs: tuple[LoopSpec, ...]) -> None:
    for spec in specs:
        check_spec(spec)


def _check_code(export: Export) -> None:
    name = foreign_code(export)
    if name is not None:
        raise OnnxError(
            f"{name} in {export.root} is not the installed LoopExport's, and ONNX export runs no other code; "
            "convert the base again with this version"
        )


def _check_real_shards(export: Export) -> None:
    """Check for links out of the directory, as in the Hub's cache: ONNX Runtime does not follow them."""
    root = export.root.resolve()
    for shard in export.base.shards:
        if root not in shard.path.parents:  # shard.path has its links resolved
            raise OnnxError(
                f"{shard.name} in {export.root} is a link out of it, which ONNX Runtime refuses to follow: use --out "
                "COPY, or a --dtype other than the stored one, which writes the weights again"
            )


def _checked_out(export: Export, out: str | Path | None, overwrite: bool) -> Path | None:
    path = None if out is None else output_path(out)
    if path is None or path.resolve() == export.root.resolve():
        if not os.access(export.root, os.W_OK | os.X_OK):
            raise OutputError(f"cannot write into {export.root}; use --out for a copy elsewhere")
        return None
    check_output(path, export.root, overwrite=overwrite, is_replaceable=is_export)
    return path


def _warnings(export: Export, dtype: str, attention: str, specs: tuple[LoopSpec, ...]) -> Iterator[str]:
    from loopexport.onnx.runtime.session import cuda_problem

    model_type = export.base.config["model_type"]
    status, reason = onnx_outcome(model_type)
    if status == "refused":
        yield f"a tiny model of family {model_type!r} could not be exported: {reason}"
    if dtype == "bf16" and cuda_problem():
        yield (
            "ONNX Runtime computes in bf16 on CUDA only, so the graph can be neither verified nor run here; "
            "for the CPU use --dtype fp32 or fp16"
        )
    if attention == "gqa":
        yield "attention gqa takes no padded batch, and with a cache it takes several tokens for a single prompt only"
        if dtype == "fp32":
            yield "on CUDA, attention gqa computes in fp16 and bf16 only; this graph is for the CPU"
        needed = _needed_release(specs, attention)
        if needed > OLDEST:
            yield f"attention gqa with kv shared runs on onnxruntime {release_text(needed)} or newer"
