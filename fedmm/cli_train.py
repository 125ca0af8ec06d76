"""`fedmm pretrain` before a run, at the coordinator; `fedmm personalise` after it, at a hospital."""

from __future__ import annotations

import argparse
import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from fedmm.config import RunConfig, find_hospitals, parse_settings
from fedmm.errors import ConfigError, PolicyRefused
from fedmm.terminal import Adder, hospital_argument, open_site, run_argument

if TYPE_CHECKING:
    from client.site import Site
    from client.work import Work
    from fedmm.privacy.charge import Charge
    from fedmm.schema import Labels
    from fedmm.training.loop import Workbench
    from fedmm.training.pretrain import Pooled

EPOCHS = 30  # guess
STEPS, EPSILON = 20, 1.0  # guess: of a personal model; little beside what a run spends
LINES = 10  # of progress


def pretrain(args: argparse.Namespace) -> int:
    from client.site import Site
    from fedmm.models.store import save_model, save_spec
    from fedmm.training.pretrain import begin, check_open, open_plan
    from fedmm.training.pretrain import pretrain as train_openly

    # 1 may this be done with these settings and folders, before one of them is read
    config = RunConfig.from_flat(parse_settings(args.set))
    check_open(config)
    if args.out.exists() and any(args.out.iterdir()):
        raise ConfigError(f"{args.out} is not empty", fix="choose another --out")
    sites = [Site(folder, open_site(folder)) for folder in find_hospitals(args.hospitals_folder)]
    labels = _public_labels(sites)
    # 2 model
    model, bench = begin(config, labels)
    # 3 write down in each ledger that this is not covered, then train
    with ExitStack() as stack:
        works, charges, cohort = _written_down(sites, bench, config, epochs=args.epochs, stack=stack)
        studies = sum(len(batch.patient_B) for batch in cohort.physical(range(cohort.patients), limit=1))
        plan = open_plan(config, patients=cohort.patients, epochs=args.epochs)
        note = f"pretrained without privacy on {studies} studies of public data"
        print(f"{note}: {len(sites)} folders, {plan.rounds} epochs of {plan.steps_per_round} steps", flush=True)
        for charge in charges:
            charge.start()

        def check() -> None:
            for work in works:
                work.watch()

        show = progress_lines("epoch", lines=plan.rounds)
        train_openly(bench, cohort, plan, config=config, progress=show, check=check)
        for charge in charges:
            charge.settle()
    # 4 model
    model.load_trained(bench.weights())
    about = {"note": note, "studies": studies, "epochs": args.epochs, "folders": [site.name for site in sites]}
    settings = {key: value for key, value in config.flat().items() if key.startswith("training.")}
    save_spec(model.spec, args.out, extra={"pretraining": {**about, "settings": settings}})
    save_model(model, args.out)
    print(f"model   {args.out}\nuse it: fedmm simulate … --set federation.start_from={args.out}")
    return 0


def _written_down(
    sites: Sequence[Site], bench: Workbench, config: RunConfig, *, epochs: int, stack: ExitStack
) -> tuple[list[Work], list[Charge], Pooled]:
    """The folders, each for this work alone until `stack` ends; a row in each ledger, given back by `stack` if training never
    begins; the training patients of all as one cohort.

    Raises: LedgerUnusable, HospitalInvalid, PolicyRefused, HospitalBusy.
    """
    from client.app import patients_of
    from client.work import at_work
    from fedmm.privacy.plan import Event, Rate
    from fedmm.training.pretrain import Pooled

    run, works, charges, cohorts = f"pretrain-{secrets.token_hex(8)}", [], [], []
    for site in sites:  # in order of name, so that two of these never wait for each other
        stack.callback(site.close)
        works.append(stack.enter_context(at_work(site, config, run=run, round=0)))
        charge = site.ledger.reserve(Event("not_private", 0.0, Rate(1.0), epochs), run=run, round=0)
        stack.callback(charge.void)  # does nothing once training began
        charges.append(charge)
        cohorts.append(patients_of(site, bench, "train", charge))
    return works, charges, Pooled(cohorts)


def _public_labels(sites: Sequence[Site]) -> Labels:
    """Raises: PolicyRefused if one of them is not for this; ConfigError if they predict different labels."""
    for site in sites:
        if not site.config.privacy.allow_not_private:
            raise PolicyRefused(
                f"{site.folder.name} is not for training without privacy",
                why="pretraining protects nobody: public or synthetic data only",
                fix="privacy.allow_not_private = true in its site.toml, if the data are public",
            )
    first = sites[0].config.labels
    for site in sites[1:]:
        if site.config.labels != first:
            raise ConfigError(
                f"{sites[0].name} and {site.name} predict different labels",
                fix="make [labels] in every site.toml the same",
            )
    return first


def personalise(args: argparse.Namespace) -> int:
    from client.personal import personal_settings
    from client.personal import personalise as train_at_home
    from client.site import Site
    from fedmm.report.record import read_config

    settings = read_config(args.run)["settings"]
    config = personal_settings(
        settings, steps=args.steps, epsilon=args.epsilon, proximal=args.proximal, more=parse_settings(args.set)
    )
    site = Site(args.hospital, open_site(args.hospital))
    try:
        target, plan = train_at_home(
            site, args.run, config=config, parts=args.parts, progress=progress_lines("step", lines=LINES)
        )
        spent = site.ledger.spent()
    finally:
        site.close()
    if plan.private:
        print(f"epsilon {spent.epsilon:.2f} of {spent.ceiling:g} at delta {spent.delta:g} in the ledger of {site.name}")
    else:
        print("NOT PRIVATE: privacy.enabled is off; this model is not protected")
    print(f"model   {target} (stays here)\nscore it: fedmm evaluate {target} {args.hospital}")
    return 0


def progress_lines(what: str, *, lines: int) -> Callable[[int, int], None]:
    """About so many lines, with what is left: `epoch 3/30 | 4.1 s | 37 s left`."""
    from fedmm.report.record import format_seconds

    began = time.monotonic()
    first: list[tuple[int, float]] = []  # what comes before the first step, reading files say, comes once

    def show(done: int, total: int) -> None:
        took = time.monotonic() - began
        if not first:
            first.append((done, took))
        if done == total or done % max(1, total // lines) == 0:
            steps, seconds = done - first[0][0], took - first[0][1]
            left = f"{format_seconds(seconds / steps * (total - done))} left" if steps else "…"
            print(f"{what} {done:>{len(str(total))}}/{total} | {took:.1f} s | {left}", flush=True)

    return show


def add_commands(add: Adder) -> None:
    sub = add("pretrain", pretrain, "train a model to start from, without privacy, on public or synthetic folders",
              "fedmm pretrain PUBLIC --out MODEL --epochs 30")  # fmt: skip
    sub.add_argument("hospitals_folder", metavar="HOSPITALS", type=Path, help="folder of public hospital folders")
    sub.add_argument("--out", required=True, type=Path, metavar="MODEL", help="folder to write the model into")
    sub.add_argument("--epochs", type=_positive, default=EPOCHS, metavar="N", help=f"passes over the data ({EPOCHS})")
    sub.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of docs/settings.md")

    sub = add("personalise", personalise, "train a run's model on at this hospital, charged; the result stays here",
              "fedmm personalise RUN HOSPITALS/hospital_1 --parts head --epsilon 1")  # fmt: skip
    run_argument(sub)
    hospital_argument(sub)
    sub.add_argument("--parts", choices=["all", "head", "norms"], default="all", help="what is trained (all)")
    sub.add_argument("--proximal", type=float, default=0.0, metavar="MU", help="pull towards the run's weights (0)")
    sub.add_argument("--epsilon", type=float, default=EPSILON, metavar="E", help=f"what it may cost ({EPSILON:g})")
    sub.add_argument("--steps", type=_positive, default=STEPS, metavar="N", help=f"steps of training ({STEPS})")
    sub.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of docs/settings.md")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is below 1")
    return number
