"""The examples of `compare` and `scan` run, on a tiny model."""

from __future__ import annotations

import pytest

from loopexport import convert
from support.evaluation import tokenized_base, write_items

pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tokenized_base("llama", tmp_path_factory.mktemp("examples") / "base")


def test_compare_items_saves_the_result(example, base, tmp_path):
    export = convert(base, tmp_path / "looped", span=(2, 4), steps=2).root
    printed = example("compare_items.sh", export, write_items(tmp_path / "mine.jsonl", 10), tmp_path / "out")
    assert "mine" in (export / "README.md").read_text()
    assert (tmp_path / "out" / "report.html").is_file()
    assert "verdict" in printed or "inconclusive" in printed


def test_scan_draws_a_heatmap(example, base, tmp_path):
    printed = example("scan.sh", base, write_items(tmp_path / "mine.jsonl", 40), tmp_path / "out")
    assert (tmp_path / "out" / "cells.csv").is_file()
    assert list((tmp_path / "out").glob("*.png"))
    assert "recommend" in printed
