"""Figures of the privacy report alone: the budget as it burns down, beliefs, claim against measurement, attack curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedmm.report.page import short
from fedmm.report.plots import COLOURS, INK, MUTED, WIDE, canvas_of
from fedmm.report.spending import moved

DASHED = (0, (5, 4))
MOST_RUNS = 12  # guess: more vertical lines than this hide the curve
BLUE, RED, GREEN = COLOURS[0], COLOURS[1], COLOURS[2]
SMALL = 480


def burn_down(ledger: Mapping[str, Any], *, alt: str) -> str:
    """What is left of the ceiling after each charge, and dashed how it would go on. ledger: `spending.spending`."""
    ceiling, curve = float(ledger["ceiling"]), ledger["curve"]
    known = [(0, ceiling), *((at["charge"], max(0.0, ceiling - at["epsilon"])) for at in curve)]
    forecast = ledger["forecast"] or {"path": [], "refused_at_charge": None}
    coming = [known[-1], *((at["charge"], max(0.0, ceiling - at["epsilon"])) for at in forecast["path"])]
    stop = forecast["refused_at_charge"]
    with canvas_of(WIDE, 330, "burn" + alt) as canvas:
        axes = canvas.axes(left=58, right=30, top=34, bottom=48)
        last = max(coming[-1][0], stop or 0, 1)
        axes.set_xlim(0, last * 1.04)
        axes.set_ylim(-0.02 * ceiling, ceiling * 1.06)
        axes.set_xlabel("charges since the ledger began (a round of training or one release of noisy scores each)")
        axes.set_ylabel("epsilon left")
        axes.grid(True)
        axes.axhline(0, color=INK, linewidth=1.2)
        free = -1.0
        for number, start in _starts(ledger):
            axes.axvline(start, color=MUTED, linewidth=0.8, linestyle=(0, (2, 3)))
            if start < free:
                continue  # no room for its name beside the one before
            free = start + 0.05 * last
            place = {"xy": (start, ceiling * 1.06), "xytext": (0, 5), "color": MUTED, "ha": "center"}
            axes.annotate(f"run {number}", textcoords="offset points", **place)
        axes.fill_between(*zip(*known, strict=True), color=BLUE, alpha=0.12, linewidth=0)
        axes.plot(*zip(*known, strict=True), color=BLUE, linewidth=2)
        axes.plot(*known[-1], marker="o", color=BLUE, markersize=6)
        axes.annotate(f"{known[-1][1]:.2f} left", known[-1], (8, 6), textcoords="offset points", weight="bold")
        if len(coming) > 1:
            axes.plot(*zip(*coming, strict=True), color=BLUE, linewidth=1.6, linestyle=DASHED)
        if stop is not None:
            axes.plot(stop, 0, marker="X", color=RED, markersize=10, clip_on=False, zorder=6)
            side = {"xytext": (6, 34), "ha": "right"}
            axes.annotate(f"charge {stop:,} would be refused", (stop, 0), textcoords="offset points", **side)
        return canvas.svg(alt)


def _starts(ledger: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Number of each run and how many charges there were before it, where it is known and there are few."""
    starts, before = [], 0
    for number, run in enumerate(ledger["runs"], start=1):
        if run["releases"]:
            starts.append((number, before))
        before += run["releases"]
    ends = [at["charge"] for at in ledger["curve"]]
    shown = [(number, start) for number, start in starts if start == 0 or start in ends]
    return shown if len(shown) <= MOST_RUNS else []


def beliefs(epsilon: float, *, alt: str) -> str:
    """How far a belief about one patient can move: the band between odds over and odds times e^epsilon."""
    before = [i / 200 for i in range(1, 200)]
    with canvas_of(SMALL, 330, "beliefs" + alt) as canvas:
        axes = canvas.axes(left=58, right=16, top=14, bottom=48)
        low, high = [moved(p, -epsilon) for p in before], [moved(p, epsilon) for p in before]
        axes.fill_between(before, low, high, color=BLUE, alpha=0.18, linewidth=0)
        axes.plot(before, high, color=BLUE, linewidth=2)
        axes.plot(before, low, color=BLUE, linewidth=1)
        axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1.2, linestyle=DASHED, label="nothing learnt")
        axes.legend(loc="lower right", framealpha=0.9, edgecolor="none", fontsize=10)
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.set_xlabel("belief that the patient took part, before")
        axes.set_ylabel("the most and least it can be after")
        axes.grid(True)
        return canvas.svg(alt)


def claim(bounds: Sequence[tuple[str, float]], *, claimed: float, alt: str) -> str:
    """Lower bounds on epsilon that an audit measured, each a bar, and the claim that none may pass."""
    labels = [short(name, 46) for name, _ in bounds]
    left = min(300, 20 + 6.4 * max(map(len, labels), default=0))
    with canvas_of(WIDE, 96 + 30 * len(labels), "claim" + alt) as canvas:
        axes = canvas.axes(left=left, right=60, top=34, bottom=48)
        most = max([claimed, *(value for _, value in bounds)], default=1.0)
        axes.set_xlim(0, most * 1.12 or 1.0)
        axes.set_ylim(len(labels) - 0.5, -0.5)
        axes.set_yticks(range(len(labels)), labels)
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.set_xlabel("epsilon")
        axes.grid(True, axis="x")
        for i, (_, value) in enumerate(bounds):
            axes.barh(i, value, height=0.56, color=RED if value > claimed else BLUE, alpha=0.75, zorder=2)
            axes.annotate(f"{value:.2f}", (value, i), (5, 0), textcoords="offset points", va="center", weight="bold")
        axes.axvline(claimed, color=INK, linewidth=1.8, linestyle=DASHED, zorder=4)
        where = {"textcoords": "offset points", "ha": "center"}
        axes.annotate(f"claimed {claimed:.2f}", (claimed, -0.5), (0, 7), **where)
        return canvas.svg(alt)


Points = Sequence[tuple[float, float, float | None, float | None]]  # false alarms, found, its interval


def attack_curve(series: Sequence[tuple[str, Points]], limit: Sequence[tuple[float, float]], *, alt: str) -> str:
    """Share of members found by share of others taken for members, logarithmic; above `limit` nothing may lie.

    limit: (false alarms, most found) along the bound that epsilon and delta give; empty for a model without privacy.
    """
    named = 20 * -(-(len(series) + 2) // 2)  # the legend, in two columns below: inside it would lie over the marks
    with canvas_of(SMALL, 360 + named, "attack" + alt) as canvas:
        axes = canvas.axes(left=62, right=16, top=16, bottom=56 + named)
        axes.set_xscale("log")
        axes.set_yscale("log")
        if limit:
            axes.plot(*zip(*limit, strict=True), color=INK, linewidth=2, label="bound of epsilon and delta")
        line = [10 ** (-4 + i / 10) for i in range(41)]
        axes.plot(line, line, color=MUTED, linewidth=1.2, linestyle=DASHED, label="guessing")
        for i, ((name, points), (colour, marker)) in enumerate(zip(series, _looks(), strict=False)):
            aside = 10 ** (0.05 * (i - (len(series) - 1) / 2))  # side by side, so that none hides another
            x = [p[0] * aside for p in points]
            y = [max(p[1], 1e-4) for p in points]
            axes.plot(x, y, color=colour, marker=marker, markersize=6, linestyle="", label=name)
            for false_alarm, _, low, high in points:
                if low is not None and high is not None:
                    axes.plot([false_alarm * aside] * 2, [max(low, 1e-4), max(high, 1e-4)], color=colour, linewidth=1.4)
        axes.set_xlim(1e-4, 1)
        axes.set_ylim(1e-4, 1.3)
        for each in (axes.xaxis, axes.yaxis):  # powers of ten would need mathematics in the text, which is off
            each.set_major_formatter(lambda value, _: f"{100 * value:g} %")
            each.set_minor_formatter(lambda *_: "")
        axes.set_xlabel("others taken for participants")
        axes.set_ylabel("participants found")
        axes.grid(True)
        axes.legend(loc="upper center", bbox_to_anchor=(0.45, -0.15), ncol=2, frameon=False, fontsize=10)
        return canvas.svg(alt)


def _looks() -> list[tuple[str, str]]:
    """Colour and marker; the second time round a colour has another marker."""
    return [(colour, "os^Dv<"[(i + i // len(COLOURS)) % 6]) for i, colour in enumerate(COLOURS * 4)]


def alarms() -> list[float]:
    """False alarm rates along which a bound is drawn."""
    return [10 ** (-4 + i / 16) for i in range(65)]
