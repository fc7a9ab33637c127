"""ONNX graphs of exports that earlier versions wrote."""

from __future__ import annotations

import pytest

import loopexport
from loopexport.onnx import build
from support.commands import checks, sha256
from support.earlier_versions import NAMES, earlier_export


@pytest.fixture(scope="module")
def kept_trace():
    """`trace_export` that traces once: the exports have one base, and the same weights."""
    made, trace_export = [], build.trace_export

    def trace(export, *options):
        if not made:
            made.append(trace_export(export, *options))
        return made[0]

    return trace


@pytest.mark.matrix
@pytest.mark.parametrize("name", NAMES)
def test_graphs_of_an_earlier_export_outlive_its_code(name, tmp_path, monkeypatch, kept_trace):
    root = earlier_export(name, tmp_path / f"looped_{name.replace('-', '_')}")
    monkeypatch.setattr(build, "trace_export", kept_trace)
    loopexport.export_onnx(root, verify=False)
    graph = sha256(root / "model.onnx")
    loopexport.upgrade(root)
    assert sha256(root / "model.onnx") == graph
    outcome, status = checks(root)
    assert status == 0, outcome
    assert outcome["model.onnx computes what torch does"]["passed"]
