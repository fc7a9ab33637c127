"""Routers that others replace, copy, or go past."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from loopexport.templates.looped_routing import Routers
from support.compare import assert_bitwise, assert_close, assert_differs
from support.loaded_code import code_beside
from support.oracle import Oracle
from support.tiny import MOE_FAMILIES, SPAN, tiny_tokens
from support.watch_experts import LENGTH, STEPS, TRANSFORMERS_5, load

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
    for layer in model.model.layers:
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
@pytest.mark.parametrize(
    ("mode", "replaced"),
    [
        ("layer", True),
        pytest.param("block", True, marks=pytest.mark.matrix),
        pytest.param("block", False, marks=pytest.mark.matrix),
        pytest.param("layer", False, marks=pytest.mark.matrix),
    ],
)
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
    for name in ("looped_routing", "looped_decoder"):
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
