"""Quantised checkpoints: passed on as they are, run as the base runs, and never taken for what they are not."""

from __future__ import annotations

import importlib.util
import json
import sys
import types
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, __version__
from transformers.integrations import awq

import loopexport
from loopexport.checks import verification
from loopexport.templates import modeling_looped
from loopexport.templates.configuration_looped import family_name, looped_config_class
from loopexport.templates.looped_spec import LoopSpec
from support.commands import checks, run, tree
from support.family_walk import check_exact, why_base_cannot_decode
from support.quantised import (
    as_awq,
    as_fp8,
    as_gptq,
    as_mxfp4,
    by_bitsandbytes_4bit,
    by_bitsandbytes_8bit,
    by_compressed_tensors,
    by_torchao,
)
from support.tiny import SPAN, save_tiny

TRANSFORMERS_5 = int(__version__.split(".")[0]) >= 5
NF4_SHAPES = {"intermediate_size": 128, "num_key_value_heads": 4}  # the CPU kernel takes multiples of 64

# What each needs, of which family it is, how it is made, and whether its kernels give a token the same numbers alone
# and among others, so that cached decoding can equal a full forward: True, False, or None where the machine decides.
RUNS = {
    "torchao int8": ("torchao", "llama", by_torchao, {}, True),
    "torchao int8 experts": ("torchao", "qwen3_moe", by_torchao, {}, True),
    "bitsandbytes nf4": ("bitsandbytes", "llama", by_bitsandbytes_4bit, NF4_SHAPES, None),
    "bitsandbytes int8": ("bitsandbytes", "llama", by_bitsandbytes_8bit, {}, False),
    "bitsandbytes int8 experts": ("bitsandbytes", "qwen3_moe", by_bitsandbytes_8bit, {}, False),
    "compressed-tensors int4": ("compressed_tensors", "llama", partial(by_compressed_tensors, num_bits=4), {}, True),
    "compressed-tensors int8": ("compressed_tensors", "llama", partial(by_compressed_tensors, num_bits=8), {}, True),
    "fp8": ("accelerate", "llama", as_fp8, {}, True),
    "fp8 experts": ("accelerate", "qwen3_moe", as_fp8, {}, True),
    "fp8 latent attention": ("accelerate", "deepseek_v3", as_fp8, {}, True),
    "mxfp4 experts": ("accelerate", "gpt_oss", as_mxfp4, {}, True),
}
# What there is a checkpoint of, and what runs: transformers 4 saves torchao's tensors as pickles only, and leaves FP8,
# and MXFP4 in fp32, to GPUs.
MADE = [kind for kind in RUNS if TRANSFORMERS_5 or not kind.startswith("torchao")]
RUNNABLE = [kind for kind in MADE if TRANSFORMERS_5 or "fp" not in kind]
# What no CPU runs, or not without packages that need a GPU to build.
STAYS = {"gptq": as_gptq, "awq": as_awq}


@pytest.fixture(scope="session")
def quantised_base(tmp_path_factory):
    """`quantised_base(kind)`: the directory of a quantised tiny base; skips where the library is not there."""
    made = {}

    def make(kind):
        if kind not in made:
            package, family, method, shapes, _ = RUNS.get(kind) or ("torch", "llama", STAYS[kind], {}, False)
            if importlib.util.find_spec(package) is None:
                pytest.skip(f"{package} is not installed")
            root = tmp_path_factory.mktemp("quantised")
            made[kind] = method(save_tiny(family, root / "base", **shapes), root / kind.replace(" ", "-"))
        return made[kind]

    return make


@pytest.fixture(params=[*MADE, *STAYS])
def kind(request):
    return request.param


def looped(base, directory, **spec):
    return loopexport.convert(str(base), directory / "out", **{"span": SPAN, "steps": 3, **spec}).root


# ---------------------------------------------------------------------------------------------------------------------
# Bookkeeping, whether it runs or not.
# ---------------------------------------------------------------------------------------------------------------------


def test_config_and_tensors_stay_as_they_are(quantised_base, tmp_path, kind):
    base = quantised_base(kind)
    out = looped(base, tmp_path)
    before, after = (json.loads((root / "config.json").read_text()) for root in (base, out))
    assert after["quantization_config"] == before["quantization_config"]
    added = {"model_type", "architectures", "auto_map", *LoopSpec((0, 1), 2).to_config_fields()}
    assert {key for key in after if after[key] != before.get(key)} <= added
    assert tree(base)["model.safetensors"] == tree(out)["model.safetensors"]
    ours = AutoConfig.from_pretrained(out, trust_remote_code=True).quantization_config
    assert ours == AutoConfig.from_pretrained(base).quantization_config
    assert run("restore", out, tmp_path / "again").exit_code == 0
    assert tree(tmp_path / "again") == tree(base)


@pytest.mark.parametrize("name", ["quantize_config.json", "quant_config.json", "hf_quant_config.json", "recipe.yaml"])
def test_a_quantisers_own_small_files_are_carried(quantised_base, tmp_path, name):
    base = quantised_base("gptq")
    (base / name).write_text("{}")
    assert (looped(base, tmp_path) / name).read_text() == "{}"


def test_plan_counts_bytes_and_no_parameters(quantised_base, tmp_path):
    base = quantised_base("gptq")
    found = loopexport.plan_convert(str(base), span=SPAN, steps=3)
    layer = sum(tensor.nbytes for name, tensor in load_file(base / "model.safetensors").items() if ".layers.2." in name)
    outside = 4 * (64 + 131 * 64 + 64)
    assert (found.cost.params_read, found.cost.base_params_read) == (None, None)
    assert found.cost.base_bytes_read == 6 * layer + outside
    assert found.cost.bytes_read == 12 * layer + outside
    text = run("convert", base, tmp_path / "out", "--span", "1:4", "--steps", 3, "--dry-run").stdout
    assert f"{12 * layer + outside:,} bytes of weights read a token instead of {6 * layer + outside:,}\n" in text
    assert "quantised by gptq" in text
    assert "parameters" not in text


def test_packed_experts_count_by_those_a_token_is_sent_to(quantised_base):
    base = quantised_base("mxfp4 experts")
    tensors = load_file(base / "model.safetensors")
    experts = sum(tensor.nbytes for name, tensor in tensors.items() if ".experts." in name)
    rest = sum(tensor.nbytes for name, tensor in tensors.items() if ".experts." not in name)
    found = loopexport.plan_convert(str(base), span=SPAN, steps=1).cost
    assert found.base_bytes_read == rest + experts * 2 // 4 - 130 * 64 * 4  # of the embedding one row of 131


def test_kv_bytes_are_in_the_dtype_of_the_config_or_left_open(quantised_base, tmp_path):
    base = quantised_base("awq")
    config = json.loads((base / "config.json").read_text())
    for name in ("dtype", "torch_dtype"):
        config.pop(name, None)
    root = tmp_path / "base"
    root.mkdir()
    (root / "model.safetensors").symlink_to(base / "model.safetensors")
    for dtype, expected in (("float16", 6 * 2 * 2 * 16 * 2), (None, None)):
        (root / "config.json").write_text(json.dumps({**config, "dtype": dtype}))
        assert loopexport.plan_convert(str(root), span=SPAN, steps=3).cost.kv_bytes == expected


# ---------------------------------------------------------------------------------------------------------------------
# Running.
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", RUNNABLE)
def test_looped_quantised_model_is_exact(quantised_base, tmp_path, kind):
    base, decodes = quantised_base(kind), RUNS[kind][-1]
    reason = "" if decodes else why_base_cannot_decode(base)
    check_exact(base, (2, 4), tmp_path, decodes=not reason)
    assert reason or decodes is not False, "the base's own cached decoding is exact here; the looped one has to be"


@pytest.mark.parametrize("kind", RUNNABLE)
def test_the_same_weights_are_quantised_as_in_the_base(quantised_base, tmp_path, kind):
    """Were anything looked up by the looped model's type or class, a module would be left out."""

    def kinds(root):
        model = AutoModelForCausalLM.from_pretrained(root, trust_remote_code=True)
        modules = {path: type(module).__name__ for path, module in model.named_modules() if path}
        return modules, {name: (type(each), each.dtype) for name, each in model.state_dict().items()}

    base = quantised_base(kind)
    ours, theirs = kinds(looped(base, tmp_path)), kinds(base)
    ours[0]["model.layers"] = theirs[0]["model.layers"]  # the one module whose class we change
    assert ours == theirs


@pytest.mark.parametrize("kind", STAYS)
def test_what_the_base_lacks_here_the_export_lacks_too(quantised_base, tmp_path, kind):
    base = quantised_base(kind)
    with pytest.raises(Exception) as theirs:  # noqa: PT011  ImportError or RuntimeError, by the release
        AutoModelForCausalLM.from_pretrained(base)
    with pytest.raises(theirs.type) as ours:
        AutoModelForCausalLM.from_pretrained(looped(base, tmp_path), trust_remote_code=True)
    assert str(ours.value) == str(theirs.value)


# ---------------------------------------------------------------------------------------------------------------------
# verify.
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", RUNNABLE)
def test_verify_holds_an_export_to_what_its_base_does(quantised_base, tmp_path, kind):
    outcome, status = checks(looped(quantised_base(kind), tmp_path))
    assert status == 0, outcome
    decode = outcome.pop("cached decode equals the full forward")
    assert all(check["passed"] for check in outcome.values()), outcome
    decodes = RUNS[kind][-1]
    assert decode["passed"] in {True: (True,), False: (None,), None: (True, None)}[decodes], decode
    if decode["passed"] is None:
        assert "the base's own cached decoding is off by" in decode["detail"]


def test_verify_runs_a_quantised_base_in_its_own_dtype_where_kernels_ask_for_it(quantised_base, tmp_path, monkeypatch):
    load, asked = verification._load_base, []

    def refuse_fp32(export, dtype):
        asked.append(dtype)
        if dtype == torch.float32:
            raise RuntimeError("no kernel for fp32")
        return load(export, dtype)

    monkeypatch.setattr(verification, "_load_base", refuse_fp32)
    outcome, status = checks(looped(quantised_base("compressed-tensors int8"), tmp_path))
    assert (status, asked) == (0, [torch.float32, "auto"])
    assert all(check["passed"] for check in outcome.values()), outcome


@pytest.mark.parametrize("kind", STAYS)
def test_verify_says_why_a_quantised_model_is_not_run(quantised_base, tmp_path, kind):
    outcome, status = checks(looped(quantised_base(kind), tmp_path))
    assert status == 0, outcome
    left = [check["detail"] for check in outcome.values() if check["passed"] is None]
    assert len(left) == len(verification.MODEL)
    assert all(detail.startswith("the base itself does not run on this machine: ImportError: ") for detail in left)


# ---------------------------------------------------------------------------------------------------------------------
# What transformers looks up by a model's type.
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", ["AWQ_SCALES_MAPPINGS", "AWQ_FUSED_MAPPINGS"])
def test_awq_modules_are_looked_up_as_those_of_the_base(table):
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    mapping = getattr(awq, table, {})
    if not mapping:
        pytest.skip(f"this transformers has no {table}")
    native = [
        each for each in mapping if each in CONFIG_MAPPING and CONFIG_MAPPING[each] in MODEL_FOR_CAUSAL_LM_MAPPING
    ]
    assert native
    for model_type in native:
        family = family_name(model_type)
        assert getattr(modeling_looped, f"Looped{family}ForCausalLM")  # which is made when it is asked for
        assert mapping[looped_config_class(family).model_type] == mapping[model_type]


def test_awq_scales_the_same_activations_as_in_the_base(export_dir, tiny_base, monkeypatch):
    """GPT-NeoX's activations get scales of their own; the class of these, which is not installed, is stood in for."""

    class ScaledActivation(torch.nn.Module):
        def __init__(self, module, scales):
            super().__init__()
            self.scales = scales

    for name in ("gptqmodel.quantization.awq.modules.act", "awq.modules.act"):
        monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(ScaledActivation=ScaledActivation))

    def scaled(root):
        model = AutoModelForCausalLM.from_pretrained(root, trust_remote_code=True)
        awq.replace_quantization_scales(model, model.config.model_type)
        return {path for path, module in model.named_modules() if isinstance(module, ScaledActivation)}

    assert len(scaled(tiny_base("gpt_neox"))) == 6
    assert scaled(export_dir("gpt_neox")) == scaled(tiny_base("gpt_neox"))
