"""The forest plot of a comparison, and what all plots share."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .verdict_text import is_share, label
from .verdicts import BETTER, INCONCLUSIVE, WORSE, Comparison

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_LABEL_CHARS = 40
_DPI = 144
_ROW_INCHES = 0.32


@dataclass(frozen=True)
class Theme:
    """The colours of a plot."""

    background: str
    text: str
    shade: str
    verdicts: dict[str, str]


LIGHT = Theme("#ffffff", "#1f2328", "#d8dee4", {BETTER: "#1a7f37", WORSE: "#cf222e", INCONCLUSIVE: "#57606a"})
DARK = Theme("#0d1117", "#e6edf3", "#30363d", {BETTER: "#3fb950", WORSE: "#f85149", INCONCLUSIVE: "#9198a1"})


def forest_png(rows: Sequence[Comparison], theme: Theme = LIGHT) -> bytes:
    """The forest plot as PNG: difference and interval of each row, and what its number of items could have shown.

    Rows whose scores are not shares have a panel of their own, because their unit is another.
    """
    panels = [each for each in ([r for r in rows if is_share(r)], [r for r in rows if not is_share(r)]) if each]
    heights = [len(panel) + 2 for panel in panels]
    figure = new_figure(8, 1.2 + _ROW_INCHES * sum(heights), theme)
    axes = figure.subplots(len(panels), 1, squeeze=False, gridspec_kw={"height_ratios": heights})
    for panel, (ax,) in zip(panels, axes, strict=True):
        _draw_panel(ax, panel, [label(row, rows) for row in panel], theme)
    figure.supxlabel("grey: differences too small for these items to show", color=theme.text, fontsize="medium")
    return png(figure)


def _draw_panel(ax: Axes, rows: list[Comparison], labels: list[str], theme: Theme) -> None:
    scale = 100 if is_share(rows[0]) else 1
    style_axes(ax, theme)
    ax.use_sticky_edges = False  # else a bar at the edge gets no margin
    ax.axvline(0, color=theme.text, linewidth=1)
    for place, row in enumerate(rows):
        smallest, color = scale * row.smallest_difference, theme.verdicts[row.verdict]
        ax.barh(place, 2 * smallest, left=-smallest, height=0.6, color=theme.shade)
        ax.plot([scale * row.low, scale * row.high], [place, place], color=color, linewidth=2)
        ax.plot(scale * row.difference, place, "D" if row.is_group else "o", color=color)
    ax.set_yticks(range(len(rows)), labels=[plain_label(each) for each in labels], parse_math=False)
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.set_xlabel(f"loop minus base, {'points' if scale == 100 else 'units of the metric'}", color=theme.text)


def new_figure(width_inches: float, height_inches: float, theme: Theme = LIGHT) -> Figure:
    """An empty figure. It is apart from `pyplot`, so that the user's figures and backend stay as they are."""
    from matplotlib.figure import Figure

    return Figure((width_inches, height_inches), dpi=_DPI, facecolor=theme.background, layout="constrained")


def style_axes(ax: Axes, theme: Theme = LIGHT) -> None:
    """Give axes the colours of the theme, and no frame but the lower line."""
    ax.set_facecolor(theme.background)
    ax.tick_params(colors=theme.text, length=0)
    for name, spine in ax.spines.items():
        spine.set_visible(name == "bottom")
        spine.set_color(theme.text)


def png(figure: Figure) -> bytes:
    """The figure as PNG, the same bytes each time."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()


def plain_label(text: str) -> str:
    """A stranger's name as a label that any font has: ASCII, one line, at most `MAX_LABEL_CHARS` characters."""
    plain = text.encode("unicode_escape").decode("ascii")
    return plain if len(plain) <= MAX_LABEL_CHARS else f"{plain[: MAX_LABEL_CHARS - 3]}..."
