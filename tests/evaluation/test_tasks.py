"""The tasks of a comparison: names, YAML files and files of items, and one line where they are wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from loopexport import EvaluationError
from loopexport.evaluation import tasks
from loopexport.evaluation.tasks import TaskSource, read_items

pytest.importorskip("lm_eval")
YAML = """\
task: sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {items}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{choices.index(answer)}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
metadata: {{version: 3}}
"""


def file_of(directory: Path, *items) -> Path:
    path = directory / "items.jsonl"
    path.write_text("\n".join(item if isinstance(item, str) else json.dumps(item) for item in items), encoding="utf-8")
    return path


def test_an_answer_may_be_a_choice_or_its_index(tmp_path):
    path = file_of(
        tmp_path,
        {"prompt": "1 + 1 =", "choices": ["2", "3"], "answer": "3"},
        {"prompt": "1 + 1 =", "choices": ["2", "3"], "answer": 0},
    )
    assert [item["answer"] for item in read_items(path)] == [1, 0]


def test_choices_follow_the_prompt_after_a_space(tmp_path):
    path = file_of(
        tmp_path,
        {"prompt": "Paris is in", "choices": ["France", " Spain"], "answer": 0},
        {"prompt": "Paris is in ", "choices": ["France", "Spain"], "answer": 0},
        {"prompt": "", "choices": ["France", "Spain"], "answer": 0},
    )
    assert [item["choices"] for item in read_items(path)] == [
        [" France", " Spain"],
        ["France", "Spain"],
        ["France", "Spain"],
    ]


CHOICE = {"prompt": "p", "choices": ["a", "b"], "answer": 0}


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([], "has no items"),
        (["", "  "], "has no items"),
        ([CHOICE, "{"], "line 2 is not JSON"),
        (["[" * 100_000], "line 1 is not JSON"),
        ([[1, 2]], "line 1 is not an item"),
        ([{"choices": ["a", "b"], "answer": 0}], "line 1 is not an item"),
        ([{"prompt": "p", "choices": ["a", "b"]}], "line 1 is not an item"),
        ([{"prompt": 3, "answer": "a"}], "line 1 is not an item"),
        ([{"prompt": "p", "answer": 3}], "answer 3 must be text"),
        ([{"prompt": "p", "answer": " "}], "answer ' ' must be text of one line"),
        ([{"prompt": "p", "answer": "a\nb"}], "must be text of one line"),
        ([{"prompt": "", "answer": "a"}], "line 1: the prompt is empty"),
        (['{"prompt": "\\ud800", "answer": "a"}'], "line 1 has half of a character"),
        ([{**CHOICE, "choices": ["a", " a"]}], "two or more different texts"),
        ([{**CHOICE, "choices": ["a"]}], "two or more different texts"),
        ([{**CHOICE, "choices": ["a", "a"]}], "two or more different texts"),
        ([{**CHOICE, "choices": ["a", " "]}], "two or more different texts"),
        ([{**CHOICE, "choices": "ab"}], "two or more different texts"),
        ([{**CHOICE, "choices": [1, 2]}], "two or more different texts"),
        ([{**CHOICE, "answer": 2}], "answer 2 must be one of the choices, or an index from 0 to 1"),
        ([{**CHOICE, "answer": -1}], "answer -1 must be"),
        ([{**CHOICE, "answer": True}], "answer True must be"),
        ([{**CHOICE, "answer": "c"}], "answer 'c' must be"),
        ([CHOICE, {"prompt": "p", "answer": "a"}], "put them into two files"),
    ],
)
def test_refuses_wrong_items_in_one_line(tmp_path, items, message):
    with pytest.raises(EvaluationError, match=message) as error:
        TaskSource(items=file_of(tmp_path, *items)).check()
    assert "\n" not in str(error.value)


def test_refuses_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(EvaluationError, match="cannot read items"):
        read_items(tmp_path / "missing.jsonl")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(EvaluationError, match="cannot read items"):
        read_items(tmp_path / "binary.jsonl")


def test_needs_a_task():
    with pytest.raises(EvaluationError, match=r"give --tasks NAME,\.\.\. or --items"):
        TaskSource().check()


def test_names_the_nearest_task_and_what_a_download_needs(monkeypatch):
    with pytest.raises(EvaluationError, match="no task 'arc_esay'; did you mean 'arc_easy'"):
        TaskSource(("arc_esay",)).check()
    import datasets

    def offline(*args, **kwargs):
        raise ConnectionError("Couldn't reach the Hub\nsecond line")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(
        EvaluationError, match=r"cannot load arc_easy: ConnectionError.*needs the network once"
    ) as error:
        TaskSource(("arc_easy",)).load()
    assert "\n" not in str(error.value)


def test_runs_the_users_own_yaml(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    items = file_of(tmp_path, CHOICE, {"prompt": "q", "choices": ["a", "b"], "answer": 0})
    task_file = tmp_path / "own.yaml"
    items.write_text(items.read_text().replace('"answer": 0', '"answer": "a"'))
    task_file.write_text(YAML.format(items=items))
    source = TaskSource((str(task_file),))
    source.check()
    assert source.digests().keys() == {"own.yaml", items.name}
    [task] = source.load()["tasks"].values()
    assert [metric["metric"] for metric in task.config.metric_list] == ["acc", "acc_norm"]


def test_refuses_a_missing_directory_of_tasks(tmp_path):
    with pytest.raises(EvaluationError, match="no directory"):
        TaskSource(("arc_easy",), include_path=tmp_path / "missing").check()


def test_a_line_break_ends_an_item_and_nothing_else_does(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text(
        '\ufeff{"prompt": "a\u2028b\x85c", "answer": "d"}\r\n\n{"prompt": "e", "answer": "f"}', encoding="utf-8"
    )
    assert [item["prompt"] for item in read_items(path)] == ["a\u2028b\x85c", "e"]


def test_refuses_two_tasks_of_one_name(tmp_path, monkeypatch):
    """lm-evaluation-harness would run the last one and say nothing."""
    monkeypatch.setattr(TaskSource, "_manager", lambda self: tasks._index(None, include_defaults=False))
    items = file_of(tmp_path, {**CHOICE, "answer": "a"})
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "own.yaml").write_text(YAML.format(items=items))
    one, two = (str(tmp_path / folder / "own.yaml") for folder in ("one", "two"))
    same = Path(shutil.copy(items, tmp_path / "sums.jsonl"))
    assert TaskSource((one, one)).load()["tasks"].keys() == {"sums"}
    for source in (TaskSource((one, two)), TaskSource((one,), items=same)):
        with pytest.raises(EvaluationError, match="both have a task or group sums; give one of them, or rename one"):
            source.load()


def test_an_edit_of_any_file_of_a_task_is_another_digest(tmp_path):
    """Also where two files have one name, or only the task's YAML names a file."""
    files = ["own.yaml", "included.yaml", "utils.py", "data.jsonl", "sub/utils.py", "sub/own.yaml"]
    (tmp_path / "sub").mkdir()
    for name in files:
        (tmp_path / name).write_text("1")
    (tmp_path / "own.yaml").write_text(f"include: included.yaml\ndata_files: {{test: '{tmp_path}/data.jsonl'}}\n")
    (tmp_path / "notes.txt").write_text("1")
    by_path = TaskSource((str(tmp_path / "own.yaml"), str(tmp_path / "sub" / "own.yaml")))
    by_folder = TaskSource(include_path=tmp_path)
    before = by_path.digests(), by_folder.digests()
    assert len(before[0]) == len(before[1]) == len(files)
    for name in files:
        (tmp_path / name).write_text((tmp_path / name).read_text() + "# edited")
        after = by_path.digests(), by_folder.digests()
        assert all(ours != theirs for ours, theirs in zip(before, after, strict=True)), name
        before = after
    (tmp_path / "notes.txt").write_text("2")
    assert (by_path.digests(), by_folder.digests()) == before


@pytest.mark.parametrize("template", ["template.yaml", "_template_yaml", "template.v1"])
@pytest.mark.parametrize("include", ["include: {}", "include:\n  - {}", "include: ['{}']"])
def test_an_edit_of_what_an_included_file_uses_is_another_digest(tmp_path, template, include):
    files = ["main/own.yaml", f"main/{template}", "shared/default_yaml", "shared/data.jsonl", "shared/utils.py"]
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("1")
    (tmp_path / "main/own.yaml").write_text(include.format(template) + "\ntask: own\n")
    (tmp_path / "main" / template).write_text("tag: mine\ninclude: ../shared/default_yaml\n")
    (tmp_path / "shared/default_yaml").write_text(f"include: ../main/own.yaml\ntest: {tmp_path}/shared/data.jsonl\n")
    source = TaskSource((str(tmp_path / "main/own.yaml"),))
    before = source.digests()
    assert before.keys() == {Path(name).name for name in files}
    for name in files:
        (tmp_path / name).write_text((tmp_path / name).read_text() + "# edited")
        after = source.digests()
        assert {each for each in before if before[each] != after[each]} == {Path(name).name}
        before = after
