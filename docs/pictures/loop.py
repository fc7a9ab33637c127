"""The loop: a span of four layers run three times, and where keys and values are written and read."""

from __future__ import annotations

from itertools import pairwise

from drawing import Canvas, Theme

LABEL = "A span of layers runs K times: the natural pass writes the K/V cache, the iterations read it"
LAYERS = (13, 14, 15, 16)
LEFT, WIDTH, GAP = 262, 92, 14  # of the columns, one a layer
RIGHT = LEFT + len(LAYERS) * WIDTH + (len(LAYERS) - 1) * GAP
ROWS = (150, 256, 362)  # tops of the passes
HEIGHT = 48  # of a layer's box
UPDATES = ("h₁ = x + s (n - x)", "h₂ = h₁ + s (g(h₁) - h₁)", "h₃ = h₂ + s (g(h₂) - h₂)")


def draw(theme: Theme) -> str:
    """The picture as SVG."""
    canvas = Canvas(980, 540, theme, LABEL)
    _columns(canvas)
    _around(canvas)
    for number in range(len(ROWS)):
        _pass(canvas, number)
    for number in range(len(ROWS) - 1):
        _return(canvas, number)
    _cache(canvas)
    _legend(canvas)
    return canvas.svg()


def _middle(column: int) -> float:
    return LEFT + column * (WIDTH + GAP) + WIDTH / 2


def _columns(canvas: Canvas) -> None:
    canvas.text((LEFT + RIGHT) / 2, 30, "span 13:17 of 30 layers, K = 3", anchor="middle", size=16, weight="600")
    for column, layer in enumerate(LAYERS):
        x = LEFT + column * (WIDTH + GAP)
        canvas.rect(x - 4, 46, WIDTH + 8, ROWS[-1] + HEIGHT - 36, fill=canvas.theme.panel, radius=8)
        canvas.text(_middle(column), 66, f"layer {layer}", anchor="middle", fill=canvas.theme.muted)


def _around(canvas: Canvas) -> None:
    theme = canvas.theme
    y = ROWS[0] + HEIGHT / 2
    canvas.rect(36, ROWS[0], 136, HEIGHT, fill=theme.panel, stroke=theme.line)
    canvas.text(104, y + 5, "layers 0 to 12", anchor="middle")
    canvas.line([(172, y), (LEFT - 6, y)], stroke=theme.natural, width=2.2, arrow=True)
    canvas.text(214, y - 10, "x", anchor="middle", fill=theme.natural, weight="600", size=16)
    top = 470
    x = RIGHT + 145
    canvas.line([(x, ROWS[2] + HEIGHT - 4), (x, top - 2)], stroke=theme.natural, width=2.2, arrow=True)
    canvas.text(x - 12, 444, "β n + (1 - β) h₃", anchor="end", weight="600")
    canvas.rect(x - 68, top, 136, HEIGHT, fill=theme.panel, stroke=theme.line)
    canvas.text(x, top + HEIGHT / 2 + 5, "layers 17 to 29", anchor="middle")


def _pass(canvas: Canvas, number: int) -> None:
    theme = canvas.theme
    y = ROWS[number]
    colour, fill = (theme.again, theme.again_fill) if number else (theme.natural, theme.natural_fill)
    name = f"iteration {number}" if number else "natural pass"
    what = f"g(h{'₁₂'[number - 1]})" if number else "n = g(x)"
    for column in range(len(LAYERS)):
        canvas.rect(_middle(column) - WIDTH / 2, y, WIDTH, HEIGHT, fill=fill, stroke=colour)
        if column:
            start = _middle(column - 1) + WIDTH / 2
            canvas.line([(start, y + HEIGHT / 2), (start + GAP, y + HEIGHT / 2)], stroke=colour, width=2.2)
    if number:
        canvas.text(36, y + 20, name, fill=colour, weight="600", size=15)
        canvas.text(36, y + 40, what, fill=theme.muted)
    else:
        canvas.text(36, y - 27, name, fill=colour, weight="600", size=15)
        canvas.text(36, y - 9, what, fill=theme.muted)
    canvas.line([(RIGHT, y + HEIGHT / 2), (RIGHT + 24, y + HEIGHT / 2)], stroke=colour, width=2.2, arrow=True)
    canvas.rect(RIGHT + 26, y + 4, 238, HEIGHT - 8, fill=theme.background, stroke=theme.again, radius=20)
    canvas.text(RIGHT + 145, y + HEIGHT / 2 + 5, UPDATES[number], anchor="middle", size=15)


def _return(canvas: Canvas, number: int) -> None:
    """From an update back to the start of the span."""
    below, target = ROWS[number] + HEIGHT + 29, ROWS[number + 1] + HEIGHT / 2
    points = [(RIGHT + 145, ROWS[number] + HEIGHT - 4), (RIGHT + 145, below), (226, below), (226, target)]
    canvas.line([*points, (LEFT - 6, target)], stroke=canvas.theme.again, width=2.2, arrow=True)


def _cache(canvas: Canvas) -> None:
    theme = canvas.theme
    for column in range(len(LAYERS)):
        x = _middle(column)
        canvas.rect(x - 38, 80, 76, 28, fill=theme.background, stroke=theme.natural, radius=14)
        canvas.text(x, 99, "K, V", anchor="middle", size=13)
        canvas.line([(x - 12, ROWS[0]), (x - 12, 111)], stroke=theme.natural, width=2, arrow=True)
        canvas.line([(x + 12, 108), (x + 12, ROWS[0])], stroke=theme.again, width=1.8, dash="4 4")
        for start, stop in pairwise(ROWS):
            points = [(x + 12, start + HEIGHT), (x + 12, stop - 2)]
            canvas.line(points, stroke=theme.again, width=1.8, dash="4 4", arrow=True)
    canvas.text(36, 88, "K/V cache, one slot a layer", fill=theme.muted)


def _legend(canvas: Canvas) -> None:
    theme = canvas.theme
    y = 448
    canvas.line([(36, y), (76, y)], stroke=theme.natural, width=2, arrow=True)
    canvas.text(88, y + 5, "the natural pass writes its keys and values, once")
    canvas.line([(36, y + 28), (76, y + 28)], stroke=theme.again, width=1.8, dash="4 4", arrow=True)
    canvas.text(88, y + 33, "every iteration reads them (--kv shared, the default) and writes none")
    cost = "Same four layers, same weights: 30 + 2 · 4 = 38 layer evaluations a token, 1.27x."
    canvas.text(36, y + 67, cost, weight="600")
