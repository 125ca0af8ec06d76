"""The privacy report's page: what a data protection officer reads and signs. Twelve blocks; here the first six but the budget.

A document (fedmm.report.disclosure) in, one HTML page out: inline CSS and SVG, nothing fetched, no script; the same document
gives the same bytes, so that whoever checks a report draws it again and compares.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedmm.report import page, privacy_budget, privacy_measured, privacy_plots, privacy_risks
from fedmm.report.page import escaped
from fedmm.report.seal import fingerprint
from fedmm.report.words import day, number, share

Document = Mapping[str, Any]
SCRIPT = """import json, sys
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant

for ledger in json.load(open(sys.argv[1]))["document"]["accounting"]:
    bounds = []  # both are upper bounds, so the lesser one is a bound too
    for accountant in (PLDAccountant(), RdpAccountant()):
        for e in ledger["events"]:
            step = PoissonSampledDpEvent(e["sampling_rate"], GaussianDpEvent(e["noise_multiplier"]))
            accountant.compose(SelfComposedDpEvent(step, e["steps"]))
        bounds.append(accountant.get_epsilon(ledger["delta"]))
    print(ledger["hospital"], min(bounds), "stated", ledger["epsilon"])
"""


def draw(document: Document, digest: str) -> str:
    """The page. digest: SHA-256 of the document, shown on it. Raises: KeyError, TypeError or ValueError for a document of
    another form."""
    blocks = (
        _odds,
        _unit,
        privacy_budget.epsilon,
        _who,
        _mechanism,
        _accountants,
        privacy_risks.not_protected,
        privacy_risks.post_processing,
        privacy_measured.attacks,
        privacy_risks.cost,
        privacy_risks.flows,
        privacy_risks.residual,
    )
    whose = document["hospital"] or "all hospitals of a run"
    parts = (block(document) for block in blocks)
    return page.document(f"Privacy report, {whose}", [_header(document, digest), *parts, _footer(digest)])


def _header(document: Document, digest: str) -> str:
    made, run = document["made"], document["run"]
    facts = [
        ("Hospital", document["hospital"] or f"{', '.join(run['hospitals'])} (as the coordinator heard them)"),
        ("Run", f"{run['name']}, started {run['started']}, {run['rounds_done']} of {run['rounds_planned']} rounds"),
        ("Made", f"{day(made['at'])} by {made['by']}; holds until {made['expires']}"),
        ("Document", f"SHA-256 {digest}"),
    ]
    if document["ledger"]:
        key = document["ledger"]["keys"][-1]["public_key"]
        facts.append(("Signed by", f"Ed25519 key {key}, fingerprint {fingerprint(key)}: the hospital's ledger"))
        facts.append(
            ("Check it", "fedmm report --verify THIS_FILE, at any computer with fedmm; the hospital is not needed")
        )
    return f"<header><h1>Privacy report</h1>{_banners(document)}{page.facts(facts)}</header>"


def _banners(document: Document) -> str:
    shown = ""
    if not document["ledger"]:
        text = "made from the coordinator's records alone. It shows what the hospitals' ledgers stated in their answers, which "
        text += "the coordinator checked on arrival. Only a hospital can sign for its ledger: fedmm report RUN --privacy HOSPITAL"
        shown += page.banner("warning", "Unsigned:", text)
    if not document["run"]["private"]:
        text = "This run was trained without differential privacy: no epsilon holds for its model. What the ledgers say of "
        shown += page.banner("danger", "NOT PRIVATE", text + "other runs stays true.")
    if bare := sum(entry["unprotected"] for entry in document["accounting"]):
        text = "(exact scores of held-back patients, or runs without privacy, allowed by a research policy) are outside of "
        shown += page.banner("warning", f"{bare} release{'s' * (bare > 1)} without epsilon", f"{text}all that follows.")
    return shown


def _footer(digest: str) -> str:
    text = f"SHA-256 of the document: {digest}. This page loads nothing and runs no script; the block of data at its end is the "
    return f"<footer>{escaped(text)}same JSON that lies beside it, its signature included.</footer>"


# --- 1 ----------------------------------------------------------------------------------------------------------------


def _odds(document: Document) -> str:
    odds = document["odds"]
    factor, delta = odds["factor"], odds["delta"]
    whose = document["hospital"] or "a hospital of this run"
    sentence = (
        f"Somebody who knows everything about every other patient, and sees all that ever left {whose} through fedmm, can change "
        f"the odds of a bet on whether one given patient took part by a factor of at most {number(factor)} (e to the power of "
        f"epsilon {odds['epsilon']:.2f}); the chance that it is more than double that is at most {2 * delta:g} (2 x delta)."
    )
    rows = [(share(line["before"]), share(line["at_most"]), share(line["at_least"])) for line in odds["beliefs"]]
    power = [(share(line["false_alarm"]), share(line["found_at_most"])) for line in odds["power"]]
    table = page.table(["thought before", "after, at most", "after, at least"], rows, left=0)
    found = page.table(["others taken for participants", "participants found, at most"], power, left=0)
    told = f"At epsilon {odds['epsilon']:.2f} a belief of 50 % moves to at most {share(odds['beliefs'][0]['at_most'])}"
    drawing = page.figure(
        privacy_plots.beliefs(odds["epsilon"], alt=told),
        f"{told}. Everything inside the band is possible in the worst case; nothing outside of it, but for delta.",
    )
    pairs = (
        "all pairs of epsilon and delta that hold for this ledger"
        if document["ledger"]
        else "epsilon and delta as stated"
    )
    explained = (
        f"The lower table is about an attacker who decides for each patient, limited by {pairs}. These are limits for the best "
        "conceivable attacker, not what an attack was seen to do: that is in block 9."
    )
    left = (
        f"<div>{page.heading('What a belief can become')}{table}{page.heading('What a decision can find')}{found}</div>"
    )
    return page.section(
        "1. In plain words",
        page.banner("private", "The promise.", sentence),
        page.note(reading(odds["epsilon"])),
        page.pair(left, drawing),
        page.note(explained),
    )


def reading(epsilon: float) -> str:
    """How large such an epsilon is, in our reading: there is no agreed limit."""
    if epsilon <= 1:
        return "An epsilon of up to 1 is a strong promise to every patient by itself."
    if epsilon <= 4:
        return "An epsilon between 1 and 4 leaves an attacker who already suspects somebody a real advantage at the worst; no more."
    if epsilon <= 10:
        return (
            "An epsilon between 4 and 10 is weak as a promise by itself: in the worst case a suspicion becomes near certainty. "
            "It bounds what no known attack comes near; judge it together with block 9."
        )
    return "An epsilon above 10 promises next to nothing by itself. Judge by block 9, and ask for a lower ceiling."


# --- 2 ----------------------------------------------------------------------------------------------------------------


def _unit(document: Document) -> str:
    plan, policy, ledger = document["plan"], document["policy"], document["ledger"]
    record = plan["unit"] == "record"
    rows = [
        (
            "Privacy unit",
            "the patient: all images, reports, recordings and labels of one person at this hospital together",
        ),
        (
            "Unit of this run",
            "single records (RECORD LEVEL); the ledger charges the whole patient" if record else "the patient",
        ),
        (
            "Cap",
            f"at most {plan['max_studies']} studies of a patient count in a step; what a patient adds is shortened to norm C",
        ),
        (
            "Adjacency",
            "add or remove one patient: two data sets are neighbours if one has all records of one patient more",
        ),
        ("Patients", _patients(policy)),
        ("Data fingerprint", _fingerprint(ledger)),
    ]
    if policy:
        rows.append(("Noisy count", _count(policy)))
    return page.section("2. Who is one unit", page.table([], rows, left=2, kind="terms"))


def _patients(policy: Mapping[str, Any] | None) -> str:
    if policy is None:
        return "not said here; each hospital's report has its public lower bound"
    least = f"at least {policy['privacy']['public_patients']:,}: the public lower bound of site.toml."
    return f"{least} The true number is not stated; blocks 9 and 10, where they are filled, narrow it down"


def _fingerprint(ledger: Mapping[str, Any] | None) -> str:
    if ledger is None:
        return "none: it can only be made beside the ledger"
    found = ledger["fingerprint"]
    if found["commitment"] is None:
        return "none: this ledger has no list of patients yet"
    return (
        f"HMAC-SHA256 {found['commitment']}, nonce {found['nonce']}, over the list of salted ids of everybody under this ledger. "
        "Salt and list stay in the hospital. Without them it is a random number, from which neither a patient nor how many there "
        "are can be computed; it is a commitment, not a release, and needs no epsilon for that reason."
    )


def _count(policy: Mapping[str, Any]) -> str:
    least = policy["runs"]["min_patients"]
    bought = policy["release"]["counts"] == "noisy" or least
    return "bought once, charged to the ledger" if bought else "none: this policy gives away no number of patients"


# --- 4, 5, 6 ----------------------------------------------------------------------------------------------------------


def _who(document: Document) -> str:
    here = document["hospital"] or "each hospital"
    yes, no = "epsilon", "not by epsilon"
    rows = [
        (
            f"patients of {here}",
            "the coordinator",
            yes,
            "sees weights after noise, ledger statements, and nothing before it",
        ),
        (f"patients of {here}", "other hospitals", yes, "see the joint model only, which is made of noisy parts"),
        (
            f"patients of {here}",
            "users of the model, and whoever steals it",
            yes,
            "post-processing of what the coordinator sees",
        ),
        (
            f"patients of {here}",
            "all of these together",
            yes,
            "the bound is on everything that left, whoever joins forces",
        ),
        (
            f"patients of {here}",
            "the network between the sites",
            yes,
            "TLS on top, on which the promise does not depend",
        ),
        (
            f"patients of {here}",
            "people with access to the hospital's files",
            no,
            "its own access control; fedmm adds nothing",
        ),
        ("patients of two hospitals", "everybody outside", f"{yes}, the sum", "each ledger knows its own part only"),
        (
            "held-back test patients",
            "everybody outside",
            _held_back(document),
            "they train nothing; what leaves is scores",
        ),
        ("hospitals themselves", "one another", no, "names, policies and that they take part are public"),
    ]
    text = "In the terms of NIST SP 800-226: the central model inside the hospital, the trusted curator; nobody outside is."
    return page.section(
        "4. Who is protected from whom",
        page.table(["who", "from whom", "by", "because"], rows, left=4),
        page.note(text),
    )


def _held_back(document: Document) -> str:
    if document["policy"] is None:
        return "see block 7"
    return {
        "no": "nothing leaves",
        "noisy": "epsilon (noisy histograms)",
        "exact": "NOT protected: exact scores leave",
    }[document["policy"]["release"]["metrics"]]


def _mechanism(document: Document) -> str:
    plan = document["plan"]
    later = plan.get("noise_last", 1.0)
    stages = "" if later == 1 else f", in four stages to {later:g} times that"
    rows = [
        ("Mechanism", "Gaussian, on the sum of clipped gradients of a Poisson sample of patients (DP-SGD, Abadi et al. 2016)"),
        ("Clip C", f"{plan['max_grad_norm']:g}, per {plan['unit']}, in the plan of this run"),
        ("Noise", f"standard deviation sigma x C, sigma = {plan['noise_multiplier']:.6g}{stages}"),
        ("Sampling q", f"{plan['sampling_rate']:g}: every {plan['unit']} by itself, in every step (Poisson), a public number"),
        ("Steps", f"{plan['steps_per_round']} a round, {plan['rounds']} rounds"),
        ("Noise source", "ChaCha20, keyed anew by the operating system's generator; never a seed of the run; added in double "
         "precision and rounded to a grid of sigma / 2^20, so that low bits tell nothing (Mironov 2012)"),
        ("Noisy scores", f"sigma {plan['evaluation_noise']:.6g} on score histograms, once" if plan["evaluation_noise"] else "none"),
        ("Isolation", _isolated(document["policy"])),
    ]  # fmt: skip
    table = page.table(["hospital", "kind", "sigma", "q", "steps in all", "charges"], _by_event(document), left=2)
    text = (
        "What was charged, all runs of the ledger together:"
        if document["ledger"]
        else "What this run charged, as seen here:"
    )
    return page.section("5. How it is done", page.table([], rows, left=2, kind="terms"), page.note(text), table)


def _isolated(policy: Mapping[str, Any] | None) -> str:
    if policy is None:
        return "decided by each hospital"
    if policy["privacy"]["isolate_patients"]:
        return "each patient is computed alone: rounding cannot couple patients"
    return "off: last bits of a gradient (1e-7) depend on who else was drawn (docs/privacy.md, “Rounding in training”)"


def _by_event(document: Document) -> list[Sequence[Any]]:
    found: dict[tuple[str, str, float, float], list[int]] = {}
    for entry in document["accounting"]:
        for e in entry["events"]:
            key = (entry["hospital"], e["kind"], e["noise_multiplier"], e["sampling_rate"])
            found.setdefault(key, []).append(e["steps"])
    rows = [(h, kind, f"{s:.6g}", f"{q:g}", f"{sum(n):,}", f"{len(n):,}") for (h, kind, s, q), n in found.items()]
    return list(rows[: privacy_budget.MOST_LINES])


def _accountants(document: Document) -> str:
    rows = [
        (
            entry["hospital"],
            entry["scope"],
            f"{entry['delta']:g}",
            f"{entry['epsilon']:.6f}",
            "left out (above 50)" if entry["epsilon_prv"] is None else f"{entry['epsilon_prv']:.6f}",
            f"{entry['epsilon_rdp']:.6f}",
        )
        for entry in document["accounting"]
    ]
    text = (
        "Three independent upper bounds on the same history: privacy loss distributions (PLD: dp-accounting, Google); PRV "
        "(Opacus, Meta; Gopi et al. 2021); Renyi (RDP: dp-accounting; Mironov 2017). Of record is the lesser of PLD and RDP. That "
        "is PLD, but for very many steps of tiny cost, where its grid rounds up, or where it cannot be computed. "
        "To compute it again without fedmm, from the JSON beside this page, with pip install dp-accounting:"
    )
    return page.section(
        "6. Three accountants, and how to check them",
        page.table(["hospital", "of", "delta", "of record: PLD, or RDP if less", "PRV", "RDP"], rows, left=2),
        page.note(text),
        page.code(SCRIPT),
    )
