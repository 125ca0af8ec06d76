"""One self-contained page about a run, for the clinician-researcher and the data protection officer.

RUN/config.json and RUN/run.jsonl in, RUN/report.html out: inline CSS and SVG, no script, nothing fetched, nothing but
what the run folder holds; the same folder gives the same bytes. Names, reasons and scores came from other parties: text
is escaped in one place (`_text`), numbers pass `_pick` and `_number`, and what has another form is left out.
"""

from __future__ import annotations

import html
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedmm.errors import REFUSALS
from fedmm.report import plots
from fedmm.report.record import REPORT_FILE, format_seconds, read_config, read_rounds
from fedmm.schema import MODALITIES

CHANCE = 0.5
MOST_FAILURES = 300  # guess: lines of the table of refusals that somebody reads
PLACES = ("data.hospitals", "federation.out")  # paths on the coordinator's disk say nothing about the training


def write_report(folder: Path) -> Path:
    """RUN/report.html from what the run folder holds so far. Raises: ConfigError if it is no run folder, or damaged."""
    run = _load(folder)
    parts = [
        part(run) for part in (_header, _cards, _scores, _epsilon, _modalities, _errors, _failures, _training, _limits)
    ]
    title = _text(f"fedmm run {run.config.get('run', '')}")
    meta = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    head = f"<head>{meta}<title>{title}</title><style>{plots.CSS}</style></head>"
    page = f'<!doctype html>\n<html lang="en">{head}<body><main>{"".join(parts)}</main></body></html>\n'
    target, draft = folder / REPORT_FILE, folder / f".{REPORT_FILE}.{os.getpid()}"
    draft.write_text(page, encoding="utf-8")
    os.replace(draft, target)
    return target


# --- the run, read with care ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """config: config.json.  rounds: records in order.  hospitals: all that took part.  private: everything was."""

    config: Mapping[str, Any]
    rounds: Sequence[Mapping[str, Any]]
    hospitals: Sequence[str]
    private: bool
    look: Mapping[str, plots.Mark]

    @property
    def planned(self) -> int:
        """Rounds of the whole run."""
        for source in (_pick(self.config, "plan", "rounds"), _pick(self.config, "settings", "federation.rounds")):
            if (count := _number(source)) is not None:
                return int(count)
        return int(_number(_pick(self.rounds[-1], "rounds")) or len(self.rounds)) if self.rounds else 0

    @property
    def scored(self) -> list[Mapping[str, Any]]:
        """Rounds of which there are scores."""
        return [record for record in self.rounds if any(isinstance(s, dict) for s in _dict(record, "scores").values())]

    @property
    def final(self) -> dict[str, Mapping[str, Any]]:
        """The last scores of the run by hospital; empty when there are none."""
        scores = _dict(self.scored[-1], "scores") if self.scored else {}
        return {name: scores[name] for name in self.hospitals if isinstance(scores.get(name), dict)}

    def mean(
        self, value: Callable[[Mapping[str, Any]], float | None], weight: Sequence[str] = ("studies",)
    ) -> float | None:
        """Of the final scores over hospitals, weighted by studies; hospitals where it is not defined do not count."""
        return _mean((value(s), _number(_pick(s, *weight))) for s in self.final.values())

    def spent(self) -> dict[str, tuple[int, float, float, float]]:
        """Round, epsilon, ceiling and delta by hospital, as its own ledger said last."""
        last = {}
        for record in self.rounds:
            for name, said in _dict(record, "epsilon").items():
                numbers = [_number(_pick(said, key)) for key in ("spent", "ceiling", "delta")]
                if None not in numbers:
                    last[name] = (int(record["round"]), *numbers)
        return {name: last[name] for name in self.hospitals if name in last}  # type: ignore[misc]


def _load(folder: Path) -> Run:
    config, rounds = read_config(folder), read_rounds(folder)
    listed = config.get("hospitals")
    names = [str(name) for name in listed] if isinstance(listed, list) else []
    seen = {str(n) for r in rounds for n in [*_list(r, "trained"), *_dict(r, "epsilon"), *_dict(r, "scores")]}
    hospitals = list(dict.fromkeys([*names, *sorted(seen)]))
    # Fails closed: a run counts as private only if its config and every one of its rounds say so.
    private = config.get("private") is True and all(record.get("private") is True for record in rounds)
    return Run(config, rounds, hospitals, private, plots.marks(hospitals))


def _pick(value: Any, *keys: str) -> Any:
    """value[a][b]…, None where a key is missing or a level is no object."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _dict(value: Mapping[str, Any], key: str) -> dict[str, Any]:
    found = value.get(key)
    return found if isinstance(found, dict) else {}


def _list(value: Mapping[str, Any], key: str) -> list[Any]:
    found = value.get(key)
    return found if isinstance(found, list) else []


def _number(value: Any) -> float | None:
    """A finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def _mean(pairs: Iterable[tuple[float | None, float | None]]) -> float | None:
    known = [(value, weight) for value, weight in pairs if value is not None and weight]
    total = sum(weight for _, weight in known)
    return sum(value * weight for value, weight in known) / total if known and total > 0 else None


def _getter(*keys: str) -> Callable[[Any], float | None]:
    return lambda value: _number(_pick(value, *keys))


# --- HTML -------------------------------------------------------------------------------------------------------------


def _text(value: Any) -> str:
    """For the page. Figures escape by themselves."""
    return html.escape(plots.visible(str(value)))


def _show(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]], *, left: int = 1, kind: str = "") -> str:
    """left: how many columns are text; the others are numbers, aligned at the right."""

    def line(row: Sequence[Any], tag: str) -> str:
        cells = (f"<{tag}{'' if i < left else ' class=n'}>{_text(cell)}</{tag}>" for i, cell in enumerate(row))
        return f"<tr>{''.join(cells)}</tr>"

    body = "".join(line(row, "td") for row in rows)
    return f'<div class="wide {kind}"><table><thead>{line(head, "th")}</thead><tbody>{body}</tbody></table></div>'


def _details(summary: str, table: str) -> str:
    return f"<details><summary>{_text(summary)}</summary>{table}</details>"


def _section(title: str, *parts: str) -> str:
    return f"<section><h2>{_text(title)}</h2>{''.join(parts)}</section>"


def _figure(svg: str, caption: str = "") -> str:
    return f"<figure>{svg}<figcaption>{_text(caption)}</figcaption></figure>"


def _pair(*figures: str, kind: str = "") -> str:
    return f'<div class="pair {kind}">{"".join(figures)}</div>'


def _note(text: str) -> str:
    return f"<p class=note>{_text(text)}</p>"


def _legend(run: Run) -> str:
    if len(run.hospitals) < 2:
        return ""
    if len(run.hospitals) > plots.NAMED:
        return _note(f"Each grey dot is one of {len(run.hospitals)} hospitals; the tables name them.")
    items = (
        f'<li><i style="color:{run.look[n].colour}">{run.look[n].glyph}</i> {_text(n)}</li>' for n in run.hospitals
    )
    return f"<ul class=legend>{''.join(items)}<li><i class=bar></i> mean over hospitals, weighted by studies</li></ul>"


NO_SCORES = "No scores are here: {}"


def _why_no_scores(run: Run) -> str:
    if not run.rounds:
        return NO_SCORES.format("no round is done yet.")
    if len(run.rounds) < run.planned:
        return NO_SCORES.format("no evaluation was due so far, or the policies of the hospitals keep scores at home.")
    return NO_SCORES.format(
        "the policies of the hospitals keep them at home. Each hospital can see its own: fedmm evaluate."
    )


# --- the page, from top to bottom -------------------------------------------------------------------------------------


def _header(run: Run) -> str:
    config, done = run.config, len(run.rounds)
    labels = _dict(config, "labels")
    predicts = (
        [f"{labels.get('class_name')} ({', '.join(map(str, _list(labels, 'class_values')))})"]
        if labels.get("class_name")
        else []
    )
    if findings := _list(labels, "findings"):
        predicts.append(("and the findings " if predicts else "the findings ") + ", ".join(map(str, findings)))
    state = f"{done} of {run.planned}" + ("" if done >= run.planned else " – unfinished: all below is the state so far")
    weights = _number(config.get("weights"))
    facts = {
        "Run": config.get("run", "not recorded"),
        "Started": str(config.get("started", "not recorded")).replace("T", " ", 1),
        "Software": f"fedmm {config.get('fedmm', '(version not recorded)')}"
        + (f", engine {config['engine']}" if "engine" in config else ""),
        "Predicts": " ".join(predicts) or "not recorded",
        "Hospitals": f"{len(run.hospitals)}: {', '.join(run.hospitals)}" if run.hospitals else "none",
        "Rounds": state,
        **({"Model": f"{weights:,.0f} weights"} if weights else {}),
    }
    if run.private:
        state = "Patient-level (epsilon, delta) differential privacy, epsilon shown per hospital."
        status = f"<p class=private><b>Private.</b> {state}</p>"
    else:
        state = "This run was trained without differential privacy. No epsilon holds for it; its weights may reveal"
        status = f"<p class=danger><b>NOT PRIVATE</b>{state} individual patients. For research data only.</p>"
    listed = "".join(f"<div><dt>{_text(key)}</dt><dd>{_text(value)}</dd></div>" for key, value in facts.items())
    return f"<header><h1>Federated training report</h1>{status}<dl>{listed}</dl></header>"


def _cards(run: Run) -> str:
    area, right = run.mean(_getter("mean_auroc")), run.mean(_getter("accuracy"))
    base = run.mean(_getter("majority"))
    spent = run.spent()
    if not run.private:
        privacy = ("none", "NOT PRIVATE: no epsilon holds for this run")
    elif spent:
        worst = max(spent, key=lambda name: spent[name][1])
        # rounded up: an upper bound stays one
        privacy = (
            f"{math.ceil(spent[worst][1] * 100 - 1e-6) / 100:.2f}",
            f"of at most {spent[worst][2]:g} at {worst}, delta {spent[worst][3]:g}",
        )
    else:
        privacy = ("–", "no hospital has trained yet")
    refused = sorted({str(f.get("hospital")) for f in _all_failures(run) if f.get("kind") == "refused"})
    other = sorted({str(f.get("hospital")) for f in _all_failures(run) if f.get("kind") != "refused"})
    seconds = sum(_number(record.get("seconds")) or 0 for record in run.rounds)
    rounds = max(1, len(run.rounds))
    up, down = (sum(_number(r.get(key)) or 0 for r in run.rounds) / rounds / 1e6 for key in ("bytes_up", "bytes_down"))
    after = (
        f"after round {run.scored[-1]['round']}, {len(run.final)} of {len(run.hospitals)} hospitals"
        if run.scored
        else "no scores here"
    )
    cards = [
        ("Mean AUROC", _show(area), f"0.5 is chance; {after}"),
        ("Accuracy", _show(right), f"always the most frequent answer: {_show(base)}"),
        ("Highest epsilon spent", *privacy),
        (
            "Hospitals that refused",
            str(len(refused)),
            _few(refused) + (f"; other failures at {_few(other)}" if other else ""),
        ),
        ("Sent per round", f"{up:.2f} MB", f"from all hospitals together; {down:.2f} MB to them"),
        (
            "Duration",
            format_seconds(seconds),
            f"{format_seconds(seconds / rounds)} a round, over {len(run.rounds)} rounds",
        ),
    ]
    listed = "".join(f"<div><dt>{_text(a)}</dt><dd><b>{_text(b)}</b>{_text(c)}</dd></div>" for a, b, c in cards)
    return f"<section><h2>In one look</h2><dl class=cards>{listed}</dl></section>"


def _few(names: Sequence[str]) -> str:
    shown = ", ".join(plots.short(name) for name in names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown or "none"


def _scores(run: Run) -> str:
    title = "Score by round and hospital"
    if not run.scored:
        return _section(title, _note(_why_no_scores(run)))
    table: dict[str, dict[int, float | None]] = {name: {} for name in run.hospitals}
    means: dict[int, float | None] = {}
    for record in run.scored:
        scores, number = _dict(record, "scores"), int(record["round"])
        for name in run.hospitals:
            table[name][number] = _number(_pick(scores.get(name), "mean_auroc"))
        means[number] = _mean((table[n][number], _number(_pick(scores.get(n), "studies"))) for n in run.hospitals)
    caption = "Mean AUROC on the held-back patients of each hospital. 1 is perfect, 0.5 is chance."
    if len(run.scored) > 1:
        main = _figure(_score_lines(run, table, means), caption)
    else:
        points = [plots.Row(n, v, {n: v}) for n in run.hospitals if (v := table[n][next(iter(means))]) is not None]
        mean = next(iter(means.values()))
        panel = plots.Panel(
            f"Round {next(iter(means))}, by hospital",
            "mean AUROC",
            [*points, plots.Row("mean", mean)],
            (CHANCE, "chance"),
        )
        alt = f"Mean AUROC by hospital, mean {_show(mean)}"
        main = _figure(plots.rows([panel], run.look, alt=alt, limits=_span([panel]), width=plots.LEFT), caption)
    head = ["hospital", *(f"round {number}" for number in means)]
    body = [[name, *(_show(table[name][number]) for number in means)] for name in run.hospitals]
    body.append(["mean, weighted by studies", *(_show(value) for value in means.values())])
    outputs, output_table = _by_output(run)
    return _section(
        title,
        _pair(main, outputs, kind="uneven"),
        _legend(run),
        _details("Mean AUROC by round, numbers", _table(head, body)),
        output_table,
    )


def _score_lines(run: Run, table: Mapping[str, Mapping[int, float | None]], means: Mapping[int, float | None]) -> str:
    series = []
    for name in run.hospitals:
        points = [(number, value) for number, value in table[name].items() if value is not None]
        named = len(run.hospitals) <= plots.NAMED
        label = f"{plots.short(name)} {points[-1][1]:.2f}" if points and named else ""
        series.append(plots.Line(label, points, run.look[name]))
    mean = [(number, value) for number, value in means.items() if value is not None]
    if len(run.hospitals) > 1:
        series.append(plots.Line(f"mean {mean[-1][1]:.2f}" if mean else "", mean))
    alt = (
        f"Mean AUROC by round, {len(run.hospitals)} hospitals; the mean ends at {_show(mean[-1][1] if mean else None)}"
    )
    return plots.lines(
        series, alt=alt, axis="mean AUROC", rounds=run.planned, levels=[(CHANCE, "chance 0.5")], span=(0.45, 1.0)
    )


def _by_output(run: Run) -> tuple[str, str]:
    """AUROC of each finding and class in the final round: figure and table."""
    names = [name for name in _outputs(run) if any(name in _dict(s, "auroc") for s in run.final.values())]
    rows, body = [], []
    for output in names:
        values = {n: v for n, s in run.final.items() if (v := _number(_pick(s, "auroc", output))) is not None}
        mean = run.mean(_getter("auroc", output))
        rows.append(plots.Row(output, mean, values))
        body.append([output, _show(mean), *(_show(values.get(name)) for name in run.final)])
    if not rows:
        return "", ""
    panel = plots.Panel(f"Round {run.scored[-1]['round']}, by what is predicted", "AUROC", rows, (CHANCE, "chance"))
    alt = "AUROC by output: " + ", ".join(f"{row.label} {_show(row.mean)}" for row in rows)
    svg = plots.rows([panel], run.look, alt=alt, limits=_span([panel]), width=plots.RIGHT)
    table = _table(["output", "mean", *run.final], body)
    return _figure(svg, "AUROC of each output; not defined at a hospital where only one value occurs."), _details(
        "AUROC by output and hospital, numbers", table
    )


def _outputs(run: Run) -> list[str]:
    labels = _dict(run.config, "labels")
    classes = (
        [f"{labels.get('class_name')}={value}" for value in _list(labels, "class_values")]
        if labels.get("class_name")
        else []
    )
    return [*map(str, _list(labels, "findings")), *classes]


def _span(panels: Sequence[plots.Panel]) -> tuple[float, float]:
    values = [
        v
        for p in panels
        for row in p.rows
        for v in [*row.values.values(), *([row.mean] if row.mean is not None else [])]
    ]
    return max(0.0, math.floor(min([0.42, *values]) * 20 - 0.4) / 20), 1.02


def _epsilon(run: Run) -> str:
    title, spent = "Epsilon by round and hospital", run.spent()
    if not run.private:
        return _section(title, _note("Not private: no epsilon holds for this run, so there is none to draw."))
    if not spent:
        return _section(title, _note("No hospital has trained yet, so nothing was spent by this run."))
    series: dict[str, list[tuple[float, float]]] = {name: [] for name in spent}
    for record in run.rounds:
        for name in spent:
            if (value := _number(_pick(record, "epsilon", name, "spent"))) is not None:
                series[name].append((int(record["round"]), value))
    graph, groups = _epsilon_lines(run, series)
    same = groups == 1 and len(spent) > 1
    caption = "What each hospital's own ledger says after each round, earlier runs included. Dashed: its ceiling."
    items = [(name, value, ceiling) for name, (_, value, ceiling, _) in spent.items() if ceiling > 0]
    bars = plots.budget(items, run.look, alt="Share of each ceiling spent, numbers in the table below")
    head = ["hospital", "last trained in round", "rounds trained", "epsilon spent", "ceiling", "left", "delta"]
    body = [
        (
            name,
            number,
            len(series[name]),
            f"{value:.6f}",
            f"{ceiling:g}",
            f"{max(0.0, ceiling - value):.6f}",
            f"{delta:g}",
        )
        for name, (number, value, ceiling, delta) in spent.items()
    ]
    by_round = _table(
        ["round", *spent],
        [(r["round"], *(_show(_number(_pick(r, "epsilon", n, "spent")), 6) for n in spent)) for r in run.rounds],
    )
    return _section(
        title,
        _note(f"All {len(spent)} hospitals spent the same in every round: one line stands for all.") if same else "",
        _pair(
            _figure(graph, caption), _figure(bars, "The rest is what later runs may still spend there."), kind="uneven"
        ),
        _table(head, body),
        _details("Epsilon by round, numbers", by_round),
    )


def _epsilon_lines(run: Run, series: Mapping[str, plots.Points]) -> tuple[str, int]:
    """The figure, and how many different lines it has: hospitals that spent alike share one."""
    spent = run.spent()
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, points in series.items():
        groups.setdefault(tuple((number, round(value, 6)) for number, value in points), []).append(name)
    ceilings: dict[float, list[str]] = {}
    for name, (_, _, ceiling, _) in spent.items():
        ceilings.setdefault(ceiling, []).append(name)
    drawn = [plots.Line(f"{_who(n, spent)} {p[-1][1]:.2f}", p, run.look[n[0]]) for p, n in groups.items()]
    levels = [(ceiling, f"ceiling {ceiling:g}: {_who(names, spent)}") for ceiling, names in sorted(ceilings.items())]
    if max(len(drawn), len(levels)) > plots.NAMED:
        drawn, levels = [replace(line, label="") for line in drawn], [(ceiling, "") for ceiling, _ in levels]
    worst = max(spent, key=lambda name: spent[name][1])
    alt = f"Epsilon by round; the highest is {spent[worst][1]:.2f} at {worst}, ceiling {spent[worst][2]:g}"
    graph = plots.lines(drawn, alt=alt, axis="epsilon", rounds=run.planned, levels=levels, span=(0, 0.1))
    return graph, len(groups)


def _who(names: Sequence[str], among: Mapping[str, Any]) -> str:
    if len(names) == 1:
        return plots.short(names[0], 16)
    return f"all {len(names)}" if len(names) == len(among) else f"{len(names)} hospitals"


def _modalities(run: Run) -> str:
    title = "Contribution of each modality"
    known = [m for m in MODALITIES if any(_pick(s, "by_modality", m) is not None for s in run.final.values())]
    if not known:
        return _section(title, _note(_why_no_scores(run)))
    places: list[tuple[str, tuple[str, ...], tuple[str, ...]]] = [("all that are present", (), ("studies",))]
    places += [(f"{m} only", ("by_modality", m, "only"), ("by_modality", m, "studies")) for m in known]
    places += [(f"without {m}", ("by_modality", m, "without"), ("studies",)) for m in known]
    panels, tables = [], []
    for key, name in (("mean_auroc", "Mean AUROC"), ("accuracy", "Accuracy")):
        rows = []
        for label, path, weight in places:
            get = _getter(*path, key)
            values = {n: v for n, s in run.final.items() if (v := get(s)) is not None}
            rows.append(plots.Row(label, run.mean(get, weight), values))
        base = run.mean(_getter("majority")) if key == "accuracy" else CHANCE
        panels.append(plots.Panel(name, "", rows, (base or 0.0, "chance" if base == CHANCE else "majority"), bars=True))
        body = [(row.label, _show(row.mean), *(_show(row.values.get(n)) for n in run.final)) for row in rows]
        tables.append(
            _details(f"{name} by modality and hospital, numbers", _table(["input", "mean", *run.final], body))
        )
    alt = "Mean AUROC by input: " + ", ".join(f"{row.label} {_show(row.mean)}" for row in panels[0].rows)
    svg = plots.rows(panels, run.look, alt=alt, limits=_span(panels), width=plots.WIDE)
    counts = ", ".join(
        f"{m} {run_total:,.0f}" for m in known if (run_total := _total(run, "by_modality", m, "studies")) is not None
    )
    caption = (
        f"Round {run.scored[-1]['round']}, the same model throughout. “only” rows are the studies that have that "
        f"modality ({counts} of {_total(run, 'studies'):,.0f}), seen with it alone, so these compare other studies; "
        "“without” rows are all studies with it hidden. A long step from “all” to “without”: the model leans on it."
    )
    return _section(title, _figure(svg, caption), _legend(run), *tables)


def _total(run: Run, *keys: str) -> float:
    return sum(_number(_pick(scores, *keys)) or 0 for scores in run.final.values())


def _errors(run: Run) -> str:
    title, labels = "What it gets wrong, and how sure it is", _dict(run.config, "labels")
    if not run.final:
        return _section(title, _note(_why_no_scores(run)))
    figures, tables = [], []
    values = [str(value) for value in _list(labels, "class_values")]
    if values and (counts := _pooled(run, str(labels.get("class_name")), values)):
        alt = f"Confusion of {labels['class_name']}, numbers in the table below"
        svg = plots.confusion([value for value in values], counts, alt=alt)
        figures.append(
            _figure(
                svg, f"{labels['class_name']}: studies of all hospitals together, and the share of each true class."
            )
        )
        rows = [(value, *counts[i]) for i, value in enumerate(values)]
        tables.append(_details("Confusion, numbers (rows are the truth)", _table(["true", *values], rows)))
    found = []
    for name in map(str, _list(labels, "findings")):
        if pair := _pooled(run, name, ["no", "yes"]):
            (tn, fp), (fn, tp) = pair
            area = run.mean(_getter("auroc", name))
            rates = [_show(right / total if total else None, 2) for right, total in ((tp, tp + fn), (tn, tn + fp))]
            found.append((name, tp, fn, fp, tn, *rates, _show(area, 2)))
    findings = ["finding", "found", "missed", "false alarm", "rightly no", "sensitivity", "specificity", "AUROC"]
    table = "<h3>Findings, at a probability of 0.5</h3>" + _table(findings, found) if found else ""
    figures += _calibration(run, tables)
    if len(figures) < 2 and table:
        figures, table = [f"<div>{table}</div>", *figures], ""
    together = "Counts are summed over hospitals: where these see different classes, telling them apart already scores."
    return _section(title, _pair(*figures), _note(together), table, *tables)


def _pooled(run: Run, name: str, values: Sequence[str]) -> list[list[int]] | None:
    """Counts of a confusion table summed over hospitals; tables of another form are left out."""
    total: list[list[int]] | None = None
    for scores in run.final.values():
        table = _pick(scores, "confusion", name)
        counts = _pick(table, "counts")
        if _pick(table, "values") != list(values) or not isinstance(counts, list) or len(counts) != len(values):
            continue
        if all(
            isinstance(row, list) and len(row) == len(values) and all(type(n) is int and n >= 0 for n in row)
            for row in counts
        ):
            total = (
                [[a + b for a, b in zip(*rows, strict=True)] for rows in zip(total or counts, counts, strict=True)]
                if total
                else counts
            )
    return total


def _calibration(run: Run, tables: list[str]) -> list[str]:
    """The figure, if there is one; its numbers go to `tables`. Bins of several hospitals are joined by their counts."""
    bins: dict[int, list[float]] = {}
    for scores in run.final.values():
        columns = [_pick(scores, "calibration", key) for key in ("predicted", "observed", "count")]
        if not all(isinstance(column, list) for column in columns):
            continue
        for b, entry in enumerate(zip(*columns, strict=False)):
            predicted, observed, count = map(_number, entry)
            if predicted is not None and observed is not None and count and count > 0 and 0 <= predicted <= 1:
                total = bins.setdefault(b, [0.0, 0.0, 0.0])
                total[:] = [total[0] + predicted * count, total[1] + observed * count, total[2] + count]
    if not bins:
        return []
    points = [(p / n, o / n, int(n)) for _, (p, o, n) in sorted(bins.items())]
    ece = sum(abs(p - o) * n for p, o, n in points) / sum(n for _, _, n in points)
    svg = plots.calibration(points, alt=f"Reliability curve, expected calibration error {ece:.3f}")
    tables.append(
        _details(
            "Calibration, numbers",
            _table(
                ["mean predicted", "observed rate", "count"], [(_show(p), _show(o), n) for p, o, n in points], left=0
            ),
        )
    )
    caption = (
        "All outputs of all hospitals. Above the diagonal: more often true than predicted. Expected calibration error"
    )
    return [_figure(svg, f"{caption} (ECE) {ece:.3f}.")]


def _all_failures(run: Run) -> list[dict[str, Any]]:
    return [
        {**f, "round": record["round"]}
        for record in run.rounds
        for f in _list(record, "failures")
        if isinstance(f, dict)
    ]


KINDS = {
    "refused": "its own decision",
    "failed": "its app failed",
    "invalid": "its answer was not usable",
    "silent": "no answer in time",
}


def _failures(run: Run) -> str:
    title, found = "Refusals and failures", _all_failures(run)
    if not found:
        return _section(
            title,
            _note("None: every hospital took part in every round so far." if run.rounds else "No round is done yet."),
        )
    spans: dict[tuple[str, str, str, str], list[list[int]]] = {}
    for failure in found:
        hospital, kind, code, reason = (str(failure.get(k, "")) for k in ("hospital", "kind", "code", "reason"))
        ranges, number = spans.setdefault((hospital, kind, code, reason), []), int(failure["round"])
        if ranges and number <= ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    lines = sorted((first, last, key) for key, ranges in spans.items() for first, last in ranges)
    rows = []
    for first, last, (hospital, kind, code, reason) in lines[:MOST_FAILURES]:
        error = REFUSALS.get(int(code)) if code.isdecimal() else None
        when = str(first) if first == last else f"{first} – {last}"
        said = f"{kind}: {KINDS[kind]}" if kind in KINDS else kind
        rows.append((when, hospital, said, f"{code} {error('').name if error else ''}", reason))
    more = _note(f"{len(lines) - MOST_FAILURES} more are in run.jsonl.") if len(lines) > MOST_FAILURES else ""
    note = _note(
        "The run goes on without the hospital in that round. A refusal is the hospital's right and costs it no epsilon."
    )
    return _section(
        title, note, _table(["round", "hospital", "kind", "code", "reason"], rows, left=5, kind="reasons"), more
    )


def _training(run: Run) -> str:
    sections: dict[str, list[tuple[str, Any]]] = {}
    for key, value in _dict(run.config, "settings").items():
        if key not in PLACES:
            sections.setdefault(key.partition(".")[0], []).append(
                (key, str(value).lower() if isinstance(value, bool) else value)
            )
    tables = "".join(_table([], rows, left=2) for rows in sections.values())
    plan = "<h3>Privacy plan</h3>" + _plan(run)
    releases = "<h3>What left each hospital</h3>" + _releases(run)
    return _section("How it was trained", plan, releases, f"<h3>Settings</h3><div class=settings>{tables}</div>")


def _plan(run: Run) -> str:
    plan = _dict(run.config, "plan")
    q, c, sigma, steps, rounds, epsilon, delta = (
        _number(plan.get(k))
        for k in ("sampling_rate", "max_grad_norm", "noise_multiplier", "steps_per_round", "rounds", "epsilon", "delta")
    )
    if q is None or steps is None or rounds is None:
        return _note("config.json holds no plan.")
    amount = f"{steps:g} steps a round, {rounds:g} rounds, {steps * rounds:g} steps in all, at each hospital."
    sampling = f"Sampling: each patient takes part in a step with probability q = {q:g}, independently (Poisson)."
    if not run.private:
        return _list_of("No noise was added and no epsilon holds.", sampling, amount)
    if None in (c, sigma, epsilon, delta):
        return _note("config.json holds no complete privacy plan.")
    return _list_of(
        f"Unit: the {plan.get('unit', 'patient')}. All studies of a patient are protected together.",
        "Adjacency: add or remove one patient, that is: one data set has all records of one patient more.",
        sampling,
        f"Clipping: what one patient contributes to a step is shortened to norm C = {c:g}.",
        f"Noise: Gaussian, standard deviation sigma x C, sigma = {sigma:.4g}, added inside the hospital.",
        amount,
        f"Cost: at most epsilon {epsilon:g} at delta {delta:g} per hospital for this run; earlier runs add to it.",
        "Against: everybody outside the hospital: the coordinator, other hospitals, whoever gets the model.",
    )


def _list_of(*items: str) -> str:
    return f"<ul>{''.join(f'<li>{_text(item)}</li>' for item in items)}</ul>"


def _releases(run: Run) -> str:
    sent = [n for n in run.hospitals if any(isinstance(_dict(r, "scores").get(n), dict) for r in run.scored)]
    scores = (
        f"left {len(sent)} of {len(run.hospitals)} hospitals after {len(run.scored)} rounds: {', '.join(sent)}"
        if sent
        else "stayed at home"
    )
    exact = (
        "NO. Exact test scores are not covered by epsilon; they are only possible under a research policy"
        if sent
        else "nothing left"
    )
    count = _pick(run.config, "settings", "federation.weights")
    declared = "the patient bound that site.toml declares" if count == "declared" else "the same for every hospital"
    weights = "yes: this is what epsilon pays for" if run.private else "NO. No noise was added"
    rows = [
        (
            "Model weights",
            "each round in which it trained" + (", after noise" if run.private else ", as trained"),
            weights,
        ),
        ("Its weight in the average", f"each round: {declared}", "needs none: public by agreement"),
        (
            "Ledger statement",
            "each round: epsilon, ceiling, delta, head of the ledger's chain, signature",
            "needs none: follows from public settings",
        ),
        ("Refusals", "a code and one sentence, where it refused", "needs none: holds no patient's value"),
        ("Test scores", scores, exact),
    ]
    return _table(["what", "when", "covered by epsilon?"], rows, left=3)


def _limits(run: Run) -> str:
    exact = "This page holds exact counts of held-back patients: handle it as research data." if run.final else ""
    items = [
        "Scores are on held-back patients of the same hospitals; another hospital, scanner or time may differ.",
        "Few held-back studies make wide margins: a difference of some hundredths may be chance.",
        "Epsilon is an upper bound per hospital, not a measured leak. For a patient seen in two hospitals they add up.",
        "Epsilon covers what left with noise. Exact scores, and earlier runs without privacy, are outside of it.",
        "Epsilon hides that a patient took part; what is true of patients in general can still be learnt.",
        exact,
        "Not a medical device: not validated for diagnosis, not for clinical decisions.",
    ]
    made = "Made from config.json and run.jsonl of the run folder. This page loads nothing and runs no script."
    return _section("What this does not show", _list_of(*filter(None, items))) + f"<footer>{made}</footer>"
