"""The choice of a loop: items are split by themselves alone, and chance recommends nothing."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest

from loopexport import EvaluationError
from loopexport.evaluation.selection import (
    POOLED,
    choose_finalists,
    is_for_test,
    item_hash,
    judge_finalists,
    pooled,
    recommended,
    split_items,
)
from loopexport.evaluation.verdict_text import sentence
from loopexport.evaluation.verdicts import BETTER, INCONCLUSIVE, WORSE
from support.answer_pairs import make_pair, make_task

pytest.importorskip("lm_eval")

CELLS, SELECTION, TEST, FINALISTS = 10, 40, 80, 3
DOCS = [{"prompt": f"item {number}", "answer": number} for number in range(400)]


def tasks(docs, *names) -> dict:
    return {name: SimpleNamespace(eval_docs=docs) for name in names or ("task",)}


def test_every_item_is_in_one_part_and_the_share_is_kept():
    split = split_items(tasks(DOCS, "one", "other"), None, 0.25)
    for name in ("one", "other"):
        assert sorted(split.selection[name] + split.test[name]) == list(range(400))
        assert 70 <= len(split.test[name]) <= 130


def test_equal_items_of_two_tasks_are_in_one_part():
    """Else loops would be ranked by items that test them: two tasks may ask one data set in two ways."""
    split = split_items(tasks(DOCS, "one", "other"), None, 0.5)
    assert split.test["one"] == split.test["other"]


def test_part_depends_on_the_item_alone():
    whole = split_items(tasks(DOCS), None, 0.5)
    limited = split_items(tasks(DOCS), 100, 0.5)
    backwards = split_items(tasks(DOCS[::-1]), None, 0.5)
    assert limited.test["task"] == [number for number in whole.test["task"] if number < 100]
    assert sorted(399 - number for number in backwards.test["task"]) == whole.test["task"]


def test_equal_items_are_in_one_part():
    split = split_items(tasks([*DOCS, *DOCS]), None, 0.5)
    test = set(split.test["task"])
    assert all((number in test) == (number + 400 in test) for number in range(400))


def test_larger_test_part_keeps_the_items_of_a_smaller_one():
    small, large = (set(split_items(tasks(DOCS), None, share).test["task"]) for share in (0.2, 0.6))
    assert small < large


def test_known_item_keeps_its_part():
    """Another hash would move items that earlier scans ranked loops by into the test."""
    parts = [is_for_test(item_hash(doc), 0.5) for doc in DOCS[:12]]
    assert "".join("t" if each else "s" for each in parts) == "sttsttstsstt"


def test_equal_images_are_in_one_part():
    """The text of an image in Python has its address."""
    image = pytest.importorskip("PIL.Image")
    one, same, other = (item_hash({"image": image.new("RGB", (2, 2), colour)}) for colour in ("red", "red", "blue"))
    assert one == same != other


@pytest.mark.parametrize(("share", "part"), [(1e-9, "test"), (1 - 1e-9, "selection")])
def test_empty_part_is_refused(share, part):
    with pytest.raises(EvaluationError, match=f"the 400 items of task leave none for the {part} part"):
        split_items(tasks(DOCS), None, share)


def test_pool_counts_every_item_of_every_task_by_its_own_metric():
    other = {"task": "other", "metric": "exact_match"}
    pairs = [make_pair(0, 1, 0), make_pair(1, 1, 1), make_pair(1, 0, 0, **other), make_pair(0, 1, 1, **other)]
    row = pooled(pairs)
    assert (row.name, row.n, row.gained, row.lost, row.difference) == (POOLED, 4, 2, 1, 0.25)


def test_pool_counts_an_item_of_two_tasks_once():
    """Else chance counts twice: 14 of 80 scans over noise recommended a loop, where a scan of one task did in 2."""
    pairs = [make_pair(0, 1, i, task=task, item_hash=str(i)) for task in ("one", "other") for i in range(9)]
    both, one = pooled(pairs), pooled(pairs[:9])
    assert (both.n, both.seeds, both.gained) == (one.n, one.seeds, one.gained) == (9, 1, 9)
    assert both.p >= one.p


def compared(gained: int, lost: int, ties: int = 0):
    return pooled(make_task(gained, lost, gained + lost + ties))


def test_finalists_are_the_best_and_of_equals_the_cheapest():
    selection = {"a": compared(3, 1, 6), "b": compared(5, 1, 4), "dear": compared(4, 1, 5), "cheap": compared(4, 1, 5)}
    costs = {"a": 1.0, "b": 2.0, "dear": 3.0, "cheap": 1.5}
    assert choose_finalists(selection, costs, 3) == ["b", "cheap", "dear"]


def test_loop_that_is_not_better_is_no_finalist():
    selection = {"level": compared(2, 2, 6), "worse": compared(1, 2, 7), "better": compared(2, 1, 7)}
    assert choose_finalists(selection, dict.fromkeys(selection, 1.0), 3) == ["better"]


def test_p_is_adjusted_for_all_finalists():
    alone = judge_finalists({"a": compared(8, 1, 21)})
    three = judge_finalists({"a": compared(8, 1, 21), "b": compared(5, 4, 21), "c": compared(4, 5, 21)})
    assert alone["a"].verdict == BETTER
    assert three["a"].p_holm == pytest.approx(3 * alone["a"].p)
    assert (three["a"].verdict, recommended(three)) == (INCONCLUSIVE, None)


def test_a_finalist_that_holm_rejects_says_so():
    """Else it would ask for fewer items than it had."""
    judged = judge_finalists({name: compared(14, 2, 84) for name in range(40)})
    for each in judged.values():
        assert each.items_needed <= each.n
        assert sentence(each).startswith("inconclusive: the interval excludes 0, but with 40 loops compared p becomes")


def test_best_of_the_better_is_recommended_and_a_worse_one_never():
    judged = judge_finalists({"good": compared(30, 5, 65), "best": compared(40, 5, 55), "bad": compared(5, 40, 55)})
    assert [each.verdict for each in judged.values()] == [BETTER, BETTER, WORSE]
    assert recommended(judged) == "best"
    assert recommended(judge_finalists({"bad": compared(5, 40, 55)})) is None
    assert recommended({}) is None


@pytest.fixture(autouse=True)
def _quick_statistics(monkeypatch):
    monkeypatch.setattr("gc.collect", lambda: 0)  # statsmodels calls it for each p


def simulated(dice: random.Random, gains: dict[int, float], count: int, cells) -> dict[str, object]:
    """Cells whose answers differ from the base's by chance; `gains` adds right answers to some."""
    base = [float(dice.random() < 0.5) for _ in range(count)]
    rows = {}
    for cell in cells:
        flips = [dice.random() < 0.3 for _ in range(count)]
        loop = [float(dice.random() < 0.5) if flip else right for flip, right in zip(flips, base, strict=True)]
        loop = [right or float(dice.random() < gains.get(int(cell), 0.0)) for right in loop]
        rows[cell] = pooled([make_pair(*each, item) for item, each in enumerate(zip(base, loop, strict=True))])
    return rows


def one_scan(dice, gains) -> tuple[str | None, bool]:
    """The recommended cell, and whether the best on the selection part looks better there by itself."""
    names = [str(number) for number in range(CELLS)]
    selection = simulated(dice, gains, SELECTION, names)
    finalists = choose_finalists(selection, dict.fromkeys(names, 1.0), FINALISTS)
    test = judge_finalists(simulated(dice, gains, TEST, finalists))
    return recommended(test), any(each.verdict == BETTER for each in selection.values())


def test_scans_over_noise_recommend_nothing():
    outcomes = [one_scan(random.Random(seed), {}) for seed in range(100)]
    assert sum(name is None for name, _ in outcomes) >= 95
    assert sum(fooled for _, fooled in outcomes) > 5  # who chooses and tests on the same items is fooled


def test_planted_gain_survives():
    outcomes = [one_scan(random.Random(seed), {7: 0.6}) for seed in range(10)]
    assert [name for name, _ in outcomes].count("7") >= 9
