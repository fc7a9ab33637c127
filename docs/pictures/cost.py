"""Cost against K: the count of layer evaluations, and times measured by `measure_cost.py`."""

from __future__ import annotations

import json
from pathlib import Path

from drawing import Canvas, Theme

LABEL = (
    "Time of a looped model against its base, for K from 1 to 8: measured points lie on the line of layer evaluations"
)
DATA = Path(__file__).parent / "data" / "cost.json"
LEFT, RIGHT, TOP, BOTTOM = 84, 700, 84, 344
MOST_STEPS, LEAST, MOST = 8, 0.9, 2.1


def draw(theme: Theme) -> str:
    """The picture as SVG."""
    data = json.loads(DATA.read_text())
    start, stop = data["span"]
    canvas = Canvas(760, 430, theme, LABEL)
    title = f"What K costs: {data['model']}, span {start}:{stop} of {data['layers']}"
    canvas.text(LEFT, 34, title, size=17, weight="600")
    canvas.text(LEFT, 58, "time a token, looped / base", fill=theme.muted)
    _axes(canvas)
    line = [(_x(1), _y(1.0)), (_x(MOST_STEPS), _y(1 + (MOST_STEPS - 1) * (stop - start) / data["layers"]))]
    canvas.line(line, stroke=theme.muted, width=2, dash="6 5")
    for point in data["points"]:
        _square(canvas, _x(point["steps"]) - 7, _y(point["prefill"]))
        canvas.circle(_x(point["steps"]) + 7, _y(point["decode"]), 5, fill=theme.again, stroke=theme.again)
    _legend(canvas, data)
    return canvas.svg()


def _x(steps: float) -> float:
    return LEFT + 34 + (steps - 1) * (RIGHT - LEFT - 68) / (MOST_STEPS - 1)


def _y(ratio: float) -> float:
    return BOTTOM - (ratio - LEAST) * (BOTTOM - TOP) / (MOST - LEAST)


def _square(canvas: Canvas, x: float, y: float) -> None:
    canvas.rect(x - 5, y - 5, 10, 10, fill=canvas.theme.natural, stroke=canvas.theme.natural, radius=1)


def _axes(canvas: Canvas) -> None:
    theme = canvas.theme
    for tenths in range(10, 21, 2):
        y = _y(tenths / 10)
        canvas.line([(LEFT, y), (RIGHT, y)], width=1)
        canvas.text(LEFT - 10, y + 5, f"{tenths / 10:.1f}x", anchor="end", fill=theme.muted)
    for steps in range(1, MOST_STEPS + 1):
        canvas.text(_x(steps), BOTTOM + 24, str(steps), anchor="middle", fill=theme.muted)
    canvas.text((LEFT + RIGHT) / 2, BOTTOM + 46, "K, the number of steps", anchor="middle", fill=theme.muted)


def _legend(canvas: Canvas, data: dict) -> None:
    theme = canvas.theme
    x, y = LEFT + 22, TOP + 22
    canvas.rect(x - 12, y - 18, 356, 82, fill=theme.background, stroke=theme.line)
    canvas.line([(x, y), (x + 30, y)], stroke=theme.muted, width=2, dash="6 5")
    canvas.text(x + 42, y + 5, "layer evaluations, (L + (K - 1) w) / L")
    _square(canvas, x + 15, y + 23)
    canvas.text(x + 42, y + 28, f"prefill of {data['prefill_tokens']} tokens, measured")
    canvas.circle(x + 15, y + 46, 5, fill=theme.again, stroke=theme.again)
    canvas.text(x + 42, y + 51, f"decode of {data['decode_tokens']} tokens, measured")
    threads = "1 thread" if data["threads"] == 1 else f"{data['threads']} threads"
    note = f"Median of {data['rounds']} rounds in turn with the base; fp32, {threads} on a shared CPU."
    canvas.text(LEFT, BOTTOM + 74, note, size=13, fill=theme.muted)
