"""Statistics of paired answers: intervals, p, and what a number of items can show.

Everywhere `gained` counts the items that only the loop got right, `lost` those that only the base got right, and
`differences` has one number for each problem: the loop's score minus the base's, the mean over the problem's seeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, sqrt
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

CONFIDENCE = 0.95
ALPHA = 0.05  # 1 - CONFIDENCE, which is not 0.05 in floating point
RESAMPLES = 9999
RANDOM_SEED = 20240229  # a page must show the same numbers each time it is made
BATCH_NUMBERS = 4_000_000  # numbers in memory at once while resampling

_Z = 1.959964  # a normal variable is beyond +-_Z with probability ALPHA
_Z_POWER = _Z + 0.841621  # a two-sided test at ALPHA finds an effect of this many standard errors with probability 0.8
_DIGITS = 12  # an end that rounding alone moves off 0 is 0


def mcnemar_mid_p(gained: int, lost: int) -> float:
    """McNemar's test in its mid-p version, two-sided: p of at least this imbalance if both outcomes were as likely.

    It is twice the smaller tail of the binomial distribution, with half the weight for what was observed. It equals 1
    where `gained == lost`.

    Source: Fagerland, Lydersen, Laake 2013, "The McNemar test for binary matched-pairs data".
    """
    from scipy.stats import binom

    smaller, total = min(gained, lost), gained + lost
    return float(min(1.0, 2 * binom.cdf(smaller, total, 0.5) - binom.pmf(smaller, total, 0.5)))


def tango_interval(gained: int, lost: int, items: int) -> tuple[float, float]:
    """Tango's score interval of the difference of two paired proportions, `(gained - lost) / items`.

    It holds the differences that the score test does not reject at `ALPHA`. It has a width even if no item is
    discordant.

    Source: Tango 1998, "Equivalence test and confidence interval for the difference in proportions for the
    paired-sample design".
    """
    # One end is the mirror image of the other, so that a swap of base and loop mirrors the interval exactly.
    return -_tango_upper(lost, gained, items), _tango_upper(gained, lost, items)


def _tango_upper(gained: int, lost: int, items: int) -> float:
    from scipy.optimize import brentq

    if gained == items:
        return 1.0
    observed = (gained - lost) / items

    def excess(difference: float) -> float:
        """Squared deviation minus what the score test allows; negative inside the interval."""
        return (difference - observed) ** 2 * items - _Z**2 * _tango_variance(gained, lost, items, difference)

    # The variance is 0 at the observed difference if no item, or every item, is discordant: start beside it.
    return round(brentq(excess, observed + 1e-10, 1.0, xtol=1e-14), _DIGITS)


def _tango_variance(gained: int, lost: int, items: int, difference: float) -> float:
    """Variance of one item's difference, at the most likely share of lost items for this true difference."""
    a = 2 * items
    b = (2 * items - gained + lost) * difference - gained - lost
    c = -lost * difference * (1 - difference)
    share = (sqrt(max(b * b - 4 * a * c, 0.0)) - b) / (2 * a)
    return 2 * share + difference * (1 - difference)


def bootstrap_interval(differences: Sequence[float], scale: float = 1.0) -> tuple[float, float]:
    """Interval of the mean difference by resampling problems; all seeds of a problem stay together.

    It takes percentiles, expanded so that few problems get the width of Student's t. If all problems differ alike, no
    resample tells how others may differ. Then it is Tango's interval for that case: of `n` problems, a share of
    `z^2 / (n + z^2)` may lie at either end of the scale.

    Source: Miller 2024, "Adding error bars to evals" (clusters); Hesterberg 2015, "What teachers should know about the
    bootstrap" (expanded percentiles).

    Args:
        differences: one for each problem.
        scale: the largest difference that is possible; 1 for scores between 0 and 1.
    """
    import numpy as np
    from scipy.stats import bootstrap

    values = np.asarray(differences, dtype=float)
    mean = float(values.mean())
    if np.ptp(values) <= 10.0**-_DIGITS:
        share = _Z**2 / (len(values) + _Z**2)
        low, high = mean - share * (scale + mean), mean + share * (scale - mean)
    else:
        low, high = bootstrap(
            (values,),
            np.mean,
            method="percentile",
            confidence_level=_expanded_confidence(len(values)),
            n_resamples=RESAMPLES,
            batch=_batch(len(values)),
            random_state=_generator(),
        ).confidence_interval
    return round(float(low), _DIGITS), round(float(high), _DIGITS)


def _expanded_confidence(problems: int) -> float:
    """The level at which percentiles have the width of Student's t."""
    from scipy.stats import norm, t

    return 1 - 2 * float(norm.cdf(-sqrt(problems / (problems - 1)) * t.ppf(1 - ALPHA / 2, problems - 1)))


def sign_flip_p(differences: Sequence[float]) -> float:
    """Two-sided p of the mean difference if base and loop could change places in every problem.

    This permutation test needs no shape of the distribution. It is exact up to 13 problems that differ, else it draws
    `RESAMPLES` assignments of signs.
    """
    import numpy as np
    from scipy.stats import permutation_test

    values = np.asarray(differences, dtype=float)
    values = values[values != 0]  # their sign changes nothing
    if len(values) < 2:
        return 1.0
    outcome = permutation_test(
        (values,),
        np.sum,
        permutation_type="samples",
        n_resamples=RESAMPLES,
        batch=_batch(len(values)),
        random_state=_generator(),
    )
    return float(min(1.0, outcome.pvalue))


def _batch(numbers: int) -> int:
    """How many resamples of so many numbers to hold at once."""
    return max(1, BATCH_NUMBERS // numbers)


def _generator() -> np.random.Generator:
    import numpy as np

    return np.random.default_rng(RANDOM_SEED)


def smallest_difference(mean_square: float, problems: int, scale: float = 1.0) -> float:
    """The smallest true difference that one test at 5 % finds with 80 % power.

    `2.80 * sqrt(mean_square / problems)`. With few discordant items the observed mean square is no guide, and at 0 the
    formula would promise everything. So at least 3 discordant items are assumed, the upper limit that the rule of
    three gives after none was seen. This amounts to 4.9 items; mid-p needs 5 gained and none lost.

    Args:
        mean_square: mean of the squared differences; for scores of 0 and 1 the share of discordant items.
        problems: how many there are.
        scale: the largest difference that is possible.
    """
    floor = min(1.0, 3 / problems) * scale**2
    return min(scale, _Z_POWER * sqrt(max(mean_square, floor) / problems))


def items_needed(mean_square: float, difference: float) -> int | None:
    """How many problems show this difference with 80 % power: `7.85 * mean_square / difference^2`; None for 0."""
    return ceil(round(_Z_POWER**2 * mean_square / difference**2, 6)) if difference else None


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p: of all those at or below 0.05, the chance of even one false one is at most 5 %."""
    from statsmodels.stats.multitest import multipletests

    return [float(p) for p in multipletests(p_values, method="holm")[1]] if p_values else []
