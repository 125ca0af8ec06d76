"""Commands of real sites: `fedmm coordinator`, `fedmm site`, `fedmm runs`."""

from __future__ import annotations

import argparse
from pathlib import Path

from fedmm.config import parse_settings
from fedmm.errors import RunFailed
from fedmm.sites.kit import open_kit
from fedmm.terminal import EXIT_NO, Adder, format_argument, print_json


def coordinator_up(args: argparse.Namespace) -> int:
    from server.operate import up

    up(open_kit(args.kit, role="coordinator"))
    return 0


def coordinator_run(args: argparse.Namespace) -> int:
    from server.operate import start

    number, folder = start(open_kit(args.kit, role="coordinator"), parse_settings(args.set), name=args.name)
    return _followed(args, number, folder)


def runs_resume(args: argparse.Namespace) -> int:
    from server.operate import resume

    number, folder = resume(open_kit(args.kit, role="coordinator"), args.run)
    return _followed(args, number, folder)


def _followed(args: argparse.Namespace, number: int, folder: Path) -> int:
    from server.operate import follow

    print(f"run        {folder}", flush=True)
    if args.detach:
        return 0
    try:
        run = follow(open_kit(args.kit), number, say=lambda text: print(text, end="", flush=True))
    except KeyboardInterrupt:
        print(f"\nthe run goes on; stop it with: fedmm coordinator stop {args.kit} --run {folder.name}")
        return 0
    if run.status != "finished:completed":
        raise RunFailed(
            f"the run ended as {run.status}", why=run.details, fix=f"fedmm runs resume {args.kit} {folder.name}"
        )
    return 0


def coordinator_stop(args: argparse.Namespace) -> int:
    from server.operate import down, stop_run

    kit = open_kit(args.kit, role="coordinator")
    if args.run:
        stop_run(kit, args.run)
        print(f"{args.run} is stopped; hospitals stop at their next step")
        return 0
    if not down(kit):
        print("nothing was running")
        return EXIT_NO
    return 0


def runs_list(args: argparse.Namespace) -> int:
    from server.operate import runs

    found = runs(open_kit(args.kit, role="coordinator"))
    if args.format == "json":
        print_json([{**vars(run), "folder": str(run.folder)} for run in found])
        return 0
    for run in found:
        print(f"{run.name:<32} {run.state:<8} round {run.round} of {run.rounds}  started {run.started}")
    return 0


def site_up(args: argparse.Namespace) -> int:
    from client.operate import up

    up(open_kit(args.kit, role="hospital"))
    return 0


def site_stop(args: argparse.Namespace) -> int:
    from client.operate import down

    if not down(open_kit(args.kit, role="hospital")):
        print("nothing was running")
        return EXIT_NO
    return 0


# --- arguments --------------------------------------------------------------------------------------------------------


def add_coordinator(add: Adder) -> None:
    sub = add(
        "up", coordinator_up, "keep SuperLink, executor and proxy running", "fedmm coordinator up KITS/coordinator"
    )
    kit_argument(sub)
    sub = add("run", coordinator_run, "start a run and follow it",
              "fedmm coordinator run KITS/coordinator --set federation.rounds=40")  # fmt: skip
    kit_argument(sub)
    sub.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of docs/settings.md")
    sub.add_argument("--name", default="", metavar="RUN", help="name of the run folder (the time)")
    detach_argument(sub)
    sub = add("stop", coordinator_stop, "stop a run, or everything", "fedmm coordinator stop KITS/coordinator")
    kit_argument(sub)
    sub.add_argument("--run", default="", metavar="RUN", help="only this run; the rest stays up")


def add_site(add: Adder) -> None:
    sub = add("up", site_up, "keep this hospital's SuperNode and executor running", "fedmm site up KITS/north_general")
    kit_argument(sub)
    sub = add("stop", site_stop, "stop them; training stops at its next step", "fedmm site stop KITS/north_general")
    kit_argument(sub)


def add_runs(add: Adder) -> None:
    sub = add("list", runs_list, "the coordinator's runs", "fedmm runs list KITS/coordinator")
    kit_argument(sub)
    format_argument(sub)
    sub = add("resume", runs_resume, "go on with a run that stopped", "fedmm runs resume KITS/coordinator RUN")
    kit_argument(sub)
    sub.add_argument("run", metavar="RUN", help="name of the run, of fedmm runs list")
    detach_argument(sub)


def kit_argument(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("kit", metavar="KIT", type=Path, help="kit folder, made by fedmm provision")


def detach_argument(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--detach", action="store_true", help="do not wait for the end")
