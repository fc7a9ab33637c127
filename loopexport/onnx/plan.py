"""Decide and check an ONNX export before writing anything."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from loopexport._keywords import suggest_keywords
from loopexport.base.checkpoint import CONFIG
from loopexport.base.families import onnx_outcome
from loopexport.choices import Attention, Compute, OnnxDtype
from loopexport.errors import OnnxError, OutputError, SpecError, one_line
from loopexport.export.directory import BASE_FOLDER, Export, is_export, open_export
from loopexport.export.onnx_files import data_name, graph_name, weights_variant
from loopexport.export.own_code import foreign_code
from loopexport.export.quantisation import Quantisation
from loopexport.files.digests import Progress
from loopexport.files.output import check_output, output_path
from loopexport.loop.spec import LoopSpec, Steps
from loopexport.onnx.graph.releases import release_text

from .data_files import check_other_graphs
from .limits import check_memory, check_spec
from .quantise.choice import QuantiseOptions, choose_quantisation, has_whole_experts
from .quantise.size import check_quantises, expert_arrays, weight_bytes
from .requirements import check_installed, check_releases, newer_parts_of
from .weights.source import Weights, open_weights
from .weights.stored_matrices import stored_quantisation, stored_warnings
from .weights.stored_scheme import without_quantiser

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
        quantisation: how the weights are quantised; None for weights in `dtype`.
        text: a file whose text measures what quantising costs; None for LoopExport's own.
        whole_experts: whether sparse experts are quantised, too.
    """

    export: Export
    out: Path | None
    specs: tuple[LoopSpec, ...]
    dtype: str
    as_is: bool
    attention: str
    overwrite: bool
    warnings: tuple[str, ...]
    quantisation: Quantisation | None = None
    text: Path | None = None
    whole_experts: bool = False

    @property
    def graphs(self) -> dict[str, LoopSpec]:
        """The loop of each graph, by file name."""
        return {self.graph_name(spec.steps): spec for spec in self.specs}

    def graph_name(self, steps: Steps) -> str:
        """The file name of the graph of a K."""
        parts = [*([] if self.as_is else [self.variant]), *([] if self.attention == "portable" else [self.attention])]
        return graph_name(steps, self.export.spec.steps, "_".join(parts))

    @property
    def quantised(self) -> dict | None:
        """How the weights are quantised, for JSON; None for plain ones."""
        return None if self.quantisation is None else self.quantisation.to_dict()

    @property
    def variant(self) -> str:
        """The part of a file name that says how the weights are stored."""
        return weights_variant(self.dtype, self.quantisation)

    @property
    def data(self) -> str | None:
        """Name of the data file; None if the graphs read the shards."""
        return None if self.as_is else data_name(self.variant)

    @cached_property
    def data_bytes(self) -> int:
        """Bytes of weights to write, without padding."""
        if self.as_is:
            return 0
        return weight_bytes(open_weights(self.export), self.dtype, self.quantisation, whole_experts=self.whole_experts)

    def to_dict(self) -> dict:
        """The plan for `--json`."""
        return {
            "directory": str(self.out or self.export.root),
            "graphs": {name: spec.to_config_fields() for name, spec in self.graphs.items()},
            "dtype": self.dtype,
            "quantised": self.quantised,
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
    compute: Compute | None = None,
    block_size: int = 32,
    symmetric: bool = False,
    quantise_head: bool = False,
    mixed: bool = False,
    text: str | Path | None = None,
    overwrite: bool = False,
) -> OnnxPlan:
    """Decide and check an ONNX export. Writes nothing.

    Args:
        root: the export.
        out: where to write a copy of the export with the graphs; None writes them into the export itself.
        steps: one graph for each K; None for the export's own K.
        dtype: the number format of the weights; "as-is" keeps the stored one and writes no weights.
        attention: "portable", or "gqa": faster and smaller, but only `OnnxModel` gives it padded batches.
        compute: the number format of everything else, with int4 and int8; None for "fp32".
        block_size: with int4 and int8: inputs of one output that share a scale.
        symmetric: with int4 and int8: no zero points.
        quantise_head: with int4 and int8: the head in 8 bits, and with it the embedding that it is tied to.
        mixed: with int4: the layers that lose most in 8 bits.
        text: with int4 and int8: a file with text on which to measure what quantising costs; None for LoopExport's own.
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
    if export.base.is_multimodal:
        raise OnnxError(
            f"{export.root} reads more than text, and these graphs take token ids alone; convert its base with "
            "--text-only, and export that"
        )
    if attention not in ATTENTION_LAYOUTS:
        raise OnnxError(f"attention {attention!r} must be one of {', '.join(ATTENTION_LAYOUTS)}")
    weights = open_weights(export)
    stored = _stored_dtype(weights)
    if dtype not in get_args(OnnxDtype):
        raise OnnxError(f"dtype {dtype!r} must be one of {', '.join(get_args(OnnxDtype))}")
    kept = stored_quantisation(weights.matrices)
    options = QuantiseOptions(compute, block_size, symmetric, quantise_head, mixed, text)
    quantisation = choose_quantisation(dtype, kept, options)
    whole = stored if quantisation and dtype == "as-is" else "fp32"
    chosen = (compute or whole) if quantisation else stored if dtype == "as-is" else dtype
    as_is = quantisation is None and chosen == stored and weights.scheme is None
    specs = tuple(_spec_for(export.spec, each) for each in dict.fromkeys(steps or (export.spec.steps,)))
    _check_specs(specs)
    config = native_config(export)
    check_memory(config)
    is_sparse = export.base.is_sparse
    whole_experts = quantisation is not None and has_whole_experts(config, is_sparse, weights, chosen, quantisation)
    check_releases(newer_parts_of(specs, attention, whole_experts))
    if quantisation is not None:
        check_quantises(weights, quantisation, whole_experts)
    target = _checked_out(export, out, overwrite)
    if as_is and target is None:
        _check_real_shards(export)
    source = None if text is None else _readable(text)
    plan = OnnxPlan(export, target, specs, chosen, as_is, attention, overwrite, (), quantisation, source, whole_experts)
    check_other_graphs(plan)
    return replace(plan, warnings=tuple(_warnings(plan, weights)))


def _readable(path: str | Path) -> Path:
    path = Path(path).expanduser()
    try:
        path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise OnnxError(f"cannot read {path} as text ({one_line(error)}); give a file of plain text in UTF-8") from None
    return path


def _stored_dtype(weights: Weights) -> str:
    """The dtype of most stored numbers, without quantised ones."""
    counts: Counter[str] = Counter()
    for name, tensor in weights.tensors.items():
        if name not in weights.matrices:
            counts[tensor.dtype] += tensor.num_elements
    names = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}
    stored = counts.most_common(1)[0][0]
    if stored not in names:
        raise OnnxError(f"the weights are stored as {stored}; ONNX export takes {', '.join(names)}")
    return names[stored]


def _spec_for(spec: LoopSpec, steps: Steps) -> LoopSpec:
    try:
        return replace(spec, steps=steps)
    except ValueError as error:
        raise SpecError(str(error)) from None


def native_config(export: Export) -> Any:
    """The base's config, as an object of transformers, without a quantiser."""
    from transformers import AutoConfig

    return without_quantiser(AutoConfig.from_pretrained(export.root / BASE_FOLDER / CONFIG, trust_remote_code=False))


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


def _warnings(plan: OnnxPlan, weights: Weights) -> Iterator[str]:
    from .runtime.session import cuda_problem

    export, dtype, attention = plan.export, plan.dtype, plan.attention
    model_type = export.base.config["model_type"]
    status, reason = onnx_outcome(model_type)
    if status == "refused":
        yield f"a tiny model of family {model_type!r} could not be exported: {reason}"
    if weights.scheme is not None:
        yield from stored_warnings(weights.scheme, weights.matrices, dtype, plan.quantisation)
    if dtype == "bf16" and cuda_problem():
        yield (
            "ONNX Runtime computes in bf16 on CUDA only, so the graph can be neither verified nor run here; "
            "for the CPU use --dtype fp32 or fp16"
        )
    if attention == "gqa":
        yield (
            "attention gqa takes no left padding (OnnxModel.generate and stream pad right), and with a cache it takes "
            "several tokens for a single prompt only"
        )
        if dtype == "fp32":
            yield "on CUDA, attention gqa computes in fp16 and bf16 only; this graph is for the CPU"
    for part in newer_parts_of(plan.specs, attention, plan.whole_experts):
        yield f"{part.part} runs on onnxruntime {release_text(part.release)} or newer"
    if plan.quantisation is not None:
        experts = expert_arrays(weights)
        if experts and not plan.whole_experts:
            size = weight_bytes(weights, dtype, None, experts)
            yield f"sparse experts such as {experts[0]} are not quantised: {size:,} bytes of them stay in {dtype}"
