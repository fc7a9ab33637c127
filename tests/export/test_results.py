"""Measured results in an export: whole or not at all, checked like any other file, and never of another loop."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import fields

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import loopexport
from loopexport.evaluation.verdicts import Comparison
from loopexport.export.card_refresh import write_card_and_manifest
from loopexport.export.card_results import model_index, results_section
from loopexport.export.integrity import check_files
from loopexport.export.results import save_results
from loopexport.export.results_file import (
    MAX_BYTES,
    RESULTS,
    Measured,
    TaskResult,
    measured,
    parse_result,
    read_results,
)
from loopexport.files.json_text import json_text
from loopexport.files.staged_files import exactly, staged_files
from loopexport.loop.spec import make_spec
from support.commands import run, tree
from support.evaluation import tokenized_base, write_items
from support.measured import GAIN, LOSS, TASK, made_result
from support.push import edit_manifest

SECTION = re.compile(r"## Does the loop help\?\n(.*?)\n## Use", re.DOTALL)


@pytest.fixture(scope="module")
def words_export(tmp_path_factory):
    """A tiny export that can answer items."""
    pytest.importorskip("lm_eval")
    base = tokenized_base("llama", tmp_path_factory.mktemp("words") / "base")
    return loopexport.convert(base, base.parent / "export", span=(2, 4), steps=2).root


@pytest.fixture
def answering(words_export, tmp_path):
    """A copy of it."""
    return shutil.copytree(words_export, tmp_path / "export")


def compare_and_save(root, items, **options):
    """Compare an export with its base on a file of items, and save the result."""
    result = loopexport.compare(root, items=items, device="cpu", dtype="float32", batch_size=8, **options)
    assert result.save(loopexport.open_export(root))


@pytest.fixture
def export(export_dir, tmp_path):
    """A copy of a tiny export."""
    return loopexport.open_export(shutil.copytree(export_dir(), tmp_path / "export"))


def section(root):
    """The section about results in the card of an export."""
    return SECTION.search((root / "README.md").read_text())[1]


def export_again(export):
    """The export as it is on disk now."""
    return loopexport.open_export(export.root)


def refused(export, **changes):
    """The message that refuses a result, or a task of it."""
    before = tree(export.root)
    with pytest.raises(loopexport.ExportError) as refusal:
        save_results(export.root, made_result(export.spec, **changes))
    assert tree(export.root) == before
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


def set_weights_digest(root, sha256):
    """Record other weights in a manifest."""
    edit_manifest(root, lambda values: [each.update(sha256=sha256) for each in values["weights"].values()])


def write_card(root):
    """Write the card of an export as it is now."""
    with staged_files(root, exactly("README.md", "loopexport.json"), last="loopexport.json") as staged:
        write_card_and_manifest(loopexport.open_export(root), staged)
        staged.keep()


def write_results(root, text):
    """Replace the file of results as a stranger would."""
    (root / RESULTS).write_text(text)


def test_saved_result_is_read_and_shown(export):
    assert save_results(export.root, made_result(export.spec, TASK, LOSS))
    [result] = read_results(export.root)
    assert (result.spec, result.seeds, result.date) == (export.spec, (1234,), "2026-11-28")
    assert [(task.name, task.difference) for task in result.tasks] == [("arc_easy", 0.02), ("openbookqa", -0.05)]
    shown = section(export.root)
    assert "| arc_easy | acc | 100 | 0.4100 | 0.4300 | +0.0200 [-0.0200, +0.0600] | inconclusive |" in shown
    assert "| openbookqa | acc | 500 | 0.4000 | 0.3500 | -0.0500 [-0.0800, -0.0200] | worse |" in shown
    assert shown.count("items do not show whether") == 1
    assert "Not measured" not in shown
    assert (
        "openbookqa: acc 0.4000 to 0.3500, -0.0500 [-0.0800, -0.0200], n 500, worse"
        in run("inspect", export.root).stdout
    )


def test_export_without_results_says_so(export):
    assert read_results(export.root) == ()
    assert "Not measured." in section(export.root)
    assert "loopexport compare DIR --tasks" in section(export.root)
    assert json.loads(run("inspect", export.root, "--json").stdout)["results"] == {"own": [], "other": []}


def test_manifest_covers_the_results(export):
    save_results(export.root, made_result(export.spec))
    assert all(check.passed for check in check_files(export_again(export)))
    (export.root / RESULTS).write_text((export.root / RESULTS).read_text().replace("0.43", "0.73"))
    failed = {check.name for check in check_files(export_again(export)) if check.passed is False}
    assert failed == {"files are as written", "measured results are intact"}


def test_edited_results_reach_no_card(export):
    save_results(export.root, made_result(export.spec))
    (export.root / RESULTS).write_text((export.root / RESULTS).read_text().replace('"n": 100', '"n": 900'))
    with pytest.raises(loopexport.ExportError, match="has changed since it was written; remove it and run"):
        save_results(export.root, made_result(export.spec, LOSS))
    (export.root / RESULTS).unlink()
    save_results(export.root, made_result(export.spec, LOSS))
    assert [task.name for result in read_results(export.root) for task in result.tasks] == ["openbookqa"]


def test_same_comparison_replaces_the_earlier_one(export):
    spec = export.spec
    save_results(export.root, made_result(spec))
    save_results(export.root, made_result(spec, LOSS))
    save_results(export.root, made_result(spec, settings={"limit": 50}))
    save_results(export.root, made_result(spec, {**TASK, "n": 99}, date="2026-12-01"))
    found = [(result.date, result.settings["limit"], result.tasks[0].n) for result in read_results(export.root)]
    assert found == [("2026-11-28", 100, 500), ("2026-11-28", 50, 100), ("2026-12-01", 100, 99)]


def test_other_engine_arguments_or_items_keep_the_earlier_result(answering, tmp_path):
    short = {"max_length": 12, "token": "secret", "tokenizer": str(answering)}
    for start, arguments in ((0, None), (0, short), (1, None), (0, None)):
        items = write_items(tmp_path / "mine.jsonl", 4, start=start)
        compare_and_save(answering, items, model_args=arguments)
    found = read_results(answering)
    assert [result.settings.get("model_args") for result in found] == [
        {"max_length": 12, "tokenizer": answering.name},
        None,
        None,
    ]
    digests = [result.settings["files_sha256"]["mine.jsonl"] for result in found]
    assert digests[0] == digests[2] != digests[1]
    shown = section(answering)
    assert f"model_args `{{'max_length': 12, 'tokenizer': '{answering.name}'}}`" in shown
    assert str(answering) not in shown
    assert all(f"files_sha256 `{{'mine.jsonl': '{digest}'}}`" in shown for digest in digests)
    assert "secret" not in shown


@pytest.mark.parametrize("change", ["loop", "weights"])
def test_result_of_another_loop_is_never_this_exports(export, change):
    spec = make_spec(span=export.spec.span, steps=7) if change == "loop" else export.spec
    set_weights_digest(export.root, "0" * 64)
    save_results(export.root, made_result(spec, LOSS))
    set_weights_digest(export.root, ("1" if change == "weights" else "0") * 64)
    write_card(export.root)
    found = measured(export_again(export))
    assert (len(found.own), len(found.other)) == (0, 1)
    shown = section(export.root)
    assert "Not measured." in shown
    assert "another loop or other weights" in shown
    assert "model-index" not in (export.root / "README.md").read_text()
    assert "of another loop or other weights" in run("inspect", export.root).stdout


def test_edited_loop_no_longer_owns_its_results(export):
    save_results(export.root, made_result(export.spec))
    config = json.loads((export.root / "config.json").read_text())
    (export.root / "config.json").write_text(json.dumps({**config, "loop_steps": 9}))
    assert not measured(export_again(export)).own
    values = json.loads(run("inspect", export.root, "--json").stdout)["results"]
    assert (len(values["own"]), values["other"][0]["tasks"][0]["name"]) == (0, "arc_easy")


def test_default_damping_is_the_same_loop(export):
    spec = export.spec
    explicit = make_spec(span=spec.span, steps=spec.steps, damping=1 / spec.steps)
    save_results(export.root, made_result(explicit))
    assert measured(export_again(export)).own


def test_edited_card_stays(export):
    (export.root / "README.md").write_text("mine")
    assert not save_results(export.root, made_result(export.spec))
    assert (export.root / "README.md").read_text() == "mine"
    assert read_results(export.root)


def test_restore_leaves_results_out(export, tiny_base, tmp_path):
    save_results(export.root, made_result(export.spec))
    loopexport.restore(export.root, tmp_path / "base")
    assert tree(tmp_path / "base") == tree(tiny_base())


def test_base_with_results_of_a_stranger_leaves_them_behind(tiny_base, tmp_path):
    base = shutil.copytree(tiny_base(), tmp_path / "base")
    write_results(base, '{"format": 1}')
    export = loopexport.convert(str(base), tmp_path / "out", span=(1, 2), steps=2)
    assert RESULTS in export.manifest.left_behind
    assert not (export.root / RESULTS).exists()
    write_results(export.root, "{}")
    assert "is not part of the export; move it elsewhere" in refused(export)


@pytest.mark.parametrize(
    ("task", "says"),
    [
        ({"base": float("nan")}, "base nan is not a number"),
        ({"loop": 10**400}, "loop 1000"),
        ({"n": -1}, "n -1 is not 0 or more"),
        ({"n": 1.5}, "n 1.5 is not a whole number"),
        ({"n": True}, "n True is not a whole number"),
        ({"loop_nan": -1}, "loop_nan -1 is not 0 or more"),
        ({"is_group": 1}, "is_group 1 is not true or false"),
        ({"name": "a\nb"}, "is not one line of at most 200 characters"),
        ({"name": "a" * 201}, "is not one line of at most 200 characters"),
        ({"metric": ""}, "metric '' is not a text"),
        ({"p": 1.5}, "p 1.5 is not between 0 and 1"),
        ({"verdict": "great"}, "verdict 'great' is not one of better, worse, inconclusive"),
        ({"verdict": "better"}, "verdict better contradicts the interval [-0.02, 0.06]"),
        ({"low": 0.5}, "low 0.5 is above high 0.06"),
        ({"high": None}, "low and high are one interval"),
        ({"difference": 0.2}, "difference 0.2 is not 0.43 minus 0.41"),
    ],
    ids=str,
)
def test_impossible_task_is_refused(export, task, says):
    assert says in refused(export, tasks=[{**TASK, **task}])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"date": "28.11.2026"}, "date '28.11.2026' is not YYYY-MM-DD"),
        ({"spec": {"span": [1, 2], "steps": 0}}, "spec is not a loop"),
        ({"spec": []}, "spec [] is not an object"),
        ({"seeds": ["a"]}, "seeds 'a' is not a whole number"),
        ({"settings": {"a\x1b[2J": 1}}, "is not one line"),
        ({"settings": {"a": {"b": [float("inf")]}}}, "a inf is not a number"),
        ({"versions": {"torch": 2}}, "torch 2 is not one line"),
        ({"tasks": {}}, "tasks {} is not a list"),
        ({"backend": None}, "backend None is not one line"),
    ],
    ids=str,
)
def test_impossible_result_is_refused(export, changes, says):
    assert says in refused(export, **changes)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[]", "is not a JSON object"),
        ("{", "is not JSON"),
        ('{"format": 2}', "its format is not 1"),
        ('{"format": 1}', "results is missing"),
        ('{"format": 1, "results": [7]}', "result 7 is not an object"),
        ('{"format": 1, "results": [{}]}', "date is missing"),
        ('{"a": ' + "[" * 100_000, "is not JSON"),
        (" " * (MAX_BYTES + 1), "has more than 16,777,216 bytes"),
    ],
    ids=lambda text: text[:20],
)
def test_damaged_file_is_told_on_one_line(export, text, says):
    save_results(export.root, made_result(export.spec))
    write_results(export.root, text)
    result = run("inspect", export.root)
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert says in result.stderr
    assert "remove it and run `loopexport compare" in result.stderr


def test_comparison_has_every_field_of_a_result():
    ours = {field.name for field in fields(TaskResult)} - {"version"}  # the task knows it
    assert ours <= {field.name for field in fields(Comparison)}


def parsed(values):
    """A result, or the message that refuses it."""
    try:
        return parse_result(values), ""
    except ValueError as error:
        return None, str(error)


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=3)
    | st.sampled_from([10**400, "x" * 999]),
    lambda each: st.lists(each, max_size=2) | st.dictionaries(st.text(max_size=2), each, max_size=2),
    max_leaves=4,
)
SPEC = make_spec(span="1:2", steps=2)


@settings(max_examples=150, derandomize=True, database=None, deadline=None)
@given(st.sampled_from(sorted(made_result(SPEC))), st.sampled_from([None, *sorted(TASK)]), VALUES)
def test_any_value_is_refused_or_reaches_the_card(name, name_of_task, value):
    changes = {name: value} if name_of_task is None else {"tasks": [{**TASK, name_of_task: value}]}
    result, message = parsed(made_result(SPEC, **changes))
    if result is None:
        assert message.isprintable()
        return
    assert parse_result(json.loads(json_text(result.to_dict()))) == result
    yaml.safe_dump(model_index("Base", (result,)))
    assert all(line.isprintable() for line in results_section(Measured((result,), (result,))).split("\n"))


def test_settings_of_any_text_are_saved_and_leave_the_card_whole(answering, tmp_path):
    items = tmp_path / "generated.jsonl"
    items.write_text(json.dumps({"prompt": "it is", "answer": "1"}))
    generation = {"max_gen_toks": 4, "until": ["\n", "|`<b>\x1b", "x" * 300]}
    compare_and_save(answering, items, generation=generation)
    [saved] = measured(loopexport.open_export(answering)).own
    assert saved.settings["generation"] == generation
    assert r"generation ``{'max_gen_toks': 4, 'until': ['\n', '" in section(answering)
    text = (answering / "README.md").read_text()
    assert all(line.isprintable() for line in text.split("\n"))
    [entry, *_] = yaml.safe_load(text.split("---\n")[1])["model-index"][0]["results"]
    assert len(entry["dataset"]["args"]["generation"]) == 200
    assert all(check.passed for check in check_files(loopexport.open_export(answering)))


def test_answers_that_were_nan_are_told_on_the_card(export):
    broken = {**LOSS, "base_nan": 1, "loop_nan": 2000}
    save_results(export.root, made_result(export.spec, TASK, broken, {**GAIN, "loop_nan": 3}))
    counts = [(task.base_nan, task.loop_nan) for task in read_results(export.root)[0].tasks]
    assert counts == [(0, 0), (1, 2000), (0, 3)]
    shown = section(export.root)
    assert "- openbookqa: some answers were NaN and counted as wrong, 1 of the base and 2,000 of the loop.\n" in shown
    assert "- piqa: some answers were NaN and counted as wrong, 3 of the loop.\n" in shown
    assert shown.count("NaN") == 2


def test_unknown_keys_are_ignored(export):
    save_results(export.root, made_result(export.spec, {**TASK, "note": "x"}, later=1))
    assert "note" not in (export.root / RESULTS).read_text()
