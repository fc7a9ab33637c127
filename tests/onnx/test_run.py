"""Running graphs: tokenizers, prompts and numbers that do not fit are told in one line."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from transformers import AutoTokenizer

import loopexport
from loopexport.export.check import Check
from loopexport.export.manifest import OnnxRecord
from loopexport.files.json_text import json_text
from loopexport.onnx import OnnxModel
from loopexport.onnx.check.comparison import _compare, _text_tokens, make_scenarios
from loopexport.onnx.runtime.prompts import load_tokenizer
from loopexport.onnx.runtime.sampling import Sampling
from support.commands import run
from support.made_onnx import VOCAB, refused
from support.small_tokenizer import write_tokenizer
from support.tiny import SPAN


def test_json_never_holds_what_is_no_number():
    assert json.loads(json_text({"a": [float("nan"), {"b": float("inf")}], "c": 0.5})) == {
        "a": [None, {"b": None}],
        "c": 0.5,
    }
    assert json_text(Check("c", False, "", float("nan")).to_dict()).count("null") == 1


@pytest.mark.parametrize("both", [False, True])
def test_logits_that_are_no_numbers_are_a_failure(monkeypatch, both):
    scenario = make_scenarios(VOCAB, SimpleNamespace(is_identity=True))[0]
    numbers = np.ones((2, 10, 4), np.float32)
    broken = np.where(np.arange(4) == 2, np.nan, numbers)
    monkeypatch.setattr("loopexport.onnx.check.comparison.run_graph", lambda *_: broken)
    monkeypatch.setattr("loopexport.onnx.check.comparison.run_torch", lambda *_: broken if both else numbers)
    assert _compare(None, None, scenario, 1.0).passed is False


def test_decoding_into_no_numbers_is_a_failure_even_where_it_may_differ():
    import torch

    from loopexport.checks import verification
    from loopexport.loop.spec import make_spec

    broken = torch.full((1, 3, 4), float("nan"))
    spec = make_spec(span=SPAN, steps=2, kv="reference")
    looped = verification._LoopedRun([], broken, broken, broken)
    check = verification._check_cached_decode(looped, spec, 0.0)
    assert check.passed is False


def test_manifest_with_a_difference_that_is_no_number_is_written_as_json(made):
    manifest = loopexport.open_export(made).manifest
    manifest.onnx["model.onnx"] = OnnxRecord(1, difference=float("nan"))
    assert "NaN" not in manifest.to_json()


@pytest.mark.parametrize("tokenizer_class", [None, "LlamaTokenizerFast", "Qwen2TokenizerFast"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_tokenizer_without_code_of_the_directory_is_the_bases(tiny_base, tmp_path, family, tokenizer_class):
    base = shutil.copytree(tiny_base(family), tmp_path / "base")
    write_tokenizer(base, tokenizer_class)
    out = loopexport.convert(str(base), tmp_path / "out", span=SPAN, steps=2, weights="hardlink").root
    ours, theirs = load_tokenizer(out), AutoTokenizer.from_pretrained(base)
    assert type(ours) is type(theirs)
    assert ours("it is 12345, isn't it").input_ids == theirs("it is 12345, isn't it").input_ids


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["", "--no-chat"], "the prompt is empty"),
        (["it is", "--temperature", "nan"], "temperature nan must be 0 (greedy) or more, and finite"),
        (["it is", "--temperature", "-0.1"], "temperature -0.1 must be 0"),
        (["it is", "--temperature", "inf"], "temperature inf must be"),
        (["it is", "--seed", "-1"], "seed -1 must be 0 or more"),
        (["it is", "--top-p", "nan"], "top_p nan must be in (0, 1]"),
    ],
)
def test_what_cannot_be_run_is_told_in_one_line(export, options, says):
    assert says in refused("run", export, *options)


@pytest.mark.parametrize("ids", ["x", [2, None]])
def test_end_tokens_that_are_none_are_told_in_one_line(export, ids):
    (export / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    assert "which is neither a token id nor a list of token ids" in refused("run", export, "it is")


@pytest.mark.parametrize("logits", [[np.inf, 0, 1], [np.nan, 0, 1], [-np.inf] * 3])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_token_is_chosen_by_logits_that_are_not_finite(logits, temperature):
    with pytest.raises(loopexport.LoopExportError, match="not finite numbers"):
        Sampling(temperature=temperature).choose(np.array([[0.0, 1, 2], logits]), np.random.default_rng(0))
    masked = np.array([[-np.inf, 0, -np.inf]])
    assert Sampling(temperature=temperature).choose(masked, np.random.default_rng(0)) == [1]


def test_tokenizer_that_is_broken_or_missing_is_told_in_one_line(export):
    (export / "tokenizer.json").write_text("{")
    assert f"cannot load the tokenizer in {export}" in refused("run", export, "it is")
    (export / "tokenizer.json").unlink()
    assert f"no tokenizer in {export}" in refused("run", export, "it is")


def test_chat_template_that_fails_is_told_in_one_line(export):
    (export / "chat_template.jinja").write_text("{{ raise_exception('no system role') }}")
    assert "fails: no system role; use --no-chat" in refused("run", export, "it is")


def test_tiny_temperature_is_greedy_and_options_without_one_are_told(export):
    greedy = run("run", export, "it is", "--max-new-tokens", "4", "--top-k", "3")
    seeded = run("run", export, "it is", "--max-new-tokens", "4", "--seed", "3")
    for result in (greedy, seeded):
        assert "Note: --top-k, --top-p and --seed need --temperature; without it the answer is greedy" in result.stderr
    tiny = run("run", export, "it is", "--max-new-tokens", "4", "--temperature", "1e-320")
    assert tiny.exit_code == 0
    assert tiny.stderr == ""
    assert tiny.stdout == greedy.stdout


def test_tensors_that_do_not_fit_are_value_errors(made):
    model = OnnxModel(made)
    ids = np.array([[5, 6, 7], [8, 9, 10]])
    _, cache = model.forward(ids)
    wrong = {
        "must be whole numbers": [lambda: model.forward(ids[:0]), lambda: model.generate(ids[:, :0]),
                                  lambda: model.forward(ids[0]), lambda: model.forward(ids + 0.5)],
        f"token id {VOCAB} is not in": [lambda: model.forward(np.array([[VOCAB]]))],
        "token id -1 is not in": [lambda: model.generate(np.array([[5, -1]]))],
        "must have the shape": [lambda: model.forward(ids, np.ones((2, 2))), lambda: model.generate(ids, np.ones(3)),
                                lambda: model.forward(ids, np.ones((2, 3)), cache)],
        "must hold 1, and 0 for padding": [lambda: model.forward(ids, np.full((2, 3), 2))],
        "max_new_tokens 0 must be 1": [lambda: model.generate(ids, max_new_tokens=0)],
        "row 1 of attention_mask is all padding": [lambda: model.generate(ids, np.array([[1, 1, 1], [0, 0, 0]]))],
        "the cache has a batch of 2, but input_ids has a batch of 1": [lambda: model.forward(ids[:1], cache=cache)],
    }  # fmt: skip
    for says, calls in wrong.items():
        for call in calls:
            with pytest.raises(ValueError, match=says):
                call()


def test_what_onnx_runtime_refuses_is_told_in_one_line(made):
    model = OnnxModel(made)
    model.vocab_size = 10**6
    with pytest.raises(loopexport.LoopExportError, match=r"cannot run .*out of data bounds"):
        model.forward(np.array([[VOCAB]]))


def test_table_of_positions_ends_the_answer(graph):
    model = OnnxModel(graph("gpt2", steps=2))
    assert model.max_positions == 128
    prompt = np.full((1, 126), 5)
    assert model.generate(prompt, max_new_tokens=50, eos_token_ids=()).shape == (1, 3)
    with pytest.raises(ValueError, match="129 tokens are more than the 128 that the model has positions for"):
        model.generate(np.full((1, 129), 5))


def ended(pieces):
    """What a generator returns at its end."""
    while True:
        try:
            next(pieces)
        except StopIteration as end:
            return end.value


def test_generation_tells_why_it_ended(made):
    model = OnnxModel(made)
    prompt = np.array([[5, 6, 7]])
    first = int(model.generate(prompt, max_new_tokens=1, eos_token_ids=())[0, 0])
    assert ended(model.stream(prompt, max_new_tokens=2, eos_token_ids=())) == "length"
    assert ended(model.stream(prompt, max_new_tokens=9, eos_token_ids=(first,))) == "end"
    model.max_positions = 4
    assert ended(model.stream(prompt, max_new_tokens=9, eos_token_ids=())) == "positions"
    assert ended(model.stream(prompt, max_new_tokens=2, eos_token_ids=())) == "length"  # and the table is full
    assert ended(model.stream(prompt, max_new_tokens=9, eos_token_ids=(first,))) == "end"


@pytest.mark.parametrize(("positions", "new", "is_cut"), [(8, 50, True), (8, 2, False), (None, 9, False)])
def test_an_answer_that_the_table_of_positions_cut_off_ends_with_a_note(export, monkeypatch, positions, new, is_cut):
    real = OnnxModel.__init__

    def init(self, *arguments, **options):
        real(self, *arguments, **options)
        self.max_positions = positions
        vars(self)["eos_token_ids"] = ()

    monkeypatch.setattr(OnnxModel, "__init__", init)
    result = run("run", export, "it is", "--no-chat", "--max-new-tokens", new)
    assert result.exit_code == 0, result.stderr
    says = f"Note: the answer was cut off: the model has only {positions} positions\n"
    assert result.stderr == (says if is_cut else "")


def test_graphs_are_compared_on_no_more_text_than_the_model_takes(export):
    model = SimpleNamespace(root=export, tokenizer=load_tokenizer(export), max_positions=None)
    whole = _text_tokens(model, VOCAB)
    model.max_positions = 5
    assert _text_tokens(model, VOCAB).tolist() == whole[:, :5].tolist()
    model.max_positions = None
    assert _text_tokens(model, int(whole.max())) is None  # the tokenizer has more tokens than the model


def test_models_without_a_table_of_positions_have_no_such_end(made):
    assert OnnxModel(made).max_positions is None


def test_stream_ends_with_what_never_became_a_character(made, monkeypatch):
    model = OnnxModel(made)
    texts = {1: "a", 2: "a\ufffd", 3: "ab", 4: "ab\ufffd"}
    fake = SimpleNamespace(decode=lambda tokens, **_: texts[len(tokens)])
    monkeypatch.setattr(model, "encode", lambda *_, **__: None)
    monkeypatch.setattr(model, "stream", lambda *_, **__: (np.array([5]) for _ in range(4)))
    monkeypatch.setitem(vars(model), "tokenizer", fake)
    assert list(model.stream_text("it is")) == ["a", "b", "\ufffd"]
