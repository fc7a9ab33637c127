"""`compare` and `scan` ask multimodal models questions of text."""

from __future__ import annotations

import json

import pytest
from transformers import CONFIG_MAPPING

from loopexport import EvaluationError, LoopSpec, convert, plan_compare, plan_scan
from support.multimodal import save_multimodal, save_tokenizer

pytest.importorskip("lm_eval")
CPU = {"device": "cpu", "dtype": "float32", "batch_size": 4}
LOOP = LoopSpec(span=(1, 4), steps=3)


@pytest.fixture(scope="module", params=["gemma3", "qwen2_5_vl"])
def base(request, tmp_path_factory):
    """A base that AutoModelForCausalLM loads, and one that it does not."""
    if request.param not in CONFIG_MAPPING:
        pytest.skip("needs a newer transformers")
    return save_tokenizer(save_multimodal(request.param, tmp_path_factory.mktemp("base") / request.param))


@pytest.fixture
def items(tmp_path):
    path = tmp_path / "mine.jsonl"
    rows = [
        {"prompt": f"word{n} word{n + 1} ", "choices": ["word7", f"word{n + 40}"], "answer": n % 2} for n in range(6)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_base_and_export_give_one_result(base, items, tmp_path):
    export = convert(base, tmp_path / "export", span=LOOP.span, steps=LOOP.steps).root
    results = [plan_compare(base, LOOP, items=items, **CPU).run(), plan_compare(export, items=items, **CPU).run()]
    answers = [[(pair.base.loglikelihoods, pair.loop.loglikelihoods) for pair in each.pairs] for each in results]
    assert answers[0] == answers[1]
    assert all(ours != theirs for ours, theirs in answers[0])


def test_scan_ranks_loops_of_the_language_model(base, items):
    result = plan_scan(base, items=items, widths=(2,), steps=(2,), **CPU).run()
    assert {cell.cell.spec.span for cell in result.cells} == {(start, start + 2) for start in range(5)}


def test_vllm_is_refused(base, items):
    with pytest.raises(EvaluationError, match=r"is multimodal, and .* were not tried on vLLM; use --backend hf"):
        plan_compare(base, LOOP, items=items, backend="vllm")
