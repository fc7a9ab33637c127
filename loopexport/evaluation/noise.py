"""The floor of a comparison: how far a base differs from itself, and which flips are no larger."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from loopexport.errors import EvaluationError

from .items import Answer, Pair


@dataclass(frozen=True)
class Floor:
    """The base against itself with another batch size.

    Attributes:
        items: number of items.
        largest_difference: of one choice's log-likelihood, in nats; None if there are no choices, or all are NaN.
        flips: items whose score changed.
        batch_sizes: of the two runs.
    """

    items: int
    largest_difference: float | None
    flips: int
    batch_sizes: tuple[int, int]

    def to_dict(self) -> dict:
        """The floor as one JSON object."""
        return asdict(self)


def measure_floor(first: Sequence[Answer], second: Sequence[Answer], batch_sizes: tuple[int, int]) -> Floor:
    """The floor from two runs of the base.

    Args:
        first, second: the answers to the same items in the same order.
        batch_sizes: of the two runs.

    Raises:
        EvaluationError: the runs have no items, or not the same number of items or choices.
    """
    if not first or [len(each.loglikelihoods) for each in first] != [len(each.loglikelihoods) for each in second]:
        raise EvaluationError(
            f"the base's two runs have {len(first)} and {len(second)} answers, or answers with other choices; "
            "the floor needs the same items twice"
        )
    differences = [
        0.0 if one == two else abs(one - two)  # both may be minus infinity
        for answers in zip(first, second, strict=True)
        for one, two in zip(*(answer.loglikelihoods for answer in answers), strict=True)
        if not any(answer.is_nan for answer in answers)
    ]
    return Floor(
        items=len(first),
        largest_difference=max(differences, default=None),
        flips=sum(one.score != two.score for one, two in zip(first, second, strict=True)),
        batch_sizes=batch_sizes,
    )


def flips_within_noise(pairs: Sequence[Pair], noise: float) -> int | None:
    """How many items flipped although one of the models was nearly undecided between its two likeliest choices.

    Args:
        pairs: of one task, or of one group.
        noise: the largest margin of such an item, in nats: `Floor.largest_difference`.

    Returns:
        None unless the metric is `acc` of several choices. Other metrics do not choose by the log-likelihood alone;
        `acc_norm`, for one, divides it by a length.
    """
    if not all(_chooses_by_loglikelihood(pair) for pair in pairs):
        return None
    return sum(pair.difference != 0 and min(_margin(pair.base), _margin(pair.loop)) <= noise for pair in pairs)


def _chooses_by_loglikelihood(pair: Pair) -> bool:
    counts = len(pair.base.loglikelihoods), len(pair.loop.loglikelihoods)
    return pair.metric.split(",")[0] == "acc" and min(counts) > 1


def _margin(answer: Answer) -> float:
    """Difference of the two largest log-likelihoods."""
    second, first = sorted(answer.loglikelihoods)[-2:]
    return first - second
