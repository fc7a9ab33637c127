"""A terminal recording drawn from real output, which `record.py` keeps in `data/terminal.json`.

Lines appear one after the other by a CSS animation that plays once. A program that draws no animation, or a reader who
asked for less motion, sees all lines at once.
"""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

from drawing import Canvas, Theme

LABEL = "A terminal: loopexport convert, verify, onnx and run on SmolLM2-135M-Instruct, with their real output"
DATA = Path(__file__).parent / "data" / "terminal.json"
COLUMNS, SIZE, LINE, LEFT, TOP = 104, 13, 19, 22, 62
CHARACTER = SIZE * 0.602  # width of a character in the usual monospaced fonts
TYPING, OUTPUT_LINE, PAUSE = 1.2, 0.12, 1.6  # seconds


def draw(theme: Theme) -> str:
    """The picture as SVG."""
    lines = _lines(json.loads(DATA.read_text()))
    width = round(LEFT * 2 + COLUMNS * CHARACTER)
    canvas = Canvas(width, TOP + len(lines) * LINE + 12, theme, LABEL)
    canvas.raw(
        "<style>@keyframes wait{from,to{opacity:0}}"
        "@media (prefers-reduced-motion:no-preference){.l{animation-name:wait;animation-timing-function:step-end}}"
        "</style>"
    )
    canvas.rect(0.5, 0.5, width - 1, canvas.height - 1, fill=theme.panel, stroke=theme.line, radius=10)
    for number in range(3):
        canvas.circle(24 + number * 20, 22, 5, fill=theme.line, stroke=theme.line)
    for number, (kind, text, seconds) in enumerate(lines):
        if text:
            canvas.raw(f'<g class="l" style="animation-duration:{seconds:.2f}s">')
            _line(canvas, TOP + number * LINE, kind, text)
            canvas.raw("</g>")
    return canvas.svg()


def _lines(entries: list[dict]) -> list[tuple[str, str, float]]:
    """Kind, text and time of appearance of all lines."""
    lines = []
    now = 0.3
    for entry in entries:
        seconds = f"{entry['seconds']:.0f} s"
        command = textwrap.wrap(f"$ {entry['command']}", COLUMNS - 6, subsequent_indent="      ")
        for number, text in enumerate(command):
            lines.append(("took " + seconds if number + 1 == len(command) else "command", text, now))
        now += TYPING
        for text in entry["output"]:
            for piece in textwrap.wrap(text, COLUMNS, subsequent_indent=" " * _indent(text)) or [""]:
                lines.append(("output", _spaces(text, piece), now))
                now += OUTPUT_LINE
        lines.append(("output", "", now))
        now += PAUSE
    return lines[:-1]


def _indent(text: str) -> int:
    """Where the text of a line begins, behind its label."""
    before, ok, _ = text.partition("ok   ")
    return len(before + ok) if ok else 9


def _spaces(text: str, piece: str) -> str:
    """The piece, with the spaces at the head of the line that `wrap` drops."""
    head = text[: len(text) - len(text.lstrip())]
    return head + piece if head and text.lstrip().startswith(piece) else piece


def _line(canvas: Canvas, y: float, kind: str, text: str) -> None:
    theme = canvas.theme
    if kind == "output":
        parts = _coloured(theme, text)
    else:
        parts = [(theme.natural, text)]
        if kind.startswith("took "):
            x = canvas.width - LEFT
            canvas.text(x, y, kind.removeprefix("took "), mono=True, size=SIZE, fill=theme.muted, anchor="end")
    column = 0
    for colour, part in parts:
        canvas.text(LEFT + column * CHARACTER, y, part, mono=True, size=SIZE, fill=colour)
        column += len(part)


def _coloured(theme: Theme, text: str) -> list[tuple[str, str]]:
    """Pieces of a line of output, each with its colour."""
    before, ok, after = text.partition("ok   ")
    if ok:
        pieces = [(theme.text, before), (theme.good, "ok"), (theme.text, "   " + after)]
        return [piece for piece in pieces if piece[1]]
    label = text[:9]
    if label[8:] == " " and label.strip().isalpha():
        return [(theme.muted, label), (theme.text, text[9:])]
    return [(theme.text, text)]
