"""ONNX graphs in use: what is stale, foreign, half-made or cannot be run is told in one line, and nothing is lost."""

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
from loopexport.export.stale_graphs import refuse_stale
from loopexport.files.json_text import json_text
from loopexport.files.staged_files import StagedFiles, staged_files
from loopexport.onnx import OnnxModel, build
from loopexport.onnx.check import _compare, _text_tokens, make_scenarios
from loopexport.onnx.runtime.prompts import load_tokenizer
from loopexport.onnx.runtime.sampling import Sampling
from support.commands import checks, run, tree
from support.damage import EXPLODES, edit_config
from support.tiny import SPAN, save_tiny
from support.tokenizers import write_tokenizer

VOCAB = 300  # as many as the tokenizer has


@pytest.fixture(scope="module")
def one_trace(tmp_path_factory):
    """Traces of the base of this module, made once for each dtype."""
    real, traces = build.trace_export, {}

    def trace(export, *kind):
        if kind not in traces:
            traces[kind] = real(export, *kind)
        return traces[kind]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "trace_export", trace)
        yield


@pytest.fixture(scope="module")
def made(one_trace, tmp_path_factory):
    """An export with a tokenizer, `model.onnx` of its own K, 3, and `model_k2.onnx`."""
    root = tmp_path_factory.mktemp("made")
    base = save_tiny("llama", root / "base", vocab_size=VOCAB)
    write_tokenizer(base, "PreTrainedTokenizerFast")
    out = loopexport.convert(str(base), root / "out", span=SPAN, steps=3, weights="copy").root
    loopexport.onnx.export_onnx(out, steps=(2, 3), verify=False)
    return out


@pytest.fixture
def export(made, tmp_path):
    """A copy of it that a test may change."""
    return shutil.copytree(made, tmp_path / "export")


def refused(*arguments):
    """The one line that a command ends with."""
    result = run(*arguments)
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit), result.exception
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    return line


# Stale graphs.


def test_graph_of_a_loop_that_was_edited_since_is_not_run(export):
    edit_config(export, loop_steps=4)
    says = "model.onnx: the graph was made for another loop (loop_steps 3 -> 4): run `loopexport onnx"
    assert says in refused("run", export, "it is")
    with pytest.raises(loopexport.LoopExportError, match="was made for another loop"):
        OnnxModel(export)
    assert OnnxModel(export, "model_k2.onnx").vocab_size == VOCAB  # of another K on purpose
    edit_config(export, loop_span=[0, 2])
    with pytest.raises(loopexport.LoopExportError, match=r"another loop \(loop_span \[1, 4\] -> \[0, 2\]\)"):
        OnnxModel(export, "model_k2.onnx")


def test_the_command_that_is_named_makes_a_stale_graph_anew(export):
    loopexport.onnx.export_onnx(export, steps=(2,), dtype="fp16", verify=False)
    edit_config(export, loop_anchor=0.5)
    for name, options in (
        ("model_k2.onnx", " --steps 2"),
        ("model.onnx", ""),
        ("model_k2_fp16.onnx", " --steps 2 --dtype fp16"),
    ):
        says = refused("run", export, "it is", "--file", name)
        assert f"{name}: the graph was made for another loop" in says
        assert f"run `loopexport onnx {export}{options}` again" in says
        assert run("onnx", export, *options.split(), "--no-verify").exit_code == 0
        assert OnnxModel(export, name).vocab_size == VOCAB
    assert checks(export, "--files-only")[1] == 0


def test_a_graph_that_somebody_deleted_is_forgotten(export):
    (export / "model_k2.onnx").unlink()
    assert checks(export, "--files-only")[1] == 1
    assert run("onnx", export, "--no-verify").exit_code == 0
    assert checks(export, "--files-only")[1] == 0
    assert "model_k2.onnx" not in (export / "README.md").read_text()


def test_a_step_size_that_is_spelt_out_is_no_other_loop(export):
    edit_config(export, loop_damping=1 / 3)
    assert OnnxModel(export).vocab_size == VOCAB
    edit_config(export, loop_damping=0.5)
    with pytest.raises(loopexport.LoopExportError, match=r"another loop \(loop_damping null -> 0.5\)"):
        OnnxModel(export)


@pytest.mark.parametrize("fields", [{"loop_steps": "3"}, {"loop_steps": "{"}])
def test_graph_that_does_not_tell_its_loop_is_not_run(export, fields):
    with pytest.raises(loopexport.LoopExportError, match=r"model\.onnx does not tell which loop it holds"):
        refuse_stale(export / "model.onnx", fields)


def test_graph_of_a_loop_that_was_edited_since_fails_verification(export):
    assert checks(export, "--files-only")[1] == 0
    edit_config(export, loop_steps=4)
    outcome, status = checks(export, "--files-only")
    assert status == 1
    assert "run `loopexport onnx" in outcome["ONNX graphs hold the loop of config.json"]["detail"]
    assert outcome["ONNX files are as written"]["passed"]
    outcome, status = checks(export)
    assert status == 1
    assert outcome["model.onnx computes what torch does"]["passed"] is False
    assert outcome["model_k2.onnx computes what torch does"]["passed"]


# Foreign code.


def foreign_tokenizer(root):
    path = root / "tokenizer_config.json"
    entry = {"auto_map": {"AutoTokenizer": [None, "tokenization_own.Own"]}}
    path.write_text(json.dumps({**json.loads(path.read_text()), **entry}))
    (root / "tokenization_own.py").write_text(EXPLODES)


def custom_generate(root):
    (root / "custom_generate").mkdir()
    (root / "custom_generate" / "generate.py").write_text(EXPLODES)


def foreign_auto_map(root):
    entries = json.loads((root / "config.json").read_text())["auto_map"]
    edit_config(root, auto_map={**entries, "AutoModelForCausalLM": "own.Model", "AutoTokenizer": [None, "own.Tokens"]})
    (root / "own.py").write_text(EXPLODES)


FOREIGN = {
    "modeling_looped.py": lambda root: (root / "modeling_looped.py").write_text(EXPLODES),
    "configuration_looped.py": lambda root: (root / "configuration_looped.py").write_text(EXPLODES),
    "custom_generate/generate.py": custom_generate,
    "the auto_map of config.json": foreign_auto_map,
    "the auto_map of tokenizer_config.json": foreign_tokenizer,
}


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_code_is_refused_by_onnx_and_not_run_by_run(export, name):
    FOREIGN[name](export)
    assert f"{name} in {export} is not the installed LoopExport's" in refused("onnx", export, "--dry-run")
    assert run("run", export, "it is", "--max-new-tokens", "2").exit_code == 0


def test_custom_generate_is_not_run_by_verify(export):
    custom_generate(export)
    assert "custom_generate/generate.py in" in refused("verify", export)
    assert "is code that LoopExport did not write" in refused("push", export, "me/name", "--token", "none")


# Files.


def genai_graph(root):
    return json.loads((root / "genai_config.json").read_text())["model"]["decoder"]["filename"]


def test_genai_config_names_the_graph_of_the_exports_own_k(export, one_trace):
    assert genai_graph(export) == "model.onnx"
    assert run("onnx", export, "--no-verify", "--steps", "2").exit_code == 0
    assert genai_graph(export) == "model.onnx"
    assert checks(export, "--files-only")[1] == 0
    (export / "model.onnx").unlink()
    (export / "genai_config.json").unlink()
    result = run("onnx", export, "--no-verify", "--steps", "2")
    assert "genai_config.json names model_k2.onnx, K = 2: there is no graph of the export's own K, 3" in result.stderr
    assert genai_graph(export) == "model_k2.onnx"
    assert run("onnx", export, "--no-verify").exit_code == 0
    assert genai_graph(export) == "model.onnx"


@pytest.mark.parametrize("step", ["_save", "_graph_record", "_write_genai_config", "_record_files"])
@pytest.mark.parametrize("failure", [KeyboardInterrupt, RuntimeError])
def test_run_that_is_stopped_leaves_the_earlier_one(export, one_trace, monkeypatch, step, failure):
    real = getattr(build, step)

    def stop(*arguments):
        real(*arguments)
        raise failure

    monkeypatch.setattr(build, step, stop)
    edit_config(export, loop_anchor=0.5)
    before = tree(export)
    result = run("onnx", export, "--no-verify", "--steps", "3,4", "--dtype", "fp16")
    assert result.exit_code == (130 if failure is KeyboardInterrupt else 1)
    assert tree(export) == before


def contents(root):
    return {path.name: path.read_text() for path in root.iterdir()}


@pytest.mark.parametrize("can_link", [True, False])
def test_staged_files_replace_all_or_none(monkeypatch, tmp_path, can_link):
    def refuse(*arguments, **options):
        raise OSError("no links here")

    if not can_link:
        monkeypatch.setattr("os.link", refuse)
    (tmp_path / "old").write_text("old")
    files = StagedFiles(tmp_path)
    for name in ("old", "new"):
        files.write(name, b"new")
    files.partial("half").write_text("ha")
    files.end()
    assert contents(tmp_path) == {"old": "old"}
    with staged_files(tmp_path) as files:
        for name in ("old", "new"):
            files.write(name, b"new")
        files.keep()
    assert contents(tmp_path) == {"old": "new", "new": "new"}


def test_staging_that_is_stopped_between_two_steps_leaves_no_second_name(monkeypatch, tmp_path):
    def stop(*arguments):
        raise KeyboardInterrupt

    (tmp_path / "old").write_text("old")
    files = StagedFiles(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.replace", stop)
        with pytest.raises(KeyboardInterrupt):
            files.write("old", b"new")
    files.end()
    assert contents(tmp_path) == {"old": "old"}


@pytest.mark.parametrize("kind", ["inside", "a file", "above"])
def test_out_that_cannot_be_is_told(export, kind, tmp_path):
    (tmp_path / "file").write_text("mine")
    out = {"inside": export / "deep" / "out", "a file": tmp_path / "file", "above": tmp_path}[kind]
    assert "the output" in refused("onnx", export, "--out", out, "--dry-run")


def test_out_that_is_the_export_itself_means_in_place(export, monkeypatch):
    monkeypatch.chdir(export)
    for out in (".", export, "../export"):
        result = run("onnx", ".", "--out", out, "--dry-run", "--json")
        assert result.exit_code == 0, result.stderr
        assert json.loads(result.stdout)["directory"] == "."


def test_weights_that_are_links_are_refused_before_any_work(export, one_trace, tmp_path):
    (export / "model.safetensors").rename(tmp_path / "blob")
    (export / "model.safetensors").symlink_to(tmp_path / "blob")
    assert "is a link out of it, which ONNX Runtime refuses" in refused("onnx", export, "--dry-run")
    assert "its weights are links out of" in refused("run", export, "it is")
    for options in (["--dtype", "fp16"], ["--out", tmp_path / "copy"]):  # the advice holds
        result = run("onnx", export, *options, "--no-verify")
        assert result.exit_code == 0, result.stderr
    assert OnnxModel(export, "model_fp16.onnx").generate(np.array([[5]]), max_new_tokens=2).shape == (1, 2)
    assert OnnxModel(tmp_path / "copy").generate(np.array([[5]]), max_new_tokens=2).shape == (1, 2)


def test_plan_tells_what_each_k_makes_of_the_loop(export):
    lines = run("onnx", export, "--steps", "1,2,8", "--dry-run").stdout
    assert "K = 1: the base\n" in lines
    assert "K = 2: euler, s = 0.5, 2 evaluations of the span" in lines
    assert "K = 8: euler, s = 0.125, 8 evaluations of the span" in lines
    assert "0.333" not in lines


# Numbers.


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
    monkeypatch.setattr("loopexport.onnx.check.run_graph", lambda *_: broken)
    monkeypatch.setattr("loopexport.onnx.check.run_torch", lambda *_: broken if both else numbers)
    assert _compare(None, None, scenario, 1.0).passed is False


def test_decoding_into_no_numbers_is_a_failure_even_where_it_may_differ(monkeypatch):
    import torch

    from loopexport.checks import verification
    from loopexport.loop.spec import make_spec

    broken = torch.full((1, 3, 4), float("nan"))
    monkeypatch.setattr(verification, "_decode", lambda *_: [broken])
    spec = make_spec(span=SPAN, steps=2, kv="reference")
    check = verification._check_cached_decode(lambda *_, **__: SimpleNamespace(logits=broken), None, spec, 0.0)
    assert check.passed is False


def test_manifest_with_a_difference_that_is_no_number_is_written_as_json(made):
    manifest = loopexport.open_export(made).manifest
    manifest.onnx["model.onnx"] = OnnxRecord(1, difference=float("nan"))
    assert "NaN" not in manifest.to_json()


# Running.


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
    assert "Note: --top-k and --top-p need --temperature" in greedy.stderr
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
