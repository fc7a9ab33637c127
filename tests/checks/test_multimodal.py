"""`verify` of multimodal exports: an image in the prompt, the layers of the language model, the right Auto class."""

from __future__ import annotations

import sys

import pytest
import torch
from transformers import CONFIG_MAPPING

import loopexport
from loopexport.base.auto_class import auto_class
from loopexport.checks import probe as probe_module
from loopexport.checks.effect import IMAGE_COUNTS, decoder_layers
from loopexport.checks.probe import make_probe, text_probe
from loopexport.checks.verification import CACHED_IS_BY_HAND, FULL_IS_BY_HAND, MODEL, ONE_STEP_IS_BASE
from loopexport.errors import ExportError
from loopexport.export.directory import open_export
from support.export_faults import Fault, failures_of
from support.multimodal import (
    IMAGE_TOKEN,
    IMAGE_TOKENS,
    KINDS,
    VIDEO_TOKEN,
    image_prompt,
    multimodal_config,
    multimodal_model,
    save_multimodal,
    save_processor,
)
from support.tiny import SPAN

KNOWN = [kind for kind in KINDS if kind in CONFIG_MAPPING]


@pytest.fixture(scope="module")
def export_of(tmp_path_factory):
    """`export_of(kind, **spec)`: an export of a tiny multimodal base, with its processor if we can make that."""
    made = {}

    def make(kind, **spec):
        key = (kind, *spec.items())
        if key not in made:
            base = save_multimodal(kind, tmp_path_factory.mktemp("base") / kind)
            if kind in PICTURED:
                save_processor(kind, base)
            out = tmp_path_factory.mktemp("export") / "_".join([kind, *map(str, spec.values())])
            made[key] = loopexport.convert(str(base), out, **{"span": SPAN, "steps": 3, **spec}).root
        return made[key]

    return make


PICTURED = ("gemma3", "llava")


@pytest.fixture
def pillow():
    """What the processors of `PICTURED` need."""
    pytest.importorskip("PIL")
    pytest.importorskip("transformers.models.gemma3.image_processing_pil_gemma3")


def outcome(root) -> dict:
    """The checks of `verify`, by name."""
    return {check.name: check for check in loopexport.verify(root)}


@pytest.mark.parametrize(("kind", "kv"), [("gemma3", "shared"), ("gemma3", "per_step"), ("llava", "reference")])
def test_every_check_has_an_image_in_its_prompt(export_of, pillow, kind, kv):
    root = export_of(kind, kv=kv)
    checks = outcome(root)
    assert [check for check in checks.values() if not check.passed and "by design" not in check.detail] == []
    assert {*MODEL, IMAGE_COUNTS} <= checks.keys()
    probe = make_probe(open_export(root), multimodal_config(kind))
    assert (probe.tokens == IMAGE_TOKEN).sum() == IMAGE_TOKENS[kind]
    assert "pixel_values" in probe.images


@pytest.mark.parametrize(
    ("kind", "kv"), [(kind, kv) for kind, kv in (("qwen2_5_vl", "shared"), ("qwen3_5", "per_step")) if kind in KNOWN]
)
def test_image_at_positions_of_three_coordinates(export_of, monkeypatch, kind, kv):
    """Transformers makes these processors only where torchvision is installed."""
    monkeypatch.setattr(probe_module, "_processed_prompt", lambda root: image_prompt(kind))
    checks = outcome(export_of(kind, kv=kv))
    assert [check for check in checks.values() if check.passed is False] == []
    for name in (ONE_STEP_IS_BASE, FULL_IS_BY_HAND, CACHED_IS_BY_HAND, IMAGE_COUNTS):
        assert checks[name].passed, checks[name]


def test_prompt_of_text_alone_says_why(export_of):
    checks = outcome(export_of("qwen2_5_vl"))
    assert checks[IMAGE_COUNTS].passed is None
    assert "the prompt has text alone: the export has none of processor_config.json" in checks[IMAGE_COUNTS].detail
    assert all(checks[name].passed for name in MODEL)


def test_missing_package_is_named(export_of, pillow, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    probe = make_probe(open_export(export_of("gemma3")), multimodal_config("gemma3"))
    assert probe.prompt == 0
    assert "pip install pillow" in probe.reason


def test_random_tokens_never_stand_for_an_image():
    tokens = text_probe(multimodal_config("gemma3", vocab_size=VIDEO_TOKEN + 4)).tokens
    assert not (tokens > VIDEO_TOKEN).any()  # Gemma 3 has no token for a video


@pytest.mark.parametrize("kind", KNOWN)
def test_layers_are_those_of_the_language_model(kind):
    """The vision tower has as many."""
    model = multimodal_model(kind)
    assert decoder_layers(model) == list(model.model.language_model.layers)


@pytest.mark.parametrize("kind", KNOWN)
def test_auto_class_loads_the_whole_model(kind):
    with torch.device("meta"):
        model = auto_class(multimodal_config(kind).to_dict()).from_config(multimodal_config(kind))
    assert type(model).__name__.endswith("ForConditionalGeneration")


WALK = "    walk = loop.begin(loop.layers_of(decoder), args, kwargs)\n"
EMBEDDINGS = 'kwargs["inputs_embeds"]'
FAULTS = {
    "iterations see no later image token": Fault(
        "looped_call.py",
        "        return args, kwargs\n",
        '        return args, kwargs | ({"attention_mask": None} if k else {})\n',
    ),
    "all tokens are one": Fault(
        "looped_decoder.py", WALK, f"{WALK}    {EMBEDDINGS} = 0 * {EMBEDDINGS} + {EMBEDDINGS}[:, :1]\n"
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_caught(export_of, pillow, tmp_path, name):
    assert failures_of(export_of("gemma3", kv="shared"), FAULTS[name], tmp_path / name.replace(" ", "_"))


def test_vllm_is_refused(export_of):
    with pytest.raises(ExportError, match="multimodal exports were not tried on vLLM; leave --runtime out"):
        loopexport.verify(export_of("qwen2_5_vl"), runtime="vllm")
