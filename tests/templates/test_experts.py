"""Experts of an export are loaded, run and saved as the base's are, whatever was loaded before it in a process."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from support.compare import assert_bitwise, assert_close, assert_differs
from support.routing import run_without_ties
from support.structure import by_class
from support.tiny import MOE_FAMILIES, tiny_tokens

TRANSFORMERS_5 = int(transformers.__version__.split(".")[0]) >= 5
BACKENDS = ("eager", "batched_mm", "grouped_mm")
LENGTH = 9

needs_backends = pytest.mark.skipif(not TRANSFORMERS_5, reason="transformers 4 knows one way to run experts")

# Which backend runs is decided once for a class, by what was loaded first in a process: here the export of each family.
EXPORTS_FIRST = """
import json, sys
import torch
from transformers import AutoModelForCausalLM

torch.set_num_threads(1)
answers = {}
for family, export, base, saved in json.load(sys.stdin):
    answers[family] = []
    for directory in (export, base):
        model, info = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, output_loading_info=True)
        if directory == export:
            model.save_pretrained(saved)
            model.config.loop_steps = 1
        with torch.no_grad():
            logits = model.eval()(torch.arange(3, 12)[None], use_cache=False).logits
        answers[family].append({
            "amiss": [key for group in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in info[group]],
            "backend": getattr(model.config, "_experts_implementation", None),
            "logits": logits.tolist(),
        })
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def exports_first(export_dir, tiny_base, tmp_path_factory):
    """What a fresh process says of the export and the base of each family, and where it saved the exports."""
    saved = tmp_path_factory.mktemp("saved")
    families = [(name, str(export_dir(name)), str(tiny_base(name)), str(saved / name)) for name in MOE_FAMILIES]
    command = [sys.executable, "-c", EXPORTS_FIRST]
    done = subprocess.run(command, input=json.dumps(families), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), saved


def load(directory, **options):
    return AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, **options).eval()


def full(model, tokens):
    with torch.no_grad():
        return model(tokens, use_cache=False).logits


@contextmanager
def watched_backends():
    """The names of the backends that ran experts."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ran = []

    def watch(name, run):
        return lambda *args, **kwargs: ran.append(name) or run(*args, **kwargs)

    watched = {name: watch(name, ALL_EXPERTS_FUNCTIONS[name]) for name in BACKENDS if name != "eager"}
    with mock.patch.dict(ALL_EXPERTS_FUNCTIONS._local_mapping, watched):
        yield ran


def tensors(directory) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint by name."""
    return {name: tensor for path in Path(directory).glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_export_that_is_loaded_first_is_loaded_run_and_saved_like_the_base(
    family, exports_first, export_dir, tiny_base
):
    answers, saved = exports_first
    ours, theirs = answers[family]
    assert ours == theirs
    assert ours["amiss"] == []
    assert ours["backend"] == ("grouped_mm" if TRANSFORMERS_5 else None)
    assert_saved_like(saved / family, tiny_base(family))
    tokens = tiny_tokens(2, LENGTH)
    assert_bitwise(full(load(saved / family), tokens), full(load(export_dir(family)), tokens))


def assert_saved_like(directory, base) -> None:
    ours, theirs = tensors(directory), tensors(base)
    assert sorted(ours) == sorted(theirs)
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        assert torch.equal(ours[name], tensor), name


@needs_backends
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", by_class(MOE_FAMILIES))
def test_one_step_is_bitwise_the_base_on_every_backend(family, backend, export_dir, tiny_base):
    ours = load(export_dir(family), experts_implementation=backend, loop_steps=1)
    theirs = load(tiny_base(family), experts_implementation=backend)
    assert ours.config._experts_implementation == theirs.config._experts_implementation == backend
    tokens = tiny_tokens(2, LENGTH)
    assert_bitwise(full(ours, tokens), full(theirs, tokens))


@needs_backends
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("family", by_class(MOE_FAMILIES))
def test_looped_model_is_the_same_on_every_backend(family, frozen, export_dir):
    model = load(export_dir(family, frozen_routing=frozen))
    tokens, first = run_without_ties(model, lambda tokens: full(model, tokens), 2, LENGTH)
    ran = set()
    for backend in BACKENDS:
        model.set_experts_implementation(backend)
        with watched_backends() as calls:
            assert_close(full(model, tokens), first)
        ran |= {(backend, call) for call in calls}
    assert ran == {("batched_mm", "batched_mm"), ("grouped_mm", "grouped_mm")}
    model.config.loop_steps = 1
    assert_differs(full(model, tokens), first)
