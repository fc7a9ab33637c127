"""Fixtures of the tests of `compare` and `scan`."""

from __future__ import annotations

import pytest

from loopexport.evaluation.items import Pair
from support import answer_pairs


@pytest.fixture(autouse=True, scope="module")
def _items_of_their_own():
    """Give each pair that is made by hand the hash of an item of its own task, where a test does not choose one."""

    def make(**fields) -> Pair:
        task, item, chosen = fields["task"], fields["item"], fields["item_hash"]
        return Pair(**{**fields, "item_hash": f"{task} {item}" if chosen in ("i", f"i{item}") else chosen})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(answer_pairs, "Pair", make)
        yield
