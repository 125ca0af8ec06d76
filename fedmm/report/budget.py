"""The page's sections about privacy: what was promised, what each ledger says, what left each hospital."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from fedmm.errors import REFUSALS
from fedmm.report import page, plots
from fedmm.report.reading import EXACT, HELLO, HISTOGRAM, UPDATE, WITHHELD, Arrived, Run, Statement

OPEN_TABLE = 6  # guess: more hospitals than this, and what left each one is folded up
RECORD = (
    "A patient with several records is protected less: each ledger charges the whole patient's cost, and the epsilon shown "
    "per hospital is the patient's."
)


def promise(run: Run) -> str:
    if run.private and run.plan.unit == "record":
        level = f"Differential privacy of single records: epsilon {run.plan.epsilon:g}, delta {run.plan.delta:g}."
        status = page.banner("warning", "RECORD LEVEL", f"{level} {RECORD}")
    elif run.private:
        level = f"{run.plan.unit.capitalize()}-level (epsilon, delta) differential privacy"
        status = page.banner("private", "Private.", f"{level}, epsilon shown per hospital.")
    else:
        state = "This run was trained without differential privacy. No epsilon holds for it; its weights may reveal"
        status = page.banner("danger", "NOT PRIVATE", f"{state} individual patients. For research data only.")
    if not (open_to := run.unprotected):
        return status
    where = ", ".join(f"{name} ({count})" for name, count in open_to.items())
    total = sum(open_to.values())
    return status + page.banner(
        "warning",
        f"{total} release{'s' if total > 1 else ''} at these hospitals",
        "(exact test scores or runs without privacy, allowed by their research policy) are not covered by any epsilon: "
        f"{where}. Counted by each ledger since it began, earlier runs included.",
    )


def highest_epsilon(run: Run) -> tuple[str, str]:
    if not run.private:
        return "none", "NOT PRIVATE: no epsilon holds for this run"
    if not run.statements:
        return "–", "no hospital has trained yet"
    name, said = max(run.statements.items(), key=lambda item: item[1].spent)
    spent = math.ceil(said.spent * 100 - 1e-6) / 100  # rounded up: an upper bound stays one
    return f"{spent:.2f}", f"of at most {said.ceiling:g} at {name}, delta {said.delta:g}; earlier runs there included"


def epsilon(run: Run) -> str:
    title, last = "Epsilon by round and hospital", run.statements
    if not last:
        return page.section(title, page.note("No hospital has trained yet, so nothing was spent by this run."))
    if not run.private:
        text = "Not private: no epsilon holds for this run, so there is none to draw. What each ledger said last:"
        heads = [(name, _head(said), said.round, said.unprotected) for name, said in last.items()]
        head = ["hospital", "ledger head", "stated in round", "releases without epsilon"]
        return page.section(title, page.note(text), page.table(head, heads, left=2), _chain(run))
    spent = {n: [(r.number, r.statements[n].spent) for r in run.rounds if n in r.statements] for n in last}
    graph, groups = _epsilon_lines(run, spent)
    same = f"All {len(last)} hospitals spent the same in every round: one line stands for all."
    caption = "What each hospital's own ledger says after each round, scores of that round and earlier runs included. "
    caption += "Dashed: its ceiling."
    rows = [
        (r.number, *(f"{r.statements[n].spent:.6f}" if n in r.statements else "–" for n in last)) for r in run.rounds
    ]
    return page.section(
        title,
        page.note(same) if groups == 1 and len(last) > 1 else "",
        page.figure(graph, caption),
        _statements(run),
        page.note(
            "Epsilon spent by this run alone is not in the records: a ledger counts all that ever left under it, earlier "
            "runs too, and epsilons cannot be subtracted. The plan holds this run to at most "
            f"{run.plan.epsilon:g} at delta {run.plan.delta:g}{' per record' if run.plan.unit == 'record' else ''}."
        ),
        page.details("Epsilon by round, numbers", page.table(["round", *last], rows)),
        _chain(run),
    )


def _chain(run: Run) -> str:
    """All that is needed to check each ledger's head without its hospital."""
    rows = [(name, said.sequence, said.hash, said.signature, said.key) for name, said in run.statements.items()]
    text = (
        "Ed25519 over the hash of the ledger's last row when it was stated; the coordinator checked it on arrival. At the "
        "hospital, fedmm ledger verify HOSPITAL --against RUN compares every statement of this run with the ledger."
    )
    head = ["hospital", "row", "hash", "signature", "public key"]
    table = page.table(head, rows, left=5, kind="chain")
    return page.details("Ledger heads, signatures and public keys", page.note(text) + table)


def _statements(run: Run) -> str:
    head = ["hospital", "ledger head", "epsilon spent", "ceiling", "left", "delta", "releases without epsilon"]
    head += ["rounds trained", "stated in round"]
    trained = {name: sum(name in r.trained for r in run.rounds) for name in run.statements}
    rows = [
        (
            name,
            _head(said),
            page.bar(said.spent / said.ceiling if said.ceiling > 0 else 1.0, f"{said.spent:.6f}"),
            *(f"{said.ceiling:g}", f"{max(0.0, said.ceiling - said.spent):.6f}", f"{said.delta:g}"),
            *(said.unprotected, trained[name], said.round),
        )
        for name, said in run.statements.items()
    ]
    return page.table(head, rows, left=2)


def _head(said: Statement) -> str:
    """Enough of the chain's end to compare by eye with the ledger at the hospital."""
    return f"{said.sequence}: {said.hash[:16]}"


def _epsilon_lines(run: Run, spent: Mapping[str, plots.Points]) -> tuple[str, int]:
    """The figure, and how many different lines it has: hospitals that spent alike share one."""
    last = run.statements
    groups: dict[tuple[tuple[float, float], ...], list[str]] = {}
    ceilings: dict[float, list[str]] = {}
    for name, points in spent.items():
        groups.setdefault(tuple((number, round(value, 6)) for number, value in points), []).append(name)
        ceilings.setdefault(last[name].ceiling, []).append(name)

    def who(names: Sequence[str]) -> str:
        if len(names) == 1:
            return page.short(names[0], 16)
        return f"all {len(names)}" if len(names) == len(last) else f"{len(names)} hospitals"

    drawn = [plots.Line(f"{who(n)} {p[-1][1]:.2f}", p, plots.marks(run.hospitals)[n[0]]) for p, n in groups.items()]
    levels = [(ceiling, f"ceiling {ceiling:g}: {who(names)}") for ceiling, names in sorted(ceilings.items())]
    if max(len(drawn), len(levels)) > plots.NAMED:
        drawn, levels = [replace(line, label="") for line in drawn], [(ceiling, "") for ceiling, _ in levels]
    name, worst = max(last.items(), key=lambda item: item[1].spent)
    alt = f"Epsilon by round; the highest is {worst.spent:.2f} at {name}, ceiling {worst.ceiling:g}"
    graph = plots.lines(
        drawn, alt=alt, axis="epsilon", rounds=run.plan.rounds, levels=levels, span=(0, 0.1), width=plots.WIDE
    )
    return graph, len(groups)


def privacy_plan(run: Run) -> str:
    plan, steps = run.plan, run.plan.steps_per_round
    amount = f"{steps} steps a round, {plan.rounds} rounds, {steps * plan.rounds} steps in all, at each hospital."
    sampling = f"Sampling: each {plan.unit} takes part in a step with probability q = {plan.sampling_rate:g}, "
    sampling += f"independently (Poisson), with at most {plan.max_studies} studies of a patient."
    if not run.private:
        return page.bullets(["No noise was added and no epsilon holds.", sampling, amount])
    together = "All studies of a patient are protected together."
    if plan.unit == "record":
        together = f"RECORD LEVEL. {RECORD}"
    scores = "Test scores: none are released under this epsilon."
    if plan.evaluation_noise:
        scores = (
            f"Test scores: noisy histograms, once, after the last round, where site.toml allows it; sigma = "
            f"{plan.evaluation_noise:.4g} x their sensitivity. Their cost is part of the epsilon below."
        )
    return page.bullets(
        [
            f"Unit: the {plan.unit}. {together}",
            f"Adjacency: add or remove one {plan.unit}, that is: one data set has all records of one {plan.unit} more."
            if plan.unit == "patient"
            else "Adjacency: add or remove one record.",
            sampling,
            f"Clipping: what one {plan.unit} contributes to a step is shortened to norm C = {plan.max_grad_norm:g}.",
            "Noise: Gaussian, standard deviation sigma x C, "
            f"sigma = {plan.noise_multiplier:.4g}{plan.later()}, added inside the hospital.",
            amount,
            scores,
            f"Cost: at most epsilon {plan.epsilon:g} at delta {plan.delta:g} per {plan.unit} and hospital for this run; "
            "earlier runs add to it.",
            "Against: everybody outside the hospital: the coordinator, other hospitals, whoever gets the model.",
        ]
    )


# --- what left --------------------------------------------------------------------------------------------------------


def releases(run: Run) -> str:
    """Every message that left a hospital: by kind, with what it holds, and by hospital."""
    if not run.arrived:
        return page.note("Nothing has left a hospital so far.")
    kinds = sorted({a.what for a in run.arrived}, key=_order)
    rows = [(kind, *_holds(run, kind), *_sum(a for a in run.arrived if a.what == kind)) for kind in kinds]
    in_rounds = sum(a.bytes for r in run.rounds for a in r.arrived)
    rows.append(("all", "", "", *_sum(run.arrived)))
    head = ["what left", "what it holds", "covered by epsilon?", "messages", "bytes"]
    counted, early = sum(r.bytes_up for r in run.rounds), sum(a.bytes for a in run.introduced)
    text = f"All bytes: {counted:,} up in the rounds and {early:,} before the first one. "
    text += "An interrupted round may be missing here; each hospital's own ledger has every message: fedmm ledger show."
    odd = f"The messages of the rounds have {in_rounds:,} bytes, the records count {counted:,} up."
    return (
        page.table(head, rows, left=3)
        + (page.banner("warning", "Damaged records.", odd) if in_rounds != counted else "")
        + page.note(text)
        + _by_hospital(run, kinds)
    )


def _by_hospital(run: Run, kinds: Sequence[str]) -> str:
    names = [*run.hospitals, *sorted({a.hospital for a in run.arrived} - set(run.hospitals))]
    rows: list[tuple[str, ...]] = []
    for name in names:
        own = [a for a in run.arrived if a.hospital == name]
        found = [(kind, *_sum(a for a in own if a.what == kind)) for kind in kinds if any(a.what == kind for a in own)]
        rows += [(name if i == 0 else "", kind, *numbers) for i, (kind, *numbers) in enumerate(found)]
    rows.append(("all", "", *_sum(run.arrived)))
    table = page.table(["hospital", "what left", "messages", "bytes"], rows, left=2)
    return table if len(names) <= OPEN_TABLE else page.details("What left, by hospital", table)


def _sum(messages: Iterable[Arrived]) -> tuple[str, str]:
    sizes = [message.bytes for message in messages]
    return f"{len(sizes):,}", f"{sum(sizes):,}"


CODED = {  # by federation.wire: how weights leave; what rounding costs is accuracy, never epsilon
    "fp16": ", as their change, in half precision",
    "int8": ", as their change, rounded at random to 8 bits",
    "topk": ", as the largest hundredth of their change, in half precision; the rest waits at the hospital",
}


def _order(kind: str) -> tuple[int, str]:
    known = (HELLO, UPDATE, HISTOGRAM, EXACT, WITHHELD)
    return (known.index(kind) if kind in known else len(known), kind)


def _holds(run: Run, kind: str) -> tuple[str, str]:
    """What is in messages of this kind, and whether epsilon covers it."""
    said = "what its ledger says: epsilon, ceiling, delta, releases without epsilon, its head, signed"
    weights, wire = run.settings.get("federation.weights"), str(run.settings.get("federation.wire"))
    counts = {
        "declared": "its weight in the average, the patient bound that site.toml declares",
        "noisy": "its weight in the average, a noisy number of patients that its ledger charged once",
    }
    count = counts.get(str(weights), "its weight in the average, the same for every hospital")
    none = "needs none: holds nothing of a patient"
    if kind.startswith("refusal "):
        code = kind.removeprefix("refusal ")
        error = REFUSALS.get(int(code)) if code.isdecimal() else None
        text = "a code and one sentence; before the first round also what a hello holds"
        return f"{error('').name}: {text}" if error else text, none
    known = {
        HELLO: ("name, labels, policy, and how much noise its ledger needs; follows from site.toml and plans", none),
        UPDATE: (
            f"model weights {'after noise' if run.private else 'as trained'}{CODED.get(wire, '')}; {count}; {said}",
            "yes: this is what epsilon pays for" if run.private else "NO. No noise was added",
        ),
        HISTOGRAM: (f"noisy histograms of test scores; {said}", "yes: charged to the ledger, once in this run"),
        EXACT: (
            f"exact test scores; {said}",
            "NO. Exact test scores are not covered by epsilon; they are only possible under a research policy",
        ),
        WITHHELD: (f"no scores: kept at home by policy; {said}", none),
    }
    return known.get(
        kind, ("unusable: it was not read further and is not kept", "not known: see the hospital's ledger")
    )
