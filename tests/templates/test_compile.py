"""torch.compile of a looped model: one graph, with and without a static cache, equals eager.

`make test` compiles each mechanism once: each K/V policy, each mode, a loop that decode steps skip, a sliding window.
The matrix has all combinations, and Inductor, whose C++ compiler takes the longest.
"""

from __future__ import annotations

import itertools

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, StaticCache

import loopexport
from support.compare import assert_close
from support.tiny import save_tiny, tiny_tokens

TRANSFORMERS_5 = int(transformers.__version__.split(".")[0]) >= 5
KV_POLICIES = ("shared", "per_step", "reference")
DECODES = {"full": {}, "bypass": {"decode": "bypass"}, "first_n": {"decode": "first_n", "first_n": 2}}
FULLGRAPH_SAMPLE = {("shared", "block"), ("reference", "layer")}
DECODE_SAMPLE = {("llama", "per_step", "bypass")}


FOUR_LAYERS = {
    "llama": {"num_hidden_layers": 4},
    "gemma3_text": {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2},
}


@pytest.fixture
def looped(tmp_path):
    """`looped(family, **spec)`: a looped model of four layers, since compiling takes a time for each."""

    def make(family, **spec):
        base = save_tiny(family, tmp_path / "base", **FOUR_LAYERS[family])
        spec = spec if "path" in spec else {"span": (1, 3), "steps": 3, **spec}
        out = loopexport.convert(str(base), tmp_path / "out", **spec).root
        return AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True).eval()

    return make


def cells(sample, *values):
    """All combinations as pytest takes them: those of the sample, and the others with the matrix."""
    return [
        pytest.param(*each, marks=() if each in sample else pytest.mark.matrix) for each in itertools.product(*values)
    ]


@pytest.mark.parametrize(("kv", "mode"), cells(FULLGRAPH_SAMPLE, KV_POLICIES, ("block", "layer")))
def test_compiled_fullgraph_equals_eager(looped, kv, mode):
    torch._dynamo.reset()
    model, tokens = looped("llama", kv=kv, mode=mode), tiny_tokens(2, 9)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert_close(compiled(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize(
    ("family", "kv", "decode"), cells(DECODE_SAMPLE, ("llama", "gemma3_text"), KV_POLICIES, DECODES)
)
def test_compiled_decode_on_a_static_cache_equals_eager(looped, family, kv, decode):
    torch._dynamo.reset()
    model, tokens = looped(family, kv=kv, **DECODES[decode]), tiny_tokens(2, 16)

    def run(forward):
        cache = StaticCache(config=model.config, max_cache_len=20)
        with torch.no_grad():
            logits = [model(tokens[:, :6], past_key_values=cache).logits]
            for position in range(6, 16):
                # transformers 4 cannot compile on a static cache without being told the position
                where = {} if TRANSFORMERS_5 else {"cache_position": torch.tensor([position])}
                logits.append(forward(tokens[:, position : position + 1], past_key_values=cache, **where).logits)
        return torch.cat(logits, dim=1)

    assert_close(run(torch.compile(model, fullgraph=True, backend="aot_eager")), run(model))


PATHS = (
    {"path": ((0, 2), (0, 3), (1, 4))},
    {"path": ((0, 2), (3, 4), (1, 2)), "kv": "shared"},  # leaves out layer 2
    {"span": ((0, 1), (2, 4)), "steps": (2, 3), "kv": "per_step"},
)


@pytest.mark.parametrize("loop", PATHS, ids=",".join)
def test_compiled_paths_and_steps_of_each_span_equal_eager(looped, loop):
    torch._dynamo.reset()
    model, tokens = looped("llama", **loop), tiny_tokens(2, 9)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    cache = StaticCache(config=model.config, max_cache_len=12)
    with torch.no_grad():
        full = model(tokens).logits
        assert_close(compiled(tokens).logits, full)
        model(tokens[:, :8], past_key_values=cache)
        if TRANSFORMERS_5:
            assert_close(compiled(tokens[:, 8:], past_key_values=cache).logits, full[:, 8:])


@pytest.mark.matrix
def test_inductor_compiled_forward_equals_eager(looped):
    torch._dynamo.reset()
    model, tokens = looped("llama", span=(2, 3), steps=2), tiny_tokens(2, 9)
    with torch.no_grad():
        assert_close(torch.compile(model, fullgraph=True)(tokens).logits, model(tokens).logits)
