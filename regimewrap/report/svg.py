"""What charts are made of: scales, axes, legends and marks as SVG text. Knows nothing of experiments.

Colours are classes and variables of a style sheet, so one drawing serves a light page, a dark one and paper. A drawing
is as wide as a phone; larger screens enlarge it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

#: Units of a drawing's width, about the pixels of a phone.
WIDTH = 400
LEFT, RIGHT = 34, 388

#: Okabe and Ito's colours, which stay apart for colour-blind readers, lighter ones in the dark; marks repeat what they
#: say. The first is that of the arm that others are compared with.
COLOURS = ("#333333", "#0072b2", "#c04f00", "#00805a", "#a8548c", "#8a6500")
DARK_COLOURS = ("#dddddd", "#56b4e9", "#ff9a4d", "#2fc79b", "#e79fc8", "#e6b422")
_MARKS = ("M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0", "M-3.5-3.5h7v7h-7z", "M0-4.5l4.5 8h-9z", "M0-5l5 5-5 5-5-5z")


def _variables(colours: Sequence[str], ink: str, soft: str, line: str, paper: str) -> str:
    named = {"ink": ink, "soft": soft, "line": line, "paper": paper} | {
        f"arm{i}": each for i, each in enumerate(colours)
    }
    return " ".join(f"--{name}: {colour};" for name, colour in named.items())


_LIGHT = _variables(COLOURS, ink="#222", soft="#595959", line="#ddd", paper="#fff")
_DARK = _variables(DARK_COLOURS, ink="#e8e8e8", soft="#a8a8a8", line="#3c3c3c", paper="#16181b")
_ARMS = "\n".join(f".arm{i} {{ --arm: var(--arm{i}); }}" for i in range(len(COLOURS)))

#: What a page with drawings, and a drawing in a file of its own, needs.
STYLE = f"""
:root {{ color-scheme: light dark; {_LIGHT} }}
@media (prefers-color-scheme: dark) {{ :root {{ {_DARK} }} }}
@media print {{ :root {{ color-scheme: light; {_LIGHT} }} }}
{_ARMS}
.chart {{ font: 12px system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }}
.chart text {{ fill: var(--ink); }}
.chart .soft {{ fill: var(--soft); }}
.chart .grid {{ stroke: var(--line); }}
.chart .area {{ fill: var(--line); }}
.chart .curve {{ fill: none; stroke: var(--arm); stroke-width: 2; stroke-linejoin: round; }}
.chart .arm0.curve {{ stroke-dasharray: 5 3; }}
.chart .trace {{ fill: none; stroke: var(--arm); stroke-width: 1.5; }}
.chart .faint {{ opacity: .35; }}
.chart .mark {{ fill: var(--arm); }}
.chart .event {{ fill: var(--paper); stroke: var(--ink); }}
.chart .bar {{ stroke: var(--arm); }}
.chart .cursor {{ stroke: var(--ink); stroke-width: 1.5; stroke-dasharray: 2 3; }}
"""


@dataclass(frozen=True)
class Scale:
    """Where values lie in a drawing: from ``low`` at ``start`` to ``high`` at ``end``, in units of the drawing."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Return the place of a value."""
        low, high, at = (math.log(each) if self.log else each for each in (self.low, self.high, value))
        share = (at - low) / (high - low) if high > low else 0.5
        return round(self.start + share * (self.end - self.start), 1)


def ticks(low: float, high: float) -> list[float]:
    """Return round numbers that reach from below ``low`` to above ``high``, six at most.

    >>> ticks(30.5, 95.2)
    [20.0, 40.0, 60.0, 80.0, 100.0]
    """
    reach = max(high - low, 1.0)
    step = next(s for s in _steps(reach) if math.ceil(high / s) - math.floor(low / s) <= 5)
    return [round(i * step, 10) for i in range(math.floor(low / step), math.ceil(high / step) + 1)]


def _steps(reach: float) -> Iterable[float]:
    power = 10.0 ** math.floor(math.log10(reach / 5))
    return (factor * power for factor in (1, 2, 5, 10, 20, 50))


def text(x: float, y: float, words: str, anchor: str = "start", kind: str = "") -> str:
    """Return words at a place."""
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" class="{kind}">{escape(words)}</text>'


def axes(x: Scale, y: Scale, along: Iterable[tuple[float, str]], up: Iterable[tuple[float, str]]) -> str:
    """Return the grid of a panel with its numbers, at the given values of both scales."""
    rows = "".join(
        f'<path class="grid" d="M{x.start} {y(value)}H{x.end}"/>{text(x.start - 5, y(value) + 4, word, "end", "soft")}'
        for value, word in up
    )
    return rows + "".join(
        f'<path class="grid" d="M{x(value)} {y.start}v4"/>{text(x(value), y.start + 17, word, "middle", "soft")}'
        for value, word in along
    )


def path(points: Iterable[tuple[float, float]], kind: str) -> str:
    """Return straight lines from point to point."""
    return f'<path class="{kind}" d="M{"L".join(f"{x} {y}" for x, y in points)}"/>'


def mark(x: float, y: float, arm: int, kind: str = "mark", size: float = 1.0) -> str:
    """Return the mark of an arm at a place."""
    return (
        f'<path class="{kind} arm{arm % len(COLOURS)}" d="{_MARKS[arm % len(_MARKS)]}" '
        f'transform="translate({x} {y}) scale({size})"/>'
    )


def legend(names: Sequence[tuple[int, str]]) -> tuple[str, float]:
    """Return the names of arms beside their marks, in as many lines as they need, and the height of these."""
    parts, x, y = [], 6.0, 12.0
    for arm, name in names:
        width = 22 + 7.2 * len(name)
        if x > 6 and x + width > WIDTH:
            x, y = 6.0, y + 18
        parts += [mark(x, y - 4, arm), text(x + 9, y, name)]
        x += width
    return "".join(parts), y + 8


def drawing(body: str, height: float, told: str, more: str = "") -> str:
    """Return a whole drawing; ``told`` says in words what it shows, ``more`` are further attributes."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="chart" role="img" viewBox="0 0 {WIDTH} {height:g}" '
        f'aria-label="{escape(told)}"{more}>{body}</svg>'
    )


def as_file(picture: str) -> str:
    """Return a drawing with its style inside, for a file of its own."""
    start, rest = picture.split(">", 1)
    return f"{start}><style>{STYLE}</style>{rest}\n"
