"""Plots of comparisons and scans. What they show was looked at; here: they draw any input and touch nothing else."""

from __future__ import annotations

import sys
import warnings

import pytest

from loopexport.evaluation.heatmap import heatmap_png
from loopexport.evaluation.plots import DARK, forest_png
from loopexport.evaluation.verdicts import compare_pairs
from support.answer_pairs import make_pair, make_task

PNG = b"\x89PNG\r\n\x1a\n"


def width_and_height(png: bytes) -> tuple[int, int]:
    assert png.startswith(PNG)
    return int.from_bytes(png[16:20], "big"), int.from_bytes(png[20:24], "big")


@pytest.mark.parametrize("name", ["quiz", "$x^{$", "\u95ee\u7b54\n\u202e", "n" * 500])
def test_forest_draws_any_name(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert width_and_height(forest_png(compare_pairs(make_task(5, 3, 50, task=name))))[0] == 8 * 144


def test_forest_grows_with_its_rows_and_is_the_same_each_time():
    few = compare_pairs(make_task(5, 3, 50))
    many = compare_pairs([pair for i in range(30) for pair in make_task(5, 3, 50, task=f"task{i}")])
    assert width_and_height(forest_png(many))[1] > 3 * width_and_height(forest_png(few))[1]
    assert forest_png(few) == forest_png(few) != forest_png(few, DARK)


def test_forest_has_a_panel_for_scores_beyond_1():
    quiz = make_task(5, 3, 50)
    bleu = [make_pair(40, 40 + i % 5, i, task="wmt", metric="bleu") for i in range(20)]
    heights = [width_and_height(forest_png(compare_pairs(pairs)))[1] for pairs in (quiz, [*quiz, *bleu])]
    assert heights[1] > heights[0] + 144 * 0.32  # a row, and a panel's own margin


def cell(start, width, steps, difference, error=0.02):
    interval = {"low": difference - error, "high": difference + error}
    return {"start": start, "width": width, "steps": steps, "difference": difference, **interval}


CELLS = [cell(start, width, steps, 0.01 * (start - steps)) for steps in (3, 2) for width in (4, 2) for start in (8, 4)]


def test_heatmap_has_a_panel_for_each_k():
    one = heatmap_png([each for each in CELLS if each["steps"] == 2])
    assert width_and_height(heatmap_png(CELLS))[1] > 1.3 * width_and_height(one)[1]


@pytest.mark.parametrize("cells", [[cell(4, 2, 2, 0.0)], [cell(start, 2, 2, 0.01) for start in range(60)]])
def test_heatmap_draws_one_cell_and_many(cells):
    assert width_and_height(heatmap_png(cells))[0] <= 16 * 144


def test_heatmap_marks_cells_that_may_be_chance():
    assert heatmap_png([cell(4, 2, 2, 0.03, error=0.02)]) != heatmap_png([cell(4, 2, 2, 0.03, error=0.04)])


def test_plots_leave_the_users_backend_alone():
    before = sys.modules.pop("matplotlib.pyplot", None)
    try:
        forest_png(compare_pairs(make_task(5, 3, 50)))
        heatmap_png(CELLS[:1])
        assert "matplotlib.pyplot" not in sys.modules
    finally:
        if before is not None:
            sys.modules["matplotlib.pyplot"] = before
