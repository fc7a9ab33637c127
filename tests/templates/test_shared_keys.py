"""Gemma 3n and 4: late layers reuse the keys of earlier ones, and may run on the last token alone."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import loopexport
from loopexport import LoopExportError
from support.compare import assert_bitwise, assert_close, assert_differs
from support.family_walk import save_tiny_family
from support.loaded_code import code_beside
from support.tiny import tiny_tokens

pytestmark = pytest.mark.skipif(
    "gemma4_text" not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, reason="gemma4_text came with transformers 5"
)
TOKENS = tiny_tokens(2, 9)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny gemma4_text; layers 4 and 5 reuse keys."""
    return save_tiny_family("gemma4_text", tmp_path_factory.mktemp("gemma4") / "base")


@pytest.fixture(scope="module")
def gemma4(base, tmp_path_factory):
    """An export of it."""
    return loopexport.convert(str(base), tmp_path_factory.mktemp("gemma4") / "out", span=(3, 5), steps=3).root


@pytest.fixture
def model(gemma4):
    return AutoModelForCausalLM.from_pretrained(gemma4, trust_remote_code=True).eval()


@pytest.mark.parametrize("mode", ["block", "layer"])
@pytest.mark.parametrize("kv", ["shared", "per_step", "reference"])
@pytest.mark.parametrize("span", [(1, 4), (3, 5), (4, 6), (2, 6)])
def test_the_last_token_alone_has_the_logits_of_a_full_forward(model, span, kv, mode):
    model.config.loop_span, model.config.loop_kv, model.config.loop_mode = list(span), kv, mode
    with torch.no_grad():
        whole = model(TOKENS).logits
        assert_close(model(TOKENS, logits_to_keep=1).logits, whole[:, -1:])
        assert_close(model(TOKENS, logits_to_keep=torch.tensor([2, 5])).logits, whole[:, [2, 5]])
    token = model.generate(TOKENS, max_new_tokens=1, do_sample=False)[:, -1]
    assert torch.equal(token, whole[:, -1].argmax(-1))


def test_a_prompt_loops_under_bypass_also_where_only_its_last_token_is_run(model):
    model.config.loop_span, model.config.loop_decode, model.config.loop_damping = [4, 6], "bypass", 1.0
    with torch.no_grad():
        whole = model(TOKENS, logits_to_keep=1).logits
        assert_close(model(TOKENS, logits_to_keep=1, use_cache=False).logits, whole)
        model.config.loop_steps = 1
        assert_differs(model(TOKENS, logits_to_keep=1).logits, whole)


@pytest.mark.parametrize("path", [[[0, 3], [4, 6]], [[0, 2], [3, 6]], [[0, 3], [1, 6]], [[0, 6], [4, 6]]], ids=str)
def test_a_path_that_changes_which_keys_are_reused_is_refused(base, model, path, tmp_path):
    says = "the last 2 layers of the model reuse keys and values of layers 2, 3, so a path cannot run layer"
    with pytest.raises(LoopExportError, match=says):
        loopexport.convert(base, tmp_path / "out", path=path)
    model.config.loop_span, model.config.loop_path, model.config.loop_steps = None, path, 2
    with pytest.raises(ValueError, match=says):
        model(TOKENS)


@pytest.mark.parametrize("path", [[[0, 5]], [[0, 4], [5, 6]]], ids=str)
def test_a_path_may_leave_out_layers_that_reuse_keys(model, path):
    left_out = {4, 5} - {layer for run in path for layer in range(*run)}
    base = copy.deepcopy(model)
    base.config.loop_steps = 1
    for layer in left_out:
        base.model.layers[layer].forward = lambda hidden, *args, **kwargs: hidden
    model.config.loop_span, model.config.loop_path, model.config.loop_steps = None, path, 2
    model.config.loop_damping = None
    with torch.no_grad():
        theirs = base(TOKENS, use_cache=False).logits
        assert_bitwise(model(TOKENS, use_cache=False).logits, theirs)
        past = model(TOKENS[:, :6], use_cache=True).past_key_values
        assert_close(model(TOKENS[:, 6:], past_key_values=past).logits, theirs[:, 6:])


def test_a_span_in_which_tokens_are_dropped_is_refused(model, monkeypatch):
    """Whatever a model does to its hidden states between the layers of a span: no broadcasting hides it."""
    looped_decoder = code_beside(model, "looped_decoder")
    monkeypatch.setattr(model.model, "first_kv_shared_layer_idx", 4)
    monkeypatch.setattr(looped_decoder, "FIRST_REUSER", "unknown to us")
    with pytest.raises(ValueError, match="changes the hidden states between layers 3 and 4, inside a span"):
        model(TOKENS, logits_to_keep=1)
