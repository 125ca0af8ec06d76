"""The privacy report's blocks seven to twelve but nine: what is not protected, what it costs, who does what, who signs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fedmm.report import page, plots
from fedmm.report.page import escaped, show
from fedmm.report.words import day

Document = Mapping[str, Any]
STAYS = "Images, report texts, audio, labels and names stay in the hospital's folder. The number of patients is not stated, but "
STAYS += "for a noisy count that was paid for and the public lower bound. Shares of real patients in blocks 9 and 10, where they "
STAYS += (
    "are filled, are rounded: they narrow it down. Exact scores, if allowed, say how many studies, to the coordinator."
)


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
            ["Blocks 9 and 10 show measurements on real patients of the hospital. They have no noise, and no epsilon covers "
             "them: rounded as they are, they narrow down how many patients there are, and whoever passes this page on passes "
             "those on. Leave them out of what is published, or publish on purpose."]
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
        cells = [_estimate(score["mean_auroc"]), _estimate(score["accuracy"]), show(score["majority"], 2)]
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
    return "–" if here is None or there is None else f"{here - there:+.2f}"


def _estimate(e: Mapping[str, float | None]) -> str:
    if e["low"] is None or e["high"] is None:
        return show(e["value"], 2)
    return f"{show(e['value'], 2) if e['value'] is not None else 'not known'} ({e['low']:.2f} to {e['high']:.2f})"


def _by_subset(found: Mapping[str, Any]) -> str:
    names = list(dict.fromkeys(part["given"] for s in found["hospitals"] for part in s["subsets"]))
    if not names:
        return page.note("By subset of modalities: not in noisy scores.")
    scored = [s for s in found["hospitals"] if s["subsets"]]
    areas = [{part["given"]: part["mean_auroc"] for part in s["subsets"]} for s in scored]
    rows = [(name.replace("+", " + "), *(show(area.get(name), 2) for area in areas)) for name in names]
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
         show(g["accuracy"], 2))
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
