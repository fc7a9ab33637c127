"""Graphs of a loop that was edited since are told and made again."""

from __future__ import annotations

import pytest

import loopexport
from loopexport.export.stale_graphs import loop_difference, refuse_stale
from loopexport.loop.spec import make_spec
from loopexport.onnx import OnnxModel
from support.commands import checks, run
from support.damage import edit_config
from support.made_onnx import VOCAB, refused


def test_graph_of_a_loop_that_was_edited_since_is_not_run(export):
    edit_config(export, loop_steps=4)
    says = "model.onnx: the graph contains another loop (loop_steps 3 -> 4): run `loopexport onnx"
    assert says in refused("run", export, "it is")
    with pytest.raises(loopexport.LoopExportError, match="contains another loop"):
        OnnxModel(export)
    assert OnnxModel(export, "model_k2.onnx").vocab_size == VOCAB  # of another K on purpose
    edit_config(export, loop_span=[0, 2])
    with pytest.raises(loopexport.LoopExportError, match=r"another loop \(loop_span \[1, 4\] -> \[0, 2\]\)"):
        OnnxModel(export, "model_k2.onnx")


def test_a_path_that_was_edited_since_is_told():
    path, other = make_spec(path="0-3,2-4"), make_spec(path="0-3,1-4")
    span = make_spec(span="1:4x3", kv="per_step")
    assert loop_difference("model.onnx", path, path) == ""
    assert loop_difference("model.onnx", path, other) == "loop_path [[0, 4], [2, 5]] -> [[0, 4], [1, 5]]"
    assert "loop_path [[0, 4], [2, 5]] -> null" in loop_difference("model.onnx", path, span)
    assert "loop_path null -> [[0, 4], [2, 5]]" in loop_difference("model.onnx", span, path)
    several = make_spec(span=["0:2x3", "3:5x2"])
    assert loop_difference("model.onnx", several, make_spec(span=["0:2", "3:5"], steps=3)) == ("loop_steps [3, 2] -> 3")


def test_the_command_that_is_named_makes_a_stale_graph_anew(export):
    loopexport.onnx.export_onnx(export, steps=(2,), dtype="fp16", verify=False)
    edit_config(export, loop_anchor=0.5)
    for name, options in (
        ("model_k2.onnx", " --steps 2"),
        ("model.onnx", ""),
        ("model_k2_fp16.onnx", " --steps 2 --dtype fp16"),
    ):
        says = refused("run", export, "it is", "--file", name)
        assert f"{name}: the graph contains another loop" in says
        assert f"run `loopexport onnx {export}{options}` again" in says
        assert run("onnx", export, *options.split(), "--no-verify").exit_code == 0
        assert OnnxModel(export, name).vocab_size == VOCAB
    assert checks(export, "--files-only")[1] == 0


def test_graph_whose_k_became_the_exports_own_is_to_be_deleted(export):
    """The graph of the own K has no K in its name, so that no command writes this one again."""
    edit_config(export, loop_steps=2, loop_anchor=0.5)
    says = refused("run", export, "it is", "--file", "model_k2.onnx")
    assert f"delete it, and run `loopexport onnx {export} --steps 2`" in says
    (export / "model_k2.onnx").unlink()
    assert run("onnx", export, "--steps", "2", "--no-verify").exit_code == 0
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
    with pytest.raises(loopexport.LoopExportError, match=r"model\.onnx has a damaged loop in its metadata"):
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
