"""A looped model with another head, and libraries that look a model up by its type."""

from __future__ import annotations

import sys
import types

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from support.compare import assert_bitwise, assert_close, assert_differs
from support.tiny import tiny_tokens

TOKENS = tiny_tokens(2, 9)
HEADS = ("AutoModelForSequenceClassification", "AutoModelForTokenClassification", "AutoModelForQuestionAnswering")


@pytest.mark.parametrize("auto", HEADS)
def test_a_head_is_trained_as_on_the_base_and_saved(export_dir, tiny_base, tmp_path, auto):
    """The head is new in both; its body is the looped model, and one step is bitwise the base."""
    auto_class = getattr(transformers, auto)
    torch.manual_seed(0)
    model = auto_class.from_pretrained(export_dir("llama"), trust_remote_code=True).eval()
    torch.manual_seed(0)
    base = auto_class.from_pretrained(tiny_base("llama")).eval()
    base.load_state_dict(model.state_dict())
    model.config.pad_token_id = base.config.pad_token_id = 0

    def answer(of):
        with torch.no_grad():
            output = of(TOKENS)
        return output.start_logits if "Question" in auto else output.logits

    looped = answer(model)
    assert_differs(looped, answer(base))
    model.save_pretrained(tmp_path)
    again = auto_class.from_pretrained(tmp_path, trust_remote_code=True).eval()
    assert_close(answer(again), looped)
    model.config.loop_steps = 1
    assert_bitwise(answer(model), answer(base))


def test_a_head_that_the_base_has_not_is_refused(export_dir):
    with pytest.raises(AttributeError, match="Glm4Moe has no class of this kind in transformers"):
        AutoModelForSequenceClassification.from_pretrained(export_dir("glm4_moe"), trust_remote_code=True)


@pytest.mark.parametrize("method", ["LoraConfig", "IA3Config"])
def test_peft_knows_the_modules_of_the_base_family(looped, method):
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(looped("llama"), getattr(peft, method)(task_type="CAUSAL_LM"))
    assert adapted.get_nb_trainable_parameters()[0] > 0


def test_adaption_prompts_know_the_base_family(looped):
    peft = pytest.importorskip("peft")
    config = peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=4, adapter_layers=3)
    adapted = peft.get_peft_model(looped("llama"), config)
    adapted(input_ids=TOKENS, labels=TOKENS).loss.backward()


def test_tables_of_libraries_that_are_not_imported_stay_so(looped, monkeypatch):
    from support.loaded_code import code_beside

    model = looped("llama")
    tables = list(code_beside(model, "configuration_looped").TYPE_TABLES)
    for name in tables:
        monkeypatch.delitem(sys.modules, name, raising=False)
    model.config.to_dict()
    assert not [name for name in tables if name in sys.modules]


def test_a_table_gets_the_entry_of_the_native_type(export_dir, monkeypatch):
    liger = types.ModuleType("liger_kernel.transformers.monkey_patch")
    liger.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": "patch for llama"}
    monkeypatch.setitem(sys.modules, liger.__name__, liger)
    AutoModelForCausalLM.from_pretrained(export_dir("llama"), trust_remote_code=True).config.to_dict()
    assert liger.MODEL_TYPE_TO_APPLY_LIGER_FN["looped_llama"] == "patch for llama"
