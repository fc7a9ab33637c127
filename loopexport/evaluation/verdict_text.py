"""A comparison in plain sentences, for the terminal and the report."""

from __future__ import annotations

from collections.abc import Sequence

from . import verdicts
from .noise import Floor
from .verdicts import BETTER, BOOTSTRAP, INCONCLUSIVE, TANGO, WORSE, Comparison

MAX_NAMES = 5  # in one sentence


def headline(rows: Sequence[Comparison]) -> str:
    """The answer in one or two sentences."""
    if len(rows) == 1:
        return _only_row(rows[0])
    names = {verdict: [label(row, rows) for row in rows if row.verdict == verdict] for verdict in (BETTER, WORSE)}
    open_rows = sum(row.verdict == INCONCLUSIVE for row in rows)
    found = ", and ".join(f"{verdict} on {_listed(each)}" for verdict, each in names.items() if each)
    if not found:
        return (
            f"Nobody can know yet whether the loop helps: in all {len(rows)} comparisons the difference may be chance."
        )
    others = "comparison" if open_rows == 1 else f"{open_rows} comparisons"
    rest = f" In the other {others} the difference may be chance." if open_rows else ""
    return f"The loop is {found}.{rest}"


def _only_row(row: Comparison) -> str:
    if row.verdict == INCONCLUSIVE:
        reason = sentence(row).removeprefix(f"{INCONCLUSIVE}: ")
        return f"Nobody can know yet whether the loop helps on {row.name}: {reason}."
    return f"The loop is {row.verdict} on {row.name}{sentence(row).removeprefix(row.verdict)}."


def sentence(row: Comparison) -> str:
    """The verdict of one row and what supports it, without a full stop."""
    if row.verdict != INCONCLUSIVE:
        return (
            f"{row.verdict} by {size(row, row.difference)} "
            f"({100 * row.confidence:.0f} % interval {signed(row, row.low)} to {signed(row, row.high)})"
        )
    if row.is_hopeless:
        return f"{INCONCLUSIVE}: {_problems(row)} cannot show any difference, however large"
    if row.note:
        return f"{INCONCLUSIVE}: {row.note}"
    shown = f"{_problems(row)} could have shown {can_show(row)}"
    if row.items_needed is None:
        return f"{INCONCLUSIVE}: {shown}; no difference was observed"
    observed = size(row, row.difference).split()[0]
    return f"{INCONCLUSIVE}: {shown}; {row.items_needed:,} would be needed for the {observed} observed"


def label(row: Comparison, rows: Sequence[Comparison]) -> str:
    """The name of a row, with its metric where the name alone is not unique."""
    is_unique = sum(other.name == row.name for other in rows) == 1
    return row.name if is_unique else f"{row.name} ({row.metric})"


def is_share(row: Comparison) -> bool:
    """Whether the scores lie between 0 and 1, so that differences are points of a hundred."""
    return all(0 <= score <= 1 for score in (row.base, row.loop)) and -1 <= row.low <= row.high <= 1


def score(row: Comparison, value: float) -> str:
    """A mean score: in per cent if scores are shares."""
    return f"{100 * value:.1f}" if is_share(row) else f"{value:#.3g}"


def signed(row: Comparison, value: float) -> str:
    """A difference with its sign. Only 0 is shown as 0, so that an interval never seems to reach it."""
    if value == 0:
        return "0.0" if is_share(row) else "0"
    text = f"{100 * value:+.1f}" if is_share(row) else f"{value:+.3g}"
    return text if float(text) else f"{100 * value:+.1g}"


def size(row: Comparison, value: float) -> str:
    """The size of a difference, with its unit."""
    number = signed(row, abs(value)).lstrip("+")
    return f"{number} points" if is_share(row) else number


def can_show(row: Comparison) -> str:
    """The smallest difference that so many problems show."""
    return "nothing" if row.is_hopeless else size(row, row.smallest_difference)


def p_text(row: Comparison) -> str:
    """The p that the verdict uses."""
    return verdicts.p_text(row.final_p)


def holm_sentence(rows: Sequence[Comparison]) -> str:
    """How p was adjusted, and that the numbers of items needed are not; empty if it was not."""
    kinds = {"task": [row for row in rows if not row.is_group], "group": [row for row in rows if row.is_group]}
    adjusted = [_count(len(each), kind) for kind, each in kinds.items() if each and each[0].p_holm is not None]
    if not adjusted:
        return ""
    families = " and, apart from them, for ".join(adjusted)
    return f"p is adjusted for {families} (Holm), each metric counting; what the items can show is for one test alone."


def method_sentence(rows: Sequence[Comparison]) -> str:
    """How intervals and p were computed."""
    methods = {
        TANGO: "Tango's score interval and McNemar's mid-p where each item is right or wrong",
        BOOTSTRAP: "resampled problems and a sign-flip test where scores are graded or items have seeds or copies",
    }
    used = [text for method, text in methods.items() if any(row.method == method for row in rows)]
    return f"Interval and p: {'; '.join(used)}."


def length_sentence(row: Comparison) -> str:
    """How long the generated answers are; empty for choices."""
    if not row.base_tokens and not row.loop_tokens:
        return ""
    return (
        f"base {row.base_tokens:,.0f} tokens an answer, {100 * row.base_truncated:.1f} % cut at the limit; "
        f"loop {row.loop_tokens:,.0f} tokens, {100 * row.loop_truncated:.1f} % cut"
    )


def floor_sentence(floor: Floor | None) -> str:
    """What the base against itself shows."""
    if floor is None:
        return "The base was not compared with itself."
    first, second = floor.batch_sizes
    noise = floor.largest_difference
    largest = "" if noise is None else f", and log-likelihoods differ by up to {noise:.2g} nats"
    return (
        f"The base against itself, batch size {first} against {second}: "
        f"{floor.flips} of {_count(floor.items, 'item')} flipped{largest}."
    )


def noise_sentence(row: Comparison) -> str:
    """How many flips the noise of the base explains; empty if that is not known."""
    if row.flips_within_noise is None:
        return ""
    return f"{row.flips_within_noise} of {_count(row.gained + row.lost, 'flip')} within the base's own noise"


def nan_sentence(row: Comparison) -> str:
    """How many answers are NaN; empty if none is."""
    counts = {"base": row.base_nan, "loop": row.loop_nan}
    found = " and ".join(f"{_count(count, 'answer')} of the {name}" for name, count in counts.items() if count)
    return f"NaN in place of {found}, counted as wrong: try dtype float32, or a milder loop" if found else ""


def _listed(names: list[str]) -> str:
    if len(names) > MAX_NAMES:
        names = [*names[:MAX_NAMES], _count(len(names) - MAX_NAMES, "other")]
    *start, last = names
    return f"{', '.join(start)} and {last}" if start else last


def _problems(row: Comparison) -> str:
    return _count(row.n, "item" if row.seeds == 1 else "problem")


def _count(number: int, word: str) -> str:
    return f"{number:,} {word}" if number == 1 else f"{number:,} {word}s"
