"""The published gains and losses, with their intervals, from `loopexport presets`."""

from __future__ import annotations

import sys
from pathlib import Path

from drawing import Canvas, Theme

sys.path.insert(0, str(Path(__file__).parents[2]))
from loopexport.loop.presets import AUTHORS, PAPER, PRESETS, Preset, Result

LABEL = "Published differences between looped models and their bases, in points, with 95 % confidence intervals"
LEFT, RIGHT, TOP, ROW = 452, 900, 98, 42
LEAST, MOST = -8.5, 8.5


def draw(theme: Theme) -> str:
    """The picture as SVG."""
    cited = [preset for preset in PRESETS if preset.status != "third-party"]
    rows = [(preset, result) for preset in cited for result in preset.results if result.gain is not None]
    bottom = TOP + len(rows) * ROW
    canvas = Canvas(980, bottom + 86, theme, LABEL)
    canvas.text(36, 34, "What was published: looped minus base, in percentage points", size=17, weight="600")
    canvas.text(36, 58, "by others; LoopExport measured none of these", fill=theme.muted)
    _axis(canvas, bottom)
    for number, (preset, result) in enumerate(rows):
        _row(canvas, TOP + number * ROW + ROW / 2, preset, result)
    _legend(canvas, bottom)
    return canvas.svg()


def _x(points: float) -> float:
    return LEFT + (points - LEAST) * (RIGHT - LEFT) / (MOST - LEAST)


def _axis(canvas: Canvas, bottom: int) -> None:
    theme = canvas.theme
    for points in range(-8, 9, 2):
        canvas.line([(_x(points), TOP - 6), (_x(points), bottom)], width=1)
        canvas.text(_x(points), bottom + 20, f"{points:+d}" if points else "0", anchor="middle", fill=theme.muted)
    canvas.line([(_x(0), TOP - 6), (_x(0), bottom)], stroke=theme.text, width=1.5)
    canvas.text(_x(0) + 10, TOP - 12, "better than the base", fill=theme.good, size=13)
    canvas.text(_x(0) - 10, TOP - 12, "worse", fill=theme.bad, size=13, anchor="end")


def _row(canvas: Canvas, y: float, preset: Preset, result: Result) -> None:
    theme = canvas.theme
    colour = theme.good if result.gain > 0 else theme.bad
    task, _, model = result.task.rpartition(", ")
    if not model.startswith(preset.models[0]):  # the task does not name its model
        task, model = result.task, preset.models[0]
    canvas.text(36, y - 3, task, size=14)
    canvas.text(36, y + 13, f"{model}, {_source(result)}", size=12, fill=theme.muted)
    if result.interval:
        low, high = (_x(bound) for bound in result.interval)
        canvas.line([(low, y), (high, y)], stroke=colour, width=2.5)
        for x in (low, high):
            canvas.line([(x, y - 5), (x, y + 5)], stroke=colour, width=2.5)
    canvas.circle(_x(result.gain), y, 5, fill=colour if result.interval else theme.background, stroke=colour)
    canvas.text(944, y + 5, f"{result.gain:+.2f}", anchor="end", fill=colour, weight="600")


def _source(result: Result) -> str:
    return {PAPER: "the paper", AUTHORS: "the paper's authors"}.get(result.source, result.source)


def _legend(canvas: Canvas, bottom: int) -> None:
    theme = canvas.theme
    y = bottom + 54
    canvas.line([(36, y), (76, y)], stroke=theme.muted, width=2.5)
    canvas.circle(56, y, 5, fill=theme.muted, stroke=theme.muted)
    canvas.text(88, y + 5, "with its 95 % confidence interval", size=13)
    canvas.circle(342, y, 5, fill=theme.background, stroke=theme.muted)
    canvas.text(358, y + 5, "no interval was published", size=13)
