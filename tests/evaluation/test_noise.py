"""The base against itself."""

from __future__ import annotations

import pytest

from loopexport.errors import EvaluationError
from loopexport.evaluation.items import Answer
from loopexport.evaluation.noise import Floor, flips_within_noise, measure_floor
from support.answer_pairs import make_pair


def test_floor_has_the_largest_difference_and_counts_flips():
    first = [Answer(1, "a", (-1.0, -2.0)), Answer(0, "b", (-3.0, float("-inf")))]
    second = [Answer(1, "a", (-1.25, -2.0)), Answer(1, "a", (-3.5, float("-inf")))]
    assert measure_floor(first, second, (8, 1)) == Floor(2, 0.5, 1, (8, 1))


def test_floor_of_generated_text_has_no_log_likelihood():
    first, second = [Answer(1, "42")], [Answer(0, "41")]
    assert measure_floor(first, second, (8, 1)) == Floor(1, None, 1, (8, 1))


@pytest.mark.parametrize(
    ("first", "second"),
    [([], []), ([Answer(1, "a")], []), ([Answer(1, "a", (-1.0, -2.0))], [Answer(1, "a", (-1.0,))])],
)
def test_floor_needs_the_same_items(first, second):
    with pytest.raises(EvaluationError, match="the same items twice"):
        measure_floor(first, second, (8, 1))


def test_exact_tie_is_within_noise_of_zero():
    tied, clear = (-1.0, -1.0, -4.0), (-1.0, -2.0, -4.0)
    pairs = [
        make_pair(Answer(0, "b", tied), Answer(1, "a", clear)),
        make_pair(Answer(0, "b", clear), Answer(1, "a", clear)),
    ]
    assert flips_within_noise(pairs, 0.0) == 1
    assert flips_within_noise([make_pair(0, 1)], 0.0) is None
