"""`fedmm attack`: what a finished model and one update tell about a hospital's patients, measured at the hospital."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedmm.cli_scores import table
from fedmm.errors import ConfigError
from fedmm.terminal import Adder, format_argument, hospital_argument, open_site, print_json, run_argument

IMAGE_STEPS = 300  # guess: about 5 s an image; Geiping et al. 2020 take thousands
SHADOWS = 16  # as fedmm.training.shadows.SHADOWS, which would bring torch (a test keeps them equal)
STAYS = "this stays at the hospital: exact statistics of its patients"
Row = Sequence[str]


def add_commands(add: Adder) -> None:
    sub = add("attack", attack, "try to find a hospital's patients in a finished model and in an update",
              "fedmm attack RUN HOSPITALS/hospital_1")  # fmt: skip
    run_argument(sub)
    hospital_argument(sub)
    sub.add_argument(
        "--shadows",
        type=_even,
        default=SHADOWS,
        metavar="K",
        help=f"shadow models of lira, even ({SHADOWS}; 0: no lira)",
    )
    steps_help = f"steps of each image's reconstruction from an update ({IMAGE_STEPS})"
    sub.add_argument("--image-steps", type=_steps, default=IMAGE_STEPS, metavar="N", help=steps_help)
    sub.add_argument(
        "--control",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also attack a model without privacy that learnt its patients by heart, made here and thrown away (yes)",
    )
    sub.add_argument("--out", type=Path, metavar="FILE", help="where the JSON goes (RUN/attack-<hospital>.json)")
    format_argument(sub)


def attack(args: argparse.Namespace) -> int:
    from fedmm.models.store import load_model
    from fedmm.report.record import read_config
    from fedmm.training.attack import attack as attack_all
    from fedmm.training.attack import read_patients, target_of

    # 1 what is attacked
    content = read_config(args.run)
    target = target_of(load_model(args.run), content)
    site = open_site(args.hospital)
    _trained(args.run, content, site.hospital.name)
    if site.labels != target.model.spec.labels:
        raise ConfigError(f"{args.hospital} has other labels than the model", fix="compare [labels] in its site.toml")
    out = args.out or args.run / f"attack-{site.hospital.name}.json"
    if not out.parent.is_dir():
        raise ConfigError(f"there is no folder {out.parent}", fix="make it, or choose another --out")
    # 2 the patients, read as training reads them
    data = read_patients(args.hospital, target)
    # 3 attack
    steps, control = args.image_steps, args.control
    found = attack_all(target, data, shadows=args.shadows, image_steps=steps, control=control, tell=progress())
    result = {
        "hospital": site.hospital.name,
        "run": content.get("run") or args.run.resolve().name,  # as the report knows it, wherever the folder lies
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "private": target.plan.private,
        "epsilon": target.plan.epsilon if target.plan.private else None,
        "note": STAYS,
        **found,
    }
    # 4 write and say
    write(result, out)
    if args.format == "json":
        print_json(result)
    else:
        print("\n".join(lines(result)))
        print(f"\nwritten {out}")
    return 0


def _trained(run: Path, content: Mapping[str, Any], hospital: str) -> None:
    """Raises: ConfigError if the model learnt from no patient of this hospital: its "members" would be none."""
    from fedmm.report.record import read_rounds

    if "personal" in content:  # a hospital's own model, in its own folder
        return
    if hospital not in {name for record in read_rounds(run) for name in record["trained"]}:
        raise ConfigError(
            f"{hospital} trained in no round of {run}",
            why="who is taken for a member was never trained on: every attack would fail, and prove nothing",
            fix="a hospital that took part; run.jsonl belongs beside config.json",
        )


def write(result: Mapping[str, Any], out: Path) -> None:
    """JSON in a file that its owner alone can read."""
    handle = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(json.dumps(result, indent=1, allow_nan=False) + "\n")
    out.chmod(0o600)  # it may have been there


# --- for people ---------------------------------------------------------------------------------------------------------


def lines(result: Mapping[str, Any]) -> Iterator[str]:
    """The run's model beside the control, attack by attack."""
    plan = f"epsilon {result['epsilon']:g}" if result["private"] else "NOT PRIVATE"
    yield f"{result['hospital']}, model of {result['run']} ({plan}); {STAYS}"
    control: Mapping[str, Any] = result["control"] or {}
    beside = ("this model", "control") if control else ("this model",)
    both = [result, control] if control else [result]
    yield from table(
        ("membership", "given", *(f"AUC, {who}" for who in beside), *(f"TPR at 1 % FPR, {who}" for who in beside)),
        _membership(both),
    )
    for entry in result["membership"]:
        if entry.get("unseen") and entry["modality"] == "all":
            yield f"  of that the split alone: AUC of shadow models that never saw the patient {_with(entry['unseen'])}"
    yield "  chance is 0.5 and 1 %; members are training patients, non-members held-back ones of the same hospital"
    yield from _unresolved(result["membership"])
    heads = (f"{what}, {who}" for what in ("first", "of first five") for who in beside)
    yield from table(("re-linkage", *heads, "chance", "candidates"), _links(both))
    yield from table(("one patient's update", *beside, "baseline"), _updates(both))
    if control:
        yield "  control: the same model without privacy, learnt by heart; if that is not found out, nothing is proved"
    if not result["start_known"]:
        yield "Warning: federation.start_from is not here, so shadow models and control began at other weights than the run."


def _membership(both: Sequence[Mapping[str, Any]]) -> Iterator[Row]:
    entries = [{(e["attack"], e["modality"]): e for e in result["membership"]} for result in both]
    for key in entries[0]:
        found = [of[key] for of in entries if key in of]
        yield *key, *(_with(e["auc"]) for e in found), *(_with(e["tpr"]["0.01"]) for e in found)


def _unresolved(entries: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    least = min((entry["non_members"] for entry in entries), default=0)
    rates = [rate for rate, needs in (("1 %", 100), ("0.1 %", 1000)) if least < needs]
    if rates:
        yield f"  a false positive rate of {' and '.join(rates)} cannot be told of {least} non-members (it takes 100, 1000)"


def _links(both: Sequence[Mapping[str, Any]]) -> Iterator[Row]:
    for found in zip(*(result["relinkage"] for result in both), strict=True):
        one = found[0]
        chances = [one["chance_top1"], one["chance_top5"]]
        chance = " / ".join("-" if c is None else f"{c:.3f}" for c in chances)
        shares = (_with(entry[key]) for key in ("top1", "top5") for entry in found)
        yield f"{one['from']} to {one['to']}", *shares, chance, str(one["candidates"])


def _updates(both: Sequence[Mapping[str, Any]]) -> Iterator[Row]:
    for found in zip(*(result["inversion"] for result in both), strict=True):
        one = found[0]
        if "not_applicable" in one:
            yield one["what"], f"not applicable: {one['not_applicable']}"
        else:
            yield (
                one["what"],
                *(_with(entry) for entry in found),
                "-" if one["baseline"] is None else f"{one['baseline']:.3f}",
            )


def _with(score: Mapping[str, Any]) -> str:
    """0.812 (0.78 to 0.85)"""
    if score["value"] is None:
        return "-"
    return f"{score['value']:.3f}" + (
        f" ({score['low']:.2f} to {score['high']:.2f})" if score["low"] is not None else ""
    )


def progress() -> Any:
    """Lines on stderr: `shadow models 3/16 | 41 s | 3 min left`."""
    from fedmm.report.record import format_seconds

    began: dict[str, float] = {}
    start = last = time.monotonic()

    def tell(what: str, done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        first = began.setdefault(what, last)
        left = f" | {format_seconds((now - first) / done * (total - done))} left" if done else ""
        print(f"{what} {done}/{total} | {now - start:.0f} s{left}", file=sys.stderr, flush=True)
        last = now

    return tell


def _even(text: str) -> int:
    if (number := int(text)) % 2 or not 0 <= number <= 256:
        raise argparse.ArgumentTypeError(f"{number} is not an even number from 0 to 256")
    return number


def _steps(text: str) -> int:
    if not 1 <= (number := int(text)) <= 100_000:
        raise argparse.ArgumentTypeError(f"{number} is not in 1 to 100000")
    return number
