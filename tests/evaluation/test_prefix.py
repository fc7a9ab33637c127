"""Shared prefixes change no bit, and save the layers before each span."""

from __future__ import annotations

from contextlib import contextmanager, suppress

import pytest
import torch

from loopexport import LoopSpec
from loopexport.evaluation.arms import Arm, Model, base_arm
from loopexport.evaluation.prefix import SharedPrefix
from loopexport.evaluation.subject import find_subject
from support.evaluation import tokenized_base
from support.tiny import NUM_LAYERS, tiny_tokens

pytest.importorskip("lm_eval")
SPECS = (
    LoopSpec(span=(0, 2), steps=2),
    LoopSpec(span=(2, 3), steps=3, damping=1.0, kv="per_step"),
    LoopSpec(span=(2, 5), steps=2, mode="layer"),
    LoopSpec(span=(4, 6), steps=2, anchor=0.5, kv="reference"),
)
ARMS = [base_arm(SPECS[0]), *(Arm(f"loop{number}", spec) for number, spec in enumerate(SPECS))]
BATCHES = [tiny_tokens(2, 14, seed=1), tiny_tokens(3, 9, seed=2)]
TEXTS = ["it is 12345 and it is 67890", "it is 1"]


@contextmanager
def loaded(base, spec=SPECS[1]):
    """The model of all arms, on a tiny base."""
    with find_subject(base, spec).directory() as root:
        model = Model(root, "hf", {"device": "cpu", "dtype": "float32"}, 4, prefix=SharedPrefix())
        model.use(ARMS[0])
        yield model


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    with loaded(tokenized_base("llama", tmp_path_factory.mktemp("prefix") / "llama")) as model:
        yield model


@torch.no_grad()
def answers(model, arm, prefix=None, batches=BATCHES) -> list[torch.Tensor]:
    network = model.use(arm).model
    if prefix is None:
        return [network(tokens).logits for tokens in batches]
    with prefix.sharing(network, arm.spec):
        return [network(tokens).logits for tokens in batches]


def roomy() -> SharedPrefix:
    """A prefix with room for all batches."""
    return SharedPrefix(_room=len(BATCHES))


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3_moe", "gpt2", "deepseek_v3"])
def test_no_bit_changes_and_layers_before_the_span_are_saved(family, tmp_path):
    with loaded(tokenized_base(family, tmp_path / family)) as model:
        prefix = roomy()
        for arm in ARMS:
            whole, shared = answers(model, arm), answers(model, arm, prefix)
            assert all(map(torch.equal, whole, shared)), arm.name
        # the base starts at 0 as the first loop does; the second runs all layers, and the others start behind layer 1
        assert prefix.saved == len(BATCHES) * (2 + 2)
        prefix.check(model, ARMS, TEXTS)
        assert prefix.off == ""


def test_counts_what_would_have_run(llama):
    prefix = roomy()
    answers(llama, ARMS[0], prefix)
    answers(llama, ARMS[2], prefix)
    assert prefix.evaluations == len(BATCHES) * (NUM_LAYERS + NUM_LAYERS + 2)


def test_layers_before_the_span_do_not_run_again(llama):
    prefix, runs = roomy(), []
    layer = llama.lm.model.model.layers[1]
    with_hook = layer.self_attn.register_forward_hook(lambda *_: runs.append(1))
    for arm in (ARMS[3], ARMS[4], ARMS[4]):
        answers(llama, arm, prefix)
    with_hook.remove()
    assert len(runs) == len(BATCHES)


def test_other_tokens_run_in_full(llama):
    prefix, others = roomy(), [BATCHES[0], tiny_tokens(3, 9, seed=3), BATCHES[1]]
    answers(llama, ARMS[3], prefix)
    shared = answers(llama, ARMS[4], prefix, others)
    assert all(map(torch.equal, answers(llama, ARMS[4], batches=others), shared))
    assert prefix.saved == 2


@torch.no_grad()
def test_forward_with_a_mask_runs_in_full(llama):
    prefix, network, spec = roomy(), llama.use(ARMS[3]).model, ARMS[3].spec
    answers(llama, ARMS[3], prefix)
    mask = torch.ones_like(BATCHES[0])
    mask[0, :3] = 0
    whole = network(BATCHES[0], attention_mask=mask).logits
    with prefix.sharing(network, spec):
        assert torch.equal(network(BATCHES[0], attention_mask=mask).logits, whole)
    assert prefix.saved == 0


def test_states_beyond_the_room_are_not_kept(llama):
    prefix = SharedPrefix(_room=1)
    for arm in (ARMS[3], ARMS[4]):
        shared = answers(llama, arm, prefix)
        assert all(map(torch.equal, answers(llama, arm), shared))
    assert (prefix.saved, prefix.find(1)) == (2, None)


def test_layers_get_their_own_forward_back(llama):
    layers = llama.lm.model.model.layers
    before = [vars(layer).get("forward") for layer in layers]
    with suppress(KeyError), roomy().sharing(llama.lm.model, ARMS[4].spec):
        assert "forward" in vars(layers[0])
        raise KeyError
    assert [vars(layer).get("forward") for layer in layers] == before
    assert not llama.lm.model._forward_pre_hooks


class _Changing(torch.nn.Module):
    """A layer that changes its input in place, which would change the state that others start from."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, hidden, *args, **kwargs):
        return self.layer(hidden.mul_(1.5), *args, **kwargs)


def test_layer_that_changes_its_input_in_place_switches_sharing_off(tmp_path):
    with loaded(tokenized_base("llama", tmp_path / "llama")) as model:
        layers = model.lm.model.model.layers
        layers[2] = _Changing(layers[2])
        prefix = SharedPrefix()
        prefix.check(model, ARMS, TEXTS)
        assert prefix.off == "it changes the logits of loop1"
        assert all(map(torch.equal, answers(model, ARMS[4]), answers(model, ARMS[4], prefix)))
        assert prefix.saved == 0


def test_layer_that_misses_what_an_earlier_one_hands_on_switches_sharing_off(tmp_path):
    with loaded(tokenized_base("llama", tmp_path / "llama")) as model:
        layers, handed = model.lm.model.model.layers, []
        layers[0].register_forward_pre_hook(lambda *_: handed.clear())
        layers[1].self_attn.register_forward_hook(lambda *_: handed.append(None))
        layers[5].register_forward_hook(lambda *_: handed[0])
        prefix = SharedPrefix()
        prefix.check(model, ARMS, TEXTS)
        assert prefix.off == "IndexError: list index out of range"


def test_room_grows_with_the_weights_and_shrinks_with_the_batch(llama):
    prefix, text = SharedPrefix(), "it is 12345 and it is 67890"
    weights = sum(each.numel() for each in llama.lm.model.parameters())
    tokens = len(llama.lm.tok_encode(text))
    assert prefix.batches(llama.lm, text, 1) == max(1, int(weights * 0.01 / (tokens * 64)))
    assert prefix.batches(llama.lm, text, 10**6) == 1
