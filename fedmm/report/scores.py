"""The page's sections about scores: by round, by what is predicted, by modality, and what the model gets wrong.

Exact and noisy scores never mix: means weighted by studies are of exact ones, noisy ones are pooled by the coordinator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from fedmm.report import page, plots
from fedmm.report.page import show
from fedmm.report.reading import Estimate, Round, Run, Score, Summary, weighted
from fedmm.schema import SUBSETS

CHANCE = (0.5, "chance")
NOISY = "Noisy, charged to the ledger; the 95 % interval includes privacy noise and the number of patients."
Series = Mapping[int, float | None]  # by number of the round
Value = Callable[[Score], float | None]


def cards(run: Run) -> list[tuple[str, str, str]]:
    """Mean AUROC and accuracy in one look: exact ones where there are any, else the pooled noisy ones."""
    base = show(run.mean(lambda s: s.majority))
    area, right, after = "–", "–", why_no_scores(run)
    beside = f"always the most frequent answer: {base}"
    if run.scored:
        area, right = show(run.mean(lambda s: s.overall.mean_auroc)), show(run.mean(lambda s: s.overall.accuracy))
        after = (
            f"0.5 is chance; after round {run.scored[-1].number}, {len(run.final)} of {len(run.hospitals)} hospitals"
        )
    if run.noisy and (pooled := run.noisy.pooled):
        number = len(run.noisy.noisy)
        if run.scored:
            after += f", exact; noisy scores of {number}: {said(pooled.mean_auroc)}"
            beside += f"; noisy: {said(pooled.accuracy)}"
        else:
            area, right = _short(pooled.mean_auroc), _short(pooled.accuracy)
            who = f"noisy scores of {number} of {len(run.hospitals)} hospitals"
            after = f"{_beside(pooled.mean_auroc)}; 0.5 is chance; {who}"
            beside = f"{_beside(pooled.accuracy)}; {who}"
    return [("Mean AUROC", area, after), ("Accuracy", right, beside)]


def scores(run: Run) -> str:
    title = "Score by round and hospital"
    if not run.scored and not run.noisy:
        return page.section(title, page.note(why_no_scores(run)))
    home = f"Scores kept at home by policy: {', '.join(run.withheld)}." if run.withheld else ""
    both = page.heading("Exact scores") if run.scored and run.noisy else ""
    return page.section(
        title,
        (both + _exact(run)) if run.scored else "",
        _noisy(run, run.noisy) if run.noisy else "",
        page.note(home) if home else "",
    )


def _exact(run: Run) -> str:
    names = _exact_names(run)
    area = {n: {r.number: r.scores[n].overall.mean_auroc for r in run.scored if n in r.scores} for n in names}
    mean = {r.number: weighted((s.overall.mean_auroc, s.studies) for s in r.scores.values()) for r in run.scored}
    head = ["hospital", *(f"round {number}" for number in mean)]
    rows = [[n, *("at home" if n in r.withheld else show(area[n].get(r.number)) for r in run.scored)] for n in area]
    rows.append(["mean, weighted by studies", *map(show, mean.values())])
    caption = "Mean AUROC on the held-back patients of each hospital. 1 is perfect, 0.5 is chance."
    drawing = _score_lines(run, area, mean) if len(mean) > 1 else _score_rows(run)
    by_output, output_table = _by_output(run)
    return (
        page.pair(page.figure(drawing, caption), by_output, kind="uneven")
        + _legend(run)
        + page.details("Mean AUROC by round, numbers", page.table(head, rows))
        + output_table
    )


def _exact_names(run: Run) -> list[str]:
    """Hospitals that are not known to give noisy scores."""
    return [name for name in run.hospitals if not run.noisy or name not in run.noisy.noisy]


def _noisy(run: Run, final: Round) -> str:
    look, pooled = plots.marks(run.hospitals), final.pooled
    all_of_them = {name: score for name, score in final.noisy.items()}
    if pooled and len(all_of_them) > 1:
        all_of_them["pooled"] = pooled
    areas = [_span(name, score.mean_auroc, look.get(name)) for name, score in all_of_them.items()]
    rows = [
        (name, said(score.mean_auroc), said(score.accuracy), f"{score.patients:,}")
        for name, score in all_of_them.items()
    ]
    known = list((pooled or next(iter(final.noisy.values()))).auroc)
    by_output = [(name, *(said(score.auroc[name]) for score in all_of_them.values())) for name in known]
    alt = ", ".join(f"{span.label} {show(span.value, 2)}" for span in areas)
    right = ""
    if pooled:
        outputs = [_span(name, estimate) for name, estimate in pooled.auroc.items()]
        title = f"Round {final.number}, by what is predicted"
        spoken = f"AUROC by output, noisy: {', '.join(f'{s.label} {show(s.value, 2)}' for s in outputs)}"
        drawing = plots.intervals(outputs, title=title, axis="AUROC", alt=spoken, width=plots.RIGHT)
        right = page.figure(drawing, "AUROC of each output, histograms of all noisy hospitals summed.")
    left = plots.intervals(
        areas,
        title=f"Round {final.number}, by hospital, noisy",
        axis="mean AUROC",
        alt=f"Mean AUROC by hospital, noisy: {alt}",
        width=plots.LEFT,
    )
    return (
        page.heading("Noisy scores")
        + page.pair(page.figure(left, f"{NOISY} The mean is over the outputs that are known."), right, kind="uneven")
        + page.table(["hospital", "mean AUROC (95 %)", "accuracy (95 %)", "test patients, about"], rows, left=3)
        + page.details(
            "Noisy AUROC by output and hospital, numbers",
            page.table(["output", *all_of_them], by_output, left=1 + len(all_of_them)),
        )
    )


def _span(label: str, e: Estimate, mark: plots.Mark | None = None) -> plots.Span:
    return plots.Span(label, e.value, e.low, e.high, mark)


def said(e: Estimate) -> str:
    """0.81 (0.74 to 0.88)"""
    return f"{_short(e)} ({_range(e)})"


def _short(e: Estimate) -> str:
    return "not known" if e.value is None else f"{e.value:.2f}"


def _beside(e: Estimate) -> str:
    return "hidden by the privacy noise" if e.value is None else f"95 %: {_range(e)}"


def _range(e: Estimate) -> str:
    return f"{e.low:.2f} to {e.high:.2f}"


def why_no_scores(run: Run) -> str:
    if not run.rounds:
        return "No scores are here: no round is done yet."
    if run.plan.evaluation_noise and len(run.rounds) < run.plan.rounds:
        return "No scores are here yet: noisy ones are asked for once, after the last round."
    if run.withheld:
        return f"Scores kept at home by policy: {', '.join(run.withheld)}. Each hospital sees its own: fedmm evaluate."
    if any(r.evaluated for r in run.rounds):
        return "No scores are here: no hospital gave usable ones; see the refusals and failures."
    return "No scores are here: no evaluation was due so far."


def _score_lines(run: Run, area: Mapping[str, Series], mean: Series) -> str:
    series = []
    for name in area:
        points = _defined(area[name])
        label = f"{page.short(name)} {points[-1][1]:.2f}" if points and len(run.hospitals) <= plots.NAMED else ""
        series.append(plots.Line(label, points, plots.marks(run.hospitals)[name]))
    last = _defined(mean)
    if len(area) > 1 and last:
        series.append(plots.Line(f"mean {last[-1][1]:.2f}", last))
    ends = f"the mean ends at {show(last[-1][1] if last else None)}"
    alt = f"Mean AUROC by round, {len(area)} hospitals; {ends}"
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
        text = "Not known: noisy scores are of studies as they are, with all that is present."
        return page.section(title, page.note(text if run.noisy and not run.final else why_no_scores(run)))
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
    return page.section(title, page.figure(svg, caption), _legend(run), _combinations(run), *tables)


def _combinations(run: Run) -> str:
    """A table of every subset of the modalities, where the scores have them."""
    rows = []
    for name in SUBSETS:
        parts = [s.subsets[name] for s in run.final.values() if name in s.subsets]
        if parts:
            studies = sum(count for count, _ in parts)
            area = weighted((part.mean_auroc, count) for count, part in parts)
            right = weighted((part.accuracy, count) for count, part in parts)
            rows.append((name.replace("+", " + "), f"{studies:,}", show(area), show(right)))
    if not rows:
        return ""
    head = ["given only", "studies that have all of it", "mean AUROC", "accuracy"]
    return page.heading("Every combination") + page.table(head, rows)


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
    if not run.final and not run.noisy:
        return page.section(title, page.note(why_no_scores(run)))
    together = "Counts are summed over hospitals: where these see different classes, telling them apart already scores."
    noisy_curve, noisy_table = _noisy_calibration(run)
    if not run.final:
        note = "Which answers were wrong is not in noisy scores: they hold each output's probabilities only."
        return page.section(title, page.pair(noisy_curve, page.note(note)), noisy_table)
    curve, table = _calibration(run)
    if noisy_curve:
        counts = page.pair(f"<div>{_confusion(run)}{page.note(together)}</div>", f"<div>{_findings(run)}</div>")
        return page.section(title, _collapsed(run), counts, page.pair(curve, noisy_curve), table, noisy_table)
    left = f"<div>{_confusion(run)}{_findings(run)}{page.note(together)}</div>"
    return page.section(title, _collapsed(run), page.pair(left, curve), table)


def _collapsed(run: Run) -> str:
    """A warning where a hospital's scores say that the model gives one answer."""
    found = [f"{', '.join(score.collapsed)} at {name}" for name, score in run.final.items() if score.collapsed]
    text = f"Nearly every patient gets the same answer, or the same probability, though the truth differs: {'; '.join(found)}."
    return page.banner("warning", "The model hardly tells patients apart.", text) if found else ""


def _noisy_calibration(run: Run) -> tuple[str, str]:
    """Figure and table of the pooled histogram; empty where there is none."""
    if not run.noisy or not (pooled := run.noisy.pooled):
        return "", ""
    points = [(p, e.value, n, (e.low, e.high)) for p, e, n in pooled.bins.values() if e.value is not None]
    error = "not known" if pooled.calibration_error is None else f"{pooled.calibration_error:.3f}"
    caption = f"All outputs of hospitals with noisy scores, pooled. Expected calibration error (ECE) {error}. {NOISY}"
    drawing = plots.calibration(
        [(p, o, n) for p, o, n, _ in points],
        errors=[interval for *_, interval in points],
        alt=f"Reliability curve, noisy, expected calibration error {error}",
    )
    rows = [(show(p), said(e), f"{n:,}") for p, e, n in pooled.bins.values()]
    table = page.table(["mean predicted", "observed rate (95 %)", "count, about"], rows, left=0)
    return page.figure(drawing, caption), page.details("Noisy calibration, numbers", table)


def _confusion(run: Run) -> str:
    name, values = run.labels.class_name, run.labels.class_values
    if not (counts := run.pooled(name)):
        return ""
    rows = []
    for value, row in zip(values, counts, strict=True):
        shares = [n / max(1, sum(row)) for n in row]
        rows.append((value, *(page.heat(s, f"{n} ({s:.0%})") for n, s in zip(row, shares, strict=True))))
    whose = "hospitals with exact scores" if run.noisy else "all hospitals"
    caption = f"{name}: studies of {whose} together (rows are the truth), and the share of each true class."
    return page.figure(page.table(["true", *(f"said {value}" for value in values)], rows), caption)


def _calibration(run: Run) -> tuple[str, str]:
    """Figure and table; empty where no scores have the agreed form."""
    if not (bins := run.bins):
        return "", ""
    ece = sum(abs(p - o) * n for p, o, n in bins) / sum(n for _, _, n in bins)
    whose = "hospitals with exact scores" if run.noisy else "all hospitals"
    svg = plots.calibration(bins, alt=f"Reliability curve, expected calibration error {ece:.3f}")
    caption = f"All outputs of {whose}. Above the diagonal: more often true than predicted. Expected calibration error"
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
    look = plots.marks(run.hospitals)
    marks = ((look[name].colour, look[name].glyph, name) for name in _exact_names(run))
    return page.legend(marks, "mean over hospitals, weighted by studies")
