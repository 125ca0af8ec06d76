"""The page's sections about scores: by round, by what is predicted, by modality, and what the model gets wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from fedmm.report import page, plots
from fedmm.report.page import show
from fedmm.report.reading import Run, Score, Summary, weighted

CHANCE = (0.5, "chance")
Series = Mapping[int, float | None]  # by number of the round
Value = Callable[[Score], float | None]


def scores(run: Run) -> str:
    title = "Score by round and hospital"
    if not run.scored:
        return page.section(title, page.note(why_no_scores(run)))
    area = {n: {r.number: r.scores[n].overall.mean_auroc for r in run.scored if n in r.scores} for n in run.hospitals}
    mean = {r.number: weighted((s.overall.mean_auroc, s.studies) for s in r.scores.values()) for r in run.scored}
    head = ["hospital", *(f"round {number}" for number in mean)]
    rows = [[n, *("at home" if n in r.withheld else show(area[n].get(r.number)) for r in run.scored)] for n in area]
    rows.append(["mean, weighted by studies", *map(show, mean.values())])
    home = f"Scores kept at home by policy: {', '.join(run.withheld)}." if run.withheld else ""
    caption = "Mean AUROC on the held-back patients of each hospital. 1 is perfect, 0.5 is chance."
    drawing = _score_lines(run, area, mean) if len(mean) > 1 else _score_rows(run)
    by_output, output_table = _by_output(run)
    return page.section(
        title,
        page.pair(page.figure(drawing, caption), by_output, kind="uneven"),
        _legend(run),
        page.note(home) if home else "",
        page.details("Mean AUROC by round, numbers", page.table(head, rows)),
        output_table,
    )


def why_no_scores(run: Run) -> str:
    if not run.rounds:
        return "No scores are here: no round is done yet."
    if run.withheld:
        return f"Scores kept at home by policy: {', '.join(run.withheld)}. Each hospital sees its own: fedmm evaluate."
    if any(r.evaluated for r in run.rounds):
        return "No scores are here: no hospital gave usable ones; see the refusals and failures."
    return "No scores are here: no evaluation was due so far."


def _score_lines(run: Run, area: Mapping[str, Series], mean: Series) -> str:
    series = []
    for name in run.hospitals:
        points = _defined(area[name])
        label = f"{page.short(name)} {points[-1][1]:.2f}" if points and len(run.hospitals) <= plots.NAMED else ""
        series.append(plots.Line(label, points, plots.marks(run.hospitals)[name]))
    last = _defined(mean)
    if len(run.hospitals) > 1 and last:
        series.append(plots.Line(f"mean {last[-1][1]:.2f}", last))
    ends = f"the mean ends at {show(last[-1][1] if last else None)}"
    alt = f"Mean AUROC by round, {len(run.hospitals)} hospitals; {ends}"
    return plots.lines(
        series, alt=alt, axis="mean AUROC", rounds=run.plan.rounds, levels=[(0.5, "chance 0.5")], span=(0.45, 1.0)
    )


def _defined(series: Series) -> list[tuple[float, float]]:
    return [(number, value) for number, value in series.items() if value is not None]


def _score_rows(run: Run) -> str:
    mean = run.mean(lambda s: s.overall.mean_auroc)
    rows = [plots.Row(n, v, {n: v}) for n, s in run.final.items() if (v := s.overall.mean_auroc) is not None]
    title = f"Round {run.scored[-1].number}, by hospital"
    panel = plots.Panel(title, "mean AUROC", [*rows, plots.Row("mean", mean)], CHANCE)
    return plots.rows(
        [panel], plots.marks(run.hospitals), alt=f"Mean AUROC by hospital, mean {show(mean)}", width=plots.LEFT
    )


def _by_output(run: Run) -> tuple[str, str]:
    """AUROC of each finding and class in the final round: figure and table."""
    known = [name for name in run.labels.outputs if any(name in s.overall.auroc for s in run.final.values())]
    if not known:
        return "", ""
    rows = [_output(run, name) for name in known]
    panel = plots.Panel(f"Round {run.scored[-1].number}, by what is predicted", "AUROC", rows, CHANCE)
    svg = plots.rows([panel], plots.marks(run.hospitals), alt=f"AUROC by output: {_said(rows)}", width=plots.RIGHT)
    caption = "AUROC of each output; not defined at a hospital where only one value occurs."
    return page.figure(svg, caption), _row_table(run, "AUROC by output and hospital, numbers", "output", rows)


def _output(run: Run, name: str) -> plots.Row:
    return _row(run, name, lambda s: s.overall.auroc.get(name))


def modalities(run: Run) -> str:
    title = "Contribution of each modality"
    known = list(dict.fromkeys(m for s in run.final.values() for m in s.having))
    if not known:
        return page.section(title, page.note(why_no_scores(run)))
    areas = _modality_rows(run, known, lambda part: part.mean_auroc)
    right = _modality_rows(run, known, lambda part: part.accuracy)
    base = (run.mean(lambda s: s.majority) or 0.0, "majority")
    panels = [
        plots.Panel("Mean AUROC", "", areas, CHANCE, bars=True),
        plots.Panel("Accuracy", "", right, base, bars=True),
    ]
    svg = plots.rows(panels, plots.marks(run.hospitals), alt=f"Mean AUROC by input: {_said(areas)}", width=plots.WIDE)
    tables = [
        _row_table(run, f"{panel.title} by modality and hospital, numbers", "input", panel.rows) for panel in panels
    ]
    counts = ", ".join(f"{m} {sum(s.having.get(m, 0) for s in run.final.values()):,}" for m in known)
    caption = (
        f"Round {run.scored[-1].number}, the same model throughout. “only” rows are the studies that have that "
        f"modality ({counts} of {sum(s.studies for s in run.final.values()):,}), seen with it alone, so these compare "
        "other studies; “without” rows are all studies with it hidden. A long step from “all” to “without”: the model "
        "leans on it."
    )
    return page.section(title, page.figure(svg, caption), _legend(run), *tables)


def _modality_rows(run: Run, known: Sequence[str], number: Callable[[Summary], float | None]) -> list[plots.Row]:
    def alone(m: str) -> plots.Row:
        return _row(
            run,
            f"{m} only",
            lambda s: number(s.alone[m]) if m in s.alone else None,
            weight=lambda s: s.having.get(m, 0),
        )

    def without(m: str) -> plots.Row:
        return _row(run, f"without {m}", lambda s: number(s.without[m]) if m in s.without else None)

    everything = _row(run, "all that are present", lambda s: number(s.overall))
    return [everything, *map(alone, known), *map(without, known)]


def errors(run: Run) -> str:
    title = "What it gets wrong, and how sure it is"
    if not run.final:
        return page.section(title, page.note(why_no_scores(run)))
    together = "Counts are summed over hospitals: where these see different classes, telling them apart already scores."
    curve, table = _calibration(run)
    left = f"<div>{_confusion(run)}{_findings(run)}{page.note(together)}</div>"
    return page.section(title, page.pair(left, curve), table)


def _confusion(run: Run) -> str:
    name, values = run.labels.class_name, run.labels.class_values
    if not (counts := run.pooled(name)):
        return ""
    rows = []
    for value, row in zip(values, counts, strict=True):
        shares = [n / max(1, sum(row)) for n in row]
        rows.append((value, *(page.heat(s, f"{n} ({s:.0%})") for n, s in zip(row, shares, strict=True))))
    caption = f"{name}: studies of all hospitals together (rows are the truth), and the share of each true class."
    return page.figure(page.table(["true", *(f"said {value}" for value in values)], rows), caption)


def _calibration(run: Run) -> tuple[str, str]:
    """Figure and table; empty where no scores have the agreed form."""
    if not (bins := run.bins):
        return "", ""
    ece = sum(abs(p - o) * n for p, o, n in bins) / sum(n for _, _, n in bins)
    svg = plots.calibration(bins, alt=f"Reliability curve, expected calibration error {ece:.3f}")
    caption = (
        "All outputs of all hospitals. Above the diagonal: more often true than predicted. Expected calibration error"
    )
    head, rows = ["mean predicted", "observed rate", "count"], [(show(p), show(o), n) for p, o, n in bins]
    table = page.details("Calibration, numbers", page.table(head, rows, left=0))
    return page.figure(svg, f"{caption} (ECE) {ece:.3f}."), table


def _findings(run: Run) -> str:
    rows = []
    for name in run.labels.findings:
        if counts := run.pooled(name):
            (tn, fp), (fn, tp) = counts
            rates = [show(right / total if total else None, 2) for right, total in ((tp, tp + fn), (tn, tn + fp))]
            rows.append((name, tp, fn, fp, tn, *rates, show(_output(run, name).mean, 2)))
    head = ["finding", "found", "missed", "false alarm", "rightly no", "sensitivity", "specificity", "AUROC"]
    return page.heading("Findings, at a probability of 0.5") + page.table(head, rows) if rows else ""


def _row(run: Run, label: str, value: Value, weight: Callable[[Score], float] = lambda s: s.studies) -> plots.Row:
    values = {name: v for name, s in run.final.items() if (v := value(s)) is not None}
    return plots.Row(label, run.mean(value, weight), values)


def _row_table(run: Run, title: str, what: str, rows: Iterable[plots.Row]) -> str:
    body = [(row.label, show(row.mean), *(show(row.values.get(name)) for name in run.final)) for row in rows]
    return page.details(title, page.table([what, "mean", *run.final], body))


def _said(rows: Iterable[plots.Row]) -> str:
    return ", ".join(f"{row.label} {show(row.mean)}" for row in rows)


def _legend(run: Run) -> str:
    if len(run.hospitals) < 2:
        return ""
    if len(run.hospitals) > plots.NAMED:
        return page.note(f"Each grey dot is one of {len(run.hospitals)} hospitals; the tables name them.")
    marks = ((mark.colour, mark.glyph, name) for name, mark in plots.marks(run.hospitals).items())
    return page.legend(marks, "mean over hospitals, weighted by studies")
