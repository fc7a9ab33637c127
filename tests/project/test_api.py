"""The public Python API: every keyword is written out, and a misspelt one is answered with the nearest."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from typing import get_args, get_type_hints

import pytest

import loopexport
from loopexport import choices, errors
from loopexport.cli.text import MARKS, TRAVEL
from loopexport.export.onnx_files import DTYPES
from loopexport.export.quantisation import BITS
from loopexport.export.weights import METHODS as WEIGHTS
from loopexport.loop.spec import DECODE_MODES, KV_POLICIES, MODES, RULES, SPEC_KEYS
from loopexport.onnx.plan import ATTENTION_LAYOUTS
from loopexport.onnx.runtime.session import PROVIDERS
from support.paths import ROOT

FUNCTIONS = {
    "convert": loopexport.convert,
    "plan_convert": loopexport.plan_convert,
    "push": loopexport.push,
    "plan_push": loopexport.plan_push,
    "verify": loopexport.verify,
    "scan": loopexport.scan,
    "plan_scan": loopexport.plan_scan,
    "adopt": loopexport.adopt,
    "plan_adopt": loopexport.plan_adopt,
    "upgrade": loopexport.upgrade,
    "plan_upgrade": loopexport.plan_upgrade,
    "restore": loopexport.restore,
    "export_onnx": loopexport.export_onnx,
    "plan_onnx": loopexport.plan_onnx,
    "OnnxModel": loopexport.OnnxModel.__init__,
    "OnnxModel.generate": loopexport.OnnxModel.generate,
    "OnnxModel.stream": loopexport.OnnxModel.stream,
    "OnnxModel.stream_text": loopexport.OnnxModel.stream_text,
    "OnnxModel.answer": loopexport.OnnxModel.answer,
}

each_function = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)


def keywords(function) -> dict[str, inspect.Parameter]:
    """Everything that a function takes, by name."""
    return {name: each for name, each in inspect.signature(function).parameters.items() if name != "self"}


def settings(function, *left_out) -> dict[str, tuple]:
    """Default, kind and annotation of each keyword."""
    return {
        name: (each.default if name not in ("progress", "notify", "say") else None, each.kind, each.annotation)
        for name, each in keywords(function).items()
        if name not in left_out
    }


@each_function
def test_every_keyword_is_written_out_typed_and_documented(function):
    owner = loopexport.OnnxModel if function.__name__ == "__init__" else function
    text = inspect.getdoc(owner)
    assert "\nArgs:\n" in text
    for name, each in keywords(function).items():
        assert each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY), f"{name} is not written out"
        assert each.annotation is not each.empty, f"{name} has no type"
        assert f"\n    {name}: " in text, f"{name} is not documented"
    assert inspect.signature(function).return_annotation is not inspect.Signature.empty


@each_function
def test_misspelt_keyword_is_answered_with_the_nearest_of_that_function(function):
    for name in keywords(function):
        with pytest.raises(loopexport.KeywordError, match=rf"takes no keyword '{name}x'; did you mean '{name}'\?$"):
            function(**{f"{name}x": 1})


@pytest.mark.parametrize(
    ("given", "meant"), [("weigths", "weights"), ("spna", "span"), ("norm_interpolate", "norm_interpolation")]
)
def test_misspelt_keyword_of_convert_names_function_and_remedy(given, meant):
    with pytest.raises(TypeError) as raised:
        loopexport.convert("model", **{given: 1})
    assert str(raised.value) == f"convert() takes no keyword {given!r}; did you mean {meant!r}?"


def test_keyword_that_resembles_none_is_answered_with_all():
    with pytest.raises(loopexport.KeywordError, match="it takes root, out, weights, progress"):
        loopexport.restore("export", "out", zzz=1)


def test_convert_takes_what_plan_convert_takes_and_progress():
    assert settings(loopexport.convert, "progress") == settings(loopexport.plan_convert, "dry_run")


def test_push_takes_what_plan_push_takes_and_notify():
    assert settings(loopexport.push, "notify") == settings(loopexport.plan_push)


def test_adopt_takes_what_plan_adopt_takes_and_progress():
    assert settings(loopexport.adopt, "progress") == settings(loopexport.plan_adopt)


def test_scan_takes_what_plan_scan_takes_and_progress():
    assert settings(loopexport.scan, "progress") == settings(loopexport.plan_scan, "dry_run")


def test_export_onnx_takes_what_plan_and_apply_take():
    both = {**settings(loopexport.plan_onnx), **settings(loopexport.OnnxPlan.apply)}
    assert settings(loopexport.export_onnx) == both


def test_answer_takes_what_stream_text_takes_and_generate_what_stream_takes():
    model = loopexport.OnnxModel
    assert settings(model.answer) == settings(model.stream_text)
    assert settings(model.generate) == settings(model.stream)


@pytest.mark.parametrize("function", [loopexport.convert, loopexport.plan_convert])
def test_fields_of_the_loop_are_those_of_loopspec_and_none_means_not_given(function):
    taken = [name for name in keywords(function) if name in SPEC_KEYS]
    assert tuple(taken) == SPEC_KEYS
    assert {keywords(function)[name].default for name in taken} == {None}


def test_field_that_is_none_is_the_presets_or_the_default(tiny_base):
    base = str(tiny_base("llama"))
    plan = loopexport.plan_convert(base, "out", span=(1, 4), steps=3, anchor=None, kv=None, frozen_routing=None)
    assert plan.spec == loopexport.LoopSpec(span=(1, 4), steps=3)
    plan = loopexport.plan_convert(base, "out", preset="qwen3-4b-mmlu-pro", span="1:4", steps=None, kv=None)
    assert (plan.spec.steps, plan.spec.kv) == (3, "reference")


def test_types_of_choices_have_the_words_that_are_checked():
    words = {
        choices.Mode: MODES,
        choices.KvPolicy: KV_POLICIES,
        choices.DecodeMode: DECODE_MODES,
        choices.RuleName: tuple(RULES),
        choices.Weights: WEIGHTS,
        choices.Attention: ATTENTION_LAYOUTS,
        choices.Compute: DTYPES,
        choices.Provider: ("auto", *PROVIDERS),
    }
    for kind, allowed in words.items():
        assert sorted(get_args(kind)) == sorted(allowed)
    assert sorted(get_args(choices.OnnxDtype)) == sorted(("as-is", *DTYPES, *BITS))
    assert set(get_args(choices.Placement)) == set(WEIGHTS) - {"none"}


@each_function
def test_types_can_be_resolved(function):
    assert get_type_hints(inspect.unwrap(function))


def test_public_names_are_all_there_and_listed():
    for name in loopexport.__all__:
        assert getattr(loopexport, name) is not None
    assert {*loopexport._HOMES, "__version__"} == set(loopexport.__all__) <= set(dir(loopexport))


def test_names_for_type_checkers_are_the_public_ones():
    tree = ast.parse((ROOT / "loopexport" / "__init__.py").read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    named = {
        alias.name: node.module.removeprefix("loopexport.")
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert named == loopexport._HOMES


def test_every_error_is_public_and_drawn_in_the_tree():
    raised = {name for name, each in vars(errors).items() if isinstance(each, type) and issubclass(each, Exception)}
    assert raised <= set(loopexport.__all__)
    drawn = {line.split()[1] for line in errors.__doc__.splitlines() if "──" in line}
    assert drawn | {"LoopExportError"} == raised
    assert all(issubclass(getattr(errors, name), errors.LoopExportError) for name in raised)


def test_importing_the_package_and_planning_load_no_slow_module():
    code = "import loopexport, sys; print(*({'torch', 'transformers', 'click', 'tqdm', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"


def test_library_prints_nothing_and_draws_no_bar():
    """Only the command line prints; the library calls `progress`, `say` and `notify`."""
    allowed = {"cli", "templates"}
    for path in (ROOT / "loopexport").rglob("*.py"):
        if path.relative_to(ROOT / "loopexport").parts[0] in allowed:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            called = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
            assert called != "print", f"{path}:{node.lineno} prints"
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules = [node.module or ""]
            bad = [each for each in modules if each.split(".")[0] in ("tqdm", "click") or "loopexport.cli" in each]
            assert not bad or path.name == "__main__.py", f"{path}:{node.lineno} imports {bad}"


def test_words_of_the_output_cover_every_outcome():
    assert set(MARKS) == {True, False, None}
    assert len(TRAVEL) == len(set(TRAVEL.values()))
