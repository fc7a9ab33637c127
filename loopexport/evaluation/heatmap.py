"""The cells of a scan as a heatmap."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from .plots import new_figure, png, style_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize

_COLOURS = "RdBu"  # red for losses, white for the base, blue for gains; readers with red-green blindness can tell them
_MAX_TEXT_COLUMNS = 24  # more are too narrow for a number in each cell
_CELL_INCHES = 0.55
_MAX_INCHES = 16.0

Cell = Mapping[str, float]


def heatmap_png(cells: Sequence[Cell]) -> bytes:
    """Difference to the base by start and width of the span, one panel for each K, as PNG.

    A cell whose interval contains 0 is pale and hatched: it may be chance.

    Args:
        cells: the scanned loops, each with `start`, `width`, `steps`, and the shares `difference`, `low`, `high`.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import CenteredNorm

    starts, widths, steps = (sorted({int(cell[key]) for cell in cells}) for key in ("start", "width", "steps"))
    largest = max(abs(100 * cell["difference"]) for cell in cells) or 1.0
    norm = CenteredNorm(0, largest)
    width_inches = min(_MAX_INCHES, max(5.0, 2 + _CELL_INCHES * len(starts)))
    figure = new_figure(width_inches, max(3.0, len(steps) * (1.1 + _CELL_INCHES * len(widths)) + 0.4))
    axes = figure.subplots(len(steps), 1, squeeze=False)
    for k, (ax,) in zip(steps, axes, strict=True):
        style_axes(ax)
        ax.set_title(f"K = {k}", loc="left", fontsize="medium")
        _label_axes(ax, starts, widths)
        for cell in cells:
            if cell["steps"] == k:
                _draw_cell(ax, cell, starts, widths, norm)
    figure.colorbar(ScalarMappable(norm, _COLOURS), ax=list(axes[:, 0]), label="loop minus base, points", shrink=0.9)
    figure.supxlabel("pale and hatched: the interval contains 0", fontsize="small")
    return png(figure)


def _label_axes(ax: Axes, starts: list[int], widths: list[int]) -> None:
    ax.set_xticks(range(len(starts)), labels=[str(start) for start in starts])
    ax.set_yticks(range(len(widths)), labels=[str(width) for width in widths])
    ax.set_xlim(-0.5, len(starts) - 0.5)
    ax.set_ylim(-0.5, len(widths) - 0.5)
    ax.set_xlabel("start of the span")
    ax.set_ylabel("width")


def _draw_cell(ax: Axes, cell: Cell, starts: list[int], widths: list[int], norm: Normalize) -> None:
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    x, y = starts.index(int(cell["start"])), widths.index(int(cell["width"]))
    may_be_chance = cell["low"] <= 0 <= cell["high"]
    colour = colormaps[_COLOURS](norm(100 * cell["difference"]), alpha=0.35 if may_be_chance else 1.0)
    hatch = "///" if may_be_chance else None
    ax.add_patch(Rectangle((x - 0.47, y - 0.47), 0.94, 0.94, facecolor=colour, edgecolor="#8c959f", hatch=hatch, lw=0))
    if len(starts) <= _MAX_TEXT_COLUMNS:
        _write_number(ax, x, y, 100 * cell["difference"], norm.vmax or 0.0, may_be_chance)


def _write_number(ax: Axes, x: int, y: int, value: float, largest: float, may_be_chance: bool) -> None:
    is_dark = not may_be_chance and abs(value) > 0.6 * largest
    backing = {"boxstyle": "round,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.8}
    ax.text(
        *(x, y, f"{value:+.1f}"),
        ha="center",
        va="center",
        fontsize="small",
        color="white" if is_dark else "black",
        bbox=backing if may_be_chance else None,
    )
