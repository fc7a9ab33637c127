"""The layer list of a looped model: native to scripts, hooks and other threads; a loop for the decoder's forward alone.

Each recipe is something that scripts do with `model.model.layers`. It must give on a looped model what it gives on the
base, and leave the loop as it was.
"""

from __future__ import annotations

import copy
import inspect
import pickle
import textwrap
import threading

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint import checkpoint_wrapper
from transformers.models.llama import modeling_llama

from support.compare import assert_bitwise, assert_close, assert_differs
from support.forwards import full_forward
from support.tiny import NUM_LAYERS, SPAN, tiny_tokens

STEPS = 3
TOKENS = tiny_tokens(2, 9)


class Wrapper(nn.Module):
    """Wraps a layer, and changes nothing."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, *args, **kwargs):
        return self.block(*args, **kwargs)


def names(layers):
    return [type(layer).__name__ for layer in layers]


READING = {
    "class of the list": lambda layers: (type(layers), repr(layers)),
    "classes of the layers": names,
    "native layers": lambda layers: all(isinstance(each, modeling_llama.LlamaDecoderLayer) for each in layers),
    "reversed": lambda layers: names(reversed(layers)),
    "sum of lists": lambda layers: names(layers + layers),
    "children": lambda layers: [name for name, _ in layers.named_children()],
    "iteration gives what an index gives": lambda layers: [layers[i] is each for i, each in enumerate(layers)],
    "layer in list": lambda layers: layers[2] in layers,
    "keys of a dict": lambda layers: len({each: i for i, each in enumerate(layers)}),
    "slice": lambda layers: (type(layers[1:4]), names(layers[1:4])),
    "parameters of a slice": lambda layers: sum(each.numel() for each in layers[:3].parameters()),
    "sequential": lambda layers: names(nn.Sequential(*layers)),
    "new list": lambda layers: names(nn.ModuleList(list(layers))),
    "deep copies": lambda layers: names(copy.deepcopy(each) for each in layers),
    "copies": lambda layers: names(copy.copy(each) for each in layers),
    "copy of the list": lambda layers: type(copy.deepcopy(layers)),
    "to": lambda layers: [each.to("cpu") is each for each in layers],
    "freezing": lambda layers: [each.requires_grad for each in layers[:3].requires_grad_(False).parameters()],
    "by a walk with own hands": lambda layers: walk_by_hand(layers),
}


def walk_by_hand(layers):
    """Layer by layer over several samples, as calibration and pruning tools run a model: the base's own layers."""
    torch.manual_seed(0)
    states = [torch.randn(1, 5, 64) for _ in range(2)]
    rope = (torch.ones(1, 5, 16), torch.zeros(1, 5, 16))
    with torch.no_grad():
        for layer in layers:
            states = [layer(hidden, attention_mask=None, position_embeddings=rope) for hidden in states]
    return torch.stack([each[0] if isinstance(each, tuple) else each for each in states]).sum().item()


@pytest.mark.parametrize("recipe", READING)
def test_reading_gives_what_the_base_gives(looped, plain, recipe):
    assert READING[recipe](looped("llama").model.layers) == READING[recipe](plain("llama").model.layers)


def enumerated(wrap):
    def change(model):
        for index, layer in enumerate(model.model.layers):
            model.model.layers[index] = wrap(layer)

    return change


def new_list(model):
    model.model.layers = nn.ModuleList([Wrapper(layer) for layer in model.model.layers])


def named_children(model):
    for name, layer in list(model.model.layers.named_children()):
        setattr(model.model.layers, name, Wrapper(layer))


def forwards_replaced(model):
    for layer in model.model.layers:
        layer.forward = lambda *args, native=layer.forward, **kwargs: native(*args, **kwargs)


def decoder_forward_replaced(model):
    """As patches of whole forwards do: on the instance, so that a method of ours never runs."""
    native = type(model.model).__mro__[1].forward if hasattr(model.config, "loop_steps") else type(model.model).forward
    model.model.forward = native.__get__(model.model)


WRAPPING = {
    "wrapper while enumerating": enumerated(Wrapper),
    "activation checkpointing while enumerating": enumerated(checkpoint_wrapper.checkpoint_wrapper),
    "compiled while enumerating": enumerated(lambda layer: torch.compile(layer, backend="eager")),
    "compiled in place": lambda model: [layer.compile(backend="eager") for layer in model.model.layers],
    "new list of wrappers": new_list,
    "wrappers by name": named_children,
    "forwards replaced": forwards_replaced,
    "decoder's forward replaced": decoder_forward_replaced,
    "activation checkpointing by class": lambda model: checkpoint_wrapper.apply_activation_checkpointing(
        model, check_fn=lambda module: type(module).__name__ == "LlamaDecoderLayer"
    ),
}


@pytest.mark.parametrize("recipe", WRAPPING)
def test_wrapping_layers_changes_no_logits_and_loses_no_tensor(looped, recipe):
    torch._dynamo.reset()
    is_quick = "compiled" not in recipe
    for fields in ({}, {"kv": "per_step", "mode": "layer"})[: 1 + is_quick]:
        model = looped("llama", **fields)
        before, tensors = full_forward(model, TOKENS), len(model.state_dict())
        options = {"max_new_tokens": 4 if is_quick else 1, "do_sample": False}
        generated = model.generate(TOKENS[:1], **options)
        WRAPPING[recipe](model)
        assert_close(full_forward(model, TOKENS), before)
        assert torch.equal(model.generate(TOKENS[:1], **options), generated)
        assert len(model.state_dict()) == tensors


def gradients(model):
    model.zero_grad()
    model(TOKENS, labels=TOKENS, use_cache=False).loss.backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("kv", ["shared", "per_step"])
@pytest.mark.parametrize("native_checkpointing", [False, True])
def test_gradients_pass_through_wrappers(looped, kv, native_checkpointing):
    model = looped("llama", kv=kv).train()
    plain = gradients(model)
    if native_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    enumerated(Wrapper if native_checkpointing else checkpoint_wrapper.checkpoint_wrapper)(model)
    for ours, theirs in zip(gradients(model), plain, strict=True):
        assert_close(ours, theirs, 1e-4)


@pytest.mark.parametrize("how", ["slice", "delete", "new list"])
def test_layers_outside_the_span_can_be_pruned(looped, plain, how):
    """As the base's can; the span keeps its numbers, since the layers before it stay."""
    model = looped("llama")
    layers = model.model.layers
    if how == "slice":
        model.model.layers = layers[:-1]
    elif how == "delete":
        del layers[NUM_LAYERS - 1]
    else:
        model.model.layers = nn.ModuleList([layer for layer in layers if layer is not layers[NUM_LAYERS - 1]])
    model.config.num_hidden_layers = NUM_LAYERS - 1
    pruned = full_forward(model, TOKENS)
    model.config.loop_steps = 1
    base = plain("llama")
    del base.model.layers[NUM_LAYERS - 1]
    base.config.num_hidden_layers = NUM_LAYERS - 1
    assert_bitwise(full_forward(model, TOKENS), full_forward(base, TOKENS))
    assert_differs(pruned, full_forward(model, TOKENS))


def test_a_hook_sees_native_layers_during_a_forward(looped):
    """Also one that runs in the middle of the decoder's forward, or in another thread meanwhile."""
    model, seen = looped("llama"), []

    def look(*_):
        seen.append(all(isinstance(layer, modeling_llama.LlamaDecoderLayer) for layer in model.model.layers))
        other = threading.Thread(target=lambda: seen.append(type(model.model.layers[1:3]) is nn.ModuleList))
        other.start()
        other.join()

    model.model.embed_tokens.register_forward_hook(look)
    model.model.layers[SPAN[0]].mlp.register_forward_hook(look)
    full_forward(model, TOKENS)
    assert seen == [True, True] * (1 + STEPS)


INNER = {
    "the same model with one step": lambda model, looped: model,
    "another model": lambda model, looped: looped("llama", mode="layer"),
    "another model with one step": lambda model, looped: with_one_step(looped("llama", kv="reference")),
    "another model whose forward was replaced": lambda model, looped: with_own_forward(looped("llama", kv="reference")),
}


def with_one_step(model):
    model.config.loop_steps = 1
    return model


def with_own_forward(model):
    decoder_forward_replaced(model)
    return model


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("where", ["embed_tokens", "layers.2.mlp", "norm"])
def test_a_forward_inside_a_forward_is_exact(looped, inner, where):
    """A hook may ask another looped model, or this one without its loop, in the middle of a forward."""
    model = looped("llama")
    other, outer, seen = INNER[inner](model, looped), full_forward(model, TOKENS), []
    expected = ask(other, model)

    def hook(*_):
        handle.remove()
        seen.append(ask(other, model))

    handle = model.model.get_submodule(where).register_forward_hook(hook)
    assert_bitwise(full_forward(model, TOKENS), outer)
    assert_bitwise(seen[0], expected)


def ask(other, model):
    """Logits of another model, or of this one with one step."""
    steps = other.config.loop_steps
    other.config.loop_steps = 1 if other is model else steps
    logits = full_forward(other, TOKENS)
    other.config.loop_steps = steps
    return logits


@pytest.mark.parametrize("fields", [{"steps": 1}, {"frozen_routing": False}])
def test_a_forward_inside_a_router_chooses_its_own_experts(looped, fields):
    model, seen = looped("qwen3_moe", frozen_routing=True), []
    settings = {name: getattr(model.config, f"loop_{name}") for name in fields}

    def inner():
        for name, value in fields.items():
            setattr(model.config, f"loop_{name}", value)
        logits = full_forward(model, TOKENS)
        for name, value in settings.items():
            setattr(model.config, f"loop_{name}", value)
        return logits

    outer, expected = full_forward(model, TOKENS), inner()

    def hook(*_):
        handle.remove()
        seen.append(inner())

    handle = model.model.layers[SPAN[0]].self_attn.register_forward_hook(hook)
    assert_bitwise(full_forward(model, TOKENS), outer)
    assert_bitwise(seen[0], expected)


def test_hooks_on_a_looped_layer_run_once_for_each_evaluation(looped):
    """Steering and capturing: the hook of a span layer sees, and may change, the output of every evaluation."""
    model, counts = looped("llama"), [0] * NUM_LAYERS
    before = full_forward(model, TOKENS)
    for index, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda *_, index=index: counts.__setitem__(index, counts[index] + 1))
    full_forward(model, TOKENS)
    assert counts == [STEPS if index in range(*SPAN) else 1 for index in range(NUM_LAYERS)]
    steer = model.model.layers[SPAN[0]].register_forward_hook(
        lambda module, args, out: (out[0] + 1, *out[1:]) if isinstance(out, tuple) else out + 1
    )
    assert_differs(full_forward(model, TOKENS), before)
    steer.remove()
    assert_bitwise(full_forward(model, TOKENS), before)


PATCHES = {
    "by index": "for _i in range(len(self.layers)):\n        decoder_layer = self.layers[_i]",
    "by children": "for decoder_layer in self._modules['layers'].children():",
    "by modules": "for decoder_layer in list(dict(self.named_children())['layers'])[: self.config.num_hidden_layers]:",
}


@pytest.mark.parametrize("how", PATCHES)
def test_a_forward_that_does_not_walk_the_list_loops_or_raises(looped, monkeypatch, how):
    """As a future transformers might walk; it must never give the base without a word."""
    source = textwrap.dedent(inspect.getsource(inspect.unwrap(modeling_llama.LlamaModel.forward)))
    walk = "for decoder_layer in self.layers[: self.config.num_hidden_layers]:"
    assert walk in source
    source = source[source.index("def forward") :].replace(walk, PATCHES[how])
    model = looped("llama")
    expected, namespace = model.model(TOKENS, use_cache=False).last_hidden_state, {}
    exec(compile(source, "patched", "exec"), vars(modeling_llama), namespace)
    monkeypatch.setattr(modeling_llama.LlamaModel, "forward", namespace["forward"])
    if how == "by index":
        assert_bitwise(model.model(TOKENS, use_cache=False).last_hidden_state, expected)
    else:
        with pytest.raises(ValueError, match="did not run layer 1 through its layer list"):
            model.model(TOKENS, use_cache=False)
    model.config.loop_steps = 1
    model.model(TOKENS, use_cache=False)


def test_copies_and_pickles_loop(looped):
    model = looped("llama")
    expected = full_forward(model, TOKENS)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_bitwise(full_forward(twin, TOKENS), expected)
        assert type(twin.model).__name__ == "LlamaModel"
        twin.config.loop_steps = 1
        assert_differs(full_forward(twin, TOKENS), expected)
    assert_bitwise(full_forward(model, TOKENS), expected)


@pytest.mark.parametrize(
    ("family", "fields"), [("llama", {}), ("qwen3_moe", {"mode": "layer", "frozen_routing": True})]
)
def test_threads_do_not_disturb_each_other(looped, family, fields):
    model = looped(family, **fields)
    samples = [tiny_tokens(2, 24, seed=seed) for seed in range(3)]
    expected, wrong = [full_forward(model, tokens) for tokens in samples], []

    def work(index):
        for _ in range(12):
            try:
                if not torch.equal(full_forward(model, samples[index]), expected[index]):
                    wrong.append("another result")
            except Exception as error:
                wrong.append(repr(error))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(samples))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_threads_that_train_with_checkpointing_do_not_disturb_each_other(looped):
    model = looped("llama").train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    samples = [tiny_tokens(1, 16, seed=seed) for seed in range(2)]
    expected, wrong = [model(each, labels=each).loss.item() for each in samples], []

    def work(index):
        for _ in range(8):
            loss = model(samples[index], labels=samples[index]).loss
            torch.autograd.grad(loss, list(model.parameters()))
            if abs(loss.item() - expected[index]) > 1e-4:
                wrong.append(loss.item())

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(samples))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
