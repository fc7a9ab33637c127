"""What users and libraries do to the modules that keep a recurrent state, and to the code of their family."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

import loopexport
from support.compare import assert_bitwise
from support.tiny import SPAN, save_tiny, tiny_tokens

modeling_qwen3_5 = pytest.importorskip("transformers.models.qwen3_5.modeling_qwen3_5", reason="transformers 4")

MIXER = modeling_qwen3_5.Qwen3_5GatedDeltaNet
TOKENS = tiny_tokens(1, 5)


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    """An export of a tiny model with linear attention."""
    root = tmp_path_factory.mktemp("mixers")
    base = save_tiny("qwen3_5_text", root / "base")
    return loopexport.convert(str(base), root / "looped", span=SPAN, steps=3).root


@pytest.fixture
def made(export):
    """`made(kv=...)`: the export, loaded."""
    return lambda kv: AutoModelForCausalLM.from_pretrained(export, trust_remote_code=True, loop_kv=kv).eval()


def test_a_wrapper_around_the_class_of_a_mixer_is_refused_under_shared(made, monkeypatch):
    """Without functools.wraps, nothing shows what the code inside of the wrapper does."""
    native = MIXER.forward
    monkeypatch.setattr(MIXER, "forward", lambda self, *args, **kwargs: native(self, *args, **kwargs))
    with pytest.raises(ValueError, match="a recurrent state, but no module whose code it knows; use kv per_step"):
        made(kv="shared")(TOKENS)


@pytest.mark.parametrize("kv", ["per_step", "reference"])
def test_a_forward_that_was_replaced_later_runs_in_every_pass(made, monkeypatch, kv):
    model, native = made(kv=kv), MIXER.forward
    monkeypatch.setattr(MIXER, "forward", lambda self, *args, **kwargs: native(self, *args, **kwargs) / 2)
    with torch.no_grad():
        theirs = made(kv=kv)(TOKENS).logits
        assert_bitwise(model(TOKENS).logits, theirs)


def test_a_kernel_that_was_replaced_later_is_refused_under_shared(made, monkeypatch):
    model, native = made(kv="shared"), modeling_qwen3_5.causal_conv1d_fn
    monkeypatch.setattr(modeling_qwen3_5, "causal_conv1d_fn", lambda *args, **kwargs: native(*args, **kwargs))
    with pytest.raises(ValueError, match="computes causal_conv1d_fn by itself, and somebody replaced it"):
        model(TOKENS)


def test_a_helper_that_was_replaced_later_is_used(made, monkeypatch):
    model = made(kv="shared")
    monkeypatch.setattr(modeling_qwen3_5, "apply_mask_to_padding_states", lambda hidden, mask: hidden / 2)
    with torch.no_grad():
        assert_bitwise(model(TOKENS).logits, made(kv="shared")(TOKENS).logits)


@pytest.mark.parametrize("kv", ["shared", "per_step"])
def test_a_replica_for_data_parallel_runs_on_its_own_weights(made, kv):
    model = made(kv=kv)
    replica, twin = replicated(model, 1.05), copy.deepcopy(model)
    for parameter in twin.parameters():
        parameter.data.mul_(1.05)
    with torch.no_grad():
        assert_bitwise(replica(TOKENS).logits, twin(TOKENS).logits)


def replicated(model, factor):
    """A replica as nn.DataParallel makes it, on the same device, with weights of its own."""
    replicas = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, replica in replicas.items():
        replica._modules.update({name: replicas.get(child) for name, child in module._modules.items()})
        for name, parameter in module._parameters.items():
            replica._parameters.pop(name, None)
            object.__setattr__(replica, name, None if parameter is None else parameter.detach() * factor)
    return replicas[model]
