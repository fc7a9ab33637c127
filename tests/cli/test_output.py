"""What strangers wrote cannot command the terminal, and output that cannot be written is told."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import pytest

from loopexport.cli.output import echo_line, echo_piece
from support.commands import run

COMMANDS = ["\x1b[2J", "\r", "\x08", "\x07", "\x9b2J", "\u202e", "\u2066", "\x7f", "\0", "\ud800"]


@pytest.mark.parametrize("text", COMMANDS)
@pytest.mark.parametrize("echo", [echo_line, echo_piece])
def test_commands_are_escaped(capsys, echo, text):
    echo(f"a{text}b")
    shown = capsys.readouterr().out.rstrip("\n")
    assert shown.isprintable()
    assert (shown[:2], shown[-1]) == ("a\\", "b")


@pytest.mark.parametrize("text", ["\n", "\u2028", "\u200b", "\t"])
def test_line_ends_within_a_line_are_escaped(capsys, text):
    echo_line(f"a{text}b", err=True)
    shown = capsys.readouterr().err
    assert shown == f"a{text.encode('unicode_escape').decode()}b\n"


def test_answers_keep_lines_and_the_marks_of_scripts(capsys):
    text = (
        "one\ntwo\t\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645 \u200f \U0001f468\u200d\U0001f469\u200d\U0001f467"
    )
    echo_piece(text)
    assert capsys.readouterr().out == text


def command_line(*arguments, stdout):
    """Run `loopexport` in a process of its own."""
    command = [sys.executable, "-m", "loopexport", *arguments]
    return subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the system has no /dev/full")
@pytest.mark.parametrize("arguments", [["rules"], ["families", "--json"], ["--help"], ["convert", "--help"]])
def test_output_that_cannot_be_written_is_an_error_on_one_line(arguments):
    with open("/dev/full", "w") as full:
        done = command_line(*arguments, stdout=full)
    assert (done.returncode, done.stderr) == (1, "Error: cannot write to stdout: No space left on device\n")


def test_reader_that_has_gone_is_no_error_to_print():
    reader, writer = os.pipe()
    os.close(reader)
    done = command_line("rules", stdout=writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


def test_errors_of_other_files_are_not_taken_for_the_output(monkeypatch):
    def full():
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("loopexport.cli.text.rule_lines", full)
    result = run("rules")
    assert isinstance(result.exception, OSError)
    assert "cannot write to stdout" not in result.stderr
