"""A graph takes token ids alone: a multimodal export is refused, and its language model is not."""

from __future__ import annotations

import loopexport
import loopexport.onnx
from support.commands import run
from support.multimodal import save_multimodal


def test_multimodal_export_is_refused_and_its_language_model_is_not(tmp_path):
    base = save_multimodal("llava", tmp_path / "base")
    whole = loopexport.convert(base, tmp_path / "whole", span=(1, 4), steps=2).root
    result = run("onnx", whole)
    assert result.exit_code == 1
    assert "reads more than text" in result.stderr
    text = loopexport.convert(base, tmp_path / "text", span=(1, 4), steps=2, text_only=True).root
    assert loopexport.onnx.plan_onnx(text)
