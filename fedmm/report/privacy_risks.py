"""The privacy report's blocks seven to twelve: what is not protected, what was measured, who does what, who signs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fedmm.report import page, plots, privacy_plots
from fedmm.report.page import escaped, show
from fedmm.report.spending import most_found
from fedmm.report.words import day, share

Document = Mapping[str, Any]
AUDIT = "Not measured. “fedmm audit HOSPITAL” measures it: planted records whose presence an attacker guesses, which gives a lower "
AUDIT += "bound on epsilon that must not pass the claim; --audit brings it in here."
STAYS = "Images, report texts, audio, labels and names stay in the hospital's folder. So does the number of patients, but for a "
STAYS += (
    "noisy count that was paid for, the public lower bound, and exact scores, if allowed: those say how many studies."
)
ATTACK = "Not measured. “fedmm attack” measures it on this run: who took part, which records belong together, what can be rebuilt."


# --- 7, 8 -------------------------------------------------------------------------------------------------------------


def not_protected(document: Document) -> str:
    bare = sum(entry["unprotected"] for entry in document["accounting"])
    measured = document["audit"] or document["attacks"] or document["attacks_by_hospital"]
    exact = any(score["kind"] == "exact" for score in document["utility"]["hospitals"])
    shown = measured or exact or document["utility"]["groups"]
    items = [
        f"Releases without epsilon: {bare or 'none'}, of those that the ledger counts. They add nothing to the numbers above and "
        "are not covered by them.",
        *(
            ["Blocks 9 and 10 show measurements on real patients of the hospital. They are exact, and no epsilon covers them: "
             "whoever passes this page on passes those on. Leave them out of what is published, or publish on purpose."]
            if shown
            else []
        ),
        "What is true of people in general. That smoking harms can be learnt from others too; this hides only who took part.",
        "What a hospital does outside of fedmm, and people who can read its files.",
        "When a message came, that a deadline passed, that a process ended, whether a folder passed its check.",
        "Earlier runs without privacy of the same patients, and models that a run started from.",
        "A patient who was in several hospitals: the epsilons of all of them add up, and no ledger knows the others.",
        "Rounding in training where patients are not isolated (block 5), and errors in the code. Proofs hold for the algorithm; "
        "that the code does what they say is measured: by fedmm's tests, and where there was an audit in block 9.",
        "Choices of a model, a threshold or an early end that people made by looking at the data themselves.",
    ]  # fmt: skip
    return page.section("7. What is not protected", page.bullets(items))


def post_processing(document: Document) -> str:
    plan, hospitals = document["plan"], len(document["run"]["hospitals"])
    free = [
        "Averaging over hospitals, momentum and Adam on the noisy gradient, averages over rounds, compression, the choice of the "
        "last round, predictions for any patient: functions of what has its noise already. They cost no epsilon, ever.",
        "Giving the same release again, for a message that was lost: the same bytes tell nothing new. The ledger has each time.",
    ]
    secure = (
        "Secure aggregation is not built: the coordinator sees each hospital's noisy update by itself, and epsilon holds against "
        "that. It would let the coordinator see the sum only. This report's epsilon does not rest on it and would stay. "
        + _less_noise(plan, hospitals)
    )
    return page.section(
        "8. What costs nothing more, and what secure aggregation would add",
        page.heading("Post-processing"),
        page.bullets(free),
        page.heading("Secure aggregation"),
        page.note(secure),
    )


def _less_noise(plan: Mapping[str, Any], hospitals: int) -> str:
    """With N hospitals alike that add sigma / sqrt(N) each, the sum has sigma."""
    if hospitals < 2 or not plan["noise_multiplier"]:
        return "With one hospital in the run it would change nothing."
    root, sigma = math.sqrt(hospitals), plan["noise_multiplier"]
    return (
        f"It could be used for accuracy: with {hospitals} hospitals alike the same epsilon would hold for the sum with "
        f"{root:.2f} times less noise (sigma {sigma / root:.4g} instead of {sigma:.4g} at each), as long as "
        "the hospitals do not join the coordinator: each that does takes its part of the noise away from the others."
    )


# --- 9 ----------------------------------------------------------------------------------------------------------------


def attacks(document: Document) -> str:
    audit = document["audit"]
    found = document["attacks_by_hospital"] or (
        {document["hospital"]: document["attacks"]} if document["attacks"] else {}
    )
    return page.section(
        "9. What attacks were seen to do",
        page.heading("Audit: the claim against a measurement"),
        _audit(audit) if audit else page.note(AUDIT),
        page.heading("Attacks on this run"),
        "".join(_attacked(document, name, each) for name, each in found.items()) if found else page.note(ATTACK),
    )


def _audit(audit: Mapping[str, Any]) -> str:
    claimed, low, right = audit["claimed_epsilon"], audit["lower_bound"], audit["correct"]
    fits = audit["verdict"] == "consistent"
    text = (
        f"With {100 * (1 - audit['significance']):g} % confidence the code's true epsilon is at least {low:.2f}: {right:,} "
        f"right of {audit['guesses']:,} guesses about {audit['canaries']:,} planted records; {claimed:.2f} is claimed at delta "
        f"{audit['delta']:g}. A lower bound is no proof: it may not pass the claim, and how far it stays below also tells how "
        "strong the test was."
    )
    verdict = page.banner("private" if fits else "danger", "Consistent." if fits else "BROKEN", text)
    bounds = [("all canaries", low)]
    if audit["fdp_lower_bound"] is not None:
        bounds.append(("the same, by trade-off curves", audit["fdp_lower_bound"]))
    bounds += [(f"{view['canary']}, seen by {view['seen_by']}", view["lower_bound"]) for view in audit["views"]]
    alt = f"Claimed epsilon {claimed:.2f}, highest lower bound {max(value for _, value in bounds):.2f}"
    drawing = page.figure(
        privacy_plots.claim(bounds, claimed=claimed, alt=alt),
        "Measured lower bounds on epsilon. None may pass the dashed line.",
    )
    rows = [
        (c["name"], "passed" if c["passed"] else "FAILED", c["measured"], c["expected"], _rare(c["false_alarm"]))
        for c in audit["checks"]
    ]
    table = page.table(["check", "", "measured", "expected", "false alarm rate"], rows, left=2) if rows else ""
    when = page.note(f"Measured {audit['date']} with fedmm {audit['fedmm']}." if audit["date"] else "")
    return verdict + drawing + table + when


def _rare(value: float | None) -> str:
    return "–" if value is None else f"{value:.2g}"


def _attacked(document: Document, name: str, found: Mapping[str, Any]) -> str:
    other = found["run"] not in ("", document["run"]["name"])
    warning = page.banner("warning", "Another run:", f"measured on {found['run']}, not on this one.") if other else ""
    how = "trained with privacy" if found["private"] else "trained WITHOUT privacy"
    control = found["control"]
    beside = " Beside it, in brackets, the same attack on a model trained without privacy." if control else ""
    text = f"{name}, on a model {how}, {found['date']}. 95 % intervals.{beside}"
    return (
        warning
        + page.note(text)
        + _membership(document, found, control)
        + _relinkage(found["relinkage"], control)
        + _inversion(found["inversion"], control)
    )


def _membership(document: Document, found: Mapping[str, Any], control: Mapping[str, Any] | None) -> str:
    if not (listed := found["membership"]):
        return ""
    open_ones = {(m["attack"], m["modality"]): m for m in (control or {"membership": []})["membership"]}
    rows = []
    for m in listed:
        other = open_ones.get((m["attack"], m["modality"]))
        tpr = [f"{share(t['value'])}{_range(t, per_cent=True)} at {share(t['false_alarm'])}" for t in m["tpr"]]
        beside = f"[{other['auc']['value']:.3f}]" if other else ""
        rows.append((m["attack"], m["modality"], f"{m['auc']['value']:.3f}{_range(m['auc'])}", beside, "; ".join(tpr)))
    head = [
        "attack",
        "sees",
        "AUC (0.5: guessing)",
        "without privacy",
        "participants found, at this share of false alarms",
    ]
    series = [
        (f"{m['attack']}, {m['modality']}", [(t["false_alarm"], t["value"], t["low"], t["high"]) for t in m["tpr"]])
        for m in listed
    ]
    series += [
        (f"{kind}, {what}, no privacy", [(t["false_alarm"], t["value"], None, None) for t in m["tpr"]])
        for (kind, what), m in open_ones.items()
        if what == "all"
    ]
    pairs = _pairs(document)
    limit = [(x, most_found(x, pairs)) for x in privacy_plots.alarms()]
    alt = "Participants found by share of false alarms, with the bound of epsilon and delta"
    drawing = privacy_plots.attack_curve(series, limit, alt=alt)
    caption = "What attacks found against what the best conceivable one could (black). Both axes are logarithmic; marks side by "
    caption += "side belong to the same share of false alarms."
    table = page.table(head, rows, left=5, kind="reasons")
    return (
        page.heading("Who took part")
        + _beyond(listed, pairs)
        + table
        + f"<div class=half>{page.figure(drawing, caption)}</div>"
    )


def _beyond(listed: Sequence[Mapping[str, Any]], pairs: Sequence[tuple[float, float]]) -> str:
    """A warning where an attack did better than epsilon and delta allow."""
    over = [
        f"{m['attack']}, {m['modality']} at {share(t['false_alarm'])}"
        for m in listed
        for t in m["tpr"]
        if t["low"] is not None and t["low"] > most_found(t["false_alarm"], pairs)
    ]
    text = f"{'; '.join(over)}: even the lower end of the interval is above it. By chance that happens once in forty; look into it."
    return page.banner("danger", "Above the bound", text) if over else ""


def _pairs(document: Document) -> list[tuple[float, float]]:
    own = [(document["odds"]["epsilon"], document["odds"]["delta"])]
    return own + [(p["epsilon"], p["delta"]) for p in (document["ledger"] or {"profile": []})["profile"]]


def _relinkage(listed: Sequence[Mapping[str, Any]], control: Mapping[str, Any] | None) -> str:
    if not listed:
        return ""
    open_ones = {(r["from"], r["to"]): r for r in (control or {"relinkage": []})["relinkage"]}
    rows = []
    for r in listed:
        other = open_ones.get((r["from"], r["to"]))
        cells = [
            f"{share(r[k]['value'])}{_range(r[k], per_cent=True)}, chance about {share(r[f'chance_{k}'])}" for k in TOPS
        ]
        beside = ", ".join(share(other[k]["value"]) for k in TOPS) if other else ""
        rows.append((f"{r['from']} to {r['to']}", *cells, f"[{beside}]" if beside else ""))
    head = ["which belongs to which", "right at first", "among the first five", "without privacy"]
    return page.heading("Records of one patient put together again") + page.table(head, rows, left=4)


TOPS = ("top1", "top5")


def _inversion(listed: Sequence[Mapping[str, Any]], control: Mapping[str, Any] | None) -> str:
    if not listed:
        return ""
    open_ones = {i["what"]: i for i in (control or {"inversion": []})["inversion"]}
    rows = [
        (
            i["what"],
            f"{i['value']:.3g}{_range(i)}",
            "–" if i["baseline"] is None else f"{i['baseline']:.3g}",
            f"[{open_ones[i['what']]['value']:.3g}]" if i["what"] in open_ones else "",
        )
        for i in listed
    ]
    head = ["what was rebuilt from an update", "found", "a guess without it", "without privacy"]
    return page.heading("Records rebuilt") + page.table(head, rows, left=4)


def _range(e: Mapping[str, float | None], *, per_cent: bool = False) -> str:
    low, high = e["low"], e["high"]
    if low is None or high is None:
        return ""
    return f" ({share(low)} to {share(high)})" if per_cent else f" ({low:.3g} to {high:.3g})"


# --- 10 ---------------------------------------------------------------------------------------------------------------


def cost(document: Document) -> str:
    found = document["utility"]
    title = "10. What privacy costs in accuracy"
    if not found["hospitals"] and not found["groups"]:
        home = f" Scores are kept at home by policy: {', '.join(found['withheld'])}." if found["withheld"] else ""
        text = f"No scores left a hospital in this run.{home} “fedmm evaluate RUN HOSPITAL --format json” measures them at home."
        return page.section(title, page.note(text), _groups(document))
    return page.section(title, _by_hospital(found), _by_subset(found), _groups(document))


def _by_hospital(found: Mapping[str, Any]) -> str:
    other = {s["hospital"]: s for s in (found["compared_with"] or {"hospitals": []})["hospitals"]}
    rows = []
    for score in found["hospitals"]:
        beside = other.get(score["hospital"])
        cells = [_estimate(score["mean_auroc"]), _estimate(score["accuracy"]), show(score["majority"])]
        if found["compared_with"]:
            cells += [_estimate(beside["mean_auroc"]) if beside else "–", _less(score, beside)]
        rows.append((score["hospital"], score["kind"], *cells))
    head = ["hospital", "scores", "mean AUROC", "accuracy", "most frequent answer"]
    head += ["AUROC without privacy", "difference"] if found["compared_with"] else []
    text = "What the same training gives without privacy was not measured: --compare OPEN_RUN puts it beside these."
    if found["compared_with"]:
        text = f"Without privacy: run {found['compared_with']['run']}. That the two differ in nothing else is not checked here."
    return page.table(head, rows, left=2) + page.note(text)


def _less(score: Mapping[str, Any], other: Mapping[str, Any] | None) -> str:
    here, there = score["mean_auroc"]["value"], other["mean_auroc"]["value"] if other else None
    return "–" if here is None or there is None else f"{here - there:+.3f}"


def _estimate(e: Mapping[str, float | None]) -> str:
    if e["low"] is None or e["high"] is None:
        return show(e["value"])
    return f"{show(e['value']) if e['value'] is not None else 'not known'} ({e['low']:.2f} to {e['high']:.2f})"


def _by_subset(found: Mapping[str, Any]) -> str:
    names = list(dict.fromkeys(part["given"] for s in found["hospitals"] for part in s["subsets"]))
    if not names:
        return page.note("By subset of modalities: not in noisy scores.")
    scored = [s for s in found["hospitals"] if s["subsets"]]
    areas = [{part["given"]: part["mean_auroc"] for part in s["subsets"]} for s in scored]
    rows = [(name.replace("+", " + "), *(show(area.get(name)) for area in areas)) for name in names]
    table = page.table(["given only", *(s["hospital"] for s in scored)], rows)
    return page.heading("By subset of modalities, mean AUROC") + table


def _groups(document: Document) -> str:
    groups = document["utility"]["groups"]
    if not groups:
        whose = document["hospital"] or "HOSPITAL"
        text = "By sex, age and other groups: not measured here. “fedmm evaluate RUN HOSPITAL --format json” measures it with "
        return page.note(f"{text}intervals; put what it says into the run folder as evaluate-{whose}.json.")
    spans = [
        plots.Span(
            f"{g['kind']} {g['group']}", g["mean_auroc"]["value"], g["mean_auroc"]["low"], g["mean_auroc"]["high"]
        )
        for g in groups
        if None not in g["mean_auroc"].values() and g["hospital"] == groups[0]["hospital"]
    ]
    rows = [
        (g["hospital"], g["kind"], g["group"], _estimate(g["mean_auroc"]) if g["accuracy"] is not None else "too few to tell",
         show(g["accuracy"]))
        for g in groups
    ]  # fmt: skip
    alt = "Mean AUROC by group: " + ", ".join(f"{s.label} {show(s.value, 2)}" for s in spans)
    drawing = plots.intervals(spans, title="By group", axis="mean AUROC", alt=alt, width=plots.LEFT) if spans else ""
    caption = "95 % intervals, by patient. Overlapping bars do not show a difference."
    figure = f"<div class=half>{page.figure(drawing, caption)}</div>" if drawing else ""
    table = page.table(["hospital", "by", "group", "mean AUROC", "accuracy"], rows, left=3)
    return page.heading("By group of patients") + figure + table


# --- 11, 12 -----------------------------------------------------------------------------------------------------------


def flows(document: Document) -> str:
    here = document["hospital"] or "each hospital"
    roles = [
        (
            here,
            "controller of its patients' data",
            "decides in site.toml what may leave, signs the ledger, may refuse at any time",
        ),
        (
            "coordinator",
            "recipient; whether processor or joint controller: ________________",
            "plans, averages, keeps the run folder",
        ),
        ("other hospitals", "recipients of the joint model", "get the weights of each round"),
        ("users of the model", "recipients of the model", "after the run"),
        ("patients", "data subjects", "nothing of a single one leaves without noise under a private plan"),
    ]
    if document["ledger"]:
        said = {"yes": "yes: charged", "no": "NO", "needs none": "needs none: nothing of a patient in it"}
        sent = document["ledger"]["sent"]
        rows = [(s["what"], "coordinator", said[s["covered"]], f"{s['messages']:,}", f"{s['bytes']:,}") for s in sent]
        head, left = ["what left", "to", "covered by epsilon", "messages", "bytes"], 3
        text = "From this hospital's own ledger: every message, written down before it left, all runs together."
    else:
        rows = [
            (a["hospital"], a["what"], "coordinator", f"{a['messages']:,}", f"{a['bytes']:,}")
            for a in document["run"]["arrived"]
        ]
        head, left = ["from", "what arrived", "at", "messages", "bytes"], 3
        text = "What reached the coordinator in this run. Each hospital's ledger has what left it."
    return page.section(
        "11. Who gets what, and in which role",
        page.table(["who", "role", "does"], roles, left=3),
        page.note(STAYS),
        page.table(head, rows, left=left) if rows else page.note("Nothing has left so far."),
        page.note(text),
    )


def residual(document: Document) -> str:
    made = document["made"]
    epsilon, ceiling = document["odds"]["epsilon"], max(entry["ceiling"] for entry in document["accounting"])
    risks = [
        f"At epsilon {epsilon:.2f} an attacker who is right in the worst case is limited by block 1 only; up to the ceiling "
        f"of {ceiling:g} this may grow without anybody being asked again.",
        f"delta {document['odds']['delta']:g}: the chance that a patient is failed, counted as if everything were told then.",
        *(["No audit of the code is in this report."] if not document["audit"] else []),
        *(
            ["No attack on this run is in this report."]
            if not (document["attacks"] or document["attacks_by_hospital"])
            else []
        ),
        "A stolen ledger key can sign a false report until it is rotated: compare the fingerprint, keep ledger heads elsewhere.",
        "The software that the hospital runs is trusted: its version is in every row of the ledger, nobody outside can measure it.",
        "Research software, not a medical device.",
    ]
    lines = ["Name and function of the data protection officer", "Decision, conditions", "Place, date", "Signature"]
    signs = "".join(f"<div><span></span>{escaped(line)}</div>" for line in lines)
    text = f"Made {day(made['at'])}. Holds until {made['expires']}, or until the ledger was charged again: then ask for a new one."
    signed = (
        "The JSON and this page are signed with the key of the hospital's ledger (Ed25519)."
        if document["ledger"]
        else "Not signed by any key: made from the coordinator's records alone."
    )
    return page.section(
        "12. Residual risks, signature, expiry",
        page.bullets(risks),
        page.note(f"{text} {signed}"),
        f"<div class=sign>{signs}</div>",
    )
