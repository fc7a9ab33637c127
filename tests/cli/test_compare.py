"""`loopexport compare` on the command line."""

from __future__ import annotations

import json

import pytest

from loopexport import convert, plan_compare
from loopexport.errors import SpecError
from loopexport.loop.spec import LoopSpec
from support.commands import run
from support.evaluation import tokenized_base, write_items

pytest.importorskip("lm_eval")
COMPUTE = ("--device", "cpu", "--dtype", "float32", "--batch-size", "4")
LOOP = ("--span", "1:5", "--steps", "4", "--damping", "1")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tokenized_base("llama", tmp_path_factory.mktemp("compare") / "base")


@pytest.fixture(scope="module")
def items(tmp_path_factory):
    return write_items(tmp_path_factory.mktemp("items") / "mine.jsonl", 12)


@pytest.fixture
def export(base, tmp_path):
    return convert(base, tmp_path / "export", span=(1, 5), steps=4, damping=1.0).root


def test_prints_a_table_and_writes_the_report(base, items, tmp_path):
    result = run("compare", base, *LOOP, "--items", items, "--out", tmp_path / "out", *COMPUTE)
    assert result.exit_code == 0, result.stderr
    assert "span 1:5" in result.stdout
    assert "mine" in result.stdout
    assert {"items.jsonl", "result.json", "report.html", "forest.png", "settings.json"} <= {
        path.name for path in (tmp_path / "out").iterdir()
    }
    pairs = [json.loads(line) for line in (tmp_path / "out" / "items.jsonl").read_text().splitlines()]
    assert len(pairs) == 12
    assert len(pairs[0]["loop"]["loglikelihoods"]) == 3


def test_json_is_one_object(base, items):
    result = run("compare", base, *LOOP, "--items", items, "--json", *COMPUTE)
    [row] = json.loads(result.stdout)["comparisons"]
    assert row["verdict"] in ("better", "worse", "inconclusive")
    assert row["low"] <= row["difference"] <= row["high"]


def test_a_dry_run_loads_no_model(base, items, tmp_path, monkeypatch):
    from loopexport.evaluation.arms import Model

    monkeypatch.setattr(Model, "use", lambda *args: pytest.fail("the model was loaded"))
    result = run("compare", base, *LOOP, "--items", items, "--out", tmp_path / "out", "--dry-run", *COMPUTE)
    assert result.exit_code == 0
    assert "Cost" in result.stdout
    assert not (tmp_path / "out").exists()


def test_loops_of_other_tools_are_compared(base, items, tmp_path):
    asked = ("--items", items, "--dry-run", *COMPUTE)
    (tmp_path / "loop.yml").write_text("preset: kimi-vl-a3b-truncation\nspan: 1:3\n")
    for options, line in {
        (
            "--rys",
            "1,4",
        ): "Loop     span 1:4 (layers 1 to 3), K = 2, mode block, kv per_step, anchor 0, rule euler, s = 1",
        ("--path", "0-3,2-3,1-5"): "Loop     path 0:4,2:4,1:6 (each visit runs the layer as it is), kv per_step",
        ("--span", "0:2x3", "--span", "3:5x2"): "Loop     span 0:2x3 and 3:5x2 (layers 0 to 1 and 3 to 4), K = 3 and 2",
        ("--spec", str(tmp_path / "loop.yml")): "Loop     span 1:3 (layers 1 to 2), K = 6, mode layer, kv reference",
    }.items():
        result = run("compare", base, *options, *asked)
        assert result.exit_code == 0, result.stderr
        assert line in result.stdout


def test_path_is_compared_with_its_base(base, items):
    result = run("compare", base, "--path", "0-3,2-3,1-2,5", "--items", items, "--json", *COMPUTE)
    assert result.exit_code == 0, result.stderr
    assert len(json.loads(result.stdout)["comparisons"]) == 1


def test_save_puts_the_result_into_export_and_card(export, items):
    result = run("compare", export, "--items", items, "--save", *COMPUTE)
    assert result.exit_code == 0, result.stderr
    assert "mine" in (export / "README.md").read_text()
    assert run("verify", export, "--files-only").exit_code == 0
    assert "mine" in run("inspect", export).stdout


def test_an_edited_card_stays_and_the_command_says_so(export, items):
    card = export / "README.md"
    card.write_text(card.read_text() + "\nmine\n")
    edited = card.read_text()
    result = run("compare", export, "--items", items, "--save", *COMPUTE)
    assert "README.md was edited" in result.stderr
    assert card.read_text() == edited


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("--items", "ITEMS"), 2, "has no span"),
        ((*LOOP,), 1, "no task to compare on"),
        ((*LOOP, "--items", "ITEMS", "--save"), 2, "convert it first"),
        ((*LOOP, "--items", "ITEMS", "--limit", "0"), 2, "0 is not in the range"),
        ((*LOOP, "--items", "ITEMS", "--batch-size", "many"), 1, "batch size 'many' must be auto or a number"),
        ((*LOOP, "--items", "ITEMS", "--seed", "1", "--seed", "1"), 1, "different numbers"),
        ((*LOOP, "--items", "ITEMS", "--generation", "temperature"), 2, "is not NAME=VALUE"),
        ((*LOOP, "--items", "ITEMS", "--backend", "onnx"), 2, "hf"),
        ((*LOOP, "--items", "ITEMS", "--metric", "f1"), 1, "has no metric 'f1'"),
        (("--span", "1:99", "--steps", "2", "--items", "ITEMS"), 1, "99"),
        ((*LOOP, "--items", "ITEMS", "--preset", "nonsense"), 1, "nonsense"),
        ((*LOOP, "--items", "ITEMS", "--dtype", "float33"), 1, "cannot load"),
    ],
)
def test_wrong_usage_is_one_line(base, items, arguments, status, message):
    arguments = [items if each == "ITEMS" else each for each in arguments]
    compute = [] if "--batch-size" in arguments or "--dtype" in arguments else COMPUTE
    result = run("compare", base, *arguments, *compute)
    assert result.exit_code == status
    assert message in result.stderr
    if status == 1:
        assert result.stderr.splitlines()[-1].startswith("Error: ")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            ("--span", "1:2", "--steps", "2"),
            " and has its own loop; give its base for --span and --steps, or leave",
        ),
        (("--span", "1:3"), " and has its own loop; give its base for --span, or leave it out"),
        (("--spec", "nowhere.yml"), " and has its own loop; give its base for --spec, or leave it out"),
        (("--preset", "nonsense"), " and has its own loop; give its base for --preset, or leave it out"),
        (("--revision", "main"), "; give its base for --revision, or leave it out"),
        (("--without-adapter",), "; give its base for --without-adapter, or leave it out"),
    ],
)
def test_an_export_takes_no_options_of_a_base(export, options, says):
    result = run("compare", export, *options, *COMPUTE)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"Error: {export} is an export{says}")


def test_python_refuses_another_loop_for_an_export(export, items):
    loop = LoopSpec(span=(1, 3), steps=2)
    with pytest.raises(SpecError, match="and has its own loop; give its base for another loop, or leave it out"):
        plan_compare(export, loop, items=items)
    with pytest.raises(SpecError, match="give its base for --steps and --without-adapter, or leave them out"):
        plan_compare(export, {"steps": 3}, items=items, without_adapter=True)


def test_foreign_code_is_not_run(export, items):
    (export / "modeling_looped.py").write_text("raise SystemExit('foreign code ran')\n")
    result = run("compare", export, "--items", items, *COMPUTE)
    assert result.exit_code == 1
    assert "modeling_looped.py" in result.stderr
    assert "--trust-remote-code" in result.stderr


def test_own_bar_alone_is_drawn_and_the_environment_stays(base, items):
    import os
    import subprocess
    import sys

    command = [sys.executable, "-m", "loopexport", "compare", base, *LOOP, "--items", items, *COMPUTE]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0
    assert "answers:" in done.stderr
    assert "Tokenizing" not in done.stderr
    assert "Loading weights" not in done.stderr
    run("compare", base, *LOOP, "--items", items, "--dry-run", *COMPUTE)
    assert "TQDM_DISABLE" not in os.environ
