"""Static caches, CUDA graphs and `torch.compile` against torch on the CPU in fp32, as in `torch_exactness`."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import StaticCache

from .bases import SPARSE, TINY
from .results import Result, attempt, compared, short, skipped
from .scale import Scale
from .torch_exactness import POLICIES, Pair, Scenario, allowed, error, load, logits, use_policy
from .workers import side_by_side

CACHE_LENGTH = 64
# Dense models compute in fp32, where the error is smallest; grouped_mm of compiled code takes bf16 alone.
DTYPE = {"qwen3": "fp32", "qwen3_moe": "bf16", "deepseek_v3": "bf16"}

# Runs one token, `(batch, 1)`, and returns its logits.
Step = Callable[[torch.Tensor], torch.Tensor]
# Makes the step of a model and a static cache that holds a prompt.
MakeStep = Callable[[Any, StaticCache, torch.Tensor], Step]


def static_cache(config: Any, length: int = CACHE_LENGTH) -> StaticCache:
    """A cache of fixed length."""
    return StaticCache(config=config, max_cache_len=length)


def plain_step(model: Any, cache: StaticCache, tokens: torch.Tensor) -> Step:
    """A decode step in eager mode."""
    return lambda token: model(token, past_key_values=cache, use_cache=True).logits


def compiled_step(model: Any, cache: StaticCache, tokens: torch.Tensor) -> Step:
    """A decode step that `torch.compile` turns into one CUDA graph; where there are none, the graph runs in eager."""
    torch._dynamo.reset()
    options: dict[str, Any] = {"mode": "reduce-overhead"} if tokens.is_cuda else {"backend": "eager"}
    compiled = torch.compile(model, fullgraph=True, **options)

    def step(token: torch.Tensor) -> torch.Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return compiled(token, past_key_values=cache, use_cache=True).logits.clone()

    return step


def captured_step(model: Any, cache: StaticCache, tokens: torch.Tensor) -> Step:
    """A decode step captured as a CUDA graph, without compiling; warming up does not change the cache's contents.

    Args:
        model: the model.
        cache: holds a prompt.
        tokens: any tokens, `(batch, 1)`.
    """
    token = tokens.clone()
    layers: list[Any] = cache.layers
    lengths = [layer.cumulative_length for layer in layers]
    kept = [length.clone() for length in lengths]

    def rewind() -> None:
        for length, value in zip(lengths, kept, strict=True):
            length.copy_(value)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            model(token, past_key_values=cache, use_cache=True)
            rewind()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = model(token, past_key_values=cache, use_cache=True).logits
    rewind()

    def step(new: torch.Tensor) -> torch.Tensor:
        token.copy_(new)
        graph.replay()
        return output

    return step


@torch.no_grad()
def stepped_logits(model: Any, scenario: Scenario, make_step: MakeStep) -> torch.Tensor:
    """The logits of all tokens: a prompt in eager mode on a static cache, then single tokens by `make_step`."""
    device = next(model.parameters()).device
    tokens, prompt = scenario.tokens.to(device), scenario.chunks[0]
    cache = static_cache(model.config)
    parts = [model(tokens[:, :prompt], past_key_values=cache, use_cache=True).logits.float().cpu()]
    step = make_step(model, cache, tokens[:, :1])
    for position in range(prompt, tokens.shape[1]):
        parts.append(step(tokens[:, position : position + 1]).float().cpu())
    return torch.cat(parts, dim=1)


def exact_on_static_caches(scale: Scale, families: tuple[str, ...] = tuple(TINY)) -> Iterator[Result]:
    """Each family: every policy on a static cache and as a captured graph; then one policy compiled."""
    return side_by_side({family: partial(_family, family, scale) for family in families}, scale.workers)


def _family(family: str, scale: Scale) -> Iterator[Result]:
    torch.backends.cuda.matmul.allow_tf32 = False
    with tempfile.TemporaryDirectory() as work:
        yield from _cases(family, Path(work), scale)


def _cases(family: str, work: Path, scale: Scale) -> Iterator[Result]:
    dtype, typical = DTYPE[family], DTYPE[family] != "fp32" and family in SPARSE
    experts = "grouped_mm" if family in SPARSE else None
    pair = Pair(family, work)
    base = load(pair.base, dtype, scale.device, "sdpa", experts)
    base_error = pair.worst(base, pair.base_logits, typical)
    model = load(pair.looped, dtype, scale.device, "sdpa", experts)
    whole = pair.scenarios[0]
    steps = replace(whole, chunks=(whole.chunks[0], *[1] * sum(whole.chunks[1:])))

    def static(policy: str) -> Result:
        use_policy(model, policy)
        difference = pair.worst(model, pair.looped_logits[policy], typical, static_cache)
        return compared(difference, allowed(base_error, dtype), base=short(base_error))

    def stepped(policy: str, make_step: MakeStep) -> Result:
        use_policy(model, policy)
        # Under `reference` the chunks decide what is computed, so both have to run the same.
        reference = (
            logits(reference_model(), steps) if policy == "reference" else pair.looped_logits[policy][whole.name]
        )
        difference = error(stepped_logits(model, steps, make_step), reference, steps, typical)
        return compared(difference, allowed(base_error, dtype), base=short(base_error))

    def reference_model() -> Any:
        exact = load(pair.looped, "fp32", "cpu", "eager", "eager" if family in SPARSE else None)
        use_policy(exact, "reference")
        return exact

    for policy in POLICIES:
        yield attempt(f"{dtype} {policy} static cache", partial(static, policy))
    for policy in POLICIES:
        if scale.has_graphs:
            yield attempt(f"{dtype} {policy} CUDA graph", partial(stepped, policy, captured_step))
        else:
            yield {"case": f"{dtype} {policy} CUDA graph", **skipped("no CUDA graphs on a CPU")}
    policy = {"qwen3": "shared", "qwen3_moe": "per_step", "deepseek_v3": "shared"}[family]
    yield attempt(f"{dtype} {policy} compiled", lambda: stepped(policy, compiled_step))
