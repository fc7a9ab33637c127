"""Looped models in torch on the device against torch on the CPU in fp32.

The base is measured first, in the same way: its error is that of the device, the kernels and the number format. The
loop evaluates more layers and may lose `FACTOR` times as much.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache

import loopexport

from .bases import DTYPES, SPARSE, TINY, TINY_SPAN, TINY_STEPS, tiny_base
from .results import Result, attempt, attempt_all, compared, short
from .scale import Scale
from .workers import side_by_side

POLICIES = ("shared", "per_step", "reference")
FACTOR = 3.0
# An error below this is rounding, whatever the base's is: relative to the logits' scale.
FLOORS = {"fp32": 2e-6, "fp16": 2e-4, "bf16": 2e-3}
# The loop has to change the logits by this much of their scale; else equality means nothing.
LEAST_EFFECT = 0.02


@dataclass(frozen=True)
class Scenario:
    """Tokens that run in chunks through one cache.

    Attributes:
        name: what is special about it.
        tokens, mask: `(batch, seq)`; a mask of None is no mask at all.
        chunks: lengths that make up `seq`.
    """

    name: str
    tokens: torch.Tensor
    mask: torch.Tensor | None
    chunks: tuple[int, ...]


def scenarios(vocab_size: int = 512) -> list[Scenario]:
    """A prompt, decode steps and a chunk; with left padding and without."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, vocab_size, (4, 32), generator=generator)
    mask = torch.ones_like(tokens)
    mask[0, :5] = 0
    mask[2, :11] = 0
    chunks = (20, 1, 1, 1, 1, 1, 1, 6)
    return [Scenario("full rows", tokens, None, chunks), Scenario("left padding", tokens, mask, chunks)]


@torch.no_grad()
def logits(model: Any, scenario: Scenario, make_cache=None) -> torch.Tensor:
    """The logits of all tokens, `(batch, seq, vocab)`, in fp32 on the CPU.

    Args:
        model: a causal language model.
        scenario: what to run.
        make_cache: makes the cache of a config; None for a `DynamicCache`.
    """
    device = next(model.parameters()).device
    tokens, mask = scenario.tokens.to(device), scenario.mask
    cache = (make_cache or (lambda config: DynamicCache(config=config)))(model.config)
    parts, start = [], 0
    for length in scenario.chunks:
        stop = start + length
        inputs: dict[str, Any] = {"input_ids": tokens[:, start:stop], "past_key_values": cache}
        if mask is not None:
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            inputs["attention_mask"] = mask[:, :stop].to(device)
            inputs["position_ids"] = positions[:, start:stop].to(device)
        parts.append(model(**inputs, use_cache=True).logits.float().cpu())
        start = stop
    return torch.cat(parts, dim=1)


def error(ours: torch.Tensor, reference: torch.Tensor, scenario: Scenario, typical: bool) -> float:
    """The error of the worst token: the largest difference of a logit, relative to the largest logit.

    Args:
        ours, reference: `(batch, seq, vocab)`.
        scenario: says which tokens are padding.
        typical: the median over tokens instead. Rounding sends some tokens to other experts, which changes their logits
            by any amount, in the base too.
    """
    visible = torch.ones_like(scenario.tokens).bool() if scenario.mask is None else scenario.mask.bool()
    each = (ours - reference).abs().amax(-1)[visible] / reference[visible].abs().max()
    if not bool(torch.isfinite(each).all()):
        return float("nan")
    return float(each.median() if typical else each.max())


def load(root: Path, dtype: str, device: str, attention: str, experts: str | None = None) -> Any:
    """Load a base or an export onto a device."""
    options: dict[str, Any] = {"attn_implementation": attention, "dtype": DTYPES[dtype], "trust_remote_code": True}
    if experts is not None:
        options["experts_implementation"] = experts
    model: Any = AutoModelForCausalLM.from_pretrained(root, **options)
    return model.eval().to(device)


def use_policy(model: Any, policy: str) -> None:
    """Change the K/V policy of a loaded model."""
    model.config.loop_kv = policy


class Pair:
    """A tiny base and its loop on disk, with the logits that torch computes on the CPU in fp32.

    Attributes:
        family: one of `TINY`.
        base, looped: the directories.
        scenarios: what was run.
        base_logits: of the base, by scenario.
        looped_logits: of the loop, by policy and scenario.
    """

    def __init__(self, family: str, work: Path, policies: tuple[str, ...] = POLICIES):
        self.family, self.scenarios = family, scenarios()
        self.base = tiny_base(family, work / "base")
        spec = {"span": TINY_SPAN, "steps": TINY_STEPS}
        # Named after the temporary folder: transformers copies an export's code to a folder of its name.
        looped = work / f"looped-{work.name}"
        self.looped = loopexport.convert(str(self.base), looped, weights="hardlink", **spec).root
        experts = "eager" if family in SPARSE else None
        self.base_logits = self._run(load(self.base, "fp32", "cpu", "eager", experts))
        model = load(self.looped, "fp32", "cpu", "eager", experts)
        self.looped_logits = {}
        for policy in policies:
            use_policy(model, policy)
            self.looped_logits[policy] = self._run(model)
            self._check_effect(policy)

    def _run(self, model: Any) -> dict[str, torch.Tensor]:
        return {scenario.name: logits(model, scenario) for scenario in self.scenarios}

    def _check_effect(self, policy: str) -> None:
        for scenario in self.scenarios:
            changed = self.looped_logits[policy][scenario.name]
            effect = error(changed, self.base_logits[scenario.name], scenario, typical=True)
            if not effect >= LEAST_EFFECT:
                raise AssertionError(f"the loop of {self.family} changes a typical logit by {effect:.3g} only")

    def worst(self, model: Any, references: dict[str, torch.Tensor], typical: bool, make_cache=None) -> float:
        """The largest error over the scenarios."""
        errors = [
            error(logits(model, scenario, make_cache), references[scenario.name], scenario, typical)
            for scenario in self.scenarios
        ]
        return float("nan") if any(each != each for each in errors) else max(errors)


def allowed(base_error: float, dtype: str) -> float:
    """The error that a loop may have, given that of its base."""
    return FACTOR * max(base_error, FLOORS[dtype])


def exact_as_the_base(scale: Scale, families: tuple[str, ...] = tuple(TINY)) -> Iterator[Result]:
    """Each number format, family, attention and policy."""
    dtypes = ("fp32", *dict.fromkeys(("bf16", *scale.half)))
    jobs = {f"{family} {dtype}": partial(_family, family, dtype, scale) for dtype in dtypes for family in families}
    return side_by_side(jobs, scale.workers)


def _family(family: str, dtype: str, scale: Scale) -> Iterator[Result]:
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    with tempfile.TemporaryDirectory() as work:
        pair = Pair(family, Path(work))
        for attention in ("sdpa", "eager"):
            yield from attempt_all(attention, partial(cases_of, pair, dtype, attention, scale))


def cases_of(pair: Pair, dtype: str, attention: str, scale: Scale) -> Iterator[Result]:
    """One result for each K/V policy: the loop may lose a few times what its base loses in the same way."""
    sparse = pair.family in SPARSE
    experts, typical = ("grouped_mm", dtype != "fp32") if sparse else (None, False)
    base = load(pair.base, dtype, scale.device, attention, experts)
    base_error = pair.worst(base, pair.base_logits, typical)
    model = load(pair.looped, dtype, scale.device, attention, experts)
    for policy in pair.looped_logits:

        def case(policy=policy) -> Result:
            use_policy(model, policy)
            difference = pair.worst(model, pair.looped_logits[policy], typical)
            return compared(difference, allowed(base_error, dtype), base=short(base_error))

        yield attempt(policy, case)
