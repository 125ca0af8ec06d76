"""The coordinator's app: settings → who is there → plan → rounds → run folder."""

from __future__ import annotations

import logging
import secrets
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedmm.config import RunConfig
from fedmm.errors import ConfigError
from fedmm.federation.rounds import Members, RoundRecord, introduce, run_rounds
from fedmm.federation.strategies import make_strategy
from fedmm.models.multimodal import ModelSpec, build_model
from fedmm.models.store import save_model, save_spec
from fedmm.privacy.plan import PrivacyPlan, make_plan
from fedmm.report.record import MODEL_FILE, append_round, progress_line, read_config, read_rounds
from fedmm.report.render import write_report
from fedmm.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint

CONNECT_SECONDS = 120.0  # guess: SuperNodes of a simulation register within seconds, real ones are started before
app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    coordinate(grid, RunConfig.from_flat(dict(context.run_config)))


def coordinate(grid: Grid, config: RunConfig) -> Path:
    """One run, from settings to report. Returns the run folder. A folder with an unfinished run goes on with it.

    Raises: ConfigError, PlanInvalid or RunFailed.
    """
    logging.getLogger("flwr").setLevel(logging.WARNING)
    # 1 where, and is there something to go on with
    folder = run_folder(config)
    start = load_checkpoint(folder)
    # 2 who is there
    members = introduce(grid, at_least=config.federation.min_hospitals, wait=CONNECT_SECONDS)
    say_members(members)
    # 3 plan and model
    plan = make_plan(config)
    spec = ModelSpec(inputs=config.data.inputs, model=config.model, labels=members.labels)
    model = build_model(spec, config.federation.seed)
    if start is None:
        start = Checkpoint(0, dict(model.state_dict()), {}, {"run": secrets.token_hex(8)})
        save_spec(spec, folder, extra=describe(config, plan, members, run=start.notes["run"]))
    else:
        check_same_run(folder, config, spec)
        say(f"going on after round {start.round} of {config.federation.rounds}")
        if start.round not in [record["round"] for record in read_rounds(folder)]:
            append_round(folder, RoundRecord(**start.notes["record"]))  # its evaluation was interrupted
    say_plan(plan, sum(value.numel() for value in model.state_dict().values()))
    # 4 rounds
    final = start

    def save(checkpoint: Checkpoint) -> None:
        nonlocal final
        final = checkpoint
        save_checkpoint(folder, checkpoint)

    began = time.monotonic()
    strategy = make_strategy(config.federation)
    for record in run_rounds(
        grid,
        strategy,
        run=start.notes["run"],
        config=config,
        spec=spec,
        plan=plan,
        members=members,
        start=start,
        save=save,
    ):
        append_round(folder, record)
        pace = (time.monotonic() - began) / (record.round - start.round)
        say(progress_line(record, seconds_left=pace * (record.rounds - record.round)))
        for line in dict.fromkeys(f"  {f['hospital']}: {f['kind']}: {f['reason']}" for f in record.failures):
            say(line)  # once, though a hospital may say the same to training and to evaluation
    # 5 model and report
    model.load_state_dict(final.weights)
    save_model(model, folder)
    page = write_report(folder)
    say(f"model   {folder / MODEL_FILE}\nreport  {page}")
    return folder


def run_folder(config: RunConfig) -> Path:
    """Raises: ConfigError if the folder holds a finished run or something else, or cannot be made."""
    name = config.federation.out or f"runs/{datetime.now(UTC):%Y%m%d-%H%M%S}"
    folder = Path(name).expanduser().absolute()
    if (folder / MODEL_FILE).exists():
        raise ConfigError(f"{folder} holds a finished run", fix="choose another --out, or delete the folder")
    try:
        existed = folder.exists()
        folder.mkdir(parents=True, exist_ok=True)  # now, so that a place that cannot be written is known before the run
        foreign = any(folder.iterdir()) and not (folder / "config.json").exists()
        if not existed:
            folder.rmdir()  # made again with the first file: a run that cannot start leaves nothing
    except OSError as error:
        raise ConfigError(f"{folder} cannot be a run folder ({error.strerror})", fix="choose another --out") from None
    if foreign:
        raise ConfigError(f"{folder} is not empty and no run folder", fix="choose another --out")
    return folder


def check_same_run(folder: Path, config: RunConfig, spec: ModelSpec) -> None:
    """A resumed run must be the same run. Where the folders lie may change. Raises: ConfigError naming what differs."""
    before, now = read_config(folder), config.flat()
    places = {"federation.out", "data.hospitals", "training.device"}
    differs = [k for k, v in now.items() if k not in places and before["settings"].get(k) != v]
    if differs or before.get("labels") != spec.labels.model_dump(mode="json"):
        raise ConfigError(
            f"{folder} holds an unfinished run with other settings: {', '.join(differs) or 'labels'}",
            fix="give the same settings to go on with it, or another --out",
        )


def describe(config: RunConfig, plan: PrivacyPlan, members: Members, *, run: str) -> dict[str, Any]:
    """What config.json says beyond the model: for people, the report and resuming."""
    return {
        "run": run,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "private": plan.private,
        "settings": config.flat(),
        "plan": plan.to_flat(),
        "hospitals": sorted(members.names.values()),
        "absent": [asdict(failure) for failure in members.failures],
    }


def say(text: str) -> None:
    print(text, flush=True)


def say_members(members: Members) -> None:
    say(f"hospitals  {', '.join(sorted(members.names.values()))}")
    for failure in members.failures:
        say(f"  {failure.hospital}: {failure.kind}: {failure.reason}")


def say_plan(plan: PrivacyPlan, weights: int) -> None:
    if plan.private:
        say(
            f"privacy    epsilon {plan.epsilon:g} at delta {plan.delta:g} per {plan.unit} and hospital for this run: "
            f"noise {plan.noise_multiplier:.3f} x C, sampling rate {plan.sampling_rate:g}, "
            f"{plan.rounds} rounds of {plan.steps_per_round} steps"
        )
    else:
        say("privacy    NOT PRIVATE: privacy.enabled is off; what this run releases is not protected")
    say(f"model      {weights:,} weights")
