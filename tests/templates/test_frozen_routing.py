"""Frozen routing: what experts are given in an iteration is what they were given in the natural pass."""

from __future__ import annotations

import copy
import pickle
from collections import defaultdict
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import model_type_to_module_name
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import loopexport
from loopexport.base import families
from loopexport.templates.looped_routing import Routers
from support.compare import assert_bitwise, assert_close, assert_differs
from support.family_walk import RELEASE, save_tiny_family
from support.loaded_code import code_beside
from support.oracle import Oracle
from support.tiny import MOE_FAMILIES, SPAN, tiny_tokens

TRANSFORMERS_5 = int(transformers.__version__.split(".")[0]) >= 5
STEPS = 3
LENGTH = 9


def has_experts(family: str) -> bool:
    """Whether the source of a family's native model speaks of experts that are routed to."""
    directory = Path(transformers.__file__).parent / "models" / model_type_to_module_name(family).replace(".", "/")
    source = "".join(path.read_text() for path in directory.glob("modeling_*.py"))
    return any(f"self.{name} = " in source for name in ("experts", "router", "router_gate"))


# Experts are off by default in these, or hold none of the layers that can be looped.
OVERRIDES = {
    "doge": {"is_moe": True, "num_experts": 16},
    "gemma4_text": {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32},
}
SPARSE_FAMILIES = [family for family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if has_experts(family)]


# ---------------------------------------------------------------------------------------------------------------------
# What the experts of each layer are given, pass by pass.
# ---------------------------------------------------------------------------------------------------------------------


def watch_experts(model) -> dict[str, list[list[torch.Tensor]]]:
    """For each part of the span with experts, by path, what comes to be known of their choice, run by run."""
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
    """Expert i answers the unit vector i, so that the block's output spells out its choice and weights."""
    for number, expert in enumerate(block.experts.children()):
        expert.forward = lambda x, *_, number=number: _rows_of(number, len(x), x.shape[-1])
    _watch_output(block, seen)


def _name_grouped_experts(block, seen) -> None:
    def forward(x, counts):
        return torch.cat([_rows_of(number, int(count), x.shape[-1]) for number, count in enumerate(counts)])

    block.experts.forward = forward
    _watch_output(block, seen)


def _watch_output(block, seen) -> None:
    """Record what comes out of a block, without what shared experts add to it."""
    for name, module in block.named_children():
        if "share" in name and "gate" not in name:
            module.forward = torch.zeros_like
    block.register_forward_hook(lambda _, args, output: seen.append(_tensors([output])))


def _watch_parallel(block, seen) -> None:
    """JetMoE's and Granite's of transformers 4: two stacks of weights beside a router that sorts the tokens."""

    def forward(x, counts):
        width = block.output_linear.weight.shape[1]
        return torch.cat([_rows_of(number, int(count), width) for number, count in enumerate(counts)])

    block.output_linear.forward = forward
    if hasattr(block, "reduce"):  # experts for attention: what comes out of `map` goes back through `reduce`
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
    """Llama 4's experts all run, on inputs that are scaled by the weights, most of them 0."""
    inputs = {}
    block.register_forward_pre_hook(lambda _, args: inputs.update(block=args[0].flatten(0, -2)))

    def record(_, args):
        scaled = args[0].detach().view(-1, *inputs["block"].shape)
        seen.append([(scaled / inputs["block"]).nan_to_num().mean(-1).round(decimals=4)])

    block.experts.register_forward_pre_hook(record)


def _watch_retrieved(block, seen) -> None:
    """Doge's experts are rows of two embeddings."""
    answers = []
    block.down_embed.register_forward_pre_hook(lambda _, args: answers.append(args[0].detach().clone()))
    block.register_forward_hook(lambda _, args, output: seen.append([answers[-1], output[1].detach().clone()]))


def run_and_compare(model, span, tokens) -> tuple[int, int]:
    """Of the runs of experts that iterations are, how many were given just what the natural pass gave, and all."""
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
    """Directory and span of an export with experts in the span.

    Raises:
        ValueError: there is none, and why.
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
        if any(layer.known for layer in looped_layers(model).routers[slice(*span)]):
            return out, span
        reasons.append("no experts in the span")
    raise ValueError(next((reason for reason in reasons if "no experts" not in reason), reasons[0]))


def load(directory, **options):
    return AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, **options).eval()


def looped_layers(model):
    return next(module for module in model.modules() if type(module).__name__ == "LoopedLayers")


def scatter_biases(model) -> None:
    """Give the biases by which some routers choose, and do not weigh, values that matter."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "correction_bias" in name or "balancing_biases" in name or "expert_bias" in name:
            torch.nn.init.normal_(tensor, std=0.1)


def freezes(family, directory) -> str:
    """Empty where frozen routing is exact for a family; why it is refused, where it is.

    Raises:
        AssertionError: experts are given something else in an iteration, or the test sees no difference at all.
    """
    try:
        out, span = sparse_export(family, directory, frozen_routing=True)
    except ValueError as refusal:
        return str(refusal)
    tokens = tiny_tokens(2, LENGTH)
    for frozen in (True, False):
        model = load(out, loop_frozen_routing=frozen)
        torch.manual_seed(0)
        scatter_biases(model)
        same, total = run_and_compare(model, span, tokens)
        assert total > 0, "no experts were seen to run again"
        assert (same == total) if frozen else (same < total), f"{same} of {total} runs are as in the natural pass"
    return ""


# Families of which some layers can be looped, but none that has experts.
REFUSED = {"nemotron_h": "only layers whose memory is a K/V cache can be run again"}


@pytest.mark.matrix
@pytest.mark.parametrize("family", SPARSE_FAMILIES)
def test_experts_get_the_same_tokens_and_weights_in_every_iteration_or_freezing_is_refused(family, tmp_path):
    status = families.outcomes().get(family, {}).get(RELEASE, "works").partition(":")[0]
    if status in ("refused", "untried", "no span"):
        pytest.skip(f"{family} cannot be looped at all: {status}")
    refusal = freezes(family, tmp_path)
    assert REFUSED[family] in refusal if family in REFUSED else refusal == ""


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_experts_get_the_same_tokens_and_weights_in_layer_mode_and_with_a_cache(export_dir, family):
    """In the prefill, in a decode step, and under a rule of several evaluations a step."""
    fields = {"mode": "layer", "frozen_routing": True, "norm_interpolation": True, "kv": "reference"}
    model, tokens = load(export_dir(family, steps=STEPS, **fields)), tiny_tokens(2, LENGTH)
    scatter_biases(model)
    watched = watch_experts(model)
    with torch.no_grad():
        cache = model(tokens[:, :-1], use_cache=True).past_key_values
        for runs in watched.values():
            runs.clear()
        model(tokens[:, -1:], past_key_values=cache)
    looped = [runs for runs in watched.values() if len(runs) == STEPS]
    assert looped
    for first, *later in looped:
        assert all(torch.equal(*pair) for run in later for pair in zip(run, first, strict=True))


@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_experts_get_the_same_weights_in_training_with_jitter(tmp_path, noise):
    base = save_tiny_family("mixtral", tmp_path / "base", router_jitter_noise=noise)
    out = loopexport.convert(str(base), tmp_path / "out", span=(2, 4), steps=STEPS, frozen_routing=True).root
    model = load(out).train()
    assert run_and_compare(model, (2, 4), tiny_tokens(2, LENGTH)) == (4, 4)


# ---------------------------------------------------------------------------------------------------------------------
# Routers that others replace, copy, or go past.
# ---------------------------------------------------------------------------------------------------------------------


class Adapted(torch.nn.Module):
    """What an adapter or a quantizer puts in a router's place: another answer, and none of the router's own hooks."""

    def __init__(self, router):
        super().__init__()
        self.base_layer = router

    def forward(self, hidden):
        return self.base_layer(hidden * 1.5)


def replace_routers(model):
    for layer in looped_layers(model)._modules.values():
        block = getattr(layer, "mlp", None) or layer.block_sparse_moe
        for name in ("gate", "router"):
            if name in block._modules:
                setattr(block, name, Adapted(block._modules[name]))


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_a_router_that_was_replaced_is_frozen(looped, plain, family):
    model, base, tokens = looped(family, frozen_routing=True), plain(family), tiny_tokens(2, LENGTH)
    natural = full(model, tokens)
    replace_routers(model)
    for module in base.modules():
        if "experts" in module._modules:
            name = "gate" if "gate" in module._modules else "router"
            setattr(module, name, Adapted(module._modules[name]))
    with torch.no_grad():
        theirs = Oracle(base, SPAN, STEPS, frozen_routing=True).logits(tokens, [LENGTH])
    assert_close(full(model, tokens), theirs)
    assert_differs(full(model, tokens), natural)


@pytest.mark.skipif(not TRANSFORMERS_5, reason="listed experts cannot be compiled into one graph")
@pytest.mark.parametrize("replaced", [False, True])
@pytest.mark.parametrize("mode", ["block", "layer"])
def test_compiled_fullgraph_is_frozen(looped, mode, replaced):
    torch._dynamo.reset()
    model, tokens = looped("qwen3_moe", frozen_routing=True, mode=mode), tiny_tokens(2, LENGTH)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    if replaced:
        replace_routers(model)
    with torch.no_grad():
        ours = compiled(tokens, use_cache=False).logits
    assert_close(ours, full(model, tokens))
    model.config.loop_frozen_routing = False
    assert_differs(ours, full(model, tokens))


def test_copies_are_frozen_and_independent(looped):
    model, tokens = looped("deepseek_v3", frozen_routing=True), tiny_tokens(2, LENGTH)
    frozen = full(model, tokens)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_bitwise(full(twin, tokens), frozen)
        replace_routers(twin)
        assert_differs(full(twin, tokens), frozen)
    assert_bitwise(full(model, tokens), frozen)


def test_frozen_routing_changes_no_module_and_no_name(looped, plain):
    model = looped("qwen3_moe", frozen_routing=True)
    names = [name for name, _ in plain("qwen3_moe").named_modules()]
    full(model, tiny_tokens(1, 5))
    assert [name for name, _ in model.named_modules()] == names
    for module in model.modules():
        assert not module._forward_hooks
        assert not set(module._modules) & set(vars(module))


def test_a_failed_forward_leaves_no_state_behind(looped, monkeypatch):
    model, tokens = looped("qwen3_moe", frozen_routing=True), tiny_tokens(2, LENGTH)
    frozen = full(model, tokens)
    block = model.model.layers[SPAN[0]].mlp
    with monkeypatch.context() as patch:
        patch.setattr(block.experts, "forward", lambda *_: 1 / 0, raising=False)
        for expert in block.experts.children():
            patch.setattr(expert, "forward", lambda *_: 1 / 0, raising=False)
        with pytest.raises(ZeroDivisionError):
            full(model, tokens)
    assert_bitwise(full(model, tokens), frozen)


def test_a_router_that_is_not_asked_is_refused(looped, monkeypatch):
    """A kernel that takes the whole block over reads the router's weights itself."""
    model, tokens = looped("qwen3_moe", frozen_routing=True), tiny_tokens(2, LENGTH)
    block = model.model.layers[SPAN[0]].mlp
    monkeypatch.setattr(block, "forward", lambda hidden: hidden @ block.gate.weight.T @ block.gate.weight)
    with pytest.raises(ValueError, match=r"a pass called \S*mlp\.gate 0 times.*switch frozen_routing off"):
        full(model, tokens)
    model.config.loop_frozen_routing = False
    full(model, tokens)


def test_a_router_that_iterations_ask_more_or_less_often_is_refused(looped, monkeypatch):
    model, tokens = looped("qwen3_moe", frozen_routing=True), tiny_tokens(2, LENGTH)
    block = model.model.layers[SPAN[0]].mlp
    for counts in ((1, 2), (2, 1)):
        left = iter([*counts, 1])
        monkeypatch.setattr(
            block, "forward", lambda hidden, left=left: [block.gate(hidden) for _ in range(next(left))] and hidden
        )
        with pytest.raises(ValueError, match=f"{counts[1]} times, the natural pass {counts[0]} times"):
            full(model, tokens)


def test_experts_without_a_known_router_are_refused_at_load_and_at_run_time(looped, export_dir, monkeypatch):
    model, tokens = looped("gpt_oss"), tiny_tokens(2, LENGTH)
    for name in ("looped_routing", "modeling_looped"):
        monkeypatch.setattr(code_beside(model, name), "ROUTERS", ("chooser",))
    says = r"layer 1: mlp\.experts has experts but no known router \(chooser or gate\); switch frozen_routing off"
    with pytest.raises(ValueError, match=says):
        load(export_dir("gpt_oss"), loop_frozen_routing=True)
    model = load(export_dir("gpt_oss"))
    full(model, tokens)
    model.config.loop_frozen_routing = True
    with pytest.raises(ValueError, match=says):
        full(model, tokens)


def full(model, tokens):
    with torch.no_grad():
        return model(tokens, use_cache=False).logits


def modules(**children):
    """A module of the given children, of a class that is named by the key `kind`."""
    module = type(children.pop("kind", "Block"), (torch.nn.Module,), {})()
    for name, child in children.items():
        module.add_module(name, child)
    return module


def test_routers_are_found_wherever_they_are():
    leaf = torch.nn.Identity
    experts = modules(kind="TinyExperts", **{"0": modules(kind="TinyExpertMLP")})
    found = Routers.of
    assert found(modules(mlp=modules(gate=leaf(), up_proj=leaf()))) == ((), ())
    assert found(modules(mlp=modules(gate=leaf(), experts=experts))) == (("mlp.gate",), ())
    assert found(modules(router=leaf(), experts=experts)) == (("router",), ())
    assert found(modules(attn=modules(experts=modules(router=leaf())))) == (("attn.experts.router",), ())
    assert found(modules(mlp=modules(router_gate=leaf()))) == (("mlp.router_gate",), ())
    assert found(modules(mlp=modules(pick=leaf(), experts=experts))) == ((), ("mlp.experts",))
    assert found(modules(mlp=modules(kind="NewMoE", pick=leaf(), up=leaf()))) == ((), ("mlp",))
    assert found(modules(mlp=modules(kind="NewMoE", gate=leaf(), experts=experts))) == (("mlp.gate",), ())
    assert found(modules(mlp=modules(shared_experts=leaf(), gate=leaf()))) == ((), ())
    two = modules(
        one=modules(router=leaf(), experts=experts), other=modules(pick=leaf(), experts=copy.deepcopy(experts))
    )
    assert found(two) == (("one.router",), ("other.experts",))
