"""Deliberate faults in an export, each recorded as genuine: `verify` has to catch every one.

A fault in the code is recorded in the manifest with its new digest, so that only the checks of the model can catch it.
"""

from __future__ import annotations

import shutil

import pytest
from safetensors.torch import load_file, save_file

import loopexport
from loopexport.errors import LoopExportError
from support.damage import edit_config, flip_last_byte
from support.export_faults import Fault, failures_of, mutate
from support.push import edit_manifest
from support.structure import by_class


def rule(old: str, new: str, **spec) -> Fault:
    """A fault in an update rule."""
    return Fault("looped_rules.py", old, new, spec)


def field_of_spec(old: str, new: str, **spec) -> Fault:
    """A fault in how the loop's fields are read."""
    return Fault("looped_spec.py", old, new, spec)


ANCHOR = "spec.anchor * g.natural + (1 - spec.anchor) * h"
EULER_STEP = "h = y if s == 1 else h + s * (y - h)"
EULER_STEPS = "for k in range(1, g.steps + 1):"
NORMS = "if spec.norm_interpolation and k < g.steps:"

PATH = {"path": ((0, 2), (3, 5), (0, 2), (4, 6))}  # leaves out layer 2
TWICE = {"path": ((0, 4), (1, 5), (2, 6))}  # visits layers 2 and 3 in two detours

FAULTS = {
    # Update rules.
    "sign of the step": rule("h + s * (y - h)", "h - s * (y - h)"),
    "one step too few": rule(EULER_STEPS, "for k in range(1, g.steps):"),
    "one step too many": rule(EULER_STEPS, "for k in range(1, g.steps + 2):"),
    "last step is dropped": rule(EULER_STEP, f"{EULER_STEP} if k < g.steps else h"),
    "coarse rounding": rule(EULER_STEP, "h = y if s == 1 else h + (s * (y - h)).half().float()"),
    "step from x": rule(EULER_STEP, "h = y if s == 1 else x + s * (y - x)"),
    "naive loop is damped": rule(EULER_STEP, "h = h + 0.5 * (y - h)", damping=1.0),
    "norms are not rescaled": rule(NORMS, "if False:", norm_interpolation=True),
    "last norm is rescaled too": rule(NORMS, "if spec.norm_interpolation:", norm_interpolation=True),
    "norms go to another place": rule("g.norm(g.natural)", "g.norm(h)", norm_interpolation=True),
    "anchor is ignored": rule("return h if spec.anchor == 0 else", "return h if spec.anchor < 1 else", anchor=0.5),
    "anchor is swapped": rule(ANCHOR, "(1 - spec.anchor) * g.natural + spec.anchor * h", anchor=0.25),
    "anchor on the input": rule(ANCHOR, "spec.anchor * x + (1 - spec.anchor) * h", anchor=0.5),
    "no anchor is one": rule("return h if spec.anchor == 0", "return g.natural if spec.anchor == 0"),
    "a rule is another": rule('"midpoint": _midpoint', '"midpoint": _heun', rule="midpoint"),
    "no momentum": rule("momentum = 0.3 if", "momentum = 0.0 if", rule="heavy_ball"),
    "a step of the schedule": rule("for s in spec.schedule or", "for s in (0.3,) * 3 or", rule="ema_sched",
                                   schedule=(0.5, 0.3, 0.2)),
    "mean of one too many": rule("/ k", "/ (k + 1)", rule="uniform"),
    "slopes of rk4": rule("k1 + 2 * k2", "k1 + k2", rule="rk4"),
    # Fields of the loop.
    "nothing loops": field_of_spec("return self.steps == 1 or self.anchor == 1", "return True"),
    "one step is no identity": field_of_spec(
        "and body.evaluations > 1]", "and body.evaluations > 0]", span=((0, 2), (3, 5)), steps=(1, 2), damping=0.8
    ),
    "step size": field_of_spec("return 1.0 / steps", "return 0.9 / steps"),
    "damping is ignored": field_of_spec("if self.damping is None else self.damping", "", damping=0.8),
    "another span": field_of_spec(
        "return self.span if isinstance(self.span[0], tuple) else (self.span,)",
        "return ((self.span[0] + 1, self.span[1] + 1),)",
    ),
    "span without its last layer": field_of_spec(
        "return self.span if isinstance(self.span[0], tuple) else (self.span,)",
        "return ((self.span[0], self.span[1] - 1),)",
    ),
    "one more step": field_of_spec('"steps": check_steps', '"steps": lambda value: 4 if value == 3 else value'),
    "layers loop as a block": field_of_spec('one_of("mode", MODES)', 'lambda value: "block"', mode="layer"),
    "a block loops by layers": field_of_spec('one_of("mode", MODES)', 'lambda value: "layer"'),
    "keys of another pass": field_of_spec('one_of("kv", KV_POLICIES)', 'lambda value: "per_step"'),
    "steps of another span": field_of_spec(
        "return self.steps if isinstance", "return self.steps[::-1] if isinstance", span=((0, 2), (3, 5)), steps=(2, 3)
    ),
    "natural keys for all": field_of_spec('one_of("kv", KV_POLICIES)', 'lambda value: "shared"', kv="per_step"),
    "reference as per_step": field_of_spec('one_of("kv", KV_POLICIES)', 'lambda value: "per_step"', kv="reference"),
    "decode steps loop": field_of_spec('one_of("decode", DECODE_MODES)', 'lambda value: "full"', decode="bypass"),
    "no decode step loops": field_of_spec('one_of("decode", DECODE_MODES)', 'lambda value: "bypass"'),
    "one decode step more": field_of_spec(
        '"first_n": check_first_n', '"first_n": lambda value: 2', decode="first_n", first_n=1
    ),
    # Paths.
    "a detour begins earlier": Fault("looped_path.py", "setdefault(newest, [])", "setdefault(newest - 1, [])", PATH),
    "a detour runs backwards": Fault("looped_path.py", "(after, tuple(layers))", "(after, tuple(layers[::-1]))", PATH),
    "no layer is left out": Fault("looped_path.py", "if layer not in visited)", "if layer < 0)", PATH),
    "a detour has the natural keys": Fault(
        "looped_body.py", "call.run_iteration(call.iterations, hidden)", "call.run_iteration(1, hidden)", TWICE
    ),
    # The walk and its cache.
    "span runs backwards": Fault("looped_body.py", "in enumerate(self.calls):", "in enumerate(self.calls[::-1]):"),
    "a layer is left out": Fault("looped_body.py", "in enumerate(self.calls):", "in enumerate(self.calls[:-1]):"),
    "another layer's iteration": Fault(
        "looped_body.py", "hidden = call.run_iteration(", "hidden = self.calls[0].run_iteration("
    ),
    "one slot for all iterations": Fault(
        "looped_walk.py", "self.slots[index, k]", "self.slots[index, 1]", {"kv": "per_step"}
    ),
    "skipped tokens have no keys": Fault(
        "looped_cache.py",
        "self.cache.update(*self.new, slot,",
        "self.cache.update(*[0 * each for each in self.new], slot,",
        {"kv": "per_step", "decode": "bypass"},
    ),
    "shared reads its own": Fault(
        "looped_cache.py", "return self.read[:2]\n", "return keys, values\n"
    ),
    "reference reads the natural chunk": Fault(
        "looped_cache.py", "return self._replace_chunk(self.read[0], keys), self._replace_chunk(self.read[1], values)",
        "return self.read", {"kv": "reference"},
    ),
}  # fmt: skip


# `make test` makes these faults, the record of `verify` all.
SAMPLE = (
    "sign of the step",
    "one step too few",
    "coarse rounding",
    "norms are not rescaled",
    "anchor is ignored",
    "a rule is another",
    "nothing loops",
    "another span",
    "layers loop as a block",
    "keys of another pass",
    "one slot for all iterations",
    "reference reads the natural chunk",
)


@pytest.mark.parametrize("name", by_class(FAULTS, SAMPLE))
def test_fault_in_the_code_is_caught_by_the_model(export_dir, tmp_path, name):
    fault = FAULTS[name]
    failed = failures_of(export_dir("llama", **fault.spec), fault, tmp_path / f"mutant_{name.replace(' ', '_')}")
    assert failed
    assert not {"files are as written", "the manifest knows every file"} & {*failed}


def test_code_that_is_only_recorded_again_passes(export_dir, tmp_path):
    """Or else the faults could be caught by their records."""
    root = shutil.copytree(export_dir("llama"), tmp_path / "mutant_control")
    mutate(root, rule("h + s * (y - h)", "h + (s * (y - h))"))
    assert all(check.passed for check in loopexport.verify(root, trust_remote_code=True))


def change_tensors(root, change):
    """Rewrite the weights and record them as genuine."""
    path = root / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})
    edit_manifest(root, lambda values: values["weights"].update({path.name: {"size": path.stat().st_size}}))


def swap(tensors):
    """Swap two tensors of the same shape."""
    one, other = (f"model.layers.{number}.mlp.up_proj.weight" for number in (1, 2))
    tensors[one], tensors[other] = tensors[other], tensors[one]


def swap_on_disk(root):
    """Swap two tensors; the sizes and the header stay."""
    tensors = load_file(root / "model.safetensors")
    swap(tensors)
    save_file(tensors, root / "model.safetensors", {"format": "pt"})


def forget(root, group, name):
    """Remove a record from the manifest."""
    edit_manifest(root, lambda values: values[group].pop(name))


def write(name, text="{}"):
    """A damage: a file that the manifest does not have."""

    def damage(root):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(text)

    return damage


DAMAGE = {
    "a field of the base": lambda root: edit_config(root, rms_norm_eps=0.1),
    "a new field": lambda root: edit_config(root, attention_multiplier=2.0),
    "fewer layers": lambda root: edit_config(root, num_hidden_layers=5),
    "a span outside the base": lambda root: edit_config(root, loop_span=[4, 9]),
    "a loop that is none": lambda root: edit_config(root, loop_rule="newton"),
    "auto_map": lambda root: edit_config(root, auto_map={"AutoModelForCausalLM": "modeling_looped.LoopedLlamaModel"}),
    "the base's class": lambda root: edit_config(root, architectures=["LlamaForCausalLM"]),
    "a flipped bit of the weights": lambda root: flip_last_byte(root / "model.safetensors"),
    "swapped tensors": swap_on_disk,
    "a missing tensor": lambda root: change_tensors(root, lambda each: each.pop("model.layers.2.mlp.up_proj.weight")),
    "a tensor too many": lambda root: change_tensors(root, lambda each: each.update(x=each["model.norm.weight"] + 0)),
    "a forgotten file": lambda root: forget(root, "files", "looped_rules.py"),
    "forgotten weights": lambda root: forget(root, "weights", "model.safetensors"),
    "original": lambda root: edit_config(root / "base", rms_norm_eps=0.1),
    "adapter": write("adapter_config.json"),
    "chat template": write("chat_template.jinja", "{{ messages }}"),
    "tokenizer": write("tokenizer.json"),
    "code": write("modeling_other.py", ""),
    "custom generate": write("custom_generate/generate.py", ""),
    "more weights": write("pytorch_model.bin", "x"),
}


# Damage without which no check is possible.
REFUSED = ("a span outside the base", "a loop that is none")


@pytest.mark.parametrize("name", DAMAGE)
def test_other_fault_is_caught(export_dir, tmp_path, name):
    root = shutil.copytree(export_dir("llama"), tmp_path / f"mutant_{name.replace(' ', '_')}")
    DAMAGE[name](root)
    if name in REFUSED:
        with pytest.raises(LoopExportError):
            loopexport.verify(root)
        return
    failed = [check.name for check in loopexport.verify(root, full=True) if check.passed is False]
    assert failed
