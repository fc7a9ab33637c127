"""Each long walk was done on the code as it is now."""

from __future__ import annotations

import subprocess

import pytest

from support.paths import ROOT
from support.records import RECORDS, code_of


@pytest.mark.parametrize("record", RECORDS.values(), ids=RECORDS)
def test_record_is_of_todays_code(record):
    assert record.file.exists(), f"there is no record yet: run `{record.command}`"
    assert record.read()["digest"] == record.digest(), f"what the walk exercises has changed: run `{record.command}`"


@pytest.mark.parametrize("record", RECORDS.values(), ids=RECORDS)
def test_record_lists_cells_that_passed(record):
    if record.file.exists():
        outcomes = {each["outcome"] for each in record.read()["results"].values()}
        assert outcomes
        assert outcomes <= {"passed", "skipped", "exact", "refused"}


@pytest.mark.parametrize("record", RECORDS.values(), ids=RECORDS)
def test_command_that_is_named_exists(record):
    done = subprocess.run(["make", "-n", record.command.split()[1]], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert f"--record {record.name}" in done.stdout


def test_words_and_layout_are_no_part_of_a_digest():
    plain = "def f(x):\n    return [x, 1]\n"
    worded = 'def f(x):\n    """What it does."""\n    # why\n    return [\n        x,\n        1,\n    ]\n'
    assert code_of(plain) == code_of(worded)
    assert code_of(plain) != code_of(plain.replace("1", "2"))
    assert code_of(plain) != code_of(plain.replace("[x, 1]", "(x, 1)"))


def test_tests_outside_of_a_matrix_are_no_part_of_a_digest():
    matrix = "@pytest.mark.matrix\ndef test_all():\n    pass\n"
    assert code_of(matrix) == code_of(matrix + "def test_one():\n    assert 1\n")
    assert code_of(matrix) != code_of(matrix.replace("pass", "return"))
