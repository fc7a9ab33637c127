"""Record which experts each layer chooses, in each pass."""

from __future__ import annotations

from collections import defaultdict

import torch
import transformers
from transformers import AutoModelForCausalLM

import loopexport
from support.family_walk import save_tiny_family

TRANSFORMERS_5 = int(transformers.__version__.split(".")[0]) >= 5
STEPS = 3
LENGTH = 9
# In these families experts are off by default, or only in layers that cannot be looped.
OVERRIDES = {
    "doge": {"is_moe": True, "num_experts": 16},
    "gemma4_text": {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32},
}


def watch_experts(model) -> dict[str, list[list[torch.Tensor]]]:
    """Watch each block with experts; the choice of each run, as tensors, by the block's path."""
    seen: dict[str, list] = defaultdict(list)
    for path, block in model.named_modules():
        if hasattr(block, "router_gate"):
            _watch_retrieved(block, seen[path])
        elif "experts" in block._modules and not _names_router(block.experts):
            _watch_block(block, seen[path])
        elif "ParallelExperts" in type(getattr(block, "output_linear", None)).__name__:
            _watch_parallel(block, seen[path])
    return seen


def _names_router(module) -> bool:
    return "router" in module._modules


def _watch_block(block, seen) -> None:
    experts = block.experts
    if "Grouped" in type(experts).__name__:
        _name_grouped_experts(block, seen)
    elif isinstance(experts, torch.nn.ModuleList):
        _name_listed_experts(block, seen)
    elif "Llama4" in type(experts).__name__:
        _watch_scaled_inputs(block, seen)
    else:
        experts.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(_tensors([*args[1:], *kwargs.values()])), with_kwargs=True
        )


def _tensors(values) -> list[torch.Tensor]:
    values = [value[0] if isinstance(value, tuple) else value for value in values]
    return [value.detach().clone() for value in values if isinstance(value, torch.Tensor)]


def _rows_of(expert: int, count: int, width: int) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.full((count,), expert), width).float()


def _name_listed_experts(block, seen) -> None:
    """Let expert i return the unit vector i, so that the block's output shows its choice and weights."""
    for number, expert in enumerate(block.experts.children()):
        expert.forward = lambda x, *_, number=number: _rows_of(number, len(x), x.shape[-1])
    _watch_output(block, seen)


def _name_grouped_experts(block, seen) -> None:
    def forward(x, counts):
        return torch.cat([_rows_of(number, int(count), x.shape[-1]) for number, count in enumerate(counts)])

    block.experts.forward = forward
    _watch_output(block, seen)


def _watch_output(block, seen) -> None:
    """Record the output of a block, without its shared experts."""
    for name, module in block.named_children():
        if "share" in name and "gate" not in name:
            module.forward = torch.zeros_like
    block.register_forward_hook(lambda _, args, output: seen.append(_tensors([output])))


def _watch_parallel(block, seen) -> None:
    """Watch the experts of JetMoE, and of Granite on transformers 4: two stacks of weights, and a router that sorts."""

    def forward(x, counts):
        width = block.output_linear.weight.shape[1]
        return torch.cat([_rows_of(number, int(count), width) for number, count in enumerate(counts)])

    block.output_linear.forward = forward
    if hasattr(block, "reduce"):  # experts of attention: `reduce` joins what `map` has split
        _watch_reduced(block, seen)
    else:
        _watch_output(block, seen)


def _watch_reduced(block, seen) -> None:
    reduce = block.reduce

    def watched(x, info):
        output = reduce(x, info)
        seen.append(_tensors([output]))
        return output

    block.reduce = watched


def _watch_scaled_inputs(block, seen) -> None:
    """Watch the experts of Llama 4: all run, on inputs multiplied by the weights, most of which are 0."""
    inputs = {}
    block.register_forward_pre_hook(lambda _, args: inputs.update(block=args[0].flatten(0, -2)))

    def record(_, args):
        scaled = args[0].detach().view(-1, *inputs["block"].shape)
        seen.append([(scaled / inputs["block"]).nan_to_num().mean(-1).round(decimals=4)])

    block.experts.register_forward_pre_hook(record)


def _watch_retrieved(block, seen) -> None:
    """Watch the experts of Doge, which are rows of two embeddings."""
    answers = []
    block.down_embed.register_forward_pre_hook(lambda _, args: answers.append(args[0].detach().clone()))
    block.register_forward_hook(lambda _, args, output: seen.append([answers[-1], output[1].detach().clone()]))


def run_and_compare(model, span, tokens) -> tuple[int, int]:
    """Run a model; the number of iterations that chose as in the natural pass, and the number of all iterations."""
    watched = watch_experts(model)
    with torch.no_grad():
        model(tokens, use_cache=False)
    same = total = 0
    for path, runs in watched.items():
        layer = next(int(part) for part in path.split(".") if part.isdigit())
        assert len(runs) == (STEPS if layer in range(*span) else 1), (path, len(runs))
        for run in runs[1:]:
            total += 1
            same += len(run) == len(runs[0]) and all(torch.equal(*pair) for pair in zip(run, runs[0], strict=True))
    return same, total


def sparse_export(family, directory, **fields):
    """Convert a tiny base with experts in the span; the export's directory and its span.

    Raises:
        ValueError: no span has experts and can be looped; the message says why.
    """
    base = save_tiny_family(family, directory / "base", **OVERRIDES.get(family, {}))
    reasons = []
    for span in ((2, 4), *((start, start + 1) for start in range(6))):
        out = directory / f"out{span[0]}{span[1]}"
        try:
            loopexport.convert(str(base), out, span=span, steps=STEPS, **fields)
            model = load(out)
        except (loopexport.LoopExportError, ValueError) as error:
            reasons.append(str(error))
            continue
        if any(traits.routers.known for traits in decoder_loop(model).traits[slice(*span)]):
            return out, span
        reasons.append("no experts in the span")
    raise ValueError(next((reason for reason in reasons if "no experts" not in reason), reasons[0]))


def load(directory, **options):
    return AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, **options).eval()


def decoder_loop(model):
    """What the decoder of a looped model knows about its loop."""
    return next(vars(module)["_loop"] for module in model.modules() if "_loop" in vars(module))
