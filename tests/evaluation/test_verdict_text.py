"""Comparisons in sentences."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loopexport.cli.comparison_text import comparison_lines
from loopexport.evaluation.items import Answer
from loopexport.evaluation.noise import Floor
from loopexport.evaluation.verdict_text import headline, method_sentence, sentence, signed
from loopexport.evaluation.verdicts import compare_pairs, p_text
from support.answer_pairs import make_pair, make_task


def row_of(*counts):
    return compare_pairs(make_task(*counts))[0]


@pytest.mark.parametrize(
    ("counts", "text"),
    [
        ((40, 12, 500), "better by 5.6 points (95 % interval +2.9 to +8.6)"),
        ((12, 40, 500), "worse by 5.6 points (95 % interval -8.6 to -2.9)"),
        (
            (13, 10, 300),
            "inconclusive: 300 items could have shown 4.5 points; 6,018 would be needed for the 1.0 observed",
        ),
        ((5, 5, 1000), "inconclusive: 1,000 items could have shown 0.9 points; no difference was observed"),
        ((4, 0, 200), "inconclusive: the interval excludes 0, but p = 0.062 is above 0.05"),
        ((4, 0, 4), "inconclusive: 4 items cannot show any difference, however large"),
        ((0, 1, 1), "inconclusive: 1 item cannot show any difference, however large"),
        ((12, 4, 1000), "better by 0.8 points (95 % interval +0.02 to +1.7)"),
    ],
)
def test_sentence_of_a_row(counts, text):
    assert sentence(row_of(*counts)) == text


def test_headline_of_one_row_has_its_numbers():
    assert headline([row_of(40, 12, 500)]) == "The loop is better on quiz by 5.6 points (95 % interval +2.9 to +8.6)."
    assert headline([row_of(0, 0, 10)]).startswith("Nobody can know yet whether the loop helps on quiz: 10 items could")


def headline_of(**counts):
    rows = compare_pairs([pair for name, each in counts.items() for pair in make_task(*each, task=name)])
    return headline(rows)


def test_headline_names_what_was_found():
    up, down, level = (40, 5, 500), (5, 40, 500), (3, 3, 500)
    assert headline_of(a=up, b=up, c=down) == "The loop is better on a and b, and worse on c."
    assert (
        headline_of(a=up, b=level) == "The loop is better on a. In the other comparison the difference may be chance."
    )
    assert headline_of(a=level, b=level).startswith("Nobody can know yet whether the loop helps: in all 2 comparisons")
    assert headline_of(**dict.fromkeys("abcdefg", up)) == "The loop is better on a, b, c, d, e and 2 others."


def test_metric_tells_rows_of_one_task_apart():
    pairs = [*make_task(40, 5, 500), *make_task(5, 40, 500, metric="acc_norm")]
    assert headline(compare_pairs(pairs)) == "The loop is better on quiz (acc), and worse on quiz (acc_norm)."


def test_scores_beyond_1_are_not_points():
    row = compare_pairs([make_pair(40 + i % 3, 42 + i % 2, i, metric="bleu") for i in range(40)])[0]
    assert "points" not in sentence(row)
    assert signed(row, -0.0001234) == "-0.000123"
    assert signed(row, 0) == "0"


def test_as_few_items_as_can_show_anything():
    for verdict, items in (("inconclusive", 4), ("better", 5)):
        row = row_of(items, 0, items)
        assert (row.verdict, row.is_hopeless) == (verdict, verdict == "inconclusive")
        [graded] = compare_pairs([make_pair(0.25 + i / 100, 0.5, i) for i in range(items + 1)])
        assert (graded.verdict, graded.is_hopeless) == (verdict, verdict == "inconclusive")


@pytest.mark.parametrize(
    ("p", "text"),
    [
        (0.0499, "0.050"),
        (0.05, "0.050"),
        (0.0504, "0.0504"),
        (0.050003, "0.050003"),
        (0.05 + 1e-12, ">0.050"),
        (0.000999, "<0.001"),
        (1.0, "1.000"),
    ],
)
def test_p_is_shown_on_its_side_of_the_threshold(p, text):
    assert p_text(p) == text


@given(st.integers(1, 60), st.integers(0, 60), st.integers(0, 4000))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_what_is_shown_contradicts_no_verdict(gained, lost, others):
    row = row_of(gained, lost, gained + lost + others)
    low, high, difference = (float(signed(row, value)) for value in (row.low, row.high, row.difference))
    assert (low > 0 or high < 0) == row.excludes_zero
    assert (difference == 0) == (row.difference == 0)
    assert low <= difference <= high
    if row.verdict == "inconclusive" and row.items_needed is not None and not row.note and not row.is_hopeless:
        assert row.items_needed > row.n


def test_method_sentence_names_what_was_used():
    binary, graded = make_task(4, 3, 50), [make_pair(0.25, 0.5, i, task="essay") for i in range(5)]
    texts = [method_sentence(compare_pairs(pairs)) for pairs in (binary, graded, [*binary, *graded])]
    assert ["Tango" in text for text in texts] == [True, False, True]
    assert ["sign-flip" in text for text in texts] == [False, True, True]


def test_lines_of_a_comparison_are_aligned_and_end_with_the_answer():
    generated = Answer(1, "42", tokens=1500), Answer(0, "4", tokens=2000, truncated=True)
    pairs = [*make_task(40, 12, 500, task="arc_easy"), *(make_pair(*generated, i, task="aime") for i in range(30))]
    rows = compare_pairs(pairs, {"all": ["arc_easy", "aime"]})
    lines = comparison_lines(rows, Floor(100, 0.03, 1, (8, 1)))
    table = lines[: lines.index("")]
    assert len(table) == 4
    assert len({len(line) for line in table}) == 1
    assert table[3].startswith("all (group)")
    assert "  base 1,500 tokens an answer, 0.0 % cut at the limit; loop 2,000 tokens, 100.0 % cut" in lines
    assert any(line.startswith("p is adjusted for 2 tasks (Holm)") for line in lines)
    assert any("batch size 8 against 1: 1 of 100 items flipped" in line for line in lines)
    assert lines[-1] == headline(rows)


def test_lines_say_how_many_flips_mean_nothing():
    near, far = (-1.0, -1.001), (-1.0, -3.0)
    rows = compare_pairs([make_pair(Answer(0, "a", near), Answer(1, "b", far))], floor=Floor(1, 0.1, 0, (8, 1)))
    assert "  1 of 1 flip within the base's own noise" in comparison_lines(rows, None)
    assert "The base was not compared with itself." in comparison_lines(rows, None)
