"""The report's figures: numbers in, one `<svg>` element out, ready to stand inside an HTML page.

In every figure a unit is a CSS pixel, text is text (searchable, read aloud, in any script), nothing refers to a URL,
ids depend on the content only, and there is a label for screen readers. Colours: Okabe and Ito, who made them for
readers who see fewer colours; beyond six hospitals the marker changes, so that colour alone never tells two apart.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from fedmm.report.page import escaped, short

Points = Sequence[tuple[float, float]]  # (round, value), in order of rounds

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = (("o", "●"), ("s", "■"), ("^", "▲"), ("D", "◆"))  # for matplotlib, for the page's legend
NAMED = len(COLOURS) * len(MARKERS)  # more hospitals than this are drawn alike, in grey
INK, MUTED, GRID = "#1b1f24", "#5c6670", "#e3e7eb"
SIZE, LINE = 11.5, 15  # text and distance between labels, px
WIDE, LEFT, RIGHT = 1080, 636, 420  # widths of a figure: the page, and two side by side


@dataclass(frozen=True)
class Mark:
    """How one hospital looks, in every figure of a page."""

    colour: str
    marker: str
    glyph: str


@dataclass(frozen=True)
class Row:
    """One line of a row figure: the mean over hospitals, and each hospital's value."""

    label: str
    mean: float | None
    values: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Panel:
    """Rows on one axis from `low` to `high`. reference: where bars start, and a line with this name."""

    title: str
    axis: str
    rows: Sequence[Row]
    reference: tuple[float, str] | None = None
    bars: bool = False


@dataclass(frozen=True)
class Span:
    """One line of an interval figure; value None is not known; mark None is the bold black one."""

    label: str
    value: float | None
    low: float
    high: float
    mark: Mark | None = None


@dataclass(frozen=True)
class Line:
    """points; label at the right end; mark None is the bold black mean."""

    label: str
    points: Points
    mark: Mark | None = None


def marks(hospitals: Sequence[str]) -> dict[str, Mark]:
    """Colour and marker by hospital, the same for the same list."""
    look = {}
    for i, name in enumerate(hospitals):
        marker, glyph = MARKERS[(i // len(COLOURS)) % len(MARKERS)] if i < NAMED else MARKERS[0]
        look[name] = Mark(COLOURS[i % len(COLOURS)] if i < NAMED else "#9aa3ab", marker, glyph)
    return look


# --- figures ----------------------------------------------------------------------------------------------------------


def lines(
    series: Sequence[Line],
    *,
    alt: str,
    axis: str,
    rounds: int,
    levels: Sequence[tuple[float, str]] = (),
    span: tuple[float, float],
    width: int = LEFT,
) -> str:
    """Lines over rounds with their labels at the right; levels are dashed. span: the least range that y shows."""
    with canvas_of(width, max(320, LINE * (len(series) + len(levels)) + 90), "lines" + alt) as canvas:
        axes = canvas.axes(left=52, right=184, top=16, bottom=44)
        values = [y for line in series for _, y in line.points] + [y for y, _ in levels]
        low, high = min([span[0], *values]), max([span[1], *values])
        axes.set_ylim(low - 0.02 * (high - low), high + 0.04 * (high - low))
        axes.set_xlim(0.5 if rounds > 1 else 0, rounds + (0.5 if rounds > 1 else 1))
        axes.xaxis.get_major_locator().set_params(integer=True, nbins=12)
        axes.set_xlabel("round")
        axes.set_ylabel(axis)
        axes.grid(True)
        wanted = []
        for y, name in levels:
            axes.axhline(y, color=MUTED, linewidth=1.2, linestyle=(0, (5, 4)))
            wanted.append(_Label(axes.get_xlim()[1], y, name, colour=MUTED))
        for line in series:
            if line.points:
                _draw_line(axes, line)
                wanted.append(_Label(*line.points[-1], line.label, mark=line.mark, bold=line.mark is None))
        wanted = [label for label in wanted if label.text]
        _labels_right(axes, wanted)
        return canvas.svg(alt)


def rows(panels: Sequence[Panel], look: Mapping[str, Mark], *, alt: str, width: int) -> str:
    """One or more panels of the same rows, values 0 to 1: the mean as a bar or stroke, each hospital as a small mark."""
    known = [v for p in panels for row in p.rows for v in (*row.values.values(), row.mean) if v is not None]
    limits = (max(0.0, math.floor(min([0.42, *known]) * 20 - 0.4) / 20), 1.02)
    labels = [short(row.label, 26) for row in panels[0].rows]
    left = min(184, 20 + 6.4 * max(map(len, labels), default=0))
    with canvas_of(width, 98 + 30 * len(labels), "rows" + alt) as canvas:
        gap = 36
        each = (width - left - 24 - gap * (len(panels) - 1)) / len(panels)
        for i, panel in enumerate(panels):
            start = left + i * (each + gap)
            axes = canvas.axes(left=start, right=width - start - each, top=48, bottom=44)
            axes.set_xlim(*limits)
            axes.set_ylim(len(labels) - 0.5, -0.5)
            axes.set_yticks(range(len(labels)), labels if i == 0 else [""] * len(labels))
            axes.tick_params(axis="y", length=0, labelcolor=INK)
            axes.set_title(panel.title, loc="left", y=1.0, pad=26)
            axes.set_xlabel(panel.axis)
            axes.grid(True, axis="x")
            _draw_rows(axes, panel, look, limits)
        return canvas.svg(alt)


def intervals(spans: Sequence[Span], *, title: str, axis: str, alt: str, width: int) -> str:
    """Values with their intervals, 0 to 1: a point with a bar from low to high each, only the bar where it is not known."""
    labels = [short(span.label, 26) for span in spans]
    left = min(184, 20 + 6.4 * max(map(len, labels), default=0))
    with canvas_of(width, 98 + 30 * len(labels), "intervals" + title + alt) as canvas:
        axes = canvas.axes(left=left, right=24, top=48, bottom=44)
        lowest = math.floor(min([0.42, *(span.low for span in spans)]) * 20 - 0.4) / 20
        axes.set_xlim(max(-0.02, lowest), 1.02)
        axes.set_ylim(len(labels) - 0.5, -0.5)
        axes.set_yticks(range(len(labels)), labels)
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.set_title(title, loc="left", y=1.0, pad=26)
        axes.set_xlabel(axis)
        axes.grid(True, axis="x")
        axes.axvline(0.5, color=MUTED, linewidth=1.2, linestyle=(0, (5, 4)), zorder=3)
        axes.annotate("chance 0.5", (0.5, -0.5), (0, 7), textcoords="offset points", ha="center", color=MUTED)
        for i, span in enumerate(spans):
            _draw_span(axes, i, span)
        return canvas.svg(alt)


def _draw_span(axes: Any, i: int, span: Span) -> None:
    colour = span.mark.colour if span.mark else INK
    known = span.value is not None
    style = {"linewidth": 2.6 if span.mark is None else 1.6, "linestyle": "-" if known else (0, (2, 3))}
    axes.plot([span.low, span.high], [i, i], color=colour, zorder=4, **style)
    for end in (span.low, span.high):
        axes.plot([end, end], [i - 0.12, i + 0.12], color=colour, linewidth=style["linewidth"], zorder=4)
    if known:
        axes.plot(span.value, i, marker=span.mark.marker if span.mark else "o", color=colour, markersize=7, zorder=5)
    if known:
        place = {"xy": (span.value, i - 0.14), "xytext": (0, 2), "ha": "center", "weight": "bold"}
    else:
        place = {"xy": (span.low, i - 0.14), "xytext": (6, 1), "ha": "left", "color": MUTED}
    axes.annotate(f"{span.value:.2f}" if known else "not known", textcoords="offset points", **place)


def calibration(
    bins: Sequence[tuple[float, float, int]],
    *,
    alt: str,
    errors: Sequence[tuple[float, float]] = (),
    width: int = 520,
) -> str:
    """Observed rate over predicted probability, with the counts below. bins: predicted, observed, count > 0.

    errors: lower and upper end of each observed rate's interval, where there is one.
    """
    with canvas_of(width, 400, "calibration" + alt) as canvas:
        axes = canvas.axes(left=52, right=16, top=10, bottom=140)
        axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1.2, linestyle=(0, (5, 4)))
        axes.annotate("perfect", (0.93, 0.93), (-4, 4), textcoords="offset points", ha="right", color=MUTED)
        axes.plot([p for p, _, _ in bins], [o for _, o, _ in bins], color=COLOURS[0], marker="o", markersize=5)
        for (p, _, _), (low, high) in zip(bins, errors, strict=False):
            axes.plot([p, p], [low, high], color=COLOURS[0], linewidth=1.2)
        axes.set_ylabel("observed rate")
        axes.grid(True)
        below = canvas.axes(left=52, right=16, top=278, bottom=44)
        edges = [min(int(p * 10), 9) / 10 + 0.05 for p, _, _ in bins]
        below.bar(edges, [n for _, _, n in bins], width=0.09, color="#b9c6d2")
        below.yaxis.get_major_locator().set_params(integer=True, nbins=3)
        below.set_ylabel("count")
        below.set_xlabel("predicted probability")
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1.02)
        axes.tick_params(labelbottom=False)
        below.set_xlim(0, 1)
        return canvas.svg(alt)


# --- parts of figures -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Label:
    """A text beside the axes that belongs to the point (x, y)."""

    x: float
    y: float
    text: str
    colour: str = INK
    mark: Mark | None = None
    bold: bool = False


def _draw_line(axes: Any, line: Line) -> None:
    x, y = zip(*line.points, strict=True)
    look = line.mark
    if look is None:
        axes.plot(x, y, color=INK, linewidth=3, marker="o", markersize=6, zorder=5)
    else:
        axes.plot(x, y, color=look.colour, linewidth=1.5, marker=look.marker, markersize=4.5, zorder=4)


def _labels_right(axes: Any, wanted: Sequence[_Label]) -> None:
    """Labels beside the axes, each as near to its line's end as the others allow, with a leader and the line's mark."""
    (_, bottom), (_, top) = axes.transAxes.transform([(0, 0), (1, 1)])
    left, right = axes.get_xlim()
    beside = right + 0.03 * (right - left)
    order = sorted(wanted, key=lambda label: (-label.y, label.text))
    heights = _spread([float(axes.transData.transform((0, label.y))[1]) for label in order], top, bottom)
    for label, height in zip(order, heights, strict=True):
        level = axes.transData.inverted().transform((0, height))[1]
        colour = label.mark.colour if label.mark else label.colour
        thin = {"color": colour, "linewidth": 0.7, "zorder": 2, "clip_on": False}
        axes.plot([label.x, right], [label.y, label.y], alpha=0.55, **thin)
        axes.plot([right, beside], [label.y, level], **thin)
        if label.mark:
            axes.plot([beside], [level], color=colour, marker=label.mark.marker, markersize=4.5, clip_on=False)
        # the text itself is dark: half of the colours are too pale to be read
        style = {"va": "center", "color": label.colour, "weight": "bold" if label.bold else "normal"}
        axes.annotate(label.text, (beside, level), (7, 0), textcoords="offset points", annotation_clip=False, **style)


def _spread(heights: Sequence[float], top: float, bottom: float) -> list[float]:
    """Falling heights, moved as little as possible so that neighbours are LINE apart, inside top and bottom.

    Pool adjacent violators: neighbours that are too near become one block around the middle of what they wanted.
    """
    blocks: list[tuple[float, int]] = []  # sum of what is wanted if all stood on one line, count
    for i, height in enumerate(heights):
        total, count = height + i * LINE, 1
        while blocks and blocks[-1][0] / blocks[-1][1] < total / count:
            total, count = total + blocks[-1][0], count + blocks[-1][1]
            blocks.pop()
        blocks.append((total, count))
    lowest = min(top, bottom + (len(heights) - 1) * LINE)
    flat = [min(top, max(lowest, total / count)) for total, count in blocks for _ in range(count)]
    return [height - i * LINE for i, height in enumerate(flat)]


def _draw_rows(axes: Any, panel: Panel, look: Mapping[str, Mark], limits: tuple[float, float]) -> None:
    start = panel.reference[0] if panel.reference else limits[0]
    if panel.reference:
        axes.axvline(start, color=MUTED, linewidth=1.2, linestyle=(0, (5, 4)), zorder=3)
        name = f"{panel.reference[1]} {start:.2f}".rstrip("0").rstrip(".")
        axes.annotate(name, (start, -0.5), (0, 7), textcoords="offset points", ha="center", color=MUTED)
    for i, row in enumerate(panel.rows):
        alone = len(row.values) == 1 and len(look) > 1  # the mean of one is that one
        # where a run has one hospital its mark would only hide behind the mean
        for name, value in row.values.items() if len(look) > 1 else ():
            style = {"marker": look[name].marker, "color": look[name].colour, "markeredgecolor": "white"}
            axes.plot(value, i, markersize=9 if alone else 6.5, markeredgewidth=0.6, zorder=4, **style)
        if row.mean is None:
            axes.annotate("not defined", (limits[0], i), (6, 0), textcoords="offset points", va="center", color=MUTED)
            continue
        if panel.bars:
            axes.barh(i, row.mean - start, left=start, height=0.62, color="#c3ced8", zorder=2)
        if not alone:
            axes.plot(
                [row.mean, row.mean], [i - 0.34, i + 0.34], color=INK, linewidth=2.6, solid_capstyle="butt", zorder=5
            )
        axes.annotate(
            f"{row.mean:.2f}", (row.mean, i - 0.34), (0, 1), textcoords="offset points", ha="center", weight="bold"
        )


@dataclass(frozen=True)
class Canvas:
    """A figure of width x height px."""

    figure: Any
    width: int
    height: int

    def axes(self, *, left: float, right: float, top: float, bottom: float) -> Any:
        """Axes with margins in px: fixed, so that the same numbers always give the same picture."""
        across, up = 1 - (left + right) / self.width, 1 - (top + bottom) / self.height
        return self.figure.add_axes((left / self.width, bottom / self.height, across, up))

    def svg(self, alt: str) -> str:
        """The element alone: no XML header, no namespace URLs (HTML knows them), no ids but those in use."""
        file = io.StringIO()
        self.figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
        drawing = file.getvalue()
        drawing = drawing[drawing.index("<svg") :].replace("xlink:href", "href")
        drawing = re.sub(r"<defs>\s*<style[^>]*>.*?</style>\s*</defs>", "", drawing, flags=re.DOTALL)
        drawing = re.sub(
            r' id="[a-zA-Z][\w.]*_\d+"|font-family: \'DejaVu Sans\'; | transform="rotate\(-0 [^"]*"', "", drawing
        )
        head = f'<svg viewBox="0 0 {self.width} {self.height}" role="img" aria-label="{escaped(alt)}">'
        return head + drawing[drawing.index(">") + 1 :]


@contextmanager
def canvas_of(width: int, height: int, salt: str) -> Iterator[Canvas]:
    """A canvas under the report's own style, whatever the user's matplotlibrc says. salt: different for each figure."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with warnings.catch_warnings(), matplotlib.rc_context():
        warnings.simplefilter("ignore", UserWarning)  # a glyph that our font lacks: the reader's browser has it
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({**STYLE, "svg.hashsalt": salt})
        figure = Figure(figsize=(width / 72, height / 72), dpi=72)
        FigureCanvasSVG(figure)
        yield Canvas(figure, width, height)


STYLE: Mapping[str, Any] = {
    "svg.fonttype": "none",
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "text.parse_math": False,  # a hospital may have a dollar sign in its name
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same layout everywhere; wider than what browsers show
    "font.size": SIZE,
    "axes.titlesize": SIZE,
    "axes.titleweight": "bold",
    "axes.labelsize": SIZE,
    "xtick.labelsize": SIZE,
    "ytick.labelsize": SIZE,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "axes.edgecolor": "#b6bec6",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
}
