"""`verify` computes the loop by hand over layers that remember more than keys and values, without the export's code."""

from __future__ import annotations

import pytest
from transformers import CONFIG_MAPPING

import loopexport
from loopexport.checks.effect import CHANGES_LOGITS
from loopexport.checks.verification import CACHED_DECODE_IS_FULL, CACHED_IS_BY_HAND, FULL_IS_BY_HAND
from support.export_faults import Fault, failures_of
from support.structure import by_class
from support.tiny import INDEXED, SPAN, save_tiny
from support.walk_configs import save_tiny_family

BY_HAND = (FULL_IS_BY_HAND, CACHED_IS_BY_HAND)
# One family for each kind of memory; in the span 1:4 all of them have layers of full attention too.
FAMILIES = {
    "qwen3_5_text": {"layer_types": ["linear_attention", "linear_attention", "full_attention"] * 2},
    "lfm2": {"layer_types": ["conv", "conv", "full_attention"] * 2},
    "granitemoehybrid": {"layer_types": ["mamba", "mamba", "attention"] * 2},
}
pytestmark = pytest.mark.skipif(
    any(family not in CONFIG_MAPPING for family in (*FAMILIES, *INDEXED)), reason="needs a newer transformers"
)


@pytest.fixture(scope="module")
def export_of(tmp_path_factory):
    """`export_of(family, **spec)`: an export of a tiny base with such layers."""
    bases = {}

    def make(family, **spec):
        if family not in bases:
            base = tmp_path_factory.mktemp("base") / family
            bases[family] = (
                save_tiny(family, base) if family in INDEXED else save_tiny_family(family, base, **FAMILIES[family])
            )
        out = tmp_path_factory.mktemp("export") / "_".join([family, *map(str, spec.values())])
        return loopexport.convert(str(bases[family]), out, span=SPAN, steps=3, **spec).root

    return make


def outcome(root) -> dict:
    """The checks of `verify`, by name; none has failed."""
    checks = {check.name: check for check in loopexport.verify(root)}
    assert not [check for check in checks.values() if check.passed is False]
    assert checks[CHANGES_LOGITS].passed
    return checks


@pytest.mark.parametrize(
    ("family", "spec"),
    [
        ("qwen3_5_text", {"kv": "shared"}),
        ("qwen3_5_text", {"kv": "shared", "mode": "layer", "decode": "first_n", "first_n": 1}),
        ("qwen3_5_text", {"kv": "per_step", "decode": "bypass"}),
        ("lfm2", {"kv": "shared"}),
        ("lfm2", {"kv": "reference"}),
        ("granitemoehybrid", {"kv": "per_step"}),
        ("glm_moe_dsa", {"kv": "shared"}),
        ("glm_moe_dsa", {"kv": "per_step", "decode": "bypass"}),
        ("deepseek_v32", {"kv": "reference", "mode": "layer"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_loop_is_computed_by_hand(export_of, family, spec):
    checks = outcome(export_of(family, **spec))
    for name in BY_HAND:
        assert checks[name].passed, checks[name]


def test_what_is_not_computed_by_hand_is_compared_in_chunks(export_of):
    """D x of a state space is the iterate's own, and hands cannot tell it from what the state takes up."""
    checks = outcome(export_of("granitemoehybrid", kv="shared"))
    for name in BY_HAND:
        assert checks[name].passed is None
        assert "layer 1 has a skip term beside its state" in checks[name].detail
    assert checks[CACHED_DECODE_IS_FULL].passed


def states(old: str, new: str, **spec) -> Fault:
    """A fault in what iterations get in place of a state."""
    return Fault("looped_states.py", old, new, spec)


def recurrent(old: str, new: str) -> Fault:
    """A fault in how iterations read a natural state."""
    return Fault("looped_recurrent.py", old, new)


PER_STEP = {"kv": "per_step"}
GET, UPDATE = 'self.ask("get_recurrent_state", {}', 'self.ask("update_conv_state", inputs, {}'
TAKES_UP = '{"key": 1, "value": 2, "g": 3, "beta": 4}'
FAULTS = {
    "one state for all passes": ("qwen3_5_text", states(GET.format("self.slot"), GET.format("layer_idx"), **PER_STEP)),
    "one window for all passes": ("lfm2", states(UPDATE.format("self.slot"), UPDATE.format("layer_idx"), **PER_STEP)),
    "the window has its own past": (
        "lfm2",
        recurrent("earlier = functional.pad(natural,", "earlier = functional.pad(own,"),
    ),
    "the state takes up its own values": ("qwen3_5_text", recurrent(TAKES_UP, '{"key": 1, "g": 3, "beta": 4}')),
    "a chunk has no past": ("granitemoehybrid", states("_copy(self.states.recurrent.get(state_idx))", "None")),
    "the index has a chunk of its own": (
        "deepseek_v32",
        Fault(
            "looped_cache.py",
            "return self.read[-1]\n",
            "return torch.cat([self.read[-1][:, : -keys.shape[1]], keys], 1)\n",
        ),
    ),
}


# `make test` makes these faults, the record of `verify` all.
SAMPLE = ("one state for all passes", "the state takes up its own values", "a chunk has no past")


@pytest.mark.parametrize("name", by_class(FAULTS, SAMPLE))
def test_fault_is_caught(export_of, tmp_path, name):
    family, fault = FAULTS[name]
    assert failures_of(export_of(family, **fault.spec), fault, tmp_path / name.replace(" ", "_"))
