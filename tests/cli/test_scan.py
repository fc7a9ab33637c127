"""`loopexport scan` on the command line."""

from __future__ import annotations

import json

import pytest

from support.commands import run
from support.evaluation import tokenized_base, write_items

pytest.importorskip("lm_eval")
COMPUTE = ("--device", "cpu", "--dtype", "float32", "--batch-size", "4")
GRID = ("--width", "2,9", "--stride", "2", "--steps", "1,2", "--kv", "shared,per_step")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tokenized_base("llama", tmp_path_factory.mktemp("scan") / "base")


@pytest.fixture(scope="module")
def items(tmp_path_factory):
    return write_items(tmp_path_factory.mktemp("items") / "mine.jsonl", 20)


def test_says_the_cost_then_all_loops_then_the_answer(base, items, tmp_path):
    result = run("scan", base, *GRID, "--items", items, "--out", tmp_path / "out", *COMPUTE)
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert any(line.startswith("Loops    6, 1.33x to 1.33x") for line in lines)
    assert any(line.startswith("Left out 0:9 K=1") and "ends outside the model" in line for line in lines)
    assert sum(" selection  " in line for line in lines) == 6
    assert any(line.startswith("The loops shared the layers before their spans") for line in lines)
    assert any(line.startswith(("No loop is recommended", "Recommended: ")) for line in lines)
    assert {"scan.json", "cells.csv", "heatmap-K=2.png", "heatmap-K=2-kv=per_step.png"} <= {
        path.name for path in (tmp_path / "out").iterdir()
    }


def test_json_is_one_object(base, items):
    result = run("scan", base, "--spans", "1:3,3:5", "--items", items, "--json", *COMPUTE)
    values = json.loads(result.stdout)
    assert {cell["name"] for cell in values["cells"]} == {"1:3 K=2", "3:5 K=2"}
    assert values["items"]["selection"] + values["items"]["test"] == 20
    assert all(cell["selection"]["low"] <= cell["selection"]["difference"] for cell in values["cells"])


def test_a_dry_run_loads_no_model(base, items, tmp_path, monkeypatch):
    from loopexport.evaluation.arms import Model

    monkeypatch.setattr(Model, "use", lambda *args: pytest.fail("the model was loaded"))
    options = ("--items", items, "--out", tmp_path / "out", "--dry-run")
    assert "Cost     at most" in run("scan", base, *GRID, *options, *COMPUTE).stdout
    values = json.loads(run("scan", base, *GRID, *options, "--json", *COMPUTE).stdout)
    assert len(values["cells"]) == 6
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (("--wdth", "2"), 2, "--width"),
        (("--width", "2,x"), 2, "'x' is not a valid integer"),
        (("--width", "2", "--mode", "blok"), 2, "Did you mean 'block'?"),
        (("--width", "2", "--spans", "1:3"), 1, "both were given"),
        (("--spans", "1:3", "--stride", "2"), 1, "stride 2 has no effect"),
        (("--width", "2", "--anchor", "2"), 1, "anchor 2.0 must be a weight"),
        (("--spans", "1-3"), 1, "is ambiguous"),
        (("--width", "2", "--backend", "vllm"), 2, "No such option"),
        (("--width", "2", "--test-share", "0.0001"), 1, "leave none for the test part"),
        (("--width", "2", "--max-hours", "1e-9"), 1, "is too small for one of the 5 loops"),
    ],
)
def test_wrong_options_are_one_line(base, items, options, status, message):
    result = run("scan", base, *options, "--items", items, *COMPUTE)
    assert result.exit_code == status
    assert message in result.stderr
    assert status == 2 or len(result.stderr.splitlines()[-1:]) == 1
