"""Compare a graph with the export in torch: prefill, decode, chunks, batches with padding, the last logits alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from loopexport.errors import OnnxError
from loopexport.export.check import Check
from loopexport.export.directory import open_export
from loopexport.export.manifest import OnnxRecord
from loopexport.loop.spec import LoopSpec, Steps
from loopexport.onnx.check.dequantised import dequantised, has_short_activations, in_full_precision
from loopexport.onnx.check.torch_model import load_dequantised
from loopexport.onnx.runtime.model import OnnxModel
from loopexport.onnx.runtime.session import cuda_problem
from loopexport.onnx.trace.skeleton import quiet_loading

# Largest |graph - torch| allowed, relative to the largest |torch|; torch computes in fp32.
TOLERANCES = {"fp32": 5e-5, "fp16": 2e-2, "bf16": 1e-1}
# Root mean square of graph - torch allowed, relative to torch, where the graph rounds its activations to 8 bits.
SHORT_TOLERANCE = 3e-1
AS_RUN = "with activations in 8 bits, as it runs, the graph stays near torch"

TEXT = "The lighthouse keeper climbed the stairs, counted the ships on the horizon and wrote their number down."


@dataclass(frozen=True)
class Scenario:
    """Tokens to run in chunks, through one cache.

    Attributes:
        name: the invariant, as a sentence.
        tokens, mask: `(batch, seq)`.
        chunks: lengths that make up `seq`.
        is_last_only: whether the graph computes the last logits of each chunk alone, as `generate` asks for.
    """

    name: str
    tokens: np.ndarray
    mask: np.ndarray
    chunks: tuple[int, ...]
    is_last_only: bool = False

    @property
    def visible(self) -> np.ndarray:
        """Which logits count: those of tokens, not of padding."""
        ends = np.cumsum(self.chunks) - 1
        return (self.mask[:, ends] if self.is_last_only else self.mask).astype(bool)


def check_graph(root: Path, path: Path, spec: LoopSpec, dtype: str, attention: str = "portable") -> list[Check]:
    """Compare a graph with torch.

    Args:
        root: the export, to be loaded in fp32.
        path: the graph, next to its data.
        spec: the graph's loop.
        dtype: the number format of the graph, "fp32", "fp16" or "bf16". It decides the tolerance.
        attention: the graph's attention, one of `ATTENTION_LAYOUTS`. "gqa" is compared without padding.
    """
    return compare(OnnxModel(path.parent, path.name), load_torch(root, spec.steps), spec, dtype, attention)


def compare(ours: OnnxModel, theirs, spec: LoopSpec, dtype: str, attention: str) -> list[Check]:
    """Compare loaded models. `theirs` is in fp32 and has the graph's loop."""
    vocab_size = theirs.config.get_text_config().vocab_size
    scenarios = make_scenarios(vocab_size, spec, _text_tokens(ours, vocab_size))
    if attention == "gqa":
        scenarios = [each for each in scenarios if each.mask.all()]
    is_short = has_short_activations(ours.path)
    exact = in_full_precision(ours) if is_short else ours
    with dequantised(theirs, ours.path):
        checks = [_compare(exact, theirs, scenario, TOLERANCES[dtype]) for scenario in scenarios]
        return [*checks, *([_compare_as_run(ours, theirs, scenarios)] if is_short else [])]


def check_recorded(path: Path, record: OnnxRecord, spec: LoopSpec, theirs) -> Check:
    """Compare a graph with torch, in one check.

    Args:
        path: the graph, next to its data.
        record: its entry in the manifest.
        spec: the graph's loop.
        theirs: the export from `load_torch`, with the same loop.
    """
    name = f"{path.name} computes what torch does"
    assert record.dtype is not None
    reason = why_not_run(record.dtype)
    if reason:
        return Check(name, None, f"not compared: {reason}")
    try:
        ours = OnnxModel(path.parent, path.name)
        checks = compare(ours, theirs, spec, record.dtype, record.attention or "portable")
    except OnnxError as error:
        return Check(name, False, str(error))
    worst = worst_check(checks)
    as_run = [f"{AS_RUN}: {check.detail}" for check in checks if check.name == AS_RUN and check is not worst]
    return Check(name, worst.passed, "; ".join([worst.detail, *as_run]), worst.difference)


def worst_check(checks: Sequence[Check]) -> Check:
    """A check that failed, else the largest difference; one of rounded activations does not count if it passed."""
    return max(checks, key=lambda check: (check.passed is False, check.name != AS_RUN, check.difference or 0.0))


def why_not_run(dtype: str) -> str:
    """Why a graph in this dtype cannot run here; empty if it can."""
    if dtype == "bf16" and cuda_problem():
        return f"bf16 runs on CUDA only, and ONNX Runtime cannot use CUDA here: {cuda_problem()}"
    return ""


def load_torch(root: Path, steps: Steps):
    """The export in torch, in fp32, with K = `steps`; a quantised one on what its codes stand for."""
    from transformers import AutoModelForCausalLM

    export = open_export(root)
    if export.base.quantisation is not None:
        return load_dequantised(export, steps)
    load: Any = AutoModelForCausalLM.from_pretrained
    with quiet_loading():
        return load(root, trust_remote_code=True, dtype=torch.float32, loop_steps=steps).eval()


def make_scenarios(vocab_size: int, spec: LoopSpec, text: np.ndarray | None = None) -> list[Scenario]:
    """The scenarios to compare: random tokens, and real text if there is a tokenizer."""
    tokens = np.random.default_rng(0).integers(vocab_size // 2, size=(2, 10))
    everything = np.ones_like(tokens)
    padded = everything.copy()
    padded[0, :3] = 0
    scenarios = [
        Scenario("a batch, prefilled and decoded, equals torch", tokens, everything, (7, 1, 1, 1)),
        Scenario("prefill, decode and a chunk equal torch", tokens[:1], everything[:1], (5, 1, 1, 3)),
        Scenario("decoding from an empty cache equals torch", tokens[:1, :3], everything[:1, :3], (1, 1, 1)),
        Scenario("the last logits alone equal torch", tokens[1:], everything[1:], (6, 4), is_last_only=True),
    ]
    # Rule anderson fits one mix to all tokens of a chunk, padding included, so the two may differ.
    if spec.is_identity or spec.rule != "anderson":
        scenarios.append(Scenario("a batch with left padding equals torch", tokens, padded, (6, 1, 1, 2)))
    if text is not None:
        scenarios.append(Scenario("real text equals torch", text, np.ones_like(text), (text.shape[1] - 2, 1, 1)))
    return scenarios


def _text_tokens(model: OnnxModel, vocab_size: int) -> np.ndarray | None:
    """Tokens of a text, cut to the model's positions; None without a tokenizer that fits the model."""
    if not any((model.root / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        return None
    tokens = np.array([model.tokenizer(TEXT).input_ids])[:, : model.max_positions]
    return tokens if tokens.size and tokens.max() < vocab_size else None


def _compare(ours: OnnxModel, theirs, scenario: Scenario, tolerance: float) -> Check:
    mine, reference = run_graph(ours, scenario), run_torch(theirs, scenario)
    visible = scenario.visible
    scale = float(np.abs(reference[visible]).max()) or 1.0
    difference = float(np.abs(mine - reference)[visible].max()) / scale
    detail = f"largest difference {difference:.3g} of the logits' scale, allowed {tolerance:g}"
    return Check(scenario.name, bool(difference <= tolerance), detail, difference)


def _compare_as_run(ours: OnnxModel, theirs, scenarios: list[Scenario]) -> Check:
    """How far the graph is from torch with activations in 8 bits, as it runs.

    The mean over all logits counts: where activations are rounded, a router may choose another expert for some token.
    """
    pairs = [(run_graph(ours, each), run_torch(theirs, each), each.visible) for each in scenarios]
    error = sum(float(np.square(mine - reference)[visible].sum()) for mine, reference, visible in pairs)
    scale = sum(float(np.square(reference)[visible].sum()) for _, reference, visible in pairs) or 1.0
    difference = (error / scale) ** 0.5
    detail = f"root mean square difference {difference:.3g} of the logits, allowed {SHORT_TOLERANCE:g}"
    return Check(AS_RUN, bool(difference <= SHORT_TOLERANCE), detail, difference)


def run_graph(model: OnnxModel, scenario: Scenario) -> np.ndarray:
    """The logits of a scenario."""
    cache, parts, start = None, [], 0
    number = 1 if scenario.is_last_only else None
    for length in scenario.chunks:
        stop = start + length
        tokens, mask = scenario.tokens[:, start:stop], scenario.mask[:, :stop]
        logits, cache = model.forward(tokens, mask, cache, num_logits=number)
        parts.append(logits)
        start = stop
    return np.concatenate(parts, axis=1)


def run_torch(model, scenario: Scenario) -> np.ndarray:
    """The logits of a scenario, from transformers."""
    from transformers import DynamicCache

    from loopexport.templates.looped_arguments import find_cache_argument

    tokens, mask = torch.from_numpy(scenario.tokens), torch.from_numpy(scenario.mask)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    argument = find_cache_argument(model)
    assert argument is not None
    cache, parts, start = DynamicCache(config=model.config), [], 0
    first = -1 if scenario.is_last_only else 0
    for length in scenario.chunks:
        stop = start + length
        inputs = {"input_ids": tokens[:, start:stop], "attention_mask": mask[:, :stop], argument[0]: cache}
        if takes_positions(model):
            inputs["position_ids"] = positions[:, start:stop]
        with torch.no_grad():
            parts.append(model(**inputs, use_cache=True).logits[:, first:])
        start = stop
    return torch.cat(parts, dim=1).float().numpy()


def takes_positions(model) -> bool:
    """Whether a model's forward takes `position_ids`."""
    import inspect

    return "position_ids" in inspect.signature(model.forward).parameters
