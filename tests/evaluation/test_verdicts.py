"""One row for each task and group: its counts, and a verdict that neither interval nor p contradicts."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loopexport.errors import EvaluationError
from loopexport.evaluation import statistics
from loopexport.evaluation.items import Answer
from loopexport.evaluation.noise import Floor
from loopexport.evaluation.statistics import tango_interval
from loopexport.evaluation.verdicts import compare_pairs
from support.answer_pairs import make_pair, make_task, swap


@pytest.fixture(autouse=True, scope="module")
def _quick_statistics():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "RESAMPLES", 999)
        patch.setattr("gc.collect", lambda: 0)  # statsmodels calls it for each p
        yield


def compare_one(pairs, **options):
    (row,) = compare_pairs(pairs, **options)
    return row


def test_row_counts_items():
    row = compare_one(make_task(12, 3, 100, metric="exact_match"))
    assert (row.name, row.metric, row.n, row.seeds, row.is_group) == ("quiz", "exact_match", 100, 1, False)
    assert (row.gained, row.lost, row.discordance) == (12, 3, 0.15)
    assert row.difference == pytest.approx(0.09) == pytest.approx(row.loop - row.base)
    assert (row.low, row.high) == tango_interval(12, 3, 100)
    assert (row.method, row.confidence, row.p_holm) == ("tango", 0.95, None)
    assert (row.verdict, row.note) == ("better", "")
    assert row.items_needed == pytest.approx(7.85 * 0.15 / 0.09**2, abs=1)
    assert json.loads(json.dumps(row.to_dict()))["verdict"] == "better"


def test_model_against_itself_is_zero_without_flips():
    row = compare_one(make_task(0, 0, 60))
    assert (row.difference, row.gained, row.lost, row.p, row.verdict) == (0, 0, 0, 1, "inconclusive")
    assert row.low == -row.high < 0
    assert row.items_needed is None
    assert row.smallest_difference == pytest.approx(0.081, abs=1e-3)


def test_seeds_of_an_item_are_one_problem():
    scores = [(0, 1), (0, 1), (0, 0), (1, 0)]
    pairs = [make_pair(*scores[seed], item, seed=seed) for item in range(10) for seed in range(4)]
    row = compare_one(pairs)
    assert (row.n, row.seeds, row.method) == (10, 4, "bootstrap")
    assert (row.gained, row.lost, row.difference) == (10, 0, 0.25)
    assert (row.base, row.loop) == (0.25, 0.5)


def test_more_seeds_of_the_same_answers_do_not_narrow_the_interval():
    def row_of(seeds):
        pairs = [pair for seed in range(seeds) for pair in make_task(6, 3, 40, seed=seed)]
        return compare_one(pairs)

    assert (row_of(2).low, row_of(2).high, row_of(2).p) == (row_of(8).low, row_of(8).high, row_of(8).p)


def test_scores_that_are_not_0_or_1_are_resampled():
    pairs = [make_pair(40 + i % 7, 42 + i % 5, i, metric="bleu") for i in range(80)]
    row = compare_one(pairs)
    assert row.method == "bootstrap"
    assert row.low < row.difference < row.high
    assert row.gained + row.lost <= row.n


def test_p_is_adjusted_among_tasks_and_the_note_says_so():
    tasks = [pair for name in "abcd" for pair in make_task(11, 2, 200, task=name)]
    alone = compare_one(make_task(11, 2, 200))
    assert alone.verdict == "better"
    for row in compare_pairs(tasks):
        assert row.p_holm == pytest.approx(4 * alone.p)
        assert row.verdict == "inconclusive"
        assert "4 tasks" in row.note


def test_group_pools_items_and_has_a_family_of_its_own():
    pairs = [*make_task(8, 2, 100, task="small"), *make_task(9, 3, 300, task="large")]
    *tasks, group = compare_pairs(pairs, groups={"both": ["small", "large"]})
    assert [row.name for row in tasks] == ["small", "large"]
    assert (group.name, group.is_group, group.n, group.gained, group.lost) == ("both", True, 400, 17, 5)
    assert (group.low, group.high) == tango_interval(17, 5, 400)
    assert group.p_holm is None
    assert all(row.p_holm is not None for row in tasks)
    assert group.verdict == "better"


def test_item_that_occurs_in_two_tasks_is_one_problem_of_their_group():
    scores = {"one": (0, 1), "other": (0, 0)}
    pairs = [make_pair(*each, i, task=task, item_hash=str(i)) for task, each in scores.items() for i in range(20)]
    one, other, group = compare_pairs(pairs, groups={"both": list(scores)})
    assert (one.n, one.method, other.n, other.method) == (20, "tango", 20, "tango")
    assert (group.n, group.seeds, group.method, group.gained, group.difference) == (20, 1, "bootstrap", 20, 0.5)


def test_equal_items_of_a_task_are_one_problem():
    row = compare_one([make_pair(0, 1, i, item_hash=str(i // 2)) for i in range(20)])
    assert (row.n, row.seeds, row.gained) == (10, 1, 10)


def test_seeds_of_an_item_stay_together_where_its_hash_changes():
    """As that of an item with an image does, which has the image's address."""
    row = compare_one([make_pair(0, 1, i, seed=seed, item_hash=f"{i} {seed}") for seed in (1, 2) for i in range(6)])
    assert (row.n, row.seeds) == (6, 2)


def test_group_has_a_row_for_each_metric_that_its_tasks_share():
    pairs = [
        *make_task(8, 2, 100, task="one", metric="acc"),
        *make_task(7, 2, 100, task="one", metric="acc_norm"),
        *make_task(6, 2, 100, task="two", metric="acc"),
    ]
    rows = compare_pairs(pairs, groups={"both": ["one", "two"]})
    assert [(row.name, row.metric) for row in rows if row.is_group] == [("both", "acc")]
    assert len([row for row in rows if not row.is_group]) == 3


@pytest.mark.parametrize(("gained", "lost", "words"), [(4, 0, "above 0.05"), (0, 4, "above 0.05")])
def test_verdict_waits_for_interval_and_p(gained, lost, words):
    row = compare_one(make_task(gained, lost, 200))
    assert row.excludes_zero
    assert row.verdict == "inconclusive"
    assert words in row.note


def test_lengths_of_answers():
    base, loop = Answer(0, "a", tokens=10, truncated=True), Answer(1, "b", tokens=30)
    row = compare_one([make_pair(base, loop, 0), make_pair(base, base, 1)])
    assert (row.base_tokens, row.loop_tokens) == (10, 20)
    assert (row.base_truncated, row.loop_truncated) == (1, 0.5)


def test_floor_tells_flips_that_mean_nothing():
    near, far = (-1.0, -1.001, -9.0), (-1.0, -3.0, -9.0)
    pairs = [
        make_pair(Answer(0, "a", near), Answer(1, "b", far), 0),
        make_pair(Answer(0, "a", far), Answer(1, "b", far), 1),
        make_pair(Answer(1, "a", near), Answer(1, "a", near), 2),
    ]
    floor = Floor(items=3, largest_difference=0.01, flips=0, batch_sizes=(8, 1))
    assert compare_one(pairs, floor=floor).flips_within_noise == 1
    assert compare_one(pairs).flips_within_noise is None
    normalised = [replace(pair, metric="acc_norm") for pair in pairs]
    assert compare_one(normalised, floor=floor).flips_within_noise is None


@pytest.mark.parametrize("metric", ["word_perplexity", "perplexity", "bits_per_byte", "loss", "ter", "amb_bias_score"])
def test_no_verdict_where_less_is_better(metric):
    with pytest.raises(EvaluationError, match=f"no verdict for {metric} of quiz.*such as acc"):
        compare_pairs(make_task(1, 1, 10, metric=metric))


@pytest.mark.parametrize(
    ("pairs", "groups", "message"),
    [
        ([], None, "no answers to compare"),
        ([make_pair(0, 1), make_pair(0, 1)], None, "item 0 of quiz occurs twice"),
        ([make_pair(0, float("nan"))], None, "score nan of item 0"),
        ([make_pair(0, 1)], {"all": ["quiz", "other"]}, "group all has the task other"),
    ],
)
def test_answers_that_cannot_be_compared(pairs, groups, message):
    with pytest.raises(EvaluationError, match=message):
        compare_pairs(pairs, groups)


scores = st.sampled_from([0.0, 0.0, 1.0, 1.0, 0.5])
binary = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=60)
graded = st.lists(st.tuples(scores, scores), min_size=1, max_size=30)
OPPOSITE = {"better": "worse", "worse": "better", "inconclusive": "inconclusive"}


def tasks_of(each_scores) -> list:
    return [
        make_pair(*each, item, task=f"task{number}")
        for number, scores_of_task in enumerate(each_scores)
        for item, each in enumerate(scores_of_task)
    ]


@given(st.lists(binary | graded, min_size=1, max_size=3))
@settings(max_examples=25, deadline=None)
def test_swapped_models_get_the_opposite_verdict(each_scores):
    pairs = tasks_of(each_scores)
    for row, swapped in zip(compare_pairs(pairs), compare_pairs(swap(pairs)), strict=True):
        assert swapped.difference == -row.difference
        assert (swapped.low, swapped.high) == pytest.approx((-row.high, -row.low), abs=1e-11)
        assert (swapped.gained, swapped.lost) == (row.lost, row.gained)
        assert (swapped.p, swapped.p_holm) == (row.p, row.p_holm)
        assert (swapped.verdict, swapped.note) == (OPPOSITE[row.verdict], row.note)


@given(st.lists(binary | graded, min_size=1, max_size=3))
@settings(max_examples=25, deadline=None)
def test_verdict_contradicts_neither_interval_nor_p(each_scores):
    pairs = tasks_of(each_scores)
    names = [f"task{number}" for number in range(len(each_scores))]
    for row in compare_pairs(pairs, {"all": names}):
        says = {"better": row.low > 0, "worse": row.high < 0, "inconclusive": True}
        assert says[row.verdict]
        assert row.low <= row.difference + 1e-9
        assert row.high >= row.difference - 1e-9
        if row.verdict == "inconclusive":
            assert bool(row.note) == (row.excludes_zero or row.final_p <= 0.05)
        else:
            assert row.final_p <= 0.05
            assert not row.note


def test_a_base_that_overflows_makes_no_loop_better():
    """In fp16 the base may give NaN where it is right in fp32."""
    broken = Answer(0.0, "(no answer: NaN)", (float("nan"), -1.0))
    pairs = [make_pair(broken, 1, item) for item in range(30)] + make_task(0, 0, 60)[30:]
    ahead, behind = compare_one(pairs), compare_one(swap(pairs))
    assert ahead.excludes_zero
    assert (ahead.base_nan, ahead.verdict) == (30, "inconclusive")
    assert ahead.note == "30 answers of the base are NaN, so that this is no gain; compare in float32"
    assert (behind.loop_nan, behind.verdict, behind.note) == (30, "worse", "")
