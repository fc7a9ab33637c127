"""What cannot become a graph, or cannot be run, is refused with the reason."""

from __future__ import annotations

import json
import shutil

import onnxruntime as ort
import pytest

import loopexport
import loopexport.onnx
from loopexport.onnx import requirements
from support.commands import run, tree
from support.family_walk import save_tiny_family
from support.multimodal import save_multimodal
from support.onnx_walk import walk_onnx
from support.tiny import SPAN


@pytest.fixture
def export(export_dir, tmp_path):
    """A copy of an export without graphs."""
    return shutil.copytree(export_dir("llama"), tmp_path / "export")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--steps", "0"], "steps 0 must be a whole number from 1"),
        (["--steps", "two"], "is not a list of whole numbers such as 2,4,8"),
        (["--dtype", "int3"], "'int3' is not one of"),
    ],
)
def test_bad_options_are_told(export, options, says):
    result = run("onnx", export, *options)
    assert result.exit_code in (1, 2)
    assert says in result.stderr


@pytest.mark.matrix
def test_family_that_cannot_be_traced_is_refused_with_the_reason(tmp_path):
    """Doge masks otherwise from a number of tokens on."""
    base = save_tiny_family("doge", tmp_path / "base")
    export = loopexport.convert(str(base), tmp_path / "out", span=(1, 3), steps=2).root
    before = tree(export)
    result = run("onnx", export)
    assert result.exit_code == 1
    assert "family 'doge' cannot be traced to ONNX: its code takes different paths for different" in result.stderr
    assert tree(export) == before


def test_recurrent_layers_outside_of_the_span_are_refused_at_once(tmp_path):
    base = save_tiny_family("qwen3_next", tmp_path / "base")
    export = loopexport.convert(str(base), tmp_path / "out", span=(3, 4), steps=2).root
    says = "layer 0 keeps the state of a recurrence or convolution in its cache, for which an ONNX graph has no input"
    assert says in run("onnx", export, "--dry-run").stderr


@pytest.mark.matrix
def test_window_that_only_the_cache_knows_is_refused(tmp_path):
    """Moshi masks nothing: torch's cache drops old keys, beyond the lengths that verification compares."""
    outcome, _ = walk_onnx("moshi", tmp_path, sliding_window=3000)
    assert outcome.status == "refused"
    assert "its cache forgets all but the last 3000 tokens, and no mask of its code says so" in outcome.reason


def test_multimodal_export_is_refused(tmp_path):
    base = save_multimodal("qwen2_5_vl", tmp_path / "base")
    export = loopexport.convert(str(base), tmp_path / "out", span=SPAN, steps=3).root
    result = run("onnx", export)
    assert result.exit_code == 1
    assert "these graphs take token ids alone; convert its base with --text-only" in result.stderr


def test_base_in_numbers_that_no_graph_holds_is_refused(export):
    config = json.loads((export / "base" / "config.json").read_text())
    (export / "base" / "config.json").write_text(json.dumps({**config, "quantization_config": {"bits": 4}}))
    result = run("onnx", export, "--dry-run")
    assert "the base is quantised with bitsandbytes, and graphs take gptq" in result.stderr
    assert "model.dequantize()" in result.stderr


def test_missing_graph_and_provider_are_told(export, graph):
    assert "no ONNX graph in" in run("run", export, "Hello").stderr
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        result = run("run", graph("llama", steps=2), "Hello", "--provider", "cuda")
        assert (result.exit_code, "ONNX Runtime cannot use CUDA" in result.stderr) == (1, True)


def test_old_runtimes_that_hold_shared_weights_several_times_are_refused(export, monkeypatch):
    real = requirements.version
    monkeypatch.setattr(requirements, "version", lambda name: "1.22.1" if name == "onnxruntime" else real(name))
    assert "onnxruntime 1.22.1 loads a weight once for each place" in run("onnx", export).stderr
