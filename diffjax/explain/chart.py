"""Line charts as SVG that takes its colours from the page, so that it is read in light and in dark."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Float

WIDTH, HEIGHT = 400, 250
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 10, 42
COLOURS = 6
TICKS = 5


@dataclass(frozen=True)
class Line:
    """A line through points, with the number of its colour; `dashed` lines have no dots. One that is not `listed` is
    left out of the legend, where the line of its colour stands for it.
    """

    label: str
    x: Float[np.ndarray, " n"]
    y: Float[np.ndarray, " n"]
    colour: int
    dashed: bool = False
    listed: bool = True


@dataclass(frozen=True)
class Chart:
    """Lines over one pair of axes. `says` is what it shows in words, for those who do not see it; `log_x` and `log_y`
    are logarithmic axes, on which only numbers above 0 are drawn; `falling`: x falls from left to right, as time does
    while a picture is drawn. `dashed` says in the legend what the dashed lines are that are not listed.
    """

    kind: ClassVar[str] = "chart"
    says: str
    x: str
    y: str
    lines: tuple[Line, ...]
    log_x: bool = False
    log_y: bool = False
    falling: bool = False
    dashed: str = ""

    def svg(self) -> str:
        """The drawing; the legend is the page's."""
        ends = LEFT, WIDTH - RIGHT
        across = Axis.over([line.x for line in self.lines], self.log_x, *(ends[::-1] if self.falling else ends))
        up = Axis.over([line.y for line in self.lines], self.log_y, HEIGHT - BOTTOM, TOP)
        parts = [*_across(across, self.x), *_up(up, self.y)]
        parts += [part for line in self.lines for part in _line(line, across, up)]
        return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{_title(self.says)}{"".join(parts)}</svg>'

    def rows(self) -> list[tuple[str, ...]]:
        """The numbers as a table: x, then each line's y, empty where it has no point."""
        places = sorted({float(x) for line in self.lines for x in line.x})
        known = [dict(zip(map(float, line.x), line.y, strict=True)) for line in self.lines]
        return [(f"{x:.4g}", *(f"{of[x]:.4g}" if x in of else "" for of in known)) for x in places]


@dataclass(frozen=True)
class Axis:
    """From numbers between `low` and `high` to places between `start` and `stop`, with the numbers that are written."""

    low: float
    high: float
    start: float
    stop: float
    log: bool
    ticks: tuple[float, ...]

    @classmethod
    def over(cls, values: list[np.ndarray], log: bool, start: float, stop: float) -> "Axis":
        """The axis that holds all finite values (and above 0, where it is logarithmic)."""
        every = np.concatenate([np.asarray(value, float).ravel() for value in values])
        every = every[np.isfinite(every) & ((every > 0) | (not log))]
        low, high = (float(every.min()), float(every.max())) if len(every) else (1.0, 2.0)
        if log:
            ticks = _decades(low, high)
        else:
            from matplotlib.ticker import MaxNLocator

            ticks = MaxNLocator(TICKS, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
        low, high = min(low, ticks[0]), max(high, ticks[-1])
        return cls(low, high, start, stop, log, tuple(float(tick) for tick in ticks))

    def place(self, value: Float[np.ndarray, "..."] | float) -> Float[np.ndarray, "..."]:
        """Where values stand."""
        scale = np.log if self.log else np.asarray
        share = (scale(value) - scale(self.low)) / ((scale(self.high) - scale(self.low)) or 1.0)
        return self.start + share * (self.stop - self.start)


def _decades(low: float, high: float) -> np.ndarray:
    """Powers of 10 around the numbers; 1, 2 and 5 times them where that are few."""
    powers = 10.0 ** np.arange(np.floor(np.log10(low) + 1e-9), np.ceil(np.log10(high) - 1e-9) + 1)
    if len(powers) > 3:
        return powers[:: -(-len(powers) // (TICKS + 1))]
    fine = np.sort(np.concatenate([powers, 2 * powers, 5 * powers]))
    return fine[max(0, np.searchsorted(fine, low, "right") - 1) : np.searchsorted(fine, high) + 1]


def _title(says: str) -> str:
    return f"<title>{_escape(says)}</title>"


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _across(axis: Axis, label: str) -> list[str]:
    parts = []
    for tick in axis.ticks:
        x = float(axis.place(tick))
        parts.append(f'<path class="grid" d="M{x:.1f} {TOP}V{HEIGHT - BOTTOM}"/>')
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{_number(tick)}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    return [*parts, f'<text x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{_escape(label)}</text>']


def _up(axis: Axis, label: str) -> list[str]:
    parts = []
    for tick in axis.ticks:
        y = float(axis.place(tick))
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{_number(tick)}</text>')
    middle = (TOP + HEIGHT - BOTTOM) / 2
    turned = f'<text transform="translate(13 {middle}) rotate(-90)" text-anchor="middle">{_escape(label)}</text>'
    return [*parts, turned]


def _line(line: Line, across: Axis, up: Axis) -> list[str]:
    x, y = np.asarray(line.x, float), np.asarray(line.y, float)
    seen = np.isfinite(x) & np.isfinite(y) & ((y > 0) | (not up.log)) & ((x > 0) | (not across.log))
    points = list(zip(across.place(x[seen]), up.place(y[seen])))
    kind = f"c{line.colour % COLOURS}" + (" dashed" if line.dashed else "")
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    dots = [] if line.dashed else [f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="2.6"/>' for x, y in points]
    return [f'<path class="line {kind}" d="M{path}"/>' if points else "", *dots]


def _number(value: float) -> str:
    """Few digits: 0.25, 10, 2000, 1e6."""
    if value and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:.6g}".replace("-", "\N{MINUS SIGN}")
