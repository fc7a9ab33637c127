"""Pairs of answers made by hand."""

from __future__ import annotations

from collections.abc import Iterable

from loopexport.evaluation.items import Answer, Pair


def make_pair(base: float | Answer, loop: float | Answer, item: int = 0, **fields) -> Pair:
    """A pair from two scores or two answers; `fields` replace those of an ordinary item."""
    base, loop = (each if isinstance(each, Answer) else Answer(each, f"answer of {each}") for each in (base, loop))
    usual = {"task": "quiz", "metric": "acc", "seed": 0, "prompt_hash": "p", "prompt": f"Question {item}"}
    values = {**usual, "target": "yes", **fields}
    own_hash = {"item_hash": f"{values['task']} {item}"}
    return Pair(**{**own_hash, **values}, item=item, base=base, loop=loop)


def make_task(gained: int, lost: int, items: int, **fields) -> list[Pair]:
    """A task of scores 0 and 1; half of the items without a change are right."""
    scores = [(0, 1)] * gained + [(1, 0)] * lost
    scores += [(i % 2, i % 2) for i in range(items - len(scores))]
    return [make_pair(*each, item, **fields) for item, each in enumerate(scores)]


def swap(pairs: Iterable[Pair]) -> list[Pair]:
    """The pairs with base and loop in each other's place."""
    return [Pair(**{**vars(pair), "base": pair.loop, "loop": pair.base}) for pair in pairs]
