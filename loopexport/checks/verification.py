"""`verify`: check an export's files, load it, and check the invariants of its loop."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from loopexport._keywords import suggest_keywords
from loopexport.base.checkpoint import CONFIG
from loopexport.choices import Runtime
from loopexport.errors import ExportError, first_line
from loopexport.export.check import Check
from loopexport.export.directory import BASE_FOLDER, Export, open_export
from loopexport.export.integrity import check_files
from loopexport.export.own_code import foreign_code
from loopexport.export.stale_graphs import check_loops
from loopexport.files.digests import Progress
from loopexport.loop.spec import LoopSpec, make_spec

from .vllm import check_serving

if TYPE_CHECKING:
    import torch

RUNTIMES = get_args(Runtime)

PROMPT_TOKENS = 16  # prefill, before the decode steps
DECODE_STEPS = 8

KEYS_LOADED = "every weight is loaded, and no other"
ONE_STEP_IS_BASE = "steps 1 is bitwise the base model"
FULL_ANCHOR_IS_BASE = "anchor 1 is bitwise the base model"
CACHED_DECODE_IS_FULL = "cached decode equals the full forward"

# Largest |a - b| allowed, relative to the largest |b|, between two orders of the same fp32 sums.
TOLERANCE = 1e-5


@suggest_keywords
def verify(
    root: str | Path,
    *,
    full: bool = False,
    files_only: bool = False,
    trust_remote_code: bool = False,
    runtime: Runtime = "transformers",
    progress: Progress = lambda count: None,
) -> list[Check]:
    """Check an export: files, K=1 equals the base, cached decoding, ONNX graphs.

    The model is loaded in fp32 on the CPU; a quantised model that does not run in fp32 keeps its own dtype. A check
    does not apply (`passed` is None) if the base itself does not run on this machine, or violates the invariant.

    Args:
        root: the export.
        full: hash all weights that have a recorded digest.
        files_only: check the files without loading the model.
        trust_remote_code: run modeling code that differs from the installed LoopExport's.
        runtime: "vllm" compares the greedy tokens of the installed vLLM with those of transformers.
        progress: called with the number of weight bytes just hashed.

    Raises:
        ExportError: `root` is not an export, or holds unknown code; or `runtime` is unknown or not installed.
    """
    if runtime not in RUNTIMES:
        raise ExportError(f"runtime {runtime!r} must be one of {', '.join(RUNTIMES)}")
    export = open_export(root)
    checks = check_files(export, full=full, progress=progress)
    is_whole = all(check.passed is not False for check in checks)
    checks += check_loops(export)
    if files_only or not is_whole:
        return checks
    if not trust_remote_code:
        _check_known_code(export)
    if runtime == "vllm":
        return [*checks, check_serving(export)]
    of_model = _check_model(export)
    return checks + ([_of_trained_weights(check) for check in of_model] if export.manifest.trained else of_model)


def _check_known_code(export: Export) -> None:
    name = foreign_code(export)
    if name is not None:
        raise ExportError(
            f"{name} in {export.root} is not the installed LoopExport's; "
            "read it, then use --trust-remote-code to run it, or --files-only"
        )


class _BaseDoesNotRunError(Exception):
    """The native model cannot be loaded or run on this machine."""


@dataclass(frozen=True)
class _BaseRun:
    """The native model's results with the export's weights.

    Attributes:
        dtype: the argument `dtype` of `from_pretrained`.
        logits: the logits of a full forward.
        decode_difference: difference between its cached decoding and the full forward, relative to the logits' scale.
            It is measured for quantised models only, else 0.
    """

    dtype: Any
    logits: torch.Tensor
    decode_difference: float = 0.0


def _check_model(export: Export) -> list[Check]:
    import torch

    generator = torch.Generator().manual_seed(0)
    shape = (2, PROMPT_TOKENS + DECODE_STEPS)
    tokens = torch.randint(_base_config(export).vocab_size, shape, generator=generator)
    with torch.no_grad():
        try:
            base = _run_base(export, tokens)
        except _BaseDoesNotRunError as error:
            names = (KEYS_LOADED, ONE_STEP_IS_BASE, FULL_ANCHOR_IS_BASE, CACHED_DECODE_IS_FULL)
            return [Check(name, None, f"the base itself does not run on this machine: {error}") for name in names]
        model, loading = _load(export, base.dtype)
        return [
            _check_keys(loading),
            _check_identity(ONE_STEP_IS_BASE, model, tokens, base.logits, loop_steps=1),
            _check_identity(FULL_ANCHOR_IS_BASE, model, tokens, base.logits, loop_anchor=1.0),
            _check_cached_decode(model, tokens, export.spec, base.decode_difference),
            *_check_graphs(export, model),
        ]


def _of_trained_weights(check: Check) -> Check:
    """The check in other words: with trained weights the native model is not the base model."""
    return replace(check, name=check.name.replace("the base model", "the native model"))


def _run_base(export: Export, tokens: torch.Tensor) -> _BaseRun:
    """Run the base in fp32, or in its own dtype if it is quantised and does not run in fp32.

    Raises:
        _BaseDoesNotRunError: the base is quantised and runs in neither.
    """
    import torch

    if not export.base.quantisation:
        return _BaseRun(torch.float32, _logits(_load_base(export, torch.float32), tokens))
    for dtype in (torch.float32, "auto"):
        try:
            model = _load_base(export, dtype)
            logits = model(tokens, use_cache=False).logits
            difference = _largest_difference(decode_logits(model, tokens), logits)
            return _BaseRun(dtype, logits, difference / (logits.abs().max().item() or 1.0))
        except Exception as error:  # a quantiser may raise anything: missing kernels, devices, packages
            failure = error
    raise _BaseDoesNotRunError(f"{type(failure).__name__}: {first_line(failure)}")


def _load(export: Export, dtype) -> tuple[Any, dict]:
    from transformers import AutoModelForCausalLM

    load: Any = AutoModelForCausalLM.from_pretrained
    return load(export.root, trust_remote_code=True, dtype=dtype, output_loading_info=True)


def _load_base(export: Export, dtype):
    """The native model of `base/config.json`, with the export's weights."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(export.root, config=_base_config(export), dtype=dtype)


def _base_config(export: Export):
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(export.root / BASE_FOLDER / CONFIG, trust_remote_code=False)


def _logits(model, tokens: torch.Tensor) -> torch.Tensor:
    logits = model(tokens, use_cache=False).logits
    del model
    gc.collect()
    return logits


def _check_keys(loading: dict) -> Check:
    wrong = [key for group in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in loading[group]]
    detail = f"{len(wrong)} keys, such as {wrong[0]}" if wrong else "none missing, unexpected or mismatched"
    return Check(KEYS_LOADED, not wrong, detail)


def _check_identity(name: str, model, tokens: torch.Tensor, base_logits: torch.Tensor, **fields) -> Check:
    import torch

    with _config_fields(model.config, **fields):
        logits = model(tokens, use_cache=False).logits
    difference = (logits - base_logits).abs().max().item()
    return Check(name, torch.equal(logits, base_logits), f"largest difference {difference:.3g}", difference)


def _check_cached_decode(model, tokens: torch.Tensor, spec: LoopSpec, base_difference: float) -> Check:
    """Compare prefill and single decode steps with one forward over all tokens."""
    full = model(tokens, use_cache=False).logits
    difference = _largest_difference(decode_logits(model, tokens), full)
    scale = full.abs().max().item() or 1.0
    detail = f"largest difference {difference:.3g}, {difference / scale:.3g} of the logits' scale"
    if not math.isfinite(difference):
        return Check(CACHED_DECODE_IS_FULL, False, detail, difference)
    reason = _why_decode_differs(spec)
    if reason:
        return Check(CACHED_DECODE_IS_FULL, None, f"{detail}; does not hold by design: {reason}", difference)
    holds = difference <= TOLERANCE * scale
    if not holds and base_difference > TOLERANCE:
        why = f"the quantised base itself violates it, by {base_difference:.3g} of the logits' scale"
        return Check(CACHED_DECODE_IS_FULL, None, f"{detail}; {why}", difference)
    return Check(CACHED_DECODE_IS_FULL, holds, detail, difference)


def _check_graphs(export: Export, model) -> list[Check]:
    """Compare each ONNX graph with the model in torch, with the graph's loop."""
    graphs = {name: record for name, record in export.manifest.onnx.items() if record.spec is not None}
    if graphs and find_spec("onnxruntime") is None:
        why = "not compared: onnxruntime is not installed; run `pip install loopexport[onnx]`"
        return [Check(f"{name} computes what torch does", None, why) for name in graphs]
    if not graphs:
        return []
    from loopexport.onnx.check import check_recorded

    checks = []
    for name, record in graphs.items():
        spec = make_spec(**(record.spec or {}))
        with _config_fields(model.config, **spec.to_config_fields()):
            checks.append(check_recorded(export.root / name, record, spec, model))
    return checks


def decode_logits(model, tokens: torch.Tensor) -> list[torch.Tensor]:
    """The logits of a prefill, then of single decode steps."""
    from loopexport.templates.looped_cache import find_cache_argument

    argument = find_cache_argument(model)
    name = "past_key_values" if argument is None else argument[0]  # transformers renames it from 5.24 on
    output = model(tokens[:, :PROMPT_TOKENS], use_cache=True)
    steps = [output.logits]
    for position in range(PROMPT_TOKENS, tokens.shape[1]):
        output = model(tokens[:, position : position + 1], **{name: output[name]}, use_cache=True)
        steps.append(output.logits)
    return steps


def _largest_difference(parts: list[torch.Tensor], whole: torch.Tensor) -> float:
    import torch

    return (torch.cat(parts, dim=1) - whole).abs().max().item()


def _why_decode_differs(spec: LoopSpec) -> str:
    if spec.is_identity:
        return ""
    if spec.kv == "reference":
        return "under kv reference an iteration attends to the natural K/V of earlier tokens"
    if spec.decode != "full":
        return f"decode {spec.decode} lets decode steps skip the loop"
    return ""


@contextmanager
def _config_fields(config, **fields) -> Iterator[None]:
    before = {name: getattr(config, name) for name in fields}
    try:
        for name, value in fields.items():
            setattr(config, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)
