"""`fedmm audit`: the privacy that is claimed against the privacy that is measured, on the training path itself.

1 proofs on the training loop (fedmm/training/proof.py) → 2 copies of the hospitals (fedmm/data/strangers.py) → 3 a federated run
with canaries (client/audit.py) → 4 what each onlooker could tell of them → 5 the ledger against the steps → 6 verdict.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import secrets
import sys
import time
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedmm.config import RunConfig, SiteConfig, find_hospitals, installed_version, load_site, parse_settings
from fedmm.errors import ConfigError, RunFailed
from fedmm.terminal import EXIT_NO, Adder, format_argument, print_json

if TYPE_CHECKING:
    import numpy as np
    from flwr.app import ArrayRecord, Message
    from numpy.typing import NDArray
    from torch import Tensor

    from client.app import NoiseFor
    from client.audit import AuditedHospital, Heard
    from fedmm.data.strangers import Canary
    from fedmm.models.multimodal import ModelSpec
    from fedmm.privacy.trials import Check

CLAIM, CANARIES = 1.5, 1000  # an audit in one run bites at a claim of about 1 to 2 (../shared/privacy.md)
# The bound loses 2 m delta of its significance: with 1000 canaries at 1e-4 it can never pass 1.5.  # measured
DELTA = 1e-5
TENTH, MOST_FILES = 10, 100  # canaries that are files, of each kind: one for so many Dirac canaries, and at most
CONSISTENT, BROKEN = "consistent", "broken"
RESULT_FILE = "audit.json"
EVENT = ("kind", "noise_multiplier", "sampling_rate", "steps")


def audit(args: argparse.Namespace) -> int:
    quiet = contextlib.redirect_stdout(sys.stderr) if args.format == "json" else contextlib.nullcontext()
    with quiet:
        result = run_audit(
            args.hospitals,
            args.out,
            claimed=args.claimed_epsilon,
            canaries=args.canaries,
            settings=parse_settings(args.set),
        )
    if args.format == "json":
        print_json(result)
    else:
        print("\n".join(_text(result, args.out)))
    return 0 if result["verdict"] == CONSISTENT else EXIT_NO


def run_audit(
    hospitals: Path,
    out: Path,
    *,
    claimed: float = CLAIM,
    canaries: int = CANARIES,
    settings: Mapping[str, Any] | None = None,
    noise_for: NoiseFor | None = None,
) -> dict[str, Any]:
    """The audit, written to OUT/audit.json and returned. The first hospital by name has the canaries.

    noise_for: only tests pass another one than the operating system's, to see it found out.
    Raises: ConfigError, PolicyRefused, HospitalInvalid, RunFailed.
    """
    import numpy as np

    from client.app import system_noise
    from client.audit import AuditedHospital, views_of
    from fedmm.data.strangers import check_source, copy_hospital

    began = time.monotonic()
    sites = {source: load_site(source) for source in find_hospitals(hospitals)}
    config = _config(out, claimed, canaries, list(sites.values()), settings or {})
    for source, site in sites.items():
        check_source(source, site)
    rng = np.random.default_rng()  # of the operating system: nobody can know who is inside
    in_M = rng.integers(0, 2, canaries).astype(bool)
    site = next(iter(sites.values()))
    audited = AuditedHospital(
        site.hospital.name,
        in_M,
        rng,
        clip_groups=config.training.clip_groups,
        noise_for=noise_for or system_noise,
    )
    say("1 proofs    sensitivity, noise and sampling of the training loop")
    checks = proofs(site, config, audited, canaries)
    for check in checks:
        say(_line(check))
    real = any(site.privacy.allow_not_private for site in sites.values())
    who = "some patients of research data and canaries" if real else "invented patients and canaries"
    say(f"2 copies    {', '.join(site.hospital.name for site in sites.values())}: {who}, ledgers of their own")
    out.mkdir(parents=True, exist_ok=True)
    delta, copies, made = config.privacy.delta, [], []
    for number, (source, own) in enumerate(sites.items()):
        copies.append(out / "hospitals" / own.hospital.name)
        files = 0 if number else min(canaries // TENTH, MOST_FILES)
        made += copy_hospital(source, copies[-1], canaries=files, delta=delta, rng=rng)
    site = load_site(copies[0])
    say(f"3 run       {config.federation.rounds} rounds with {canaries} canaries at {site.hospital.name}")
    heard, run = rehearsed(audited, copies, config, made)
    say("4 guesses, 5 ledger")
    views = list(views_of(heard, in_M, delta=config.privacy.delta))
    checks += books(copies[0], site, audited, run, claimed)
    return _written(out, site, config, claimed=claimed, checks=checks, views=views, seconds=time.monotonic() - began)


def _config(
    out: Path, claimed: float, canaries: int, sites: list[SiteConfig], settings: Mapping[str, Any]
) -> RunConfig:
    """Raises: ConfigError for what an audit cannot be made of."""
    for key in ("data.hospitals", "federation.out", "privacy.epsilon"):
        if key in settings:
            raise ConfigError(f"--set {key} is decided by the audit", fix="use HOSPITALS, --out and --claimed-epsilon")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(
            f"{out} is not an empty folder", why="an audit begins with ledgers of its own", fix="another --out"
        )
    if canaries < 20:
        raise ConfigError(f"{canaries} canaries prove nothing", fix="20 at least; 1000 to bite at epsilon 1.5")
    names = [site.hospital.name for site in sites]
    if len(set(names)) < len(names):
        raise ConfigError("two hospitals have the same name", fix="[hospital] name in site.toml")
    own = {"data.hospitals": str(out / "hospitals"), "federation.out": str(out.absolute() / "run")}
    delta = min(DELTA, *(site.privacy.delta for site in sites))  # no ledger is read at a smaller one than the plan's
    config = RunConfig.from_flat(
        {"federation.evaluate_every": 0, "privacy.delta": delta, **settings, "privacy.epsilon": claimed, **own}
    )
    if not config.privacy.enabled:
        raise ConfigError("a run without privacy claims no epsilon", fix="privacy.enabled = true")
    if config.privacy.unit != "patient":
        raise ConfigError(
            f"privacy.unit = {config.privacy.unit} cannot be audited",
            why="canaries are patients, and ledgers charge what a patient costs",
            fix="privacy.unit = patient",
        )
    return config


def proofs(site: SiteConfig, config: RunConfig, audited: AuditedHospital, canaries: int) -> list[Check]:
    """On the run's own model and plan, with the noise of the audited hospital. Nobody's data. Raises: ConfigError, PlanInvalid."""
    from fedmm.models.heads import Objective
    from fedmm.privacy.plan import make_plan
    from fedmm.training.local import still_parts
    from fedmm.training.loop import choose_device, workbench
    from fedmm.training.proof import prove

    spec = _spec(site, config)
    bench = workbench(
        spec,
        choose_device(site.limits.device or config.training.device),
        private=True,
        clipping=config.training.clipping,
        still=still_parts(site.release.modalities),
        objective=Objective.from_config(config.training, spec.labels),
    )
    if (weights := sum(w.numel() for w in bench.trained().values() if w.requires_grad)) < canaries:
        raise ConfigError(
            f"{canaries} canaries need as many trained weights; the model has {weights}", fix="fewer canaries"
        )
    return prove(bench, make_plan(config).of_round(1), config.training, noise=lambda: audited.noise(1))


def rehearsed(
    audited: AuditedHospital, copies: list[Path], config: RunConfig, canaries: list[Canary]
) -> tuple[Heard, Path]:
    """A federated run over the copies, in this process, by the real apps. Returns what was heard, and the run folder."""
    import torch

    from client.audit import Heard
    from client.gate import sealed
    from fedmm.data.dataset import key_of, load_hospital
    from fedmm.federation.local import LocalGrid
    from fedmm.federation.messages import ARRAYS, views
    from fedmm.federation.wire import received
    from fedmm.models.heads import Objective
    from fedmm.models.store import load_model
    from fedmm.report.record import read_config, read_rounds
    from fedmm.training.canaries import patient_losses
    from fedmm.training.local import still_parts
    from fedmm.training.loop import choose_device, workbench
    from server.app import coordinate

    site = load_site(copies[0])
    still, wire = still_parts(site.release.modalities), config.federation.wire
    spec = _spec(site, config)
    bench = workbench(spec, choose_device(site.limits.device or config.training.device), private=False)
    data = load_hospital(copies[0], spec.inputs, parts=bench.fixed_parts())
    place = {key: number for number, key in enumerate(data.key_P)}
    rows = [place[key_of(canary.patient_id)] for canary in canaries]
    objective = Objective.from_config(config.training, spec.labels)

    def losses(weights: Mapping[str, Tensor]) -> NDArray[np.float64]:
        bench.load(weights)
        return patient_losses(bench, data.cohort("all"), objective)[rows]

    heard = Heard(audited, canaries, losses, config.federation.rounds)

    class Overheard(LocalGrid):
        """What passes between coordinator and the audited hospital is what the coordinator sees."""

        def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
            asked = {message.metadata.dst_node_id: message for message in messages}
            replies = list(super().send_and_receive(asked.values(), timeout=timeout))
            node = next(iter(self.get_node_ids()))
            for reply in replies:
                of = reply.metadata
                if of.src_node_id == node and of.message_type == "train" and reply.has_content():
                    sent = asked[node].content.array_records[ARRAYS]
                    heard.round(_weights(sent), _weights(received(reply.content, sent, views(sent), still, wire)))
            return replies

    nodes = [{"site": str(copy.absolute())} for copy in copies]
    with Overheard(sealed(audited), nodes) as grid:
        run = coordinate(grid, config)
    if not heard.number:
        said = [f["reason"] for r in read_rounds(run) for f in r["failures"] if f["hospital"] == site.hospital.name]
        said += [f["reason"] for f in read_config(run)["absent"] if f["hospital"] == site.hospital.name]
        raise RunFailed(f"{site.hospital.name} took part in no round", why=said[0] if said else "it did not answer")
    with torch.no_grad():
        heard.end({name: value.detach() for name, value in load_model(run).trained().items()})
    return heard, run


def _spec(site: SiteConfig, config: RunConfig) -> ModelSpec:
    """As the run's own (server/app.py)."""
    from fedmm.models.multimodal import ModelSpec
    from fedmm.pretrained_folder import digests

    pretrained = digests(config.model, config.data)
    return ModelSpec(inputs=config.data.inputs, model=config.model, labels=site.labels, pretrained=pretrained)


def _weights(record: ArrayRecord) -> dict[str, Tensor]:
    import torch

    return {name: torch.from_numpy(array.numpy().copy()) for name, array in record.items()}


def books(copy: Path, site: SiteConfig, audited: AuditedHospital, run: Path, claimed: float) -> list[Check]:
    """The ledger of the copy against the plan, the steps that were taken and the rounds that the coordinator recorded."""
    from fedmm.privacy.accounting import epsilon_pld
    from fedmm.privacy.ledger import Ledger
    from fedmm.privacy.plan import Event, PrivacyPlan
    from fedmm.privacy.trials import Check, accountants_agree, as_planned, same_epsilon, same_steps
    from fedmm.report.record import read_config, read_rounds

    with Ledger.open(copy, site, create=False) as ledger:
        spent = ledger.spent(cross_check=True)
        rows = [event for event in ledger.events() if event["state"] != "voided"]
    events = [(int(row["round"]), Event.from_dict({name: row[name] for name in EVENT})) for row in rows]
    trained = {number: event for number, event in events if event.kind == "train"}
    steps = {n: sum(event.steps for number, event in events if number == n and event.kind == "train") for n in trained}
    replayed = epsilon_pld([event for _, event in events], spent.delta)
    plan = PrivacyPlan.from_flat(read_config(run)["plan"])
    planned = {number: plan.round_event(number).to_dict() for number in range(1, plan.rounds + 1)}
    accepted = {
        int(record["round"])
        for record in read_rounds(run)
        for arrival in record["arrived"]
        if arrival["hospital"] == site.hospital.name and arrival["what"] == "weights"
    }
    rounds = sorted(audited.steps)
    return [
        same_steps([audited.steps[n] for n in rounds], [steps[n] for n in rounds if n in steps]),
        as_planned(
            {n: [event.to_dict()[name] for name in EVENT] for n, event in trained.items()},
            {n: [event[name] for name in EVENT] for n, event in planned.items()},
        ),
        Check(
            "every round that left is in the ledger",
            accepted <= set(trained),
            f"{len(accepted - set(trained))} missing",
            "0 missing",
        ),
        same_epsilon(spent.epsilon, replayed),
        accountants_agree(spent.epsilon, spent.epsilon_prv, spent.epsilon_rdp),
        Check(
            "the ledger is within the claim",
            replayed <= claimed + 1e-6,
            f"epsilon {replayed:.6f}",
            f"at most {claimed:g}",
        ),
    ]


def _written(
    out: Path,
    site: SiteConfig,
    config: RunConfig,
    *,
    claimed: float,
    checks: list[Check],
    views: list[dict[str, Any]],
    seconds: float,
) -> dict[str, Any]:
    from fedmm.privacy.audit import SIGNIFICANCE

    best = max(views, key=lambda view: view["lower_bound"])
    passed = all(check.passed for check in checks) and best["lower_bound"] <= claimed
    result = {
        "lower_bound": best["lower_bound"],
        "claimed_epsilon": claimed,
        "delta": config.privacy.delta,
        "canaries": best["canaries"],
        "guesses": best["guesses"],
        "correct": best["correct"],
        "significance": SIGNIFICANCE,
        "verdict": CONSISTENT if passed else BROKEN,
        "fdp_lower_bound": max(view["fdp_lower_bound"] for view in views),
        "seen_by": best["seen_by"],
        "canary": best["canary"],
        "checks": [check._asdict() for check in checks],
        "views": views,
        "hospital": site.hospital.name,
        "real_patients": site.privacy.allow_not_private,
        "settings": {k: v for k, v in config.flat().items() if k not in ("data.hospitals", "federation.out")},
        "fedmm": installed_version(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "audit": secrets.token_hex(8),
        "seconds": round(seconds, 1),
    }
    (out / RESULT_FILE).write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return result


# --- words ------------------------------------------------------------------------------------------------------------


def say(text: str) -> None:
    print(text, flush=True)


def _line(check: Check | Any) -> str:
    return f"  {'ok    ' if check.passed else 'FAILED'}  {check.name}: {check.measured} (expected {check.expected})"


def _text(result: Mapping[str, Any], out: Path) -> list[str]:
    from fedmm.privacy.trials import Check

    lines = [_line(Check(**check)) for check in result["checks"]]
    lines += ["", f"{'canary':<14}{'seen by':<48}{'right of guesses':>18}{'epsilon >=':>12}{'f-DP >=':>9}"]
    lines += [
        f"{view['canary']:<14}{view['seen_by']:<48}{view['correct']:>9} of {view['guesses']:<5}"
        f"{view['lower_bound']:>12.2f}{view['fdp_lower_bound']:>9.2f}"
        for view in result["views"]
    ]
    claim, bound = result["claimed_epsilon"], result["lower_bound"]
    failed = [check["name"] for check in result["checks"] if not check["passed"]]
    lines.append("")
    if result["verdict"] == CONSISTENT:
        lines.append(
            f"Consistent: epsilon {claim:g} is claimed; at least {bound:.2f} was measured, 95 % confidence, all views together. "
            "An audit cannot prove the claim; it found nothing against it."
        )
    else:
        why = [f"at least epsilon {bound:.2f} was measured where {claim:g} is claimed"] if bound > claim else []
        lines.append(f"PRIVACY IS BROKEN: {'; '.join(why + [f'failed: {name}' for name in failed])}.")
    return [*lines, f"{out / RESULT_FILE}, {result['seconds']:.0f} s"]


# --- arguments --------------------------------------------------------------------------------------------------------


def add_commands(add: Adder) -> None:
    sub = add(
        "audit",
        audit,
        "measure the privacy that is claimed: canaries through the training path, on copies with ledgers of their own",
        "fedmm audit HOSPITALS --out AUDIT --claimed-epsilon 1.5",
    )
    sub.add_argument("hospitals", metavar="HOSPITALS", type=Path, help="folder of hospital folders, or one of them")
    sub.add_argument("--out", required=True, type=Path, metavar="AUDIT", help="folder to write into, new or empty")
    sub.add_argument("--claimed-epsilon", type=float, default=CLAIM, metavar="E", help=f"what is claimed ({CLAIM:g})")
    sub.add_argument("--canaries", type=int, default=CANARIES, metavar="M", help=f"made-up worst patients ({CANARIES})")
    sub.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of docs/settings.md")
    format_argument(sub)
