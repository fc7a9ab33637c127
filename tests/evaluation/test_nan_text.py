"""Text that a model generates from NaN counts as wrong; the other answers of its batch stay what they are."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from loopexport import LoopSpec, plan_compare
from loopexport.cli.comparison_text import comparison_lines
from loopexport.evaluation.arms import Model
from loopexport.evaluation.nan_text import LOST, NanRows, with_nan_noted
from support.evaluation import tokenized_base

pytest.importorskip("lm_eval")
from loopexport.evaluation.scoring import Metric, answer_of

NAN, INFINITY = float("nan"), float("inf")
END = 2
SAMPLED = {"do_sample": True, "temperature": 1.0, "top_p": 0.9}


def break_the_loop(model, value):
    """Let the loop's logits of the first half of the rows break down after the first new token."""

    def hook(module, args, output):
        rows, new = output.logits.shape[:2]
        if module.config.loop_steps > 1 and new == 1:
            output.logits[: rows // 2, :, 7] = value

    model.register_forward_hook(hook)


@pytest.mark.parametrize("value", [NAN, INFINITY])
@pytest.mark.parametrize("generation", [{}, SAMPLED, {"num_beams": 2}], ids=["greedy", "sampled", "beams"])
def test_text_from_nan_is_wrong_and_said(tmp_path, monkeypatch, generation, value):
    load = Model._load
    base, items = tokenized_base("llama", tmp_path / "base"), tmp_path / "items.jsonl"
    items.write_text("".join(json.dumps({"prompt": f"it is {i}", "answer": "1"}) + "\n" for i in range(4)))

    def compare():
        settings = {"device": "cpu", "dtype": "float32", "batch_size": 4}
        generated = {"max_gen_toks": 4, **generation}
        return plan_compare(base, LoopSpec(span=(2, 4), steps=2), items=items, generation=generated, **settings).run()

    whole = compare()
    monkeypatch.setattr(Model, "_load", lambda self, arm: (load(self, arm), break_the_loop(self.lm.model, value)))
    broken = compare()
    [row] = broken.comparisons
    lost = [pair.item for pair in broken.pairs if pair.loop.is_nan]
    assert (row.base_nan, row.loop_nan, len(lost)) == (0, 2, 2)
    assert all(pair.loop.score == 0 and "NaN" in pair.loop.text for pair in broken.pairs if pair.item in lost)
    assert "NaN in place of 2 answers of the loop, counted as wrong" in "\n".join(comparison_lines([row], None))
    kept = [[pair for pair in result.pairs if pair.item not in lost] for result in (whole, broken)]
    assert kept[0] == kept[1]


def generated_rows(*first):
    """Two prompts of two tokens with three new ones each, where NaN came when a row had as many tokens as `first`."""
    rows = NanRows()
    for length in (2, 3, 4):
        logits = torch.zeros(2, 9)
        for row, at in enumerate(first):
            logits[row, 5] = NAN if at is not None and length >= at else 0.0
        rows(torch.zeros(2, length), logits)
    tokens = torch.tensor([[1, 1, 3, 4, 5], [1, 1, 3, END, 0]])
    rows.mark(tokens, 2, torch.tensor([END]))
    return tokens.tolist()


@pytest.mark.parametrize(
    ("first", "rows"),
    [
        ((None, None), [[1, 1, 3, 4, 5], [1, 1, 3, END, 0]]),
        ((2, 3), [[1, 1, -1, -1, -1], [1, 1, 3, -1, -1]]),
        ((4, None), [[1, 1, 3, 4, -1], [1, 1, 3, END, 0]]),
        ((None, 4), [[1, 1, 3, 4, 5], [1, 1, 3, END, 0]]),  # the text had ended
    ],
    ids=str,
)
def test_only_what_came_before_nan_is_kept(first, rows):
    assert generated_rows(*first) == rows


def test_a_text_that_stopped_before_nan_is_whole():
    """The harness cuts a text at the words that end it afterwards."""
    harness = type("Harness", (), {"tok_decode": lambda self, tokens: " ".join(map(str, tokens))})
    lm = with_nan_noted(harness)()
    assert lm.tok_decode([3, 4]) == "3 4"
    assert lm.tok_decode([3, 4, -1, -1]) == f"3 4{LOST}"
    assert lm.tok_decode([3, 4, -1, -1]).split("4")[0] == "3 "


def test_no_stop_word_of_a_task_cuts_the_mark():
    assert not any(char.isprintable() or char.isspace() for char in LOST)


def test_an_item_that_is_asked_several_times_is_lost_with_one_of_its_texts():
    task = SimpleNamespace(config=SimpleNamespace(task="mine"), get_config=lambda name: {})
    metric = Metric("acc", "none")
    sample = {"arguments": [("prompt", {"until": []})], "filtered_resps": [], "acc": 1.0}
    texts = {"whole": [["right", "other"]], "lost": [["right", f"x{LOST}"]]}
    answers = {name: answer_of(task, {**sample, "resps": each}, metric, len) for name, each in texts.items()}
    assert (answers["whole"].text, answers["whole"].is_nan, answers["whole"].score) == ("right", False, 1.0)
    assert (answers["lost"].is_nan, answers["lost"].score) == (True, 0.0)
