"""The journal keeps answers through any kill, follows no link, and takes no entry that does not fit."""

from __future__ import annotations

import json
import os
from dataclasses import asdict

import pytest

from loopexport import EvaluationError
from loopexport.evaluation.journal import Entry, Journal

ENTRY = Entry("key", [(-1.5, False), (-2.5, True)], 4, 0.25)
KIND = "loglikelihood"


def written(path, *entries):
    journal = Journal(path)
    for entry in entries:
        journal.add(entry)
    return path


def edited(path, **changes):
    path.write_text(json.dumps({**asdict(ENTRY), **changes}) + "\n")
    return path


def test_gives_back_what_it_got(tmp_path):
    texts = Entry("texts", ["a\u2028b", "\ud800", ""], 4, 0.0)
    journal = Journal(written(tmp_path / "journal", ENTRY, texts))
    assert journal.find("key", KIND, 2) == ENTRY
    assert journal.find("texts", "generate_until", 3) == texts
    assert journal.find("another", KIND, 2) is None


def test_the_last_entry_of_a_key_counts(tmp_path):
    halved = Entry("key", [(-1.25, False), (-2.25, True)], 2, 0.5)
    assert Journal(written(tmp_path / "journal", ENTRY, halved)).find("key", KIND, 2) == halved


@pytest.mark.parametrize("share", [0, 0.3, 0.99])
def test_half_a_line_is_cut_off(tmp_path, share):
    path = written(tmp_path / "journal", ENTRY)
    whole = path.read_bytes()
    path.write_bytes(whole + whole[: int(share * len(whole))])
    later = Entry("later", ["text"], 4, 0.0)
    journal = Journal(written(path, later))
    assert journal.find("key", KIND, 2) == ENTRY
    assert journal.find("later", "generate_until", 1) == later


@pytest.mark.parametrize("content", ["private\nunfinished", None])
def test_follows_no_link(tmp_path, content):
    """It would cut the file of somebody else behind its last line break, or write a new one."""
    target, path = tmp_path / "private", tmp_path / "journal"
    if content is not None:
        target.write_text(content)
    path.symlink_to(target)
    with pytest.raises(EvaluationError, match="no link: remove it"):
        Journal(path)
    assert (target.read_text() if target.exists() else None) == content


def test_follows_no_link_that_comes_later(tmp_path):
    target, path = tmp_path / "private", tmp_path / "journal"
    journal = Journal(path)
    path.unlink()
    path.symlink_to(target)
    with pytest.raises(EvaluationError, match="cannot write"):
        journal.add(ENTRY)
    assert not target.exists()


def test_a_directory_or_a_pipe_is_no_journal(tmp_path):
    (tmp_path / "directory").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("directory", "pipe"):
        with pytest.raises(EvaluationError, match=r"cannot use .*remove it"):
            Journal(tmp_path / name)


def test_a_full_disk_is_one_line_and_the_rest_is_kept(tmp_path, monkeypatch):
    path = written(tmp_path / "journal", ENTRY)
    journal = Journal(path)

    def full(descriptor):
        os.ftruncate(descriptor, os.fstat(descriptor).st_size - 5)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(EvaluationError, match="No space left on device; the answers so far are kept"):
        journal.add(Entry("later", ["text"], 4, 0.0))
    monkeypatch.undo()
    again = Journal(path)
    assert again.find("key", KIND, 2) == ENTRY
    assert again.find("later", "generate_until", 1) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"answers": None},
        {"answers": 3},
        {"batch_size": 0},
        {"batch_size": "4"},
        {"seconds": "1"},
        {"seconds": float("nan")},
        {"surplus": 1},
    ],
)
def test_an_impossible_entry_is_damage(tmp_path, changes):
    with pytest.raises(EvaluationError, match=r"damaged .*remove it"):
        Journal(edited(tmp_path / "journal", **changes))


@pytest.mark.parametrize(
    "answers", [[[-1.5, False]], [[-1.5, False]] * 3, "ab", [1, 2], [[1, 2, 3]] * 2, [["x", True]] * 2, [[-1.5, 1]] * 2]
)
def test_an_entry_that_does_not_fit_its_requests_is_damage(tmp_path, answers):
    journal = Journal(edited(tmp_path / "journal", answers=answers))
    with pytest.raises(EvaluationError, match=r"does not fit its requests.*remove it"):
        journal.find("key", KIND, 2)


@pytest.mark.parametrize(("kind", "answer"), [("generate_until", 1.5), ("loglikelihood_rolling", "text")])
def test_each_kind_of_request_has_its_form(tmp_path, kind, answer):
    with pytest.raises(EvaluationError, match="does not fit"):
        Journal(edited(tmp_path / "journal", answers=[answer])).find("key", kind, 1)
