"""One directory and the programs that read it: which file each one takes."""

from __future__ import annotations

from drawing import Canvas, Theme

LABEL = "One exported directory with one copy of the weights feeds transformers, vLLM and ONNX Runtime"
LEFT, PANEL = 36, 392
FILES = (
    ("config", "config.json", "the base's fields and the loop_* fields"),
    ("code", "modeling_looped.py and 8 more", "the same files in every export"),
    ("weights", "model.safetensors", "the base's bytes, stored once"),
    ("tokenizer", "tokenizer.json, ...", "carried over from the base"),
    ("graph", "model.onnx", "the loop unrolled; no weights in it"),
    ("", "README.md, loopexport.json, base/", "card, digests, the base's config"),
)
RUNTIMES = (
    ("transformers", "AutoModelForCausalLM, trust_remote_code=True", ("config", "code", "weights", "tokenizer")),
    ("vLLM", "its Transformers backend", ("config", "code", "weights", "tokenizer")),
    ("ONNX Runtime", "loopexport run, loopexport.onnx.OnnxModel", ("graph", "weights", "tokenizer")),
    (
        "more runners of the graph",
        "onnxruntime-genai, optimum-onnx, transformers.js",
        ("graph", "weights", "tokenizer"),
    ),
)
TOP, FILE_HEIGHT, BOX_HEIGHT = 84, 58, 82
RIGHT, BOX = 520, 424


def draw(theme: Theme) -> str:
    """The picture as SVG."""
    canvas = Canvas(980, 506, theme, LABEL)
    height = len(FILES) * FILE_HEIGHT + 22
    canvas.text(LEFT, 34, "One directory, one copy of the weights", size=17, weight="600")
    canvas.rect(LEFT, TOP - 22, PANEL, height + 24, fill=theme.panel, stroke=theme.line, radius=10)
    canvas.text(LEFT + 16, TOP + 2, "my-model-looped/", mono=True, weight="600")
    for number, file in enumerate(FILES):
        _file(canvas, TOP + 18 + number * FILE_HEIGHT, *file)
    centre = TOP - 22 + (height + 24) / 2
    trunk = LEFT + PANEL + 44
    step = (height + 24 - BOX_HEIGHT) / (len(RUNTIMES) - 1)
    canvas.line([(LEFT + PANEL, centre), (trunk, centre)], stroke=theme.natural, width=2.2)
    for number, runtime in enumerate(RUNTIMES):
        y = TOP - 22 + number * step
        middle = y + BOX_HEIGHT / 2
        points = [(trunk, centre), (trunk, middle), (RIGHT - 4, middle)]
        canvas.line(points, stroke=theme.natural, width=2.2, arrow=True)
        _runtime(canvas, y, *runtime)
    note = "ONNX graphs point into model.safetensors. A graph of another dtype has one data file, shared by all its K."
    canvas.text(LEFT, 486, note, size=13, fill=theme.muted)
    return canvas.svg()


def _file(canvas: Canvas, y: float, chip: str, name: str, what: str) -> None:
    theme = canvas.theme
    canvas.text(LEFT + 116, y + 20, name, mono=True, size=13)
    canvas.text(LEFT + 116, y + 38, what, size=12, fill=theme.muted)
    if chip:
        _chip(canvas, LEFT + 16, y + 9, chip)


def _runtime(canvas: Canvas, y: float, name: str, how: str, chips: tuple[str, ...]) -> None:
    theme = canvas.theme
    canvas.rect(RIGHT, y, BOX, BOX_HEIGHT, fill=theme.background, stroke=theme.line, radius=10)
    canvas.text(RIGHT + 16, y + 24, name, size=15, weight="600")
    canvas.text(RIGHT + 16, y + 42, how, size=12, fill=theme.muted)
    for number, chip in enumerate(chips):
        _chip(canvas, RIGHT + 16 + number * 94, y + 52, chip)


def _chip(canvas: Canvas, x: float, y: float, text: str) -> None:
    theme = canvas.theme
    is_weights = text == "weights"
    fill, colour = (theme.again_fill, theme.again) if is_weights else (theme.natural_fill, theme.natural)
    canvas.rect(x, y, 86, 22, fill=fill, stroke=colour, radius=11)
    canvas.text(x + 43, y + 15.5, text, size=12, anchor="middle", weight="600" if is_weights else "normal")
