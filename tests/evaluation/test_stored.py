"""Results in a directory: what was edited or damaged is refused, and a kill leaves nothing that stops the next run."""

from __future__ import annotations

import json

import pytest

from loopexport import EvaluationError, OutputError
from loopexport.evaluation.items import Answer, Pair
from loopexport.evaluation.settings import SETTINGS, check_directory, read_settings, results_directory
from loopexport.evaluation.stored import ITEMS, RESULT, read_result, write_result
from support.answer_pairs import make_pair, make_task

USED = {"seeds": [1], "batch_size": 4}
VALUES = {"settings": USED, "floor": None, "groups": {}}


@pytest.fixture
def results(tmp_path):
    write_result(tmp_path, make_task(2, 1, 5), VALUES)
    return tmp_path


def test_gives_back_the_pairs(results):
    stored = read_result(results, USED)
    assert stored.pairs == make_task(2, 1, 5)
    assert stored.values == {"floor": None, "groups": {}}
    assert read_result(results / "other", USED) is None


def test_numbers_that_json_lacks_come_back():
    answer = Answer(0.0, "a", (float("nan"), float("-inf"), -1.5))
    text = json.dumps(make_pair(answer, 1).to_dict(), allow_nan=False)
    again = Pair.from_dict(json.loads(text)).base.loglikelihoods
    assert str(again) == str(answer.loglikelihoods)


@pytest.mark.parametrize("kept", [0, 3, 4])
def test_items_that_are_missing_are_noticed(results, kept):
    lines = (results / ITEMS).read_text().splitlines(keepends=True)
    (results / ITEMS).write_text("".join(lines[:kept]))
    with pytest.raises(
        EvaluationError, match=r"items.jsonl or result.json was edited\); remove result.json, and run the same"
    ):
        read_result(results, USED)


@pytest.mark.parametrize("text", ["[]", "{}", "{", "null", '{"settings": {}}', "[" * 100_000])
def test_a_result_that_is_damaged_says_what_to_do(results, text):
    (results / RESULT).write_text(text)
    with pytest.raises(EvaluationError, match=r"damaged .*remove result.json") as error:
        read_result(results, USED)
    assert "\n" not in str(error.value)


def test_an_edited_result_is_refused(results):
    values = json.loads((results / RESULT).read_text())
    for change in ({"floor": 0.1}, {"date": "2026-01-01"}, {"groups": {"all": 1}}):
        (results / RESULT).write_text(json.dumps({**values, **change}))
        with pytest.raises(EvaluationError, match=r"result.json was edited"):
            read_result(results, USED)


def test_a_result_of_edited_settings_is_refused(results):
    with pytest.raises(EvaluationError, match="settings were edited"):
        read_result(results, {**USED, "seeds": [2]})


def test_a_directory_may_be_reached_by_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with results_directory(tmp_path / "link", USED):
        pass
    assert read_settings(tmp_path / "real") == USED


@pytest.mark.parametrize("make", [lambda path: path.write_text("x"), lambda path: path.symlink_to("nowhere")])
def test_what_is_no_directory_is_refused(tmp_path, make):
    make(tmp_path / "out")
    with pytest.raises(EvaluationError, match="is not a directory"):
        check_directory(tmp_path / "out", USED)
    with pytest.raises((EvaluationError, OutputError), match="too long"):
        check_directory(tmp_path / ("a" * 300), USED)


def test_settings_go_through_no_link(tmp_path):
    (tmp_path / SETTINGS).symlink_to(tmp_path.parent / "private")
    with pytest.raises(EvaluationError, match="other files than results"), results_directory(tmp_path, USED):
        pass
    assert not (tmp_path.parent / "private").exists()


def test_a_run_killed_at_its_settings_starts_again(tmp_path, monkeypatch):
    """The file is there whole or not at all, and its temporary name stops nobody."""
    from pathlib import Path

    def full(self, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OutputError, match="no space left"), results_directory(tmp_path, USED):
        pass
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / f".{SETTINGS}.abc123.partial").write_text("{")
    with results_directory(tmp_path, USED):
        assert [path.name for path in tmp_path.iterdir()] == [SETTINGS]


def test_two_runs_do_not_share_a_directory(tmp_path):
    first, second = results_directory(tmp_path, USED), results_directory(tmp_path, USED)
    with first, pytest.raises(EvaluationError, match="another run is writing"), second:
        pass
