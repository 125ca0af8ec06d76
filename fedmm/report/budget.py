"""The page's sections about privacy: what was promised, what each ledger says, what left each hospital."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from fedmm.report import page, plots
from fedmm.report.reading import Run, Statement


def promise(run: Run) -> str:
    if run.private:
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
        f"{where}. Counted since each ledger began: earlier runs, and scores sent after its last statement, included.",
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
        heads = [(name, _head(said), said.round, run.unprotected.get(name, 0)) for name, said in last.items()]
        head = ["hospital", "ledger head", "stated in round", "releases without epsilon"]
        return page.section(title, page.note(text), page.table(head, heads, left=2))
    spent = {n: [(r.number, r.statements[n].spent) for r in run.rounds if n in r.statements] for n in last}
    graph, groups = _epsilon_lines(run, spent)
    same = f"All {len(last)} hospitals spent the same in every round: one line stands for all."
    caption = "What each hospital's own ledger says after each round, earlier runs included. Dashed: its ceiling."
    rows = [
        (r.number, *(f"{r.statements[n].spent:.6f}" if n in r.statements else "–" for n in last)) for r in run.rounds
    ]
    return page.section(
        title,
        page.note(same) if groups == 1 and len(last) > 1 else "",
        page.figure(graph, caption),
        _statements(run, {name: len(points) for name, points in spent.items()}),
        page.note(
            "Epsilon spent by this run alone is not in the records: a ledger counts all that ever left under it, earlier "
            "runs too, and epsilons cannot be subtracted. The plan holds this run to at most "
            f"{run.plan.epsilon:g} at delta {run.plan.delta:g}."
        ),
        page.details("Epsilon by round, numbers", page.table(["round", *last], rows)),
    )


def _statements(run: Run, trained: Mapping[str, int]) -> str:
    head = ["hospital", "ledger head", "epsilon spent", "ceiling", "left", "delta", "releases without epsilon"]
    head += ["rounds trained", "last in round"]
    rows = [
        (
            name,
            _head(said),
            page.bar(said.spent / said.ceiling if said.ceiling > 0 else 1.0, f"{said.spent:.6f}"),
            *(f"{said.ceiling:g}", f"{max(0.0, said.ceiling - said.spent):.6f}", f"{said.delta:g}"),
            *(run.unprotected.get(name, 0), trained[name], said.round),
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
    sampling += "independently (Poisson)."
    if not run.private:
        return page.bullets(["No noise was added and no epsilon holds.", sampling, amount])
    together = "All studies of a patient are protected together." if plan.unit == "patient" else ""
    return page.bullets(
        [
            f"Unit: the {plan.unit}. {together}",
            f"Adjacency: add or remove one {plan.unit}, that is: one data set has all records of one {plan.unit} more.",
            sampling,
            f"Clipping: what one {plan.unit} contributes to a step is shortened to norm C = {plan.max_grad_norm:g}.",
            "Noise: Gaussian, standard deviation sigma x C, "
            f"sigma = {plan.noise_multiplier:.4g}, added inside the hospital.",
            amount,
            f"Cost: at most epsilon {plan.epsilon:g} at delta {plan.delta:g} per hospital for this run; "
            "earlier runs add to it.",
            "Against: everybody outside the hospital: the coordinator, other hospitals, whoever gets the model.",
        ]
    )


def releases(run: Run) -> str:
    sent = [name for name in run.hospitals if any(name in r.scores for r in run.scored)]
    scores, exact = "stayed at home", "nothing left"
    if sent:
        scores = f"left {len(sent)} of {len(run.hospitals)} hospitals, {len(run.scored)} rounds: {', '.join(sent)}"
        exact = "NO. Exact test scores are not covered by epsilon; they are only possible under a research policy"
    if run.withheld:
        scores += f"; kept at home by policy: {', '.join(run.withheld)}"
    declared = run.settings.get("federation.weights") == "declared"
    count = "the patient bound that site.toml declares" if declared else "the same for every hospital"
    noise, weights = ("after noise", "yes: this is what epsilon pays for")
    if not run.private:
        noise, weights = "as trained", "NO. No noise was added"
    rows = [
        ("Model weights", f"each round in which it trained, {noise}", weights),
        ("Its weight in the average", f"each round: {count}", "needs none: public by agreement"),
        (
            "Ledger statement",
            "each round: epsilon, ceiling, delta, releases without epsilon, head of the ledger's chain, signature",
            "needs none: follows from public settings",
        ),
        ("Refusals", "a code and one sentence, where it refused", "needs none: holds no patient's value"),
        ("Test scores", scores, exact),
    ]
    return page.table(["what", "when", "covered by epsilon?"], rows, left=3)
