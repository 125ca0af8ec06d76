"""The `fedmm` command. Exit codes: 0 done, 1 the answer is no, 2 wrong use, 3 refused, 4 failed (docs/errors.md)."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from fedmm.config import RunConfig, SiteConfig, find_hospitals, load_site, parse_settings
from fedmm.errors import ConfigError, FedmmError

if TYPE_CHECKING:
    from fedmm.privacy.chain import Head

EXIT_NO, EXIT_WRONG_USE, EXIT_FAILED, EXIT_INTERRUPTED = 1, 2, 4, 130
Command = Callable[[argparse.Namespace], int]


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
        _print_json(result.as_json())
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
        cores = len(os.sched_getaffinity(0))
        simulate_here(config, workers=min(len(hospitals), cores) if args.workers is None else args.workers)
    return 0


CLIENT = "client.app:app"


def simulate_here(config: RunConfig, *, workers: int, client: str = CLIENT) -> None:
    """Our engine: in this process (workers 0 or 1), or in worker processes."""
    import torch

    from fedmm.federation.local import LocalGrid
    from server.app import coordinate

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


def evaluate(args: argparse.Namespace) -> int:
    from fedmm.data.dataset import load_hospital
    from fedmm.models.store import load_model
    from fedmm.training.loop import Workbench, choose_device, predict
    from fedmm.training.metrics import join, score

    model = load_model(args.run)
    import torch

    bench = Workbench(model.spec, torch.device(choose_device("auto")))
    bench.load(model.state_dict())
    parts = []
    for hospital in args.hospital:
        if _open_site(hospital).labels != model.spec.labels:
            raise ConfigError(f"{hospital} has other labels than the model", fix="compare [labels] in its site.toml")
        parts.append(predict(bench, load_hospital(hospital, model.spec.inputs).cohort(args.split)))
    result = score(join(parts), model.spec.labels)
    if args.format == "json":
        _print_json(result)
    else:
        print(_score_text(result, split=args.split))
    return 0


def predict_one(args: argparse.Namespace) -> int:
    import torch

    from fedmm.data.dataset import study_batch
    from fedmm.models.heads import probabilities
    from fedmm.models.store import load_model
    from fedmm.schema import MODALITIES

    model = load_model(args.run)
    spec = model.spec
    batch = study_batch(spec.inputs, spec.labels, image=args.image, report=args.report, audio=args.audio)
    with torch.no_grad():
        values = probabilities(model(batch.inputs, batch.seen_BM), spec.labels)[0].tolist()
    chances = dict(zip(spec.labels.outputs, values, strict=True))
    seen = [name for name, here in zip(MODALITIES, batch.seen_BM[0].tolist(), strict=True) if here]
    if args.format == "json":
        _print_json({"probabilities": chances, "modalities": seen})
    else:
        print(f"from {', '.join(seen) or 'nothing: this is the model without any input'}")
        for name, chance in chances.items():
            print(f"  {name:<28} {chance:6.1%} {'█' * round(30 * chance)}")
        print("Research software: not for diagnosis.")
    return 0


def report(args: argparse.Namespace) -> int:
    from fedmm.report.render import write_report

    print(write_report(args.run))
    return 0


# --- ledger -----------------------------------------------------------------------------------------------------------


def ledger_show(args: argparse.Namespace) -> int:
    from fedmm.privacy.ledger import Ledger

    with Ledger.open(args.hospital, _open_site(args.hospital)) as ledger:
        content = ledger.as_json()
    if args.format == "json":
        _print_json(content)
        return 0
    print(_ledger_text(content))
    return 0


def ledger_verify(args: argparse.Namespace) -> int:
    from fedmm.errors import LedgerUnusable
    from fedmm.privacy.ledger import Ledger

    site = _open_site(args.hospital)
    heads = _heads(args.against, site.hospital.name) if args.against else []
    try:
        with Ledger.open(args.hospital, site, create=False) as ledger:
            ledger.verify(against=heads)
            rows = ledger.head().seq
    except LedgerUnusable as error:
        if args.format == "json":
            _print_json({"ok": False, "problem": error.what})
        else:
            print(error)
        return EXIT_NO
    if args.format == "json":
        _print_json({"ok": True, "rows": rows})
    else:
        print(f"{args.hospital}: {rows} rows, chain and signatures are intact")
    return 0


def ledger_export(args: argparse.Namespace) -> int:
    from fedmm.privacy.ledger import Ledger

    with Ledger.open(args.hospital, _open_site(args.hospital)) as ledger:
        _print_json(ledger.export_json())
    return 0


def _heads(run: Path, hospital: str) -> list[Head]:
    """What the ledger of a hospital said about itself in a run. Raises: ConfigError if it was not in it."""
    from fedmm.privacy.chain import Head
    from fedmm.report.record import read_config, read_rounds

    read_config(run)
    said = [record["epsilon"][hospital] for record in read_rounds(run) if hospital in record["epsilon"]]
    if not said:
        raise ConfigError(f"{hospital} trained in no round of {run}", fix="give a run that it took part in")
    return [Head(statement["ledger_sequence"], statement["ledger_hash"], "") for statement in said]


def ledger_forecast(args: argparse.Namespace) -> int:
    from fedmm.privacy.ledger import Ledger
    from fedmm.privacy.plan import Event, make_plan

    with Ledger.open(args.hospital, _open_site(args.hospital)) as ledger:
        last = ledger.export_json()["events"][-1:]
        event = Event.from_dict({k: last[0][k] for k in Event.__dataclass_fields__}) if last else None
        event = event or make_plan(RunConfig()).round_event()  # nothing spent yet: the default plan
        left, epsilon, ceiling = ledger.forecast(event), ledger.epsilon(), ledger.spent().ceiling
    if args.format == "json":
        _print_json({"rounds_left": left, "like": event.to_dict(), "epsilon": epsilon, "ceiling": ceiling})
    else:
        print(
            f"{left} more round(s) of {event.steps} step(s) with noise {event.noise_multiplier:.3f} and sampling rate "
            f"{event.sampling_rate:g} fit: epsilon is {epsilon:.4f} of {ceiling:g}"
        )
    return 0


def _ledger_text(content: dict[str, Any]) -> str:
    lines = [
        f"unit       {content['unit']}, {content['relation'].replace('_', ' ')}",
        f"epsilon    {content['epsilon']:.4f} of {content['ceiling']:g} at delta {content['delta']:g} (PLD, the number of record)",
        f"           {_or_dash(content['epsilon_prv'])} by PRV, {_or_dash(content['epsilon_rdp'])} by RDP",
        f"releases   {content['releases']}, reserved and not settled {content['reserved']}, refused {content['refusals']}",
    ]
    lines.append(f"head       row {content['head']['sequence']}, {content['head']['hash'][:16]}")
    if content.get("not_private"):
        lines.append(
            f"NOT PRIVATE {content['not_private']} release(s) left without protection under a research policy; "
            "epsilon does not cover them"
        )
    for run in content.get("by_run", []):
        lines.append("  " + ", ".join(f"{key} {value}" for key, value in run.items()))
    return "\n".join(lines)


def _open_site(hospital: Path) -> SiteConfig:
    """The policy of a folder that a person typed. Raises: ConfigError if there is none; as load_site."""
    if not hospital.is_dir():
        raise ConfigError(f"there is no hospital folder {hospital}", fix="check the path")
    return load_site(hospital)


# --- words ------------------------------------------------------------------------------------------------------------


def _score_text(result: dict[str, Any], *, split: str) -> str:
    lines = [
        f"{result['studies']} studies of {result['patients']} patients ({split})",
        f"  accuracy {_or_dash(result['accuracy'])} (always the most frequent answer: {_or_dash(result['majority'])}), "
        f"macro F1 {_or_dash(result['f1_macro'])}, mean AUROC {_or_dash(result['mean_auroc'])}",
    ]
    lines += [f"  AUROC {name:<28} {_or_dash(value)}" for name, value in result["auroc"].items()]
    for name, part in result["by_modality"].items():
        lines.append(
            f"  {name:<7} in {part['studies']} studies: mean AUROC {_or_dash(part['only']['mean_auroc'])} alone, "
            f"{_or_dash(part['without']['mean_auroc'])} without it"
        )
    return "\n".join(lines)


def _or_dash(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _print_json(content: Any) -> None:
    print(json.dumps(content, indent=1, allow_nan=False))


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


Adder = Callable[[str, Command, str, str], argparse.ArgumentParser]
EXITS = "exit codes: 0 done, 1 the answer is no, 2 wrong use, 3 refused, 4 failed (docs/errors.md)"


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="fedmm",
        description="Federated multimodal learning for hospitals: private by the patient, decided by the hospital.",
        epilog=EXITS,
    )
    parser.add_argument("--version", action="version", version=f"fedmm {_version()}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=_Parser)
    _data_commands(_adder(commands))
    _run_commands(_adder(commands))
    ledger = commands.add_parser("ledger", help="a hospital's privacy ledger", epilog=EXITS)
    parts = ledger.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=_Parser)
    _ledger_commands(_adder(parts))
    return parser


def _data_commands(add: Adder) -> None:
    sub = add("synth", synth, "make synthetic hospitals", "fedmm synth HOSPITALS --hospitals 4 --patients 200 --seed 7")
    sub.add_argument("hospitals_folder", metavar="HOSPITALS", type=Path, help="folder to write into")
    sub.add_argument("--hospitals", type=int, default=4, metavar="N", help="number of hospitals (4)")
    sub.add_argument("--patients", type=int, default=200, metavar="N", help="patients in each hospital (200)")
    sub.add_argument("--seed", type=int, default=7, help="same seed, same bytes (7)")
    sub.add_argument("--missing", type=float, default=0.3, help="share of missing modalities (0.3)")

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
    _hospital(sub)
    _format(sub)


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
        "--workers", type=_whole, metavar="N", help="processes of the local engine (one a core; 0: in this one)"
    )

    sub = add(
        "evaluate",
        evaluate,
        "score a finished model on hospitals you may read",
        "fedmm evaluate RUN HOSPITALS/hospital_1",
    )
    _run(sub)
    sub.add_argument(
        "hospital", metavar="HOSPITAL", type=Path, nargs="+", help="hospital folder; several are scored together"
    )
    sub.add_argument("--split", choices=["test", "train", "all"], default="test", help="which patients (test)")
    _format(sub)

    sub = add(
        "predict",
        predict_one,
        "predict for one study",
        "fedmm predict RUN --image X.dcm --report note.txt --audio cough.wav",
    )
    _run(sub)
    for name, what in (("image", "PNG, JPEG or DICOM"), ("report", "text"), ("audio", "WAV or FLAC")):
        sub.add_argument(f"--{name}", type=Path, metavar="FILE", help=f"{what}; may be absent")
    _format(sub)

    sub = add("report", report, "write RUN/report.html again", "fedmm report RUN")
    _run(sub)


def _ledger_commands(add: Adder) -> None:
    for name, run, text in (
        ("show", ledger_show, "what was spent, by three accountants"),
        ("verify", ledger_verify, "exit 1 if a row was changed, removed or added"),
        ("export", ledger_export, "the events as JSON, to recompute epsilon elsewhere"),
        ("forecast", ledger_forecast, "how many more rounds like the last one fit under the ceiling"),
    ):
        sub = add(name, run, text, f"fedmm ledger {name} HOSPITALS/hospital_1")
        _hospital(sub)
        _format(sub)
        if name == "verify":
            sub.add_argument(
                "--against", type=Path, metavar="RUN", help="also compare with what the ledger said in this run"
            )


def _adder(commands: Any) -> Adder:
    def add(name: str, run: Command, text: str, example: str) -> argparse.ArgumentParser:
        sub: argparse.ArgumentParser = commands.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            epilog=f"example: {example}\n{EXITS}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(run_command=run)
        return sub

    return add


def _whole(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{number} is below 0")
    return number


def _hospital(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("hospital", metavar="HOSPITAL", type=Path, help="hospital folder")


def _run(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("run", metavar="RUN", type=Path, help="run folder")


def _format(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--format", choices=["text", "json"], default="text", help="text (default) or json")


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("fedmm")
    except PackageNotFoundError:
        return "0+unknown"


if __name__ == "__main__":
    sys.exit(main())
