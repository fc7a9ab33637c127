"""Speed and memory of a loop and its base, in torch and in ONNX Runtime, on random weights of real shapes.

`overhead` is the time of the loop divided by (the base's time x the ratio of layer evaluations): 1 means that the loop
costs exactly its extra layers. `ideal` is the number of tokens per second at which the device would read the weights
and the cache at its measured bandwidth.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

import loopexport
from loopexport.onnx import OnnxModel, plan_onnx

from .bases import random_base
from .results import Result, attempt, attempt_all, measured, short
from .scale import Scale
from .timing import free_bytes, read_bandwidth, seconds
from .torch_graphs import captured_step, static_cache

STEPS = 6
PROMPT = 512
# ONNX Runtime reads weights from a file: of the sparse model, so many layers of the real shapes are written.
ONNX_LAYERS = {"Moonlight-16B-A3B": 6}
# GroupQueryAttention cannot express MLA; of the 4B model, the faster layout alone fits the time.
LAYOUTS = {"Moonlight-16B-A3B": ("portable",), "Qwen3-4B": ("gqa",)}
# fp16 runs on every provider; grouped_mm of torch is fast in bf16 alone.
DTYPE = {"Moonlight-16B-A3B": "bf16"}


def speed(name: str, scale: Scale) -> Iterator[Result]:
    """Torch, then ONNX Runtime; `name` is one of `bases.REAL`."""
    bandwidth = read_bandwidth(scale)
    yield from attempt_all("torch", lambda: torch_speed(name, bandwidth, scale))
    with tempfile.TemporaryDirectory() as work:
        yield from attempt_all("ONNX Runtime", lambda: _onnx(name, Path(work), scale))


# ---------------------------------------------------------------------------------------------------------------------
# Torch.
# ---------------------------------------------------------------------------------------------------------------------


def torch_speed(name: str, bandwidth: float, scale: Scale) -> Iterator[Result]:
    """Speed of base and loop in torch: the prompt, and decode steps; `bandwidth` is in bytes per second."""
    base = random_base(name, scale.device, DTYPE.get(name, "fp16"), scale.real)
    looped = looped_over(base)
    ratio = evaluations(looped.config)
    tokens = torch.arange(3, 3 + PROMPT if scale.real else 40, device=scale.device)[None]
    yield attempt("prefill", lambda: _prefill(base, looped, tokens, ratio, scale))
    for past in scale.past:
        ways = {"eager": _eager_step, **({"CUDA graph": _graph_step} if scale.has_graphs else {})}
        for way, make_step in ways.items():

            def case(past=past, make_step=make_step) -> Result:
                taken = [_decode(model, past, make_step, scale) for model in (base, looped)]
                ideal = bandwidth / bytes_read(looped, past)
                return _figures(taken, ratio, past=past, ideal=short(ideal), of_ideal=short(1 / taken[1] / ideal))

            yield attempt(f"decode after {past}, {way}", case)


def looped_over(base: Any) -> Any:
    """The loop of a native model, with the same weights in memory: the middle layers, `STEPS` times."""
    from transformers.initialization import no_init_weights

    from loopexport.templates import configuration_looped, modeling_looped

    config = base.config
    family = type(base).__name__.removesuffix("ForCausalLM")
    spec = loopexport.loop.spec.make_spec(span=middle(config.num_hidden_layers), steps=STEPS)
    fields = {**config.to_dict(), **spec.to_config_fields()}
    fields = {name: value for name, value in fields.items() if name not in ("model_type", "architectures")}
    looped_config = getattr(configuration_looped, f"Looped{family}Config")(**fields)
    looped_class = getattr(modeling_looped, f"Looped{family}ForCausalLM")
    weight = next(base.parameters())
    with torch.device(weight.device), no_init_weights():
        looped = looped_class._from_config(looped_config, dtype=weight.dtype)
    looped.load_state_dict(base.state_dict(), assign=True)
    return looped.eval()


def middle(layers: int) -> tuple[int, int]:
    """Four layers in the middle; two of a tiny model."""
    half = 2 if layers >= 12 else 1
    return layers // 2 - half, layers // 2 + half


def evaluations(config: Any) -> float:
    """The ratio of layer evaluations, looped / base."""
    start, stop = middle(config.num_hidden_layers)
    return 1 + (STEPS - 1) * (stop - start) / config.num_hidden_layers


def bytes_read(model: Any, past: int) -> int:
    """Bytes that a looped model reads to decode one token: weights, of sparse experts only the chosen, and cache."""
    config, (start, stop) = model.config, middle(model.config.num_hidden_layers)
    experts = getattr(config, "n_routed_experts", None) or getattr(config, "num_experts", 1)
    total = model.lm_head.weight.nbytes
    for index, layer in enumerate(model.model.layers):
        times = STEPS if start <= index < stop else 1
        for weight in layer.parameters():
            active = config.num_experts_per_tok / experts if weight.dim() == 3 else 1
            total += round(times * active * weight.nbytes)
    cache = DynamicCache(config=config)
    with torch.no_grad():
        model(torch.full((1, 1), 3, device=model.device), past_key_values=cache)
    slots: list[Any] = cache.layers
    for index, slot in enumerate(slots):
        total += past * (STEPS if start <= index < stop else 1) * (slot.keys.nbytes + slot.values.nbytes)
    return total


@torch.no_grad()
def _prefill(base: Any, looped: Any, tokens: torch.Tensor, ratio: float, scale: Scale) -> Result:
    taken = [seconds(partial(model, tokens, logits_to_keep=1), scale) for model in (base, looped)]
    return _figures(taken, ratio, tokens=tokens.shape[1])


Step = Callable[[], object]


@torch.no_grad()
def _decode(model: Any, past: int, make_step: Callable[[Any, torch.Tensor, Scale], Step], scale: Scale) -> float:
    tokens = torch.full((1, past), 3, device=model.device)
    return seconds(make_step(model, tokens, scale), scale, scale.new)


def _eager_step(model: Any, tokens: torch.Tensor, scale: Scale) -> Step:
    cache = DynamicCache(config=model.config)
    model(tokens, past_key_values=cache, logits_to_keep=1)
    return lambda: model(tokens[:, :1], past_key_values=cache)


def _graph_step(model: Any, tokens: torch.Tensor, scale: Scale) -> Step:
    cache = static_cache(model.config, tokens.shape[1] + (scale.rounds + 1) * scale.new + 8)
    model(tokens, past_key_values=cache, logits_to_keep=1)
    step = captured_step(model, cache, tokens[:, :1])
    return lambda: step(tokens[:, :1])


def _figures(taken: list[float], ratio: float, **more) -> Result:
    base, looped = taken
    return measured(
        base_ms=short(1000 * base),
        looped_ms=short(1000 * looped),
        looped_per_second=short(1 / looped),
        overhead=short(looped / base / ratio),
        **more,
    )


# ---------------------------------------------------------------------------------------------------------------------
# ONNX Runtime.
# ---------------------------------------------------------------------------------------------------------------------


def _onnx(name: str, work: Path, scale: Scale) -> Iterator[Result]:
    layers = ONNX_LAYERS.get(name) if scale.real else None
    model = random_base(name, scale.device, "fp16", scale.real, layers)
    span, ratio = middle(model.config.num_hidden_layers), evaluations(model.config)
    model.save_pretrained(work / "base")
    del model
    root = loopexport.convert(str(work / "base"), work / "looped", span=span, steps=STEPS, weights="hardlink").root
    for attention in LAYOUTS.get(name, ("gqa", "portable")):
        yield from attempt_all(attention, partial(graphs, root, ratio, scale, attention=attention))


def graphs(root: Path, ratio: float, scale: Scale, **options) -> Iterator[Result]:
    """The graphs of K = 1 and K = `STEPS` of an export, against each other.

    Args:
        root: the export.
        ratio: layer evaluations, looped / base.
        scale: where and how large.
        **options: of `plan_onnx`.
    """
    plan = plan_onnx(root, steps=(1, STEPS), **options)
    start = time.perf_counter()
    plan.apply(verify=False)
    layers = plan.export.base.num_layers
    yield {"case": "export", **measured(layers=layers), "seconds": round(time.perf_counter() - start, 1)}
    files = {spec.steps: name for name, spec in plan.graphs.items()}
    found: dict[int, dict[str, Any]] = {}
    for steps in (1, STEPS):

        def case(steps=steps) -> Result:
            found[steps] = run_graph(root, files[steps], scale)
            return measured(**found[steps])

        yield attempt(f"K={steps}", case)
    if len(found) == 2:
        yield {"case": f"K={STEPS} against K=1", **measured(**_ratios(found[1], found[STEPS], ratio))}


def run_graph(root: Path, file: str, scale: Scale) -> dict[str, Any]:
    """Memory of a session, and milliseconds for a prompt and for a token, as `OnnxModel.stream` gives them."""
    before = free_bytes(scale)
    model = OnnxModel(root, file, provider="cpu" if scale.device == "cpu" else "cuda")
    prompt = torch.arange(3, 3 + (PROMPT if scale.real else 40))[None].numpy()
    times(model, prompt[:, :16], 2)
    figures: dict[str, Any] = {"session_mib": round((before - free_bytes(scale)) / 2**20)}
    for past in (*scale.past, prompt.shape[1]):
        first, token = times(model, prompt.repeat(past // prompt.shape[1] + 1, axis=1)[:, :past], scale.new)
        figures[f"prompt_of_{past}_ms"], figures[f"token_after_{past}_ms"] = short(1000 * first), short(1000 * token)
    return figures


def times(model: OnnxModel, prompt, new: int) -> tuple[float, float]:
    """Seconds to the first new token, and the median to each later one; the first run of a length does not count."""
    taken = [0.0]
    for _ in range(2):
        taken = []
        start = time.perf_counter()
        for _ in model.stream(prompt, max_new_tokens=new, eos_token_ids=()):
            now = time.perf_counter()
            taken.append(now - start)
            start = now
    return taken[0], statistics.median(taken[1:])


def _ratios(one: dict[str, Any], many: dict[str, Any], ratio: float) -> dict[str, float]:
    overheads = {
        name.replace("_ms", "_overhead"): short(many[name] / one[name] / ratio) for name in one if name.endswith("_ms")
    }
    memory = {"session_memory": short(many["session_mib"] / one["session_mib"])} if one["session_mib"] else {}
    return {"evaluations": short(ratio), **overheads, **memory}
