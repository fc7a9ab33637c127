"""`verify`: check an export's files, load it, and check the invariants of its loop."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from loopexport._keywords import suggest_keywords
from loopexport.base.auto_class import auto_class
from loopexport.base.checkpoint import CONFIG
from loopexport.base.families import is_multimodal, layer_types
from loopexport.choices import Runtime
from loopexport.errors import ExportError, first_line
from loopexport.export.check import Check
from loopexport.export.directory import BASE_FOLDER, Export, open_export
from loopexport.export.integrity import check_files
from loopexport.export.own_code import foreign_code
from loopexport.export.stale_graphs import check_loops
from loopexport.files.digests import Progress
from loopexport.loop.spec import LoopSpec, make_spec
from loopexport.templates.looped_fit import ATTENTION_TYPES

from .effect import CHANGES_LOGITS, LAYER_RUNS, check_effect, check_image, check_runs, counted_runs, image_effect
from .mlx import check_mlx
from .probe import Probe, cached_logits, full_logits, make_probe
from .vllm import check_serving

if TYPE_CHECKING:
    import torch

RUNTIMES = get_args(Runtime)

KEYS_LOADED = "every weight is loaded, and no other"
ONE_STEP_IS_BASE = "steps 1 is bitwise the base model"
FULL_ANCHOR_IS_BASE = "anchor 1 is bitwise the base model"
FULL_IS_BY_HAND = "the full forward equals the loop by hand over the base model"
CACHED_IS_BY_HAND = "cached chunks and steps equal the loop by hand over the base model"
CACHED_DECODE_IS_FULL = "cached decode equals the full forward"
# All checks of the model in torch, in order.
MODEL = (
    KEYS_LOADED,
    ONE_STEP_IS_BASE,
    FULL_ANCHOR_IS_BASE,
    LAYER_RUNS,
    CHANGES_LOGITS,
    FULL_IS_BY_HAND,
    CACHED_IS_BY_HAND,
    CACHED_DECODE_IS_FULL,
)
RUNS = "the looped model loads and runs"

# Largest |a - b| allowed, relative to the largest |b|, between two orders of the same fp32 sums.
TOLERANCE = 1e-5

# How much larger than in the base the differences from rounding may be in a loop, which repeats layers.
GROWTH = 100


@suggest_keywords
def verify(
    root: str | Path,
    *,
    full: bool = False,
    files_only: bool = False,
    trust_remote_code: bool = False,
    runtime: Runtime = "transformers",
    vllm_flags: Sequence[str] = (),
    progress: Progress = lambda count: None,
) -> list[Check]:
    """Check an export: files, K=1 equals the base, the loop by hand, cached decoding, ONNX graphs.

    The loop is computed a second time by hand, over the native model and without the export's code. The model is loaded
    in fp32 on the CPU; a quantised model that does not run in fp32 keeps its own dtype. A check does not apply
    (`passed` is None) if the base itself does not run on this machine, or violates the invariant, or if the loop of its
    family cannot be computed by hand.

    Args:
        root: the export.
        full: hash all weights that have a recorded digest.
        files_only: check the files without loading the model.
        trust_remote_code: run modeling code that differs from the installed LoopExport's.
        runtime: "vllm" compares the greedy tokens of the installed vLLM with those of transformers, "mlx" the logits of
            the installed mlx-lm.
        vllm_flags: with "vllm": command-line arguments of its server, such as `("--max-model-len", "4096")`.
        progress: called with the number of weight bytes just hashed.

    Raises:
        ExportError: `root` is no export or holds unknown code; `runtime` is unknown, not installed or lacks a flag.
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
        return [*checks, check_serving(export, vllm_flags)]
    if runtime == "mlx":
        return [*checks, *check_mlx(export)]
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
class _ByHand:
    """The result of the loop by hand over the native model.

    Attributes:
        logits: None if the loop cannot be computed by hand.
        reason: why not.
    """

    logits: torch.Tensor | None
    reason: str = ""


@dataclass(frozen=True)
class _BaseRun:
    """The native model's results with the export's weights.

    Attributes:
        dtype: the argument `dtype` of `from_pretrained`.
        logits: the logits of a full forward.
        by_hand: the same with the loop by hand.
        cached_by_hand: the logits of `probe.chunks` with the loop by hand.
        decode_difference: difference between its cached decoding and the full forward, relative to the logits' scale.
            It is measured for models that may violate it, which `_may_decode_otherwise` names; else 0.
        image_effect: how much another image changes the last logits; 0 if there is none.
    """

    dtype: Any
    logits: torch.Tensor
    by_hand: _ByHand
    cached_by_hand: _ByHand
    decode_difference: float = 0.0
    image_effect: float = 0.0


@dataclass(frozen=True)
class _LoopedRun:
    """The looped model's results.

    Attributes:
        runs: how often each decoder layer ran in a full forward.
        full: the logits of a full forward.
        decoded: the logits of `probe.steps`.
        cached: the logits of `probe.chunks`.
    """

    runs: list[int]
    full: torch.Tensor
    decoded: torch.Tensor
    cached: torch.Tensor


def _check_model(export: Export) -> list[Check]:
    import torch

    probe = make_probe(export, _base_config(export))
    with torch.no_grad():
        try:
            base = _run_base(export, probe)
        except _BaseDoesNotRunError as error:
            reason = f"the base itself does not run on this machine: {error}"
            return [*(Check(name, None, reason) for name in MODEL), *_check_graphs(export, None)]
        gc.collect()  # the base is not needed any more
        try:
            model, loading = _load(export, base.dtype)
            checks = [_check_keys(loading), *_check_against(base, model, probe, export.spec)]
        except Exception as error:  # the code of an export may raise anything
            return [Check(RUNS, False, f"{type(error).__name__}: {first_line(error)}; convert the base again")]
        return [*checks, *_check_graphs(export, model)]


def _check_against(base: _BaseRun, model, probe: Probe, spec: LoopSpec) -> list[Check]:
    looped = _run_looped(model, probe)
    identities: dict[str, dict] = {ONE_STEP_IS_BASE: {"loop_steps": 1}}
    if spec.path is None:  # a path has no anchor
        identities[FULL_ANCHOR_IS_BASE] = {"loop_anchor": 1.0}
    return [
        *(_check_identity(name, model, probe, base.logits, **loop) for name, loop in identities.items()),
        check_runs(looped.runs, spec),
        check_effect(looped.full, base.logits, base.by_hand.logits, spec),
        _check_by_hand(FULL_IS_BY_HAND, looped.full, base.by_hand, base.decode_difference),
        _check_by_hand(CACHED_IS_BY_HAND, looped.cached, base.cached_by_hand, base.decode_difference),
        _check_cached_decode(looped, spec, base.decode_difference),
        *check_image(model, probe, looped.full, base.image_effect),
    ]


def _of_trained_weights(check: Check) -> Check:
    """The check in other words: with trained weights the native model is not the base model."""
    return replace(check, name=check.name.replace("the base model", "the native model"))


def _run_base(export: Export, probe: Probe) -> _BaseRun:
    """Run the base in fp32, or in its own dtype if it is quantised and does not run in fp32.

    Raises:
        _BaseDoesNotRunError: the base is quantised and runs in neither.
    """
    import torch

    if not export.base.quantisation:
        return _run_loaded(export, probe, torch.float32)
    for dtype in (torch.float32, "auto"):
        try:
            return _run_loaded(export, probe, dtype)
        except Exception as error:  # a quantiser may raise anything: missing kernels, devices, packages
            failure = error
    raise _BaseDoesNotRunError(f"{type(failure).__name__}: {first_line(failure)}")


def _run_loaded(export: Export, probe: Probe, dtype) -> _BaseRun:
    import torch

    model = _load_base(export, dtype)
    logits = full_logits(model, probe)
    difference = 0.0
    if _may_decode_otherwise(export):
        cached = torch.stack([cached_logits(model, probe, lengths) for lengths in (probe.steps, probe.chunks)])
        difference = (cached - logits).abs().max().item()
    return _BaseRun(
        dtype,
        logits,
        *_run_by_hand(model, probe, export.spec),
        difference / (logits.abs().max().item() or 1.0),
        image_effect(model, probe, logits),
    )


def _may_decode_otherwise(export: Export) -> bool:
    """Whether the base's own cached decoding may differ from its full forward.

    Quantisers may round by the shape of a batch, layers with a state have one kernel for prompts and one for decode
    steps, and a multimodal model may treat the tokens of an image otherwise in a cache.
    """
    config = export.base.config
    others = set(layer_types(config) or ()) - set(ATTENTION_TYPES)
    return bool(export.base.quantisation or others or is_multimodal(config))


def _run_by_hand(model, probe: Probe, spec: LoopSpec) -> tuple[_ByHand, _ByHand]:
    """A full forward, and the forwards of `probe.chunks`."""
    from .replay import CannotReplayError, looped_by_hand

    def attempt(chunks: tuple[int, ...]) -> _ByHand:
        try:
            with looped_by_hand(model, spec):
                return _ByHand(cached_logits(model, probe, chunks))
        except CannotReplayError as error:
            return _ByHand(None, str(error))
        except Exception as error:  # a family's layers may reject what stands in for the cache, with any error
            return _ByHand(None, f"{type(error).__name__}: {first_line(error)}")

    return attempt(probe.whole), attempt(probe.chunks)


def _run_looped(model, probe: Probe) -> _LoopedRun:
    with counted_runs(model) as runs:
        full = full_logits(model, probe)
    return _LoopedRun(runs, full, *(cached_logits(model, probe, lengths) for lengths in (probe.steps, probe.chunks)))


def _load(export: Export, dtype) -> tuple[Any, dict]:
    load = auto_class(export.base.config).from_pretrained
    return load(export.root, trust_remote_code=True, dtype=dtype, output_loading_info=True)


def _load_base(export: Export, dtype):
    """The native model of `base/config.json`, with the export's weights."""
    return auto_class(export.base.config).from_pretrained(export.root, config=_base_config(export), dtype=dtype)


def _base_config(export: Export):
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(export.root / BASE_FOLDER / CONFIG, trust_remote_code=False)


def _check_keys(loading: dict) -> Check:
    wrong = [key for group in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in loading[group]]
    detail = f"{len(wrong)} keys, such as {wrong[0]}" if wrong else "none missing, unexpected or mismatched"
    return Check(KEYS_LOADED, not wrong, detail)


def _check_identity(name: str, model, probe: Probe, base_logits: torch.Tensor, **fields) -> Check:
    import torch

    with _config_fields(model.config, **fields):
        logits = full_logits(model, probe)
    difference = (logits - base_logits).abs().max().item()
    return Check(name, torch.equal(logits, base_logits), f"largest difference {difference:.3g}", difference)


def _check_by_hand(name: str, looped: torch.Tensor, by_hand: _ByHand, base_difference: float) -> Check:
    """Compare logits of the looped model with those of the loop by hand over the native model."""
    import torch

    if by_hand.logits is None:
        return Check(name, None, f"not checked: the loop cannot be computed by hand here ({by_hand.reason})")
    difference, scale, detail = _measure(looped, by_hand.logits)
    is_near = difference <= TOLERANCE * scale
    if not is_near and math.isfinite(difference) and looped.dtype != torch.float32:
        return Check(name, None, f"{detail}; not checked: {looped.dtype} rounds too coarsely", difference)
    return _unless_base_violates_it(name, difference, scale, detail, base_difference)


def _measure(ours: torch.Tensor, theirs: torch.Tensor) -> tuple[float, float, str]:
    """The largest difference, the scale of `theirs`, and both in words."""
    difference = (ours - theirs).abs().max().item()
    scale = theirs.abs().max().item() or 1.0
    return difference, scale, f"largest difference {difference:.3g}, {difference / scale:.3g} of the logits' scale"


def _unless_base_violates_it(name: str, difference: float, scale: float, detail: str, base_difference: float) -> Check:
    holds = difference <= TOLERANCE * scale
    if not holds and math.isfinite(difference) and difference <= GROWTH * base_difference * scale:
        why = f"the base's own cached decoding is off by {base_difference:.3g} of the logits' scale"
        return Check(name, None, f"{detail}; not proved: {why}", difference)
    return Check(name, holds, detail, difference)


def _check_cached_decode(looped: _LoopedRun, spec: LoopSpec, base_difference: float) -> Check:
    """Compare a prefill with decode steps, and chunks of several sizes, with one forward over all tokens."""
    import torch

    difference, scale, detail = _measure(torch.stack([looped.decoded, looped.cached]), looped.full)
    reason = _why_decode_differs(spec)
    if reason and math.isfinite(difference):
        return Check(CACHED_DECODE_IS_FULL, None, f"{detail}; does not hold by design: {reason}", difference)
    return _unless_base_violates_it(CACHED_DECODE_IS_FULL, difference, scale, detail, base_difference)


def _check_graphs(export: Export, model) -> list[Check]:
    """Compare each ONNX graph with the model in torch, with the graph's loop.

    A quantised model is loaded again, without its quantiser: a graph computes with what the codes stand for.
    """
    graphs = {name: record for name, record in export.manifest.onnx.items() if record.spec is not None}
    if graphs and find_spec("onnxruntime") is None:
        why = "not compared: onnxruntime is not installed; run `pip install loopexport[onnx]`"
        return [Check(f"{name} computes what torch does", None, why) for name in graphs]
    if not graphs:
        return []
    from loopexport.onnx.check.comparison import check_recorded, load_torch

    if export.base.quantisation:
        model = load_torch(export.root, export.spec.steps)
    checks = []
    for name, record in graphs.items():
        spec = make_spec(**(record.spec or {}))
        with _config_fields(model.config, **spec.to_config_fields()):
            checks.append(check_recorded(export.root / name, record, spec, model))
    return checks


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
