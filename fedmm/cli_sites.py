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


def runs_show(args: argparse.Namespace) -> int:
    from fedmm.report.status import describe_status, status_json
    from server.operate import find_run

    run = find_run(open_kit(args.kit, role="coordinator"), args.run)
    if args.format == "json":
        print_json(status_json(run.folder))
    else:
        print(f"{run.folder}\n{describe_status(run.folder)}")
    return 0


def coordinator_status(args: argparse.Namespace) -> int:
    from fedmm.report.status import describe_status
    from server.operate import status

    found = status(open_kit(args.kit, role="coordinator"))
    if args.format == "json":
        print_json(found)
        return 0 if found["processes"] is not None else EXIT_NO
    _say_processes(found["federation"], found["processes"])
    for node in found["hospitals"] or ():
        print(f"{node['name']:<24} {'connected' if node['connected'] else 'not connected'}")
    if found["run"] is not None:
        print(f"\n{found['run']['folder']}\n{describe_status(Path(found['run']['folder']))}")
    return 0 if found["processes"] is not None else EXIT_NO


def _say_processes(name: str, processes: dict[str, dict[str, int | str]] | None) -> None:
    if processes is None:
        print(f"{name} is not up")
        return
    said = [
        f"{p} ({'running' if one['pid'] else 'being started'}, {one['restarts']} restarts)"
        for p, one in processes.items()
    ]
    print(f"{name} is up: {', '.join(said)}")


def site_status(args: argparse.Namespace) -> int:
    from client.operate import status

    found = status(open_kit(args.kit, role="hospital"))
    if args.format == "json":
        print_json(found)
        return 0 if found["processes"] is not None else EXIT_NO
    _say_processes(found["hospital"], found["processes"])
    work, budget = found["work"], found["budget"]
    if work:
        code = f", code {work['code']} (docs/errors.md#{work['code']})" if work.get("code") else ""
        step = f"round {work['round']}, step {work['step']} of {work['steps']}"
        print(f"work       {work['phase']}, run {work['run'] or '-'}, {step}{code}")
    if budget:
        print(f"budget     epsilon {budget['epsilon']:.4f} of {budget['ceiling']:g} at delta {budget['delta']:g}")
    return 0 if found["processes"] is not None else EXIT_NO


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
    sub = add(
        "status",
        coordinator_status,
        "who is connected, what the newest run does",
        "fedmm coordinator status KITS/coordinator",
    )
    kit_argument(sub)
    format_argument(sub)
    sub = add("stop", coordinator_stop, "stop a run, or everything", "fedmm coordinator stop KITS/coordinator")
    kit_argument(sub)
    sub.add_argument("--run", default="", metavar="RUN", help="only this run; the rest stays up")


def add_site(add: Adder) -> None:
    sub = add("up", site_up, "keep this hospital's SuperNode and executor running", "fedmm site up KITS/north_general")
    kit_argument(sub)
    sub = add("status", site_status, "what runs here, what it works on, what is left",
              "fedmm site status KITS/north_general")  # fmt: skip
    kit_argument(sub)
    format_argument(sub)
    sub = add("stop", site_stop, "stop them; training stops at its next step", "fedmm site stop KITS/north_general")
    kit_argument(sub)


def add_runs(add: Adder) -> None:
    sub = add("list", runs_list, "the coordinator's runs", "fedmm runs list KITS/coordinator")
    kit_argument(sub)
    format_argument(sub)
    sub = add("show", runs_show, "how far a run is, hospital by hospital", "fedmm runs show KITS/coordinator RUN")
    kit_argument(sub)
    sub.add_argument("run", metavar="RUN", help="name of the run, of fedmm runs list")
    format_argument(sub)
    sub = add("resume", runs_resume, "go on with a run that stopped", "fedmm runs resume KITS/coordinator RUN")
    kit_argument(sub)
    sub.add_argument("run", metavar="RUN", help="name of the run, of fedmm runs list")
    detach_argument(sub)


def kit_argument(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("kit", metavar="KIT", type=Path, help="kit folder, made by fedmm provision")


def detach_argument(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--detach", action="store_true", help="do not wait for the end")
