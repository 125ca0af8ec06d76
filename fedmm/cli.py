"""The `fedmm` command. Exit codes: 0 done, 1 the answer is no, 2 wrong use, 3 refused, 4 failed (docs/errors.md)."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from fedmm import cli_attack, cli_audit, cli_kits, cli_ledger, cli_report, cli_scores, cli_sites, cli_train
from fedmm.config import RunConfig, find_hospitals, parse_settings
from fedmm.errors import ConfigError, FedmmError
from fedmm.schema import MODALITIES, MODALITY
from fedmm.terminal import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_NO,
    EXIT_WRONG_USE,
    EXITS,
    Adder,
    Command,
    adder,
    format_argument,
    hospital_argument,
    print_json,
    run_argument,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code; errors are one message on stderr, never a traceback."""
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # silences a tip that Ray prints in each process
    args = build_parser().parse_args(arguments)
    try:
        command: Command = args.run_command
        return command(args)
    except FedmmError as error:
        print(f"fedmm: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("fedmm: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # fedmm … | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # a full disk, a folder without permission
        print(f"fedmm: {error.strerror or type(error).__name__}: {error.filename or 'no file named'}", file=sys.stderr)
        return EXIT_FAILED


# --- data -------------------------------------------------------------------------------------------------------------


def synth(args: argparse.Namespace) -> int:
    from fedmm.data.synthetic import synthesize

    made = synthesize(
        args.hospitals_folder,
        count=args.hospitals,
        patients=args.patients,
        seed=args.seed,
        missing=args.missing,
        labels=args.labels,
        progress=_progress("studies"),
    )
    print("\n".join(str(path) for path in made))
    return 0


def import_pack(args: argparse.Namespace) -> int:
    from fedmm.data.chest import import_chest

    print("\n".join(str(path) for path in import_chest(args.pack, args.hospitals_folder)))
    return 0


def check(args: argparse.Namespace) -> int:
    from fedmm.data.check import check_hospital

    result = check_hospital(args.hospital)
    if args.format == "json":
        print_json(result.as_json())
    else:
        for problem in result.problems:
            print(problem)
        verdict = "ok" if result.ok else f"{len(result.problems)} problem(s): training refuses this folder"
        print(f"{args.hospital}: {result.studies} studies of {result.patients} patients, {verdict}")
    return 0 if result.ok else EXIT_NO


# --- runs -------------------------------------------------------------------------------------------------------------


def simulate(args: argparse.Namespace) -> int:
    hospitals = find_hospitals(args.hospitals_folder)
    settings = parse_settings(args.set)
    for key in ("data.hospitals", "federation.out"):
        if key in settings:
            raise ConfigError(f"--set {key} is given by the command itself", fix="use HOSPITALS and --out")
    settings |= {"data.hospitals": str(args.hospitals_folder.absolute()), "federation.out": str(args.out.absolute())}
    config = RunConfig.from_flat(settings)
    if config.federation.min_hospitals > len(hospitals):  # no one else can join a run on one machine
        raise ConfigError(
            f"federation.min_hospitals is {config.federation.min_hospitals}, but {args.hospitals_folder} has "
            f"{len(hospitals)} hospital folders",
            fix="lower federation.min_hospitals, or add hospitals",
        )
    if args.engine == "ray":
        simulate_on_ray(config)
    else:
        simulate_here(config, workers=args.workers)
    return 0


CLIENT = "client.app:app"


def simulate_here(config: RunConfig, *, workers: int | None, client: str = CLIENT) -> None:
    """Our engine: in this process (workers 0 or 1), or in worker processes; None: as many as this machine has room for."""
    import torch

    from fedmm.federation.capacity import auto_workers
    from fedmm.federation.local import LocalGrid
    from server.app import coordinate

    if workers is None:
        workers = auto_workers(config, hospitals=len(find_hospitals(Path(config.data.hospitals))))
    if workers > 1:
        torch.set_num_threads(1)  # the coordinator only adds up; the cores belong to the workers
    nodes = [{"site": str(path.absolute())} for path in find_hospitals(Path(config.data.hospitals))]
    with LocalGrid(client, nodes, workers=workers if workers > 1 else 0) as grid:
        coordinate(grid, config)


def simulate_on_ray(config: RunConfig, *, client: str = CLIENT) -> None:
    """Flower's simulation runtime. The server app runs in a thread there, so its error is carried over by hand."""
    import logging

    from flwr.app import Context
    from flwr.serverapp import Grid, ServerApp
    from flwr.simulation import run_simulation

    from client.site import HOSPITALS_VARIABLE
    from fedmm.federation.local import load_app
    from server.app import coordinate

    logging.getLogger("flwr").setLevel(logging.ERROR)
    failed: list[Exception] = []
    server_app = ServerApp()

    @server_app.main()
    def run(grid: Grid, context: Context) -> None:
        try:
            coordinate(grid, config)
        except Exception as error:
            failed.append(error)

    os.environ[HOSPITALS_VARIABLE] = config.data.hospitals  # Ray's workers inherit it; they get no node config
    run_simulation(
        server_app,
        load_app(client),
        num_supernodes=len(find_hospitals(Path(config.data.hospitals))),
        backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}},
    )
    if failed:
        raise failed[0]


def predict_one(args: argparse.Namespace) -> int:
    import torch

    from fedmm.data.dataset import study_batch
    from fedmm.models.heads import probabilities
    from fedmm.models.store import load_model

    model = load_model(args.run)
    spec = model.spec
    paths = {name: path for name in MODALITIES if (path := getattr(args, name)) is not None}
    batch = study_batch(spec.inputs, spec.labels, paths)
    with torch.no_grad():
        values = probabilities(model(batch.inputs, batch.seen_BM, batch.timeline), spec.labels)[0].tolist()
    chances = dict(zip(spec.labels.outputs, values, strict=True))
    seen = [name for name, here in zip(MODALITIES, batch.seen_BM[0].tolist(), strict=True) if here]
    if args.format == "json":
        print_json({"probabilities": chances, "modalities": seen})
    else:
        print(f"from {', '.join(seen) or 'nothing: this is the model without any input'}")
        for name, chance in chances.items():
            value = name == spec.labels.value_name  # on its own scale, not a probability
            print(f"  {name:<28} {chance:6.4g}" if value else f"  {name:<28} {chance:6.1%} {'█' * round(30 * chance)}")
        print("Research software: not for diagnosis.")
    return 0


def models(args: argparse.Namespace) -> int:
    from fedmm.models.catalogue import CHOICES, catalogue
    from fedmm.privacy.layers import way_of

    found = catalogue(way_of=way_of)
    if args.format == "json":
        print_json(found)
        return 0
    for leaf, detail in found["details"].items():
        size = f"{detail['trained']:>12,} weights" if detail["trained"] is not None else f"{'-':>20}"
        print(f"{leaf:<24} {size}  {detail['what'][:90]}")
        if clipped := detail.get("clipped"):
            print(f"{'':<46} {'; '.join(f'{layer}: {way}' for layer, way in clipped.items())}")
    print(f"heads: {', '.join(found['heads'])}; objectives: {', '.join(found['objectives'])}")
    for kind, ways in CHOICES.items():
        print(f"{kind}: {'; '.join(f'{name} ({how})' for name, how in ways.items())}")
    return 0


# --- words ------------------------------------------------------------------------------------------------------------


def _progress(what: str) -> Callable[[int, int], None]:
    """A line that rewrites itself on a terminal; silent elsewhere."""
    import time

    began = time.monotonic()

    def show(done: int, total: int) -> None:
        if sys.stderr.isatty() and total:
            left = (time.monotonic() - began) / max(done, 1) * (total - done)
            end = "\n" if done >= total else ""
            print(f"\r{done}/{total} {what}, {left:.0f} s left ", end=end, file=sys.stderr, flush=True)

    return show


# --- arguments --------------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_WRONG_USE, f"fedmm: {message}\n  fix: {self.prog} --help\n")


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="fedmm",
        description="Federated multimodal learning for hospitals: private by the patient, decided by the hospital.",
        epilog=EXITS,
    )
    parser.add_argument("--version", action="version", version=f"fedmm {_version()}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=_Parser)
    _data_commands(adder(commands))
    _run_commands(adder(commands))
    cli_train.add_commands(adder(commands))
    cli_audit.add_commands(adder(commands))
    cli_kits.add_commands(adder(commands))
    ledger = commands.add_parser("ledger", help="a hospital's privacy ledger", epilog=EXITS)
    parts = ledger.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=_Parser)
    cli_ledger.add_commands(adder(parts))
    for name, what, add in (
        ("coordinator", "the coordinator of real sites", cli_sites.add_coordinator),
        ("site", "a hospital of real sites", cli_sites.add_site),
        ("runs", "the runs of a coordinator", cli_sites.add_runs),
    ):
        group = commands.add_parser(name, help=what, epilog=EXITS)
        parts = group.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=_Parser)
        add(adder(parts))
    return parser


def _data_commands(add: Adder) -> None:
    sub = add("synth", synth, "make synthetic hospitals", "fedmm synth HOSPITALS --hospitals 4 --patients 200 --seed 7")
    sub.add_argument("hospitals_folder", metavar="HOSPITALS", type=Path, help="folder to write into")
    sub.add_argument("--hospitals", type=int, default=4, metavar="N", help="number of hospitals (4)")
    sub.add_argument("--patients", type=int, default=200, metavar="N", help="patients in each hospital (200)")
    sub.add_argument("--seed", type=int, default=7, help="same seed, same bytes (7)")
    sub.add_argument("--missing", type=float, default=0.3, help="share of missing modalities (0.3)")
    sub.add_argument(
        "--labels",
        choices=["default", "all"],
        default="default",
        help="all: also a stage, a risk and a time to an event",
    )

    sub = add(
        "import",
        import_pack,
        "make hospital folders of a data pack",
        "fedmm import chest ../shared/data/chest HOSPITALS",
    )
    sub.add_argument("kind", choices=["chest"], help="which pack")
    sub.add_argument("pack", metavar="PACK", type=Path, help="folder of the pack")
    sub.add_argument("hospitals_folder", metavar="HOSPITALS", type=Path, help="folder to write into, one folder a node")

    sub = add("check", check, "list every problem of a hospital folder", "fedmm check HOSPITALS/mhh_hannover")
    hospital_argument(sub)
    format_argument(sub)


def _run_commands(add: Adder) -> None:
    sub = add("simulate", simulate, "train over all hospitals on this machine",
              "fedmm simulate HOSPITALS --out RUN --set privacy.epsilon=3")  # fmt: skip
    sub.add_argument("hospitals_folder", metavar="HOSPITALS", type=Path, help="folder of hospital folders")
    sub.add_argument(
        "--out", required=True, type=Path, metavar="RUN", help="run folder; an unfinished run there goes on"
    )
    sub.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of docs/settings.md")
    sub.add_argument(
        "--engine", choices=["local", "ray"], default="local", help="local (default) or Flower's runtime on Ray"
    )
    sub.add_argument(
        "--workers",
        type=_whole,
        metavar="N",
        help="processes of the local engine (as many as cores, free memory and GPUs allow; 0: in this one)",
    )

    cli_scores.add_commands(add)
    cli_attack.add_commands(add)

    sub = add(
        "predict",
        predict_one,
        "predict for one study",
        "fedmm predict RUN --image X.dcm --report note.txt --audio cough.wav",
    )
    run_argument(sub)
    for name, modality in MODALITY.items():
        sub.add_argument(f"--{name}", type=Path, metavar="FILE", help=f"{modality.files}; may be absent")
    format_argument(sub)

    sub = add("models", models, "list the encoders, fusions and heads that --set model.… can choose", "fedmm models")
    format_argument(sub)

    cli_report.add_commands(add)


def _whole(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{number} is below 0")
    return number


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("fedmm")
    except PackageNotFoundError:
        return "0+unknown"


if __name__ == "__main__":
    sys.exit(main())
