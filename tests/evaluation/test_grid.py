"""The grid: every combination that fits the base, by its first layer; the others with a reason."""

from __future__ import annotations

from dataclasses import replace

import pytest

from loopexport import EvaluationError, SpecError
from loopexport.base.download import find_checkpoint
from loopexport.evaluation.grid import Grid, within_budget
from support.tiny import NUM_LAYERS


@pytest.fixture(scope="module")
def base(tiny_base):
    return find_checkpoint(str(tiny_base("llama")))


def test_widths_cover_the_whole_depth(base):
    cells, left_out = Grid(widths=(2, 4), stride=2).cells(base)
    assert [cell.spec.span for cell in cells] == [(0, 2), (0, 4), (2, 4), (2, 6), (4, 6)]
    assert not left_out


def test_stride_needs_widths():
    Grid(spans=("3:5",)).check()
    with pytest.raises(EvaluationError, match="stride 2 has no effect on spans"):
        Grid(spans=("3:5",), stride=2).check()


def test_width_that_no_span_can_have_is_left_out(base):
    cells, left_out = Grid(widths=(6, 7)).cells(base)
    assert [cell.spec.span for cell in cells] == [(0, 6)]
    assert [each.name for each in left_out] == ["0:7 K=2"]


def test_cells_are_all_combinations_by_first_layer_with_names_of_their_own(base):
    others = {"anchor": (0.0, 0.5), "kv": ("shared", "per_step"), "mode": ("block", "layer")}
    cells, _ = Grid(spans=("3:5", (1, 3)), steps=(2, 3), others=others).cells(base)
    assert len(cells) == len({cell.name for cell in cells}) == len({cell.spec for cell in cells}) == 2 * 2 * 2 * 2 * 2
    assert [cell.start for cell in cells] == sorted(cell.start for cell in cells)
    assert cells[0].name == "1:3 K=2"
    assert cells[-1].name == "3:5 K=3 anchor=0.5 kv=per_step mode=layer"


def test_cost_counts_layer_evaluations_relative_to_the_base(base):
    (cell,), _ = Grid(spans=("1:4",), steps=(3,)).cells(base)
    assert cell.cost == (NUM_LAYERS + 2 * 3) / NUM_LAYERS


def test_what_does_not_fit_is_left_out_with_its_reason(base):
    others = {"rule": ("euler", "aitken"), "anchor": (0.0, 1.0)}
    cells, left_out = Grid(spans=("1:3", "5:9"), steps=(2,), others=others).cells(base)
    reasons = {each.name: each.reason for each in left_out}
    assert [cell.name for cell in cells] == ["1:3 K=2"]
    assert "outside the model" in reasons["5:9 K=2"]
    assert "kv reference" in reasons["1:3 K=2 rule=aitken"]
    assert reasons["1:3 K=2 anchor=1"] == "steps or anchor is 1, so this loop is the base"


def test_layers_that_cannot_loop_are_left_out(base):
    kinds = ["full_attention"] * 3 + ["unheard_of"] * 3
    hybrid = replace(base, config={**base.config, "layer_types": kinds})
    cells, left_out = Grid(widths=(2,)).cells(hybrid)
    assert [cell.start for cell in cells] == [0, 1]
    assert len(left_out) == 3
    assert all("unheard_of" in each.reason for each in left_out)


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        (Grid(), "neither was given"),
        (Grid(spans=("1:2",), widths=(2,)), "both were given"),
        (Grid(widths=(0,)), "width 0 must be"),
        (Grid(widths=(2,), stride=0), "stride 0 must be"),
        (Grid(widths=(2,), steps=()), "numbers of steps"),
    ],
)
def test_wrong_grids_are_refused_without_a_model(grid, message):
    with pytest.raises(EvaluationError, match=message):
        grid.check()


@pytest.mark.parametrize("grid", [Grid(spans=("8:12",)), Grid(widths=(9,)), Grid(spans=("1:3",), steps=(1,))])
def test_grid_without_a_fitting_cell_is_refused(base, grid):
    with pytest.raises(EvaluationError, match="no loop of the grid fits"):
        grid.cells(base)


def test_misspelt_span_is_refused(base):
    with pytest.raises(SpecError, match="is ambiguous"):
        Grid(spans=("1-3",)).cells(base)


def test_budget_keeps_cells_spread_over_the_grid(base):
    cells, _ = Grid(widths=(1,)).cells(base)
    kept, beyond = within_budget(cells, 3, "3 evaluations")
    assert [cell.start for cell in kept] == [0, 2, 4]
    assert {each.name for each in beyond} | {cell.name for cell in kept} == {cell.name for cell in cells}
    assert {each.reason for each in beyond} == {"beyond the budget: 3 evaluations"}
    assert within_budget(cells, None, "") == within_budget(cells, 6, "") == (cells, [])


def test_budget_too_small_for_one_cell_is_refused(base):
    cells, _ = Grid(widths=(1,)).cells(base)
    with pytest.raises(EvaluationError, match=r"1e-06 hours is too small for one of the 6 loops"):
        within_budget(cells, 0, "1e-06 hours")
