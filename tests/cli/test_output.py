"""What strangers wrote cannot command the terminal."""

from __future__ import annotations

import pytest

from loopexport.cli.output import echo_line, echo_piece

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
