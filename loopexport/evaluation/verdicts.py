"""Whether a loop helps on each task: better, worse, or inconclusive."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from loopexport.errors import EvaluationError

from .items import Answer, Pair
from .noise import Floor, flips_within_noise
from .statistics import (
    ALPHA,
    CONFIDENCE,
    bootstrap_interval,
    holm,
    items_needed,
    mcnemar_mid_p,
    sign_flip_p,
    smallest_difference,
    tango_interval,
)

BETTER, WORSE, INCONCLUSIVE = "better", "worse", "inconclusive"
TANGO, BOOTSTRAP = "tango", "bootstrap"
FEWEST_BINARY, FEWEST_GRADED = 5, 6  # the least p of n problems is 0.5^n by mid-p, and 2 * 0.5^n by sign flips
# Metrics where less is better: words in names of lm-evaluation-harness 0.4.13, and whole names.
_LESS_IS_BETTER_WORDS = ("perplexity", "loss", "bits_per_byte", "brier", "nll", "bias")
_LESS_IS_BETTER = ("ter", "wer", "cer", "mse", "mae", "rmse", "likelihood_diff", "pct_stereotype", "pct_male_preferred")


@dataclass(frozen=True)
class Comparison:
    """The loop against its base on one task, or on the items of a group of tasks.

    Attributes:
        name, metric, is_group: of the task or group.
        n: number of problems. Several seeds of an item are one problem, and so are equal items.
        seeds: the largest number of seeds of a problem.
        base, loop: mean scores.
        difference: `loop - base`.
        low, high, confidence: its interval.
        method: of the interval: "tango" for scores of 0 and 1 with one answer to each problem, else "bootstrap".
        gained, lost: number of problems where the loop, and where the base, scored higher.
        discordance: share of problems with different scores.
        p: mid-p of McNemar for "tango", p of a sign-flip test for "bootstrap".
        p_holm: p adjusted for all tasks, or all groups, of the comparison; None if there is only one.
        verdict: "better" or "worse" if the interval excludes 0 and p, adjusted, is at most 0.05; else "inconclusive".
        note: why the verdict is inconclusive although interval or p alone says otherwise; else empty.
        smallest_difference: what this number of problems finds with 80 % power.
        items_needed: how many problems find the observed difference with 80 % power; None if it is 0.
        base_tokens, loop_tokens: mean number of generated tokens.
        base_truncated, loop_truncated: share of answers cut at the limit of tokens.
        flips_within_noise: problems that flipped by less than the noise of the base itself; None if not known.
        base_nan, loop_nan: number of answers that are NaN, which count as wrong.
    """

    name: str
    metric: str
    is_group: bool
    n: int
    seeds: int
    base: float
    loop: float
    difference: float
    low: float
    high: float
    confidence: float
    method: str
    gained: int
    lost: int
    discordance: float
    p: float
    p_holm: float | None
    verdict: str
    note: str
    smallest_difference: float
    items_needed: int | None
    base_tokens: float
    loop_tokens: float
    base_truncated: float
    loop_truncated: float
    flips_within_noise: int | None
    base_nan: int = 0
    loop_nan: int = 0

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval leaves out "no difference"."""
        return self.low > 0 or self.high < 0

    @property
    def is_hopeless(self) -> bool:
        """Whether so few problems give p above 0.05 even if all of them favour one side."""
        return self.n < (FEWEST_BINARY if self.method == TANGO else FEWEST_GRADED)

    @property
    def final_p(self) -> float:
        """The p that the verdict uses: the adjusted one if there is one."""
        return self.p if self.p_holm is None else self.p_holm

    def to_dict(self) -> dict:
        """The comparison as one JSON object."""
        return asdict(self)


def compare_pairs(
    pairs: Iterable[Pair], groups: Mapping[str, Sequence[str]] | None = None, floor: Floor | None = None
) -> list[Comparison]:
    """Compare the loop with its base on each task, then on each group.

    A group pools all items of its tasks: each item counts once, so that a large task weighs more than a small one. An
    item that two of its tasks share counts once too: their answers are no more independent than those of two seeds. It
    has a row for each metric that all its tasks have. A group summarises its tasks and asks a question of its
    own. Therefore p is adjusted among the tasks and, apart from that, among the groups: a task of 100 items must not
    hide the total of 57 tasks, nor the total lend its p to a task. Read one of them as the result, and name it before
    the run.

    Args:
        pairs: of all tasks, in any order.
        groups: the names of the tasks of each group.
        floor: the base against itself.

    Raises:
        EvaluationError: there are no pairs, a pair occurs twice, a score is not finite, less is better for the
            metric, or a group names a task that has no pairs.
    """
    tasks = _pairs_by_task(pairs)
    noise = floor.largest_difference if floor else None
    rows = [_compare(*key, False, each, noise) for key, each in tasks.items()]
    totals = [
        _compare(name, metric, True, members, noise)
        for name, names in (groups or {}).items()
        for metric, members in _pool(name, names, tasks).items()
    ]
    return [*judge(rows, "tasks"), *judge(totals, "groups")]


def _pairs_by_task(pairs: Iterable[Pair]) -> dict[tuple[str, str], list[Pair]]:
    """The pairs of each task and metric, in the order in which they first occur."""
    tasks: dict[tuple[str, str], list[Pair]] = defaultdict(list)
    for pair in pairs:
        tasks[pair.task, pair.metric].append(pair)
    if not tasks:
        raise EvaluationError("there are no answers to compare; evaluate at least one task with at least one item")
    for (task, metric), each in tasks.items():
        _check_metric(task, metric)
        _check_pairs(task, each)
    return dict(tasks)


def _check_metric(task: str, metric: str) -> None:
    name = metric.lower().split(",")[0]
    if name in _LESS_IS_BETTER or any(word in name for word in _LESS_IS_BETTER_WORDS):
        raise EvaluationError(
            f"no verdict for {metric} of {task}: less of it is better, and it does not show whether answers are right; "
            "compare by a metric of right answers, such as acc or exact_match"
        )


def _check_pairs(task: str, pairs: list[Pair]) -> None:
    seen = set()
    for pair in pairs:
        if (pair.item, pair.seed) in seen:
            raise EvaluationError(
                f"item {pair.item} of {task} occurs twice with seed {pair.seed}; give each item once for each seed"
            )
        seen.add((pair.item, pair.seed))
        for score in (pair.base.score, pair.loop.score):
            if not math.isfinite(score):
                raise EvaluationError(
                    f"the score {score} of item {pair.item} of {task} is not a finite number; evaluate the task again"
                )


def _pool(group: str, names: Sequence[str], tasks: Mapping[tuple[str, str], list[Pair]]) -> dict[str, list[Pair]]:
    """The pairs of a group, by metric."""
    metrics = [{metric for task, metric in tasks if task == name} for name in names]
    for name, each in zip(names, metrics, strict=True):
        if not each:
            raise EvaluationError(f"the group {group} has the task {name}, which has no answers; evaluate it too")
    common = set.intersection(*metrics) if metrics else set()
    return {
        metric: [pair for name in dict.fromkeys(names) for pair in tasks[name, metric]] for metric in sorted(common)
    }


def _compare(name: str, metric: str, is_group: bool, pairs: list[Pair], noise: float | None) -> Comparison:
    """The numbers of one row; `_judge` adds the verdict."""
    problems = _problems(pairs)
    base = [_mean(pair.base.score for pair in each) for each in problems]
    loop = [_mean(pair.loop.score for pair in each) for each in problems]
    # The mean of the differences, because it is exactly the opposite when base and loop change places.
    differences = [_mean(pair.difference for pair in each) for each in problems]
    n, gained, lost = len(problems), sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    is_binary = len(pairs) == n and {*base, *loop} <= {0, 1}
    scale = _largest_possible_difference(pairs)
    low, high = tango_interval(gained, lost, n) if is_binary else bootstrap_interval(differences, scale)
    difference = _mean(differences)
    mean_square = _mean(d * d for d in differences)
    return Comparison(
        name=name,
        metric=metric,
        is_group=is_group,
        n=n,
        seeds=max(len({pair.seed for pair in each}) for each in problems),
        base=_mean(base),
        loop=_mean(loop),
        difference=difference,
        low=low,
        high=high,
        confidence=CONFIDENCE,
        method=TANGO if is_binary else BOOTSTRAP,
        gained=gained,
        lost=lost,
        discordance=(gained + lost) / n,
        p=mcnemar_mid_p(gained, lost) if is_binary else sign_flip_p(differences),
        p_holm=None,
        verdict=INCONCLUSIVE,
        note="",
        smallest_difference=smallest_difference(mean_square, gained + lost, n, scale),
        items_needed=items_needed(mean_square, difference),
        **_lengths("base", [pair.base for pair in pairs]),
        **_lengths("loop", [pair.loop for pair in pairs]),
        flips_within_noise=None if noise is None else flips_within_noise(pairs, noise),
        base_nan=sum(pair.base.is_nan for pair in pairs),
        loop_nan=sum(pair.loop.is_nan for pair in pairs),
    )


def _problems(pairs: list[Pair]) -> list[list[Pair]]:
    """The pairs of each problem: all seeds of an item, and of its copies in this task or another one.

    An item keeps the hash of its first pair, since that of an item with an image may differ from seed to seed.
    """
    hashes: dict[tuple[str, int], str] = {}
    problems: dict[str, list[Pair]] = defaultdict(list)
    for pair in pairs:
        problems[hashes.setdefault((pair.task, pair.item), pair.item_hash)].append(pair)
    return list(problems.values())


def _mean(numbers: Iterable[float]) -> float:
    values = list(numbers)
    return math.fsum(values) / len(values)


def _largest_possible_difference(pairs: list[Pair]) -> float:
    """1 for scores between 0 and 1; else the range of the scores, the only one that is known."""
    scores = [score for pair in pairs for score in (pair.base.score, pair.loop.score)]
    return max(1.0, *scores) - min(0.0, *scores)


def _lengths(name: str, answers: list[Answer]) -> dict[str, float]:
    return {
        f"{name}_tokens": _mean(answer.tokens for answer in answers),
        f"{name}_truncated": _mean(answer.truncated for answer in answers),
    }


def judge(rows: list[Comparison], kind: str) -> list[Comparison]:
    """Adjust p among the rows, and give each its verdict.

    Args:
        rows: all that were compared.
        kind: of rows, for the note: "tasks", "groups" or "loops".
    """
    if len(rows) > 1:
        adjusted = holm([row.p for row in rows])
        rows = [replace(row, p_holm=p) for row, p in zip(rows, adjusted, strict=True)]
    return [replace(row, verdict=_verdict(row), note=_note(row, f"{len(rows)} {kind}")) for row in rows]


def _verdict(row: Comparison) -> str:
    if not (row.excludes_zero and row.final_p <= ALPHA) or _is_against_a_broken_base(row):
        return INCONCLUSIVE
    return BETTER if row.difference > 0 else WORSE


def _is_against_a_broken_base(row: Comparison) -> bool:
    """Whether the loop is ahead of a base whose numbers overflowed: in another dtype, the base may be right there."""
    return row.base_nan > 0 and row.difference > 0


def p_text(p: float) -> str:
    """p with three digits, and more where these would put it on the other side of 0.05."""
    if p < 0.001:
        return "<0.001"
    texts = (f"{p:.{digits}f}" for digits in range(3, 10))
    return next((text for text in texts if (float(text) <= ALPHA) == (p <= ALPHA)), ">0.050")


def _note(row: Comparison, rows: str) -> str:
    """Why the verdict does not follow the interval alone, or p alone."""
    if row.excludes_zero and row.final_p <= ALPHA and _is_against_a_broken_base(row):
        return f"{row.base_nan:,} answers of the base are NaN, so that this is no gain; compare in float32"
    if row.excludes_zero and row.p > ALPHA:
        return f"the interval excludes 0, but p = {p_text(row.p)} is above 0.05"
    if row.excludes_zero and row.final_p > ALPHA:
        return f"the interval excludes 0, but with {rows} compared p becomes {p_text(row.final_p)} (Holm)"
    if not row.excludes_zero and row.final_p <= ALPHA:
        return f"p = {p_text(row.final_p)}, but the interval includes 0"
    return ""
