"""A scan: one load, the same answers as comparisons one by one, an honest choice, and no work done twice."""

from __future__ import annotations

import json
import os

import pytest

import loopexport
from loopexport import EvaluationError
from loopexport.evaluation import scan_run
from loopexport.evaluation.arms import Arm, Model, base_arm
from loopexport.evaluation.journal import Journal
from loopexport.evaluation.measurement import Measurement
from loopexport.evaluation.prefix import SharedPrefix
from loopexport.evaluation.scanning import plan_scan
from loopexport.evaluation.tasks import Prompting, TaskSource
from support.evaluation import tokenized_base, write_items

pytest.importorskip("lm_eval")
GRID = {"widths": (1, 2), "stride": 2, "steps": (2,), "kv": ("shared", "per_step"), "damping": (1.0,)}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tokenized_base("llama", tmp_path_factory.mktemp("scan") / "llama")


@pytest.fixture(scope="module")
def items(tmp_path_factory):
    return write_items(tmp_path_factory.mktemp("items") / "sums.jsonl", 16)


@pytest.fixture
def plan(base, items):
    """`plan(**options)`: a scan of the tiny base."""

    def make(**options):
        given = {"items": items, "batch_size": 4, "device": "cpu", "dtype": "float32", **GRID, **options}
        return plan_scan(base, **given)

    return make


@pytest.fixture
def measured(monkeypatch):
    """The pairs that a scan measured, by cell and part."""
    seen = []

    class Recorder(Measurement):
        def pairs_by_loop(self, *args):
            seen.append(dict(super().pairs_by_loop(*args)))
            yield from seen[-1].items()

    monkeypatch.setattr("loopexport.evaluation.measurement.Measurement", Recorder)
    return seen


@pytest.fixture
def forwards(monkeypatch):
    """How often each arm was asked for answers that were not there yet."""
    used = []
    use = Model.use

    def counted(self, arm):
        used.append(arm.name)
        return use(self, arm)

    monkeypatch.setattr(Model, "use", counted)
    return used


def test_every_cell_answers_as_in_a_comparison_of_its_own(plan, measured, items):
    """With one row in a forward, since another batch may round differently."""
    ready = plan(batch_size=1, max_evaluations=9)
    result = ready.run()
    assert len(ready.cells) == len(result.cells) == 9
    assert result.not_shared == ""
    selection = measured[0]
    for cell in ready.cells[::4]:
        with ready.compare.subject.directory() as root:
            model = Model(root, "hf", ready.compare.engine, 1)
            alone = Measurement(model, Journal(None), TaskSource(items=items).load(), Prompting())
            pairs = alone.pairs(base_arm(cell.spec), [Arm("loop", cell.spec)], (1234,))["loop"]
        by_item = {pair.item: pair for pair in pairs}
        assert len(selection[cell.name]) == result.items["selection"]
        assert all(pair == by_item[pair.item] for pair in selection[cell.name])


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3_moe"])
def test_shared_prefixes_change_no_answer(family, tmp_path, items, measured, monkeypatch):
    model = tokenized_base(family, tmp_path / family)
    options = {"items": items, "batch_size": 4, "device": "cpu", "max_evaluations": 6, **GRID}
    shared = plan_scan(model, **options).run()
    monkeypatch.setattr(scan_run, "SharedPrefix", lambda: SharedPrefix(off="for a test", _is_checked=True))
    alone = plan_scan(model, **options).run()
    assert (shared.shared > 0.05, shared.not_shared) == (True, "")
    assert (alone.shared, alone.not_shared) == (0.0, "for a test")
    assert measured[0] == measured[len(measured) // 2]
    assert shared.cells == alone.cells


def test_same_command_again_computes_nothing(plan, tmp_path, forwards):
    out = tmp_path / "out"
    first = plan(out=out, kv=("shared",)).run()
    assert {"scan.json", "cells.csv", "heatmap-K=2-damping=1.png", "settings.json"} <= set(os.listdir(out))
    forwards.clear()
    assert plan(out=out, kv=("shared",)).run().to_dict() == first.to_dict()
    assert not forwards
    (out / "scan.json").unlink()
    again = plan(out=out, kv=("shared",)).run()  # from the answers alone
    assert (again.cells, again.recommended) == (first.cells, first.recommended)
    assert set(forwards) == {"base"}  # which loads the tokenizer


def test_scan_that_was_stopped_goes_on(plan, tmp_path):
    def stop(done, total):
        if done > total / 2:
            raise KeyboardInterrupt

    out, options = tmp_path / "out", {"kv": ("shared",), "batch_size": 2}
    whole = plan(**options).run()
    with pytest.raises(KeyboardInterrupt):
        plan(out=out, **options).run(stop)
    before = {json.loads(line)["key"] for line in (out / "answers.jsonl").read_text().splitlines()}
    assert before
    assert plan(out=out, **options).run().cells == whole.cells
    keys = [json.loads(line)["key"] for line in (out / "answers.jsonl").read_text().splitlines()]
    assert len(keys) == len(set(keys)) > len(before)


def test_finalists_are_tested_on_items_that_ranked_none(plan, measured, monkeypatch):
    monkeypatch.setattr(scan_run, "choose_finalists", lambda selection, costs, count: list(selection)[:count])
    result = plan(max_evaluations=4, finalists=2).run()
    selection, test = ({pair.item for pairs in part.values() for pair in pairs} for part in measured)
    assert not selection & test
    assert len(selection | test) == 16
    assert [set(part) for part in measured] == [{each.cell.name for each in result.cells}, set(list(measured[0])[:2])]


def test_generated_answers_run_in_full(plan, tmp_path):
    lines = [json.dumps({"prompt": f"it is {number} and it is", "answer": "it"}) for number in range(12)]
    (tmp_path / "mine.jsonl").write_text("\n".join(lines))
    result = plan(items=tmp_path / "mine.jsonl", generation={"max_gen_toks": 2}, max_evaluations=2).run()
    assert (len(result.cells), result.shared, result.not_shared) == (2, 0.0, "")
    assert sum(result.items.values()) == 12


def test_several_tasks_are_one_pool_and_a_row_each(plan, items, tmp_path, monkeypatch):
    """Any loops are finalists here, so that there are rows."""
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr(
        TaskSource, "_manager", lambda self: TaskManager(include_defaults=False)
    )  # reading them is slow
    monkeypatch.setattr(scan_run, "choose_finalists", lambda selection, costs, count: list(selection)[:count])
    other = tmp_path / "task.yaml"
    other.write_text(
        "task: other\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: "
        f"{items}\ntest_split: test\noutput_type: multiple_choice\ndoc_to_text: prompt\ndoc_to_choice: choices\n"
        "doc_to_target: answer\nmetric_list:\n  - metric: acc\n"
    )
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    result = plan(tasks=[str(other)], max_evaluations=2).run()
    assert sum(result.items.values()) == 32
    for each in result.finalists:
        assert {task.name for task in each.test_tasks} == {"sums", "other"}
        assert sum(task.n for task in each.test_tasks) == result.items["test"] == 2 * each.test.n  # the same items


def test_all_cells_use_one_load(plan, monkeypatch):
    loads = []
    load = Model._load
    monkeypatch.setattr(Model, "_load", lambda self, arm: (loads.append(arm), load(self, arm)))
    plan(max_evaluations=6).run()
    assert len(loads) == 1


def test_budget_of_evaluations_keeps_so_many_cells(plan):
    ready = plan(max_evaluations=5)
    assert len(ready.cells) == 5
    assert {each.reason for each in ready.left_out} == {"beyond the budget: 5 evaluations"}
    assert ready.cost < plan().cost


def test_budget_of_hours_keeps_what_fits_by_estimate(plan):
    ready = plan(max_hours=1.0)
    seconds = 3600 / (ready._cost([2.0] * 4) * 100)
    cells, beyond = ready.affordable(seconds, 100)
    assert 3 <= len(cells) < len(ready.cells)
    assert len(cells) + len(beyond) == len(ready.cells)
    assert ready.affordable(seconds / 1000, 100) == (list(ready.cells), [])
    with pytest.raises(EvaluationError, match=r"1 hours \(one loop takes .*\) is too small for one"):
        ready.affordable(seconds * 1e6, 100)


def test_hours_are_estimated_from_answers_that_are_kept(plan, tmp_path):
    out = tmp_path / "out"
    first = plan(out=out, max_hours=5, max_evaluations=4).run()
    (out / "scan.json").unlink()
    assert plan(out=out, max_hours=5, max_evaluations=4).run().cells == first.cells


def test_plan_says_the_cost(plan):
    ready = plan(widths=(2,), stride=4, steps=(3,), kv=("shared",))
    mult = (6 + 2 * 2) / 6
    assert ready.to_dict()["cost_in_base_runs"] == round(0.5 * (1 + 2 * mult) + 0.5 * (1 + 2 * mult), 2)


def test_scan_that_was_split_in_another_way_does_not_go_on(plan, tmp_path):
    plan(max_evaluations=1, out=tmp_path / "out").run()
    for name in ("settings.json", "scan.json"):
        values = json.loads((tmp_path / "out" / name).read_text())
        values.get("settings", values).pop("split_by")
        (tmp_path / "out" / name).write_text(json.dumps(values))
    with pytest.raises(EvaluationError, match=r"has results of other settings \(split_by: null, now \"item\"\)"):
        plan(max_evaluations=1, out=tmp_path / "out")


def test_results_of_other_settings_are_refused(plan, tmp_path):
    plan(max_evaluations=1, out=tmp_path / "out").run()
    with pytest.raises(EvaluationError, match="has results of other settings"):
        plan(max_evaluations=1, out=tmp_path / "out", finalists=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"test_share": 1.0}, "test share 1 must be between 0 and 1"),
        ({"finalists": 0}, "finalists 0 must be"),
        ({"max_evaluations": 0}, "too small for one loop"),
        ({"max_hours": 0.0}, "max hours 0 must be"),
        ({"widths": (7,)}, "no loop of the grid fits"),
        ({"widths": ()}, "neither was given"),
        ({"limit": 0}, "limit 0"),
    ],
)
def test_wrong_options_are_refused(plan, options, message):
    with pytest.raises(EvaluationError, match=message):
        plan(**options)


def test_export_is_refused(plan, base, tmp_path):
    export = loopexport.convert(str(base), tmp_path / "export", span=(1, 3), steps=2)
    with pytest.raises(EvaluationError, match="scan its base"):
        plan_scan(export.root, widths=(2,))


def test_several_processes_are_refused(plan, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(EvaluationError, match="runs in one process"):
        plan()


def test_damaged_result_is_refused(plan, tmp_path):
    ready = plan(out=tmp_path)
    (tmp_path / "scan.json").write_text('{"cells": 3}')
    with pytest.raises(EvaluationError, match=r"scan\.json is damaged"):
        ready.run()


def test_edited_result_is_refused(plan, tmp_path):
    options = {"out": tmp_path, "max_evaluations": 2}
    result = plan(**options).run()
    path = tmp_path / "scan.json"
    values = json.loads(path.read_text())
    assert plan(**options).run().to_dict() == result.to_dict()
    for change in ({"recommended": "8:12 K=3"}, {"cells": []}, {"shared": "x"}, {"settings": {}}):
        path.write_text(json.dumps({**values, **change}))
        with pytest.raises(EvaluationError, match=r"scan\.json is damaged \(it was edited\)"):
            plan(**options).run()


def test_a_loop_of_nan_is_said_and_not_recommended(plan, monkeypatch):
    from lm_eval.models.huggingface import HFLM

    from loopexport.cli.scan_text import scan_lines

    forward = HFLM._model_call

    def overflowing(self, inputs, **kwargs):
        return forward(self, inputs, **kwargs) * (float("nan") if self.model.config.loop_steps > 1 else 1)

    monkeypatch.setattr(HFLM, "_model_call", overflowing)
    result = plan(max_evaluations=4).run()
    assert result.recommended is None
    assert all(each.selection.gained == 0 for each in result.cells)
    [line] = [line for line in scan_lines(result) if line.startswith("NaN in place of answers, counted as wrong: ")]
    assert ": base" not in line
    assert result.not_shared == ""


def test_no_loop_is_recommended_where_the_base_overflows(plan, monkeypatch):
    """A loop may seem better then, only because its own numbers stay finite."""
    from lm_eval.models.huggingface import HFLM

    from loopexport.cli.scan_text import scan_lines

    forward = HFLM._model_call

    def overflowing(self, inputs, **kwargs):
        return forward(self, inputs, **kwargs) * (1 if self.model.config.loop_steps > 1 else float("nan"))

    monkeypatch.setattr(HFLM, "_model_call", overflowing)
    result = plan(max_evaluations=4).run()
    assert any(each.test is not None and each.test.difference > 0 for each in result.cells)
    assert result.recommended is None
    assert any("counted as wrong: base. Try --dtype float32" in line for line in scan_lines(result))
