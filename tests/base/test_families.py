"""Every causal language model of the installed transformers: exact, or refused with a reason."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import loopexport
from loopexport.base import families
from support.family_walk import RELEASE, check_exact, save_tiny_family, walk, walked_families
from support.multimodal_walk import MULTIMODAL_FAMILIES
from support.structure import REPRESENTATIVES, by_class

# The classes of structure; what is refused, or works in part; images, some of them added between layers; sound.
SAMPLE = (*REPRESENTATIVES, "xlnet", "qwen3_next", "qwen3_vl", "qwen2_audio")

RAW_WORDS = re.compile(r"['`]\w+['`]|\b(object|attribute|operand|validator|\w*Error|negative|StopIteration)\b|\^")


@pytest.mark.parametrize("family", by_class(walked_families(), SAMPLE))
def test_every_family_comes_out_as_recorded(family, tmp_path, monkeypatch):
    """`walk` itself fails where an export is not exact; a release that is not recorded has only that to pass."""
    recorded = families.outcomes().get(family, {}).get(RELEASE)
    monkeypatch.setattr(families, "outcomes", dict)
    outcome = walk(family, tmp_path)
    assert recorded is None or outcome.status == recorded.partition(": ")[0], str(outcome)


def test_layers_that_reuse_keys_of_another_layer_are_exact(tmp_path):
    """Gemma 3n and 4: two of six layers read what earlier ones stored; the span holds layers of both kinds."""
    if "gemma4_text" not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        pytest.skip("gemma4_text came with transformers 5")
    base = save_tiny_family("gemma4_text", tmp_path / "base")
    check_exact(base, (3, 5), tmp_path)
    check_exact(base, (4, 6), tmp_path)
    for kv in ("shared", "per_step", "reference"):
        out = loopexport.convert(str(base), tmp_path / kv, span=(3, 5), steps=2, kv=kv, decode="first_n", first_n=1)
        model = AutoModelForCausalLM.from_pretrained(out.root, trust_remote_code=True)
        model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4)


def test_iterations_place_tokens_where_the_natural_pass_did(tmp_path):
    """Llama 4 scales queries by a position that it takes from the cache's length, which grows in the natural pass."""
    base = save_tiny_family("llama4_text", tmp_path / "base", floor_scale=2, attn_scale=1.0)
    check_exact(base, (2, 5), tmp_path)  # layer 3 is one of those that do


def test_family_that_the_walk_saw_refused_is_refused_by_convert(tiny_base, tmp_path):
    with pytest.raises(
        loopexport.LoopExportError, match="family 'xlnet' cannot be looped: one of its layers takes no K/V cache"
    ):
        families.check_family({"model_type": "xlnet", "architectures": ["XLNetForCausalLM"], "n_layer": 4})


def test_reasons_are_plain_sentences():
    for family in families.outcomes():
        status, reason = families.newest_outcome(family)
        assert (status == "works") == (not reason)
        assert not RAW_WORDS.search(reason), reason
    for record in families.worded_outcomes().values():  # what --json prints, for every release
        for outcome in record.values():
            assert not RAW_WORDS.search(outcome), outcome


def test_every_family_of_this_release_has_an_outcome():
    recorded = {family for family, record in families.outcomes().items() if RELEASE in record}
    if not recorded:
        pytest.skip(f"the walk was not recorded on transformers {RELEASE}")
    assert set(walked_families()) == recorded


def test_each_family_is_in_the_groups_of_what_it_reads():
    groups = {reads: families.grouped_outcomes(reads) for reads in ("", *families.MEDIA)}
    names = {reads: [name for *_, names in group for name in names] for reads, group in groups.items()}
    assert sorted(itertools.chain(*names.values())) == sorted(families.outcomes())
    assert "llava" in names["images"]
    assert "llama" in names[""]
    if RELEASE in families.outcomes().get("qwen2_audio", {}):
        assert "qwen2_audio" in names["sound"]
    assert not set(names[""]) & set(MULTIMODAL_FAMILIES)
