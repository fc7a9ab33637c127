"""Honest choice of the best loop: choose on one part of the items, and test the choice on the other.

The best of many loops looks better than it is on the items that it was chosen by. So the items are split once, by a
hash of each item, which is the same in all tasks. Loops are ranked on the selection part. The best few answer the test
part, and their p values there are adjusted for their number.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from loopexport.errors import EvaluationError

from .items import Pair
from .verdicts import BETTER, Comparison, compare_pairs, judge

POOLED = "all tasks"
POOLED_METRIC = "score"


@dataclass(frozen=True)
class Split:
    """The numbers of the items in each part, for each task.

    Attributes:
        selection: to rank the loops.
        test: to test the best.
    """

    selection: dict[str, list[int]]
    test: dict[str, list[int]]


def split_items(tasks: dict[str, Any], limit: int | None, test_share: float) -> Split:
    """Split the items of each task.

    The part of an item depends on the item alone: neither on its place, nor on the limit, nor on its task. Equal items
    are in one part, also those of two tasks that ask one data set in two ways.

    Args:
        tasks: the tasks of lm-evaluation-harness, by name.
        limit: the first so many items of each task; None for all.
        test_share: about how much of the items is for the test.

    Raises:
        EvaluationError: a task has no items in one of the parts.
    """
    selection: dict[str, list[int]] = {}
    test: dict[str, list[int]] = {}
    for name, task in tasks.items():
        in_test = [is_for_test(item_hash(doc), test_share) for doc in _first(task.eval_docs, limit)]
        selection[name] = [number for number, is_test in enumerate(in_test) if not is_test]
        test[name] = [number for number, is_test in enumerate(in_test) if is_test]
        if not (selection[name] and test[name]):
            part = "test" if selection[name] else "selection"
            raise EvaluationError(
                f"the {len(in_test)} items of {name} leave none for the {part} part (test share {test_share:g}); "
                "use more items, or another --test-share"
            )
    return Split(selection, test)


def _first(docs, limit: int | None) -> Iterable:
    return docs if limit is None else (docs[index] for index in range(min(limit, len(docs))))


def item_hash(doc: Any) -> str:
    """The hash of an item, as lm-evaluation-harness computes it for its logs (`Pair.item_hash`), but for images."""
    from lm_eval.utils import hash_string

    return hash_string(json.dumps(doc, indent=2, default=_plain, ensure_ascii=False))


def _plain(value: Any) -> Any:
    """A value that JSON does not have. The harness takes an image's address, which is another one in each process."""
    from lm_eval.utils import handle_non_serializable

    if hasattr(value, "tobytes") and hasattr(value, "mode"):  # an image of Pillow
        return hashlib.sha256(value.tobytes()).hexdigest()
    return handle_non_serializable(value)


def is_for_test(doc_hash: str, test_share: float) -> bool:
    """Whether an item is in the test part."""
    digest = hashlib.sha256(doc_hash.encode()).digest()
    return int.from_bytes(digest[:8], "big") < test_share * 2**64


def pooled(pairs: Sequence[Pair]) -> Comparison:
    """The comparison on all items of all tasks together, each by its own task's metric.

    An item that occurs in several tasks is one problem; see `compare_pairs`.
    """
    numbers: dict[tuple[str, int], int] = {}
    pool = [
        replace(pair, task=POOLED, metric=POOLED_METRIC, item=numbers.setdefault((pair.task, pair.item), len(numbers)))
        for pair in pairs
    ]
    return compare_pairs(pool)[0]


def choose_finalists(selection: dict[str, Comparison], costs: dict[str, float], count: int) -> list[str]:
    """The names of the loops to test: the best on the selection part, of equals the cheapest.

    A loop that is not better than the base there is never tested.
    """
    ranked = sorted(selection, key=lambda name: (-selection[name].difference, costs[name]))
    return [name for name in ranked if selection[name].difference > 0][:count]


def judge_finalists(test: dict[str, Comparison]) -> dict[str, Comparison]:
    """The finalists' comparisons with p adjusted for their number by Holm, and the verdict that follows."""
    return dict(zip(test, judge(list(test.values()), "loops"), strict=True))


def recommended(finalists: dict[str, Comparison]) -> str | None:
    """The name of the finalist to use: of those that are better in the test, the best; None if no one is."""
    better = [name for name, each in finalists.items() if each.verdict == BETTER]
    return max(better, key=lambda name: finalists[name].difference, default=None)
