"""SVG by hand: two themes, and the few shapes that the pictures need."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

SANS = "-apple-system, 'Segoe UI', 'Noto Sans', Helvetica, Arial, 'DejaVu Sans', sans-serif"
MONO = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"


@dataclass(frozen=True)
class Theme:
    """Colours of one variant; `natural` and `again` tell the natural pass from the iterations."""

    name: str
    background: str
    panel: str
    line: str
    text: str
    muted: str
    natural: str
    natural_fill: str
    again: str
    again_fill: str
    good: str
    bad: str


LIGHT = Theme(
    name="light",
    background="#ffffff",
    panel="#f3f5f8",
    line="#c3cad3",
    text="#1f2630",
    muted="#59636e",
    natural="#0b62c4",
    natural_fill="#dcebfb",
    again="#b45309",
    again_fill="#fdeacb",
    good="#11734b",
    bad="#b42323",
)
DARK = Theme(
    name="dark",
    background="#0d1117",
    panel="#171d26",
    line="#3b4552",
    text="#e6edf3",
    muted="#9aa5b1",
    natural="#6cb2ff",
    natural_fill="#14304f",
    again="#f2b04b",
    again_fill="#47310f",
    good="#4cc38a",
    bad="#ff8a80",
)
THEMES = (LIGHT, DARK)


class Canvas:
    """A picture that grows shape by shape; `svg` ends it."""

    def __init__(self, width: int, height: int, theme: Theme, label: str):
        self.width, self.height, self.theme, self.label = width, height, theme, label
        self.parts: list[str] = []
        self.arrow_colours: list[str] = []

    def rect(self, x, y, width, height, *, fill="none", stroke="none", radius=6, dash="") -> None:
        """A rectangle with round corners."""
        self.parts.append(
            f'<rect x="{_number(x)}" y="{_number(y)}" width="{_number(width)}" height="{_number(height)}" '
            f'rx="{radius}" fill="{fill}" stroke="{stroke}"{_dash(dash)}/>'
        )

    def text(self, x, y, text, *, size=14, fill="", anchor="start", weight="normal", mono=False) -> None:
        """A line of text; `y` is its baseline."""
        family = "mono" if mono else "sans"
        bold = "" if weight == "normal" else f' font-weight="{weight}"'
        place = "" if anchor == "start" else f' text-anchor="{anchor}"'
        self.parts.append(
            f'<text class="{family}" x="{_number(x)}" y="{_number(y)}" font-size="{size}" '
            f'fill="{fill or self.theme.text}"{place}{bold}>{escape(text, quote=False)}</text>'
        )

    def line(self, points, *, stroke="", width=1.5, dash="", arrow=False, halo=False) -> None:
        """A line through points, with a head at its end where `arrow` is set, drawn over others where `halo` is."""
        stroke = stroke or self.theme.line
        path = "M" + " L".join(f"{_number(x)} {_number(y)}" for x, y in points)
        if halo:
            self.parts.append(f'<path d="{path}" fill="none" stroke="{self.theme.background}" stroke-width="7"/>')
        head = f' marker-end="url(#arrow{self._arrow(stroke)})"' if arrow else ""
        self.parts.append(
            f'<path d="{path}" fill="none" stroke="{stroke}" stroke-width="{width}" stroke-linejoin="round"'
            f"{_dash(dash)}{head}/>"
        )

    def circle(self, x, y, radius, *, fill="none", stroke="none") -> None:
        """A circle."""
        self.parts.append(
            f'<circle cx="{_number(x)}" cy="{_number(y)}" r="{radius}" fill="{fill}" stroke="{stroke}" '
            'stroke-width="2"/>'
        )

    def raw(self, part: str) -> None:
        """Any other element."""
        self.parts.append(part)

    def svg(self) -> str:
        """The whole file."""
        markers = "".join(
            f'<marker id="arrow{number}" viewBox="0 0 10 10" refX="8.5" refY="5" markerWidth="6.5" markerHeight="6.5" '
            f'orient="auto"><path d="M0 0.8 L9.5 5 L0 9.2 z" fill="{colour}"/></marker>'
            for number, colour in enumerate(self.arrow_colours)
        )
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{self.width}" height="{self.height}" '
            f'viewBox="0 0 {self.width} {self.height}" role="img">\n<title>{escape(self.label)}</title>\n'
            f"<style>.sans{{font-family:{SANS}}}.mono{{font-family:{MONO};white-space:pre}}</style>\n"
        )
        defs = f"<defs>{markers}</defs>\n" if markers else ""
        ground = f'<rect width="{self.width}" height="{self.height}" rx="10" fill="{self.theme.background}"/>\n'
        return head + defs + ground + "\n".join(self.parts) + "\n</svg>\n"

    def _arrow(self, colour: str) -> int:
        if colour not in self.arrow_colours:
            self.arrow_colours.append(colour)
        return self.arrow_colours.index(colour)


def _number(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _dash(dash: str) -> str:
    return f' stroke-dasharray="{dash}"' if dash else ""
