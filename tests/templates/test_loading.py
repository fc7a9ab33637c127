"""Loading an export: through the auto classes, without LoopExport, re-saved, overridden, never silently unlooped."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

import loopexport
from loopexport.export.own_code import code_digest
from loopexport.templates.configuration_looped import CODE_DIGEST, family_name
from support.compare import assert_bitwise, assert_differs
from support.small_tokenizer import write_tokenizer
from support.tiny import FAMILIES, SPAN, tiny_tokens

TRANSFORMERS_5 = int(transformers.__version__.split(".")[0]) >= 5
LOADING_GROUPS = ("missing_keys", "unexpected_keys", "mismatched_keys")


def load(directory, **options):
    return AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, **options)


def load_checked(directory):
    """Load, and see to it that every weight was loaded and no other."""
    model, info = load(directory, output_loading_info=True)
    assert {group: list(info[group]) for group in LOADING_GROUPS} == {group: [] for group in LOADING_GROUPS}
    return model


def logits(model, tokens):
    with torch.no_grad():
        return model(tokens, use_cache=False).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_loads_with_no_key_missing_or_left_over(export_dir, family):
    load_checked(export_dir(family))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("auto_class", [AutoModelForCausalLM, AutoModel])
def test_parameter_names_are_the_bases(export_dir, tiny_base, family, auto_class):
    ours = auto_class.from_pretrained(export_dir(family), trust_remote_code=True)
    theirs = auto_class.from_pretrained(tiny_base(family))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert ours._no_split_modules == theirs._no_split_modules


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fields", [{"loop_steps": 1}, {"loop_anchor": 1.0}], ids=["one step", "anchor one"])
def test_identities_are_bitwise_the_base_model(export_dir, plain, family, fields):
    tokens = tiny_tokens(2, 12)
    assert_bitwise(logits(load(export_dir(family), **fields), tokens), logits(plain(family), tokens))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_identities_are_bitwise_in_half_precision(export_dir, tiny_base, dtype):
    tokens = tiny_tokens(2, 12)
    theirs = logits(AutoModelForCausalLM.from_pretrained(tiny_base(), dtype=dtype), tokens)
    for fields in ({"loop_steps": 1}, {"loop_anchor": 1.0}):
        assert_bitwise(logits(load(export_dir(), dtype=dtype, **fields), tokens), theirs)
    looped = logits(load(export_dir(), dtype=dtype), tokens)
    assert looped.dtype == dtype
    assert_differs(looped.float(), theirs.float())


def test_auto_model_gives_the_hidden_states_of_the_looped_model(export_dir):
    tokens = tiny_tokens(2, 12)
    backbone = AutoModel.from_pretrained(export_dir(), trust_remote_code=True).eval()
    model = load(export_dir())
    with torch.no_grad():
        assert_bitwise(model.lm_head(backbone(tokens).last_hidden_state), logits(model, tokens))


def test_auto_config_holds_the_loop(export_dir):
    config = AutoConfig.from_pretrained(export_dir(), trust_remote_code=True)
    assert (config.loop_span, config.loop_steps, config.loop_damping, config.loop_kv) == ([*SPAN], 3, None, "shared")
    assert config.model_type == "looped_llama"


def test_without_trust_remote_code_loading_fails_rather_than_giving_the_base(export_dir):
    for auto_class in (AutoConfig, AutoModel, AutoModelForCausalLM):
        with pytest.raises((ValueError, OSError), match=r"trust_remote_code|looped_llama"):
            auto_class.from_pretrained(export_dir(), trust_remote_code=False)


def test_class_names_are_unknown_to_transformers(export_dir):
    config = json.loads((export_dir("qwen3") / "config.json").read_text())
    names = [*config["architectures"], *(entry.split(".")[1] for entry in config["auto_map"].values())]
    assert not [name for name in names if hasattr(transformers, name)]
    assert {entry.split(".")[0] for entry in config["auto_map"].values()} == {"configuration_looped", "modeling_looped"}


def test_family_names_are_unique_in_transformers():
    from transformers import CONFIG_MAPPING

    names = [family_name(model_type) for model_type in CONFIG_MAPPING]
    assert len(set(names)) == len(names)


def test_steps_can_be_overridden_at_load_and_at_run_time(export_dir):
    tokens = tiny_tokens(2, 12)
    at_export = logits(load(export_dir(steps=6)), tokens)
    assert_bitwise(logits(load(export_dir(steps=3), loop_steps=6), tokens), at_export)
    model = load(export_dir(steps=3))
    assert_differs(logits(model, tokens), at_export)
    model.config.loop_steps = 6
    assert_bitwise(logits(model, tokens), at_export)


def test_a_misspelt_field_is_refused_where_it_is_set(export_dir, tmp_path):
    message = "loop_stepz is not a field of the loop"
    export = export_dir(steps=3)
    with pytest.raises(ValueError, match=message):
        load(export).config.loop_stepz = 6
    copy = shutil.copytree(export, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "loop_stepz": 6}))
    with pytest.raises(ValueError, match=message):
        load(copy)


def test_every_field_can_be_overridden(export_dir):
    tokens = tiny_tokens(2, 12)
    fields = {"span": (2, 5), "steps": 4, "damping": 0.5, "anchor": 0.5, "mode": "layer", "kv": "per_step"}
    overrides = {f"loop_{name}": value for name, value in fields.items()}
    assert_bitwise(logits(load(export_dir(), **overrides), tokens), logits(load(export_dir(**fields)), tokens))


BAD_FIELDS = [
    ("loop_steps", 0, "steps 0"),
    ("loop_steps", 2.5, "steps 2.5"),
    ("loop_damping", float("nan"), "damping nan"),
    ("loop_damping", 0.0, "damping 0"),
    ("loop_anchor", 1.5, "anchor 1.5"),
    ("loop_anchor", float("inf"), "anchor inf"),
    ("loop_mode", "spiral", "mode 'spiral'"),
    ("loop_kv", "own", "kv 'own'"),
    ("loop_decode", "some", "decode 'some'"),
    ("loop_first_n", -1, "first_n -1"),
    ("loop_span", [4, 2], "span 4:2 is reversed"),
    ("loop_span", "1:4", "not a pair"),
]


@pytest.mark.parametrize(("field", "value", "message"), BAD_FIELDS)
def test_impossible_values_are_refused_at_load_and_at_assignment(export_dir, field, value, message):
    with pytest.raises(ValueError, match=message):
        load(export_dir(), **{field: value})
    model = load(export_dir())
    with pytest.raises(ValueError, match=message):
        setattr(model.config, field, value)
    assert getattr(model.config, field) != value


def test_span_outside_the_model_is_refused(export_dir):
    with pytest.raises(ValueError, match="ends outside the model, which has 6 layers"):
        load(export_dir(), loop_span=[4, 7])
    model = load(export_dir())
    model.config.loop_span = [4, 7]
    with pytest.raises(ValueError, match="ends outside the model"):
        logits(model, tiny_tokens(1, 3))


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "phi3"])
def test_re_saved_model_is_an_equal_model(export_dir, tmp_path, family):
    model, tokens = load(export_dir(family)), tiny_tokens(2, 12)
    model.config.loop_steps = 5
    model.save_pretrained(tmp_path)
    again = load_checked(tmp_path)
    assert again.config.loop_steps == 5
    assert_bitwise(logits(again, tokens), logits(model, tokens))
    saved = json.loads((tmp_path / "config.json").read_text())
    original = json.loads((export_dir(family) / "config.json").read_text())
    for key in ("auto_map", "architectures", "model_type", "num_hidden_layers", "loop_span"):
        assert saved[key] == original[key], key


def test_re_saved_backbone_keeps_all_three_auto_classes(export_dir, tmp_path):
    AutoModel.from_pretrained(export_dir(), trust_remote_code=True).save_pretrained(tmp_path)
    original = json.loads((export_dir() / "config.json").read_text())
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == original["auto_map"]


def test_model_and_config_can_be_pickled(export_dir):
    model, tokens = load(export_dir()), tiny_tokens(1, 5)
    assert_bitwise(logits(pickle.loads(pickle.dumps(model)), tokens), logits(model, tokens))
    assert pickle.loads(pickle.dumps(model.config)).loop_steps == 3


WITHOUT_LOOPEXPORT = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("loopexport", "templates"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())
try:
    import loopexport
except ImportError:
    pass
else:
    raise SystemExit("loopexport could be imported")

import torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
tokens = torch.load(sys.argv[2])
with torch.no_grad():
    torch.save(model(tokens, use_cache=False).logits, sys.argv[3])
print(model.generate(tokens, max_new_tokens=3, do_sample=False).shape)
"""


def test_loads_in_a_fresh_process_where_loopexport_cannot_be_imported(export_dir, tmp_path):
    tokens = tiny_tokens(2, 12)
    torch.save(tokens, tmp_path / "tokens.pt")
    command = [sys.executable, "-c", WITHOUT_LOOPEXPORT, export_dir(), tmp_path / "tokens.pt", tmp_path / "logits.pt"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "torch.Size([2, 15])" in done.stdout
    assert_bitwise(torch.load(tmp_path / "logits.pt"), logits(load(export_dir()), tokens))


@pytest.mark.parametrize(
    "tokenizer_class", [None, "PreTrainedTokenizerFast", "LlamaTokenizerFast", "Qwen2TokenizerFast"]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_auto_tokenizer_is_the_bases(tiny_base, tmp_path, family, tokenizer_class):
    if tokenizer_class is None and not TRANSFORMERS_5:
        pytest.skip("transformers 4 finds no tokenizer for a custom type unless the files name one; it says so")
    base = shutil.copytree(tiny_base(family), tmp_path / "base")
    write_tokenizer(base, tokenizer_class)
    out = loopexport.convert(str(base), tmp_path / "out", span=SPAN, steps=3).root
    theirs, ours = (AutoTokenizer.from_pretrained(path, trust_remote_code=True) for path in (base, out))
    texts = ["it's 123456789 and  two\n\n lines", "naïve café it is it", " leading space"]
    assert type(ours) is type(theirs)
    assert ours(texts).input_ids == theirs(texts).input_ids


def test_code_digest_is_up_to_date():
    digest = code_digest()
    assert digest == CODE_DIGEST, f'set CODE_DIGEST = "{digest}" in templates/configuration_looped.py'


def test_another_version_of_the_template_under_the_same_name_is_not_mixed_up(export_dir, tmp_path):
    tokens = tiny_tokens(1, 5)
    before = logits(load(export_dir()), tokens)
    other = shutil.copytree(export_dir(), tmp_path / export_dir().name)
    rules = (other / "looped_rules.py").read_text()
    (other / "looped_rules.py").write_text(rules.replace("else h + s *", "else h - s *"))
    config = (other / "configuration_looped.py").read_text()
    (other / "configuration_looped.py").write_text(config.replace(CODE_DIGEST, "e" * 16))
    assert_differs(logits(load(other), tokens), before)
    assert_bitwise(logits(load(export_dir()), tokens), before)


def test_two_exports_live_side_by_side_in_one_process(export_dir, plain):
    """Each keeps its own loop, and loading them leaves the native model as it is."""
    tokens = tiny_tokens(2, 12)
    first, second = load(export_dir(steps=3)), load(export_dir(steps=6))
    before = logits(first, tokens)
    assert_differs(logits(second, tokens), before)
    assert_bitwise(logits(first, tokens), before)
    assert type(plain()).__module__.startswith("transformers.models")
