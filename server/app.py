"""The coordinator's app: settings → who is there → plan → rounds → run folder."""

from __future__ import annotations

import logging
import os
import secrets
import time
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedmm.config import PLACES, RunConfig
from fedmm.errors import ConfigError
from fedmm.federation.aggregation import final_weights
from fedmm.federation.capacity import check_capacity
from fedmm.federation.members import Members, agree, introduce
from fedmm.federation.messages import PlanAsk
from fedmm.federation.robust import check_rule
from fedmm.federation.rounds import RoundRecord, run_rounds
from fedmm.federation.strategies import make_strategy
from fedmm.federation.wire import check_wire
from fedmm.models.multimodal import ModelSpec, MultimodalModel, build_model, check_leaves
from fedmm.models.store import load_spec, save_model, save_spec
from fedmm.pretrained_folder import digests
from fedmm.privacy.plan import PrivacyPlan, evaluation_noise, make_plan
from fedmm.report.record import MODEL_FILE, append_round, note_arrivals, progress_line, read_config, read_rounds
from fedmm.report.render import write_report
from fedmm.report.status import STATUS_FILE, StatusFile
from fedmm.report.trackers import Trackers
from fedmm.sites.kit import read_federation
from fedmm.training.augment import check_augment
from fedmm.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from fedmm.training.effect import check_effect
from fedmm.training.histograms import cells
from fedmm.training.local import check_local
from fedmm.training.loop import check_unit
from fedmm.training.pretrain import start_from
from server.grid import KIT_VARIABLE, LinkGrid

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    kit = os.environ.get(KIT_VARIABLE)  # set by fedmm coordinator up
    across = LinkGrid(grid, labels=read_federation(Path(kit)).labels) if kit else grid
    coordinate(across, RunConfig.from_flat(dict(context.run_config)))


def coordinate(grid: Grid, config: RunConfig) -> Path:
    """One run, from settings to report. Returns the run folder. A folder with an unfinished run goes on with it.

    Raises: ConfigError, PlanInvalid or RunFailed.
    """
    logging.getLogger("flwr").setLevel(logging.WARNING)
    check_leaves(config.model)
    check_local(config)
    check_effect(config)
    check_rule(config.federation)
    check_wire(config.federation)
    check_augment(config.training)  # names; once more when there is a model
    check_unit(config.model, config.privacy.unit)
    # 1 where, and is there something to go on with
    folder = run_folder(config)
    with StatusFile(folder, rounds=config.federation.rounds) as watch, Trackers(folder, say=say) as trackers:
        return run_in(folder, grid, config, watch=watch, trackers=trackers)


def run_in(folder: Path, grid: Grid, config: RunConfig, *, watch: StatusFile, trackers: Trackers) -> Path:
    """The run itself, from who is there to its report. Raises: as `coordinate`."""
    start = load_checkpoint(folder)
    if start is not None and start.round == 0 and other_settings(folder, config):
        start = None  # nothing was learnt yet: with other settings it begins anew
    if start is not None:
        check_same_settings(folder, config)
    pretrained = digests(config.model, config.data)
    # 2 who is there, and on which plan do they agree
    plan, members = plan_with_members(grid, config, folder, start)
    say_members(members)
    # 3 model
    spec = ModelSpec(inputs=config.data.inputs, model=config.model, labels=members.labels, pretrained=pretrained)
    check_capacity(spec, config, hospitals=len(members.names))
    model = build_model(spec, config.federation.seed)
    check_augment(config.training, model.fixed_parts())
    if start is None:
        origin = began_from(config, model)
        start = Checkpoint(0, dict(model.trained()), {}, {"run": secrets.token_hex(8)})
        save_spec(spec, folder, extra=describe(config, plan, members, run=start.notes["run"]) | origin)
        save_checkpoint(folder, start)  # before anybody is asked: killed in round 1, a run goes on under its name
    else:
        check_same_model(folder, spec)
        note_arrivals(folder, [asdict(arrival) for arrival in members.arrived])
        say(f"going on after round {start.round} of {config.federation.rounds}")
    recorded = [record["round"] for record in read_rounds(folder)]
    unfinished = RoundRecord(**start.notes["record"]) if start.round and start.round not in recorded else None
    watch.joined(members, run=start.notes["run"], round=start.round)
    say_plan(plan, weights=sum(value.numel() for value in model.trained().values()))
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
        unfinished=unfinished,
        watch=watch,
    ):
        append_round(folder, record)
        trackers.note(record)
        pace = (time.monotonic() - began) / max(1, record.round - start.round)
        say(progress_line(record, seconds_left=pace * (record.rounds - record.round)))
        for line in dict.fromkeys(f"  {f['hospital']}: {f['kind']}: {f['reason']}" for f in record.failures):
            say(line)  # once, though a hospital may say the same to training and to evaluation
    # 5 model and report
    model.load_trained(final_weights(final, config.federation.average))
    save_model(model, folder)
    page = write_report(folder)
    say(f"model   {folder / MODEL_FILE}\nreport  {page}")
    return folder


def plan_with_members(
    grid: Grid, config: RunConfig, folder: Path, start: Checkpoint | None
) -> tuple[PrivacyPlan, Members]:
    """The hospitals and the plan. A new run's noise is what epsilon and every ledger's rest ask for, whichever is more; a
    run that goes on keeps its plan, and a hospital that has too little left for the rest of it is refused when it comes.
    Across sites the labels are those of the federation's description, or those of the run that goes on.

    Raises: PlanInvalid, RunFailed, ConfigError.
    """
    enough, wait = config.federation.min_hospitals, config.federation.connect_seconds
    kits, labels = (grid.names, grid.labels) if isinstance(grid, LinkGrid) else (None, None)
    if start is not None:
        plan = PrivacyPlan.from_flat(read_config(folder)["plan"])
        ask = PlanAsk(plan=plan.to_flat(), rounds=plan.rounds - start.round, run=start.notes["run"])
        labels = labels and load_spec(folder).labels
        return plan, introduce(grid, ask, at_least=enough, wait=wait, kits=kits, labels=labels)
    plan = make_plan(config)
    wanted = replace(plan, evaluation_noise=evaluation_noise(config))
    ask = PlanAsk(plan=wanted.to_flat(), rounds=plan.rounds)
    members = introduce(grid, ask, at_least=enough, wait=wait, kits=kits, labels=labels)
    noisy = [hello for hello in members.hello.values() if hello.metrics == "noisy" and cells(hello.labels)]
    if wanted.evaluation_noise and noisy:
        plan = make_plan(config, noisy_scores=True)
    agreed, members = agree(plan, members, at_least=enough)
    if agreed.noise_multiplier > plan.noise_multiplier:
        fullest = max(members.hello.values(), key=lambda hello: hello.least_noise)
        say(
            f"noise raised from {plan.noise_multiplier:.3f} to {agreed.noise_multiplier:.3f} x C: "
            f"the ledger of {fullest.hospital} has no room for less"
        )
    return agreed, members


def run_folder(config: RunConfig) -> Path:
    """Raises: ConfigError if the folder holds a finished run or something else, or cannot be made."""
    name = config.federation.out or f"runs/{datetime.now(UTC):%Y%m%d-%H%M%S}"
    folder = Path(name).expanduser().absolute()
    if (folder / MODEL_FILE).exists():
        raise ConfigError(f"{folder} holds a finished run", fix="choose another --out, or delete the folder")
    try:
        existed = folder.exists()
        folder.mkdir(parents=True, exist_ok=True)  # now, so that a place that cannot be written is known before the run
        foreign = any(f.name != STATUS_FILE for f in folder.iterdir()) and not (folder / "config.json").exists()
        if not existed:
            folder.rmdir()  # made again with the first file: a run that cannot start leaves nothing
    except OSError as error:
        raise ConfigError(f"{folder} cannot be a run folder ({error.strerror})", fix="choose another --out") from None
    if foreign:
        raise ConfigError(f"{folder} is not empty and no run folder", fix="choose another --out")
    return folder


def check_same_settings(folder: Path, config: RunConfig) -> None:
    """A resumed run must be the same run. Where the folders lie may change. Raises: ConfigError naming what differs."""
    if differs := other_settings(folder, config):
        raise _another_run(folder, f"settings: {', '.join(differs)}")


def other_settings(folder: Path, config: RunConfig) -> list[str]:
    """Settings that the run in this folder was begun with otherwise."""
    before = read_config(folder)["settings"]
    return [k for k, v in config.flat().items() if k not in PLACES and before.get(k) != v]


def check_same_model(folder: Path, spec: ModelSpec) -> None:
    """Raises: ConfigError if the hospitals predict something else by now, or a pretrained folder is another one."""
    before = load_spec(folder)
    for what in ("labels", "pretrained"):
        if getattr(before, what) != getattr(spec, what):
            raise _another_run(folder, {"labels": "labels", "pretrained": "files in a pretrained folder"}[what])


def _another_run(folder: Path, what: str) -> ConfigError:
    return ConfigError(
        f"{folder} holds an unfinished run with other {what}",
        fix="give the same settings to go on with it, or another --out",
    )


def began_from(config: RunConfig, model: MultimodalModel) -> dict[str, Any]:
    """Load what `federation.start_from` names into the model. Returns what config.json says of it; nothing if none is named.

    Raises: ConfigError.
    """
    if not config.federation.start_from:
        return {}
    folder = Path(config.federation.start_from).expanduser()
    origin = start_from(folder, model)
    note = (origin["pretraining"] or {}).get("note", "not known how it was trained")
    say(f"start      {folder}: {note}; this run's epsilon does not cover that")
    return {"start_from": origin}


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
        "arrived": [asdict(arrival) for arrival in members.arrived],
    }


def say(text: str) -> None:
    print(text, flush=True)


def say_members(members: Members) -> None:
    say(f"hospitals  {', '.join(sorted(members.names.values()))}")
    for failure in members.failures:
        say(f"  {failure.hospital}: {failure.kind}: {failure.reason}")


def say_plan(plan: PrivacyPlan, *, weights: int) -> None:
    if plan.private:
        say(
            f"privacy    epsilon {plan.epsilon:g} at delta {plan.delta:g} per {plan.unit} and hospital for this run: "
            f"noise {plan.noise_multiplier:.3f} x C{plan.later()}, sampling rate {plan.sampling_rate:g}, "
            f"{plan.rounds} rounds of {plan.steps_per_round} steps"
        )
        if plan.unit == "record":
            say(
                "           RECORD LEVEL: a patient with several records is protected less; ledgers charge the patient's cost"
            )
    else:
        say("privacy    NOT PRIVATE: privacy.enabled is off; what this run releases is not protected")
    say(f"model      {weights:,} weights")
