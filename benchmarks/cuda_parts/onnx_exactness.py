"""Graphs in half precision on the device against torch in fp32 on the CPU.

Torch itself is measured first, on the device and in the same number format: the graph may lose `FACTOR` times as much.
The same run says which nodes ONNX Runtime moved to the CPU.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

import loopexport
from loopexport.onnx import OnnxModel, build, plan_onnx

from .bases import SPARSE, TINY_SPAN, TINY_STEPS, tiny_base
from .results import Result, attempt, compared, short
from .scale import Scale
from .sessions import PROVIDER, nodes_by_provider
from .torch_exactness import POLICIES, Scenario, allowed, error, load, logits, scenarios, use_policy
from .workers import side_by_side

# What is least proven comes first; GroupQueryAttention cannot express MLA.
CASES = (
    ("qwen3", "gqa"),
    ("qwen3", "portable"),
    ("qwen3_moe", "gqa"),
    ("deepseek_v3", "portable"),
    ("qwen3_moe", "portable"),
)


@dataclass(frozen=True)
class Subject:
    """A loop and how its graphs are compared.

    Attributes:
        roots: the directories of its exports, by policy.
        family: one of `bases.TINY`.
        dtype: number format of the graph.
        attention: layout of the graph.
        scenarios: what to run.
    """

    roots: dict[str, Path]
    family: str
    dtype: str
    attention: str
    scenarios: tuple[Scenario, ...]

    @property
    def typical(self) -> bool:
        """Whether to compare typical tokens; see `torch_exactness.error`."""
        return self.family in SPARSE


def exact_as_torch(
    scale: Scale, cases: tuple[tuple[str, str], ...] = CASES, policies: tuple[str, ...] = POLICIES
) -> Iterator[Result]:
    """Each family and layout in each number format; every policy from one trace."""
    jobs = {
        f"{family} {attention} {dtype}": partial(_layout, family, attention, dtype, policies, scale)
        for family, attention in cases
        for dtype in scale.half
    }
    return side_by_side(jobs, scale.workers)


def _layout(family: str, attention: str, dtype: str, policies: tuple[str, ...], scale: Scale) -> Iterator[Result]:
    own = tuple(each for each in scenarios() if attention == "portable" or each.mask is None)
    # With a cache, GroupQueryAttention takes several tokens for a single prompt only.
    fitting = own if attention == "portable" else (_single(own[0]), _decoded(own[0]))
    with tempfile.TemporaryDirectory() as work:
        roots = _export(family, Path(work), policies)
        yield from _cases(Subject(roots, family, dtype, attention, fitting), scale)


def _export(family: str, work: Path, policies: tuple[str, ...]) -> dict[str, Path]:
    base = str(tiny_base(family, work / "base"))
    spec = {"span": TINY_SPAN, "steps": TINY_STEPS, "weights": "hardlink"}
    return {
        policy: loopexport.convert(base, work / f"{policy}-{work.name}", kv=policy, **spec).root for policy in policies
    }


def _single(scenario: Scenario) -> Scenario:
    return Scenario("one prompt", scenario.tokens[:1], None, scenario.chunks)


def _decoded(scenario: Scenario) -> Scenario:
    prompt = scenario.chunks[0]
    return Scenario("a batch", scenario.tokens, None, (prompt, *[1] * (scenario.tokens.shape[1] - prompt)))


def _cases(subject: Subject, scale: Scale) -> Iterator[Result]:
    sparse = subject.family in SPARSE
    root = next(iter(subject.roots.values()))
    exact = load(root, "fp32", "cpu", "eager", "eager" if sparse else None)
    half = load(root, subject.dtype, scale.device, "sdpa", "grouped_mm" if sparse else None)
    with one_trace():
        for policy in subject.roots:

            def case(policy=policy) -> Result:
                graph = write_graph(subject, policy, scale.provider)
                for model in (exact, half):
                    use_policy(model, policy)
                references = [logits(exact, scenario) for scenario in subject.scenarios]
                theirs = _worst([logits(half, each) for each in subject.scenarios], references, subject)
                ours = _worst([graph_logits(graph, each) for each in subject.scenarios], references, subject)
                tokens = subject.scenarios[0].tokens[:1].numpy()
                elsewhere = {} if scale.device == "cpu" else nodes_by_provider(graph, tokens)
                elsewhere.pop(PROVIDER[scale.provider], None)
                return compared(ours, allowed(theirs, subject.dtype), torch=short(theirs), not_on_the_device=elsewhere)

            yield attempt(policy, case)


@contextmanager
def one_trace() -> Iterator[None]:
    """Trace a base once, though every policy has an export of its own: its graph is the same."""
    real, kept = build.trace_export, {}

    def trace(export, *kind):
        if kind not in kept:
            kept[kind] = real(export, *kind)
        return kept[kind]

    build.trace_export = trace
    try:
        yield
    finally:
        build.trace_export = real


def write_graph(subject: Subject, policy: str, provider: str) -> OnnxModel:
    """Write the graph of a policy, and load it.

    Raises:
        RuntimeError: ONNX Runtime fell back to another provider.
    """
    plan = plan_onnx(subject.roots[policy], dtype=subject.dtype, attention=subject.attention)
    plan.apply(verify=False)
    (name,) = plan.graphs
    model = OnnxModel(subject.roots[policy], name, provider=provider)
    if model.session.get_providers()[0] != PROVIDER[provider]:
        raise RuntimeError(f"ONNX Runtime fell back to {model.session.get_providers()[0]}")
    return model


def graph_logits(model: OnnxModel, scenario: Scenario) -> torch.Tensor:
    """The logits of all tokens, `(batch, seq, vocab)`."""
    tokens = scenario.tokens.numpy()
    mask = np.ones_like(tokens) if scenario.mask is None else scenario.mask.numpy()
    cache, parts, start = None, [], 0
    for length in scenario.chunks:
        stop = start + length
        part, cache = model.forward(tokens[:, start:stop], mask[:, :stop], cache)
        parts.append(torch.from_numpy(np.array(part)))
        start = stop
    return torch.cat(parts, dim=1)


def _worst(found: list[torch.Tensor], references: list[torch.Tensor], subject: Subject) -> float:
    errors = [
        error(ours, reference, scenario, subject.typical)
        for ours, reference, scenario in zip(found, references, subject.scenarios, strict=True)
    ]
    return float("nan") if any(each != each for each in errors) else max(errors)
