"""The privacy report's ninth block: what an audit and attacks were seen to do, beside what is claimed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedmm.report import page, privacy_plots
from fedmm.report.audited import CONSISTENT
from fedmm.report.spending import most_found
from fedmm.report.words import share

Document = Mapping[str, Any]
Pairs = Sequence[tuple[float, float]]  # epsilon and delta that hold together
AUDIT = "Not measured. “fedmm audit HOSPITAL --out AUDIT” measures it: planted records whose presence an attacker guesses, which "
AUDIT += "gives a lower bound on epsilon that must not pass the claim; --audit AUDIT brings it in here."
ATTACK = "Not measured. “fedmm attack RUN HOSPITAL” measures it on this run: who took part, which records belong together, what "
ATTACK += "can be rebuilt."
TOPS = ("top1", "top5")
UNKNOWN = "cannot be told"


def attacks(document: Document) -> str:
    audit = document["audit"]
    found = document["attacks_by_hospital"] or (
        {document["hospital"]: document["attacks"]} if document["attacks"] else {}
    )
    return page.section(
        "9. What attacks were seen to do",
        page.heading("Audit: the claim against a measurement"),
        _audit(document, audit) if audit else page.note(AUDIT),
        page.heading("Attacks on this run"),
        "".join(_attacked(document, name, each) for name, each in found.items()) if found else page.note(ATTACK),
    )


# --- the audit --------------------------------------------------------------------------------------------------------


def _audit(document: Document, audit: Mapping[str, Any]) -> str:
    claimed, low = audit["claimed_epsilon"], audit["lower_bound"]
    fits = audit["verdict"] == CONSISTENT
    text = (
        f"With {100 * (1 - audit['significance']):g} % confidence the code's true epsilon is at least {low:.2f}{_guessed(audit)}; "
        f"{claimed:.2f} is claimed at delta {audit['delta']:g}. A lower bound is no proof: it may not pass the claim, and how far "
        "it stays below also tells how strong the test was."
    )
    verdict = page.banner("private" if fits else "danger", "Consistent." if fits else "BROKEN", text)
    bounds = [(f"{view['canary']}, seen by {_who(view['seen_by'])}", view["lower_bound"]) for view in audit["views"]]
    alt = f"Claimed epsilon {claimed:.2f}, highest lower bound {low:.2f}"
    caption = "Lower bounds on epsilon, by kind of planted record and by who guesses; all of them hold together. None may pass "
    caption += "the dashed line, the claim."
    rows = [
        (c["name"], "passed" if c["passed"] else "FAILED", c["measured"], c["expected"], _rare(c["false_alarm"]))
        for c in audit["checks"]
    ]
    return (
        verdict
        + _elsewhere(document, audit)
        + page.note(_own_run(audit))
        + page.figure(privacy_plots.claim(bounds, claimed=claimed, alt=alt), caption)
        + page.table(["check", "", "measured", "expected", "false alarm rate"], rows, left=2)
    )


def _guessed(audit: Mapping[str, Any]) -> str:
    """Where it may be said: what was guessed right, by whom."""
    by = f"{_who(audit['seen_by'])}, about planted records of kind “{audit['canary']}”"
    if audit["correct"] is None:
        return f" (guesses of {by})"
    return f": {audit['correct']:,} of {audit['guesses']:,} guesses right, of {by}, {audit['canaries']:,} of them"


def _who(seen_by: str) -> str:
    """The coordinator, of “the coordinator, from the hospital's updates”."""
    return seen_by.partition(",")[0]


def _elsewhere(document: Document, audit: Mapping[str, Any]) -> str:
    """A warning where the audit is not one of this hospital and this version."""
    here = [document["hospital"]] if document["hospital"] else document["run"]["hospitals"]
    version, shown = document["made"]["by"].removeprefix("fedmm "), ""
    if audit["hospital"] not in here:
        shown += page.banner("warning", "Another hospital:", f"audited with the policy of {audit['hospital']}.")
    if audit["fedmm"] != version:
        text = f"the audit is of fedmm {audit['fedmm'] or 'of no known version'}, this report of {version}: what was audited is "
        shown += page.banner("warning", "Another version:", f"{text}not the code that is installed here.")
    return shown


def _own_run(audit: Mapping[str, Any]) -> str:
    epsilon, delta = audit["claimed_epsilon"], audit["delta"]
    whom = "patients of the hospital, which its policy allows," if audit["real_patients"] else "invented patients"
    curve = f"Supposing a Gaussian trade-off curve, which is not part of the verdict: at least {audit['fdp_lower_bound']:.2f}. "
    return (
        f"Epsilon {epsilon:g} at delta {delta:g} is the claim of the audit's own run, on copies with ledgers of their own. It is "
        f"not this report's epsilon: what was measured is the code, not the ledger of block 3. It trained on {whom} and planted "
        f"records, at {audit['hospital']}. {curve}Verdict and bounds were computed again from the counts. Measured "
        f"{audit['date']} with fedmm {audit['fedmm']}; settings SHA-256 {audit['settings_sha256'][:16]}…"
    )


def _rare(value: float | None) -> str:
    return "–" if value is None else f"{value:.2g}"


# --- attacks ----------------------------------------------------------------------------------------------------------


def _attacked(document: Document, name: str, found: Mapping[str, Any]) -> str:
    other = found["run"] not in ("", document["run"]["name"])
    warning = page.banner("warning", "Another run:", f"measured on {found['run']}, not on this one.") if other else ""
    how = "trained with privacy" if found["private"] else "trained WITHOUT privacy: no epsilon bounds what is found"
    control = found["control"]
    beside = " Beside it, in brackets, the same attack on a model trained without privacy." if control else ""
    text = (
        f"{name}, on a model {how}, {found['date']}. 95 % intervals. Shares of patients are rounded, the ends of their intervals "
        f"outward: they narrow the number of patients down and do not give it.{beside}"
    )
    return (
        warning
        + page.note(text)
        + _membership(_pairs(document) if found["private"] else [], found["membership"], control)
        + _relinkage(found["relinkage"], control)
        + _inversion(found["inversion"], control)
    )


def _pairs(document: Document) -> Pairs:
    own = [(document["odds"]["epsilon"], document["odds"]["delta"])]
    return own + [(p["epsilon"], p["delta"]) for p in (document["ledger"] or {"profile": []})["profile"]]


def _membership(pairs: Pairs, listed: Sequence[Mapping[str, Any]], control: Mapping[str, Any] | None) -> str:
    """pairs: that bound the attack; none for a model without privacy."""
    if not listed:
        return ""
    open_ones = {(m["attack"], m["modality"]): m for m in (control or {"membership": []})["membership"]}
    rows = []
    for m in listed:
        other = open_ones.get((m["attack"], m["modality"]))
        tpr = [f"{_share(t)} at {share(t['false_alarm'])}" for t in m["tpr"] if t["value"] is not None]
        if unknown := [share(t["false_alarm"]) for t in m["tpr"] if t["value"] is None]:
            tpr.append(f"{UNKNOWN} at {', '.join(unknown)}")
        beside = f"[{_figure(other['auc'])}]" if other else ""
        rows.append((m["attack"], m["modality"], _figure(m["auc"]) + _range(m["auc"]), beside, "; ".join(tpr)))
    head = ["attack", "sees", "AUC (0.5: guessing)", "without privacy"]
    head.append("participants found, at this share of false alarms")
    table = page.table(head, rows, left=5, kind="reasons")
    return page.heading("Who took part") + _beyond(listed, pairs) + table + _curves(listed, open_ones, pairs)


def _curves(
    listed: Sequence[Mapping[str, Any]], open_ones: Mapping[tuple[str, str], Mapping[str, Any]], pairs: Pairs
) -> str:
    """The figure, of what can be told; none where nothing can."""
    marks = {f"{m['attack']}, {m['modality']}": _marks(m["tpr"]) for m in listed}
    marks |= {
        f"{kind}, {what}, no privacy": [(x, y, None, None) for x, y, *_ in _marks(m["tpr"])]
        for (kind, what), m in open_ones.items()
        if what == "all"
    }
    series = [(name, points) for name, points in marks.items() if points]
    if not series:
        return page.note("No figure: there are too few patients for any of these shares.")
    limit = [(x, most_found(x, pairs)) for x in privacy_plots.alarms()] if pairs else []
    alt = "Participants found by share of false alarms" + (", with the bound of epsilon and delta" if pairs else "")
    caption = "What attacks found" + (" against what the best conceivable one could (black)" if pairs else "")
    caption += (
        ". Both axes are logarithmic; marks side by side belong to the same share of false alarms. They are rounded: "
    )
    caption += (
        "where a line from a mark reaches below the bound, it was not shown to be passed."
        if pairs
        else "see the table."
    )
    drawing = privacy_plots.attack_curve(series, limit, alt=alt)
    return f"<div class=half>{page.figure(drawing, caption)}</div>"


def _marks(tpr: Sequence[Mapping[str, Any]]) -> list[tuple[float, float, float | None, float | None]]:
    return [(t["false_alarm"], t["value"], t["low"], t["high"]) for t in tpr if t["value"] is not None]


def _beyond(listed: Sequence[Mapping[str, Any]], pairs: Pairs) -> str:
    """A warning where an attack did better than epsilon and delta allow."""
    told = [(m, t) for m in listed for t in m["tpr"] if t["low"] is not None]
    over = [
        f"{m['attack']}, {m['modality']} at {share(t['false_alarm'])}"
        for m, t in told
        if pairs and t["low"] > most_found(t["false_alarm"], pairs)
    ]
    text = (
        f"{'; '.join(over)}: even the lower end of the interval is above it. Of {len(told)} comparisons each comes out so by "
        f"chance at most about once in forty, while the bound holds: all together up to {len(told) / 40:.1f} on average, more "
        "often where few held-back patients set the share of false alarms. Measure it again, and look into what stays."
    )
    return page.banner("danger", "Above the bound", text) if over else ""


def _relinkage(listed: Sequence[Mapping[str, Any]], control: Mapping[str, Any] | None) -> str:
    if not listed:
        return ""
    open_ones = {(r["from"], r["to"]): r for r in (control or {"relinkage": []})["relinkage"]}
    rows = []
    for r in listed:
        other = open_ones.get((r["from"], r["to"]))
        cells = [f"{_share(r[k])}{_by_chance(r[f'chance_{k}'])}" for k in TOPS]
        beside = ", ".join(_share({**other[k], "low": None}) for k in TOPS) if other else ""
        rows.append((f"{r['from']} to {r['to']}", *cells, f"[{beside}]" if beside else ""))
    head = ["which belongs to which", "right at first", "among the first five", "without privacy"]
    return page.heading("Records of one patient put together again") + page.table(head, rows, left=4)


def _by_chance(chance: float | None) -> str:
    return "" if chance is None else f", chance at most {share(chance)}"


def _inversion(listed: Sequence[Mapping[str, Any]], control: Mapping[str, Any] | None) -> str:
    if not listed:
        return ""
    open_ones = {i["what"]: i for i in (control or {"inversion": []})["inversion"]}
    rows = []
    for i in listed:
        if i["not_applicable"]:
            rows.append((i["what"], f"not applicable: {i['not_applicable']}", "–", ""))
            continue
        other = open_ones.get(i["what"])
        guess = "–" if i["baseline"] is None else f"{i['baseline']:.3g}"
        beside = f"[{_figure(other)}]" if other and not other["not_applicable"] else ""
        rows.append((i["what"], _figure(i) + _range(i), guess, beside))
    head = ["what was rebuilt from an update", "found", "a guess without it", "without privacy"]
    return page.heading("Records rebuilt") + page.table(head, rows, left=4)


def _figure(e: Mapping[str, Any]) -> str:
    """0.52, or why it cannot be told."""
    return _unknown(e) if e["value"] is None else f"{e['value']:.2f}"


def _share(e: Mapping[str, Any]) -> str:
    """50 % (40 % to 70 %), or why it cannot be told."""
    if e["value"] is None:
        return _unknown(e)
    ends = "" if e["low"] is None or e["high"] is None else f" ({share(e['low'])} to {share(e['high'])})"
    return f"{share(e['value'])}{ends}"


def _unknown(e: Mapping[str, Any]) -> str:
    return f"{UNKNOWN}: {e['reason']}" if e["reason"] else UNKNOWN


def _range(e: Mapping[str, float | None]) -> str:
    low, high = e["low"], e["high"]
    return "" if low is None or high is None else f" ({low:.2f} to {high:.2f})"
