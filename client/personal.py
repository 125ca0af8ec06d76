"""A hospital's own model: a run's, trained on at home. It is charged like anything that is learnt from patients, and stays.

Source of `proximal` as a personal model: Li et al. 2021, "Ditto": min F_i(v) + mu/2 |v - w*|^2, w* the run's weights.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from client.app import NoiseFor, patients_of, prepare, system_noise
from client.site import Site
from client.work import allowed, at_work
from fedmm.config import RunConfig
from fedmm.errors import BudgetExhausted, ConfigError, RunFailed
from fedmm.federation.members import MAX_RAISE
from fedmm.models.multimodal import MultimodalModel
from fedmm.models.store import CONFIG_FILE, WEIGHTS_FILE, load_model, save_model, save_spec
from fedmm.privacy.plan import PrivacyPlan, make_plan
from fedmm.privacy.policy import check_kind, check_model, check_plan
from fedmm.training.effect import check_effect
from fedmm.training.local import Still, check_local
from fedmm.training.loop import Nobody, train

MODELS = "models"  # folder in the hospital's own
OTHERS = {  # what --set may not change, and what decides it
    "federation.": "there is one round, here alone",
    "model.": "the run's model is trained on",
    "data.": "the run's model reads files as it did in the run",
    "training.local_steps": "say --steps",
    "training.proximal": "say --proximal",
    "privacy.epsilon": "say --epsilon",
    "privacy.evaluation_share": "no scores leave",
    "privacy.noise_last": "one round has one noise",
}


def personalise(
    site: Site,
    run: Path,
    *,
    config: RunConfig,
    parts: str,
    progress: Callable[[int, int], None],
    noise_for: NoiseFor = system_noise,
) -> tuple[Path, PrivacyPlan]:
    """Train `parts` of the run's model on this hospital's patients and keep the result in its models folder.

    config: one round, whose plan is the whole training (`personal_settings`).  progress: steps done, and in all.
    Guarantee: the ledger is charged before a patient is touched; whatever is refused leaves nothing behind.
    Raises: PolicyRefused, PlanInvalid, BudgetExhausted, HospitalInvalid, LedgerUnusable; ConfigError; RunFailed.
    """
    # 1 policy, before data is touched
    model = load_model(run)
    target = site.folder / MODELS / run.resolve().name
    if target.exists():
        raise ConfigError(f"{target} is there already", fix="give it another name, or delete it")
    check_kind("train", site.config)
    check_model(model.spec.digest(), site.config)
    config, own = allowed(config, site), f"personal-{secrets.token_hex(8)}"
    plan = affordable(site, make_plan(config))
    with (
        at_work(site, config, run=own, round=1) as work,
        drafted(target) as draft,  # before anything is paid: a disk that cannot be written costs nothing
    ):
        bench = prepare(site, model.spec, config, private=plan.private, still=all_but(model, parts))
        bench.load(dict(model.trained()))
        # 2 pay
        with site.ledger.reserve(plan.round_event(1), run=own, round=1, plan_digest=plan.digest()) as charge:
            cohort = patients_of(site, bench, "train", charge)
            if isinstance(cohort, Nobody):
                charge.void()
                raise RunFailed("the hospital's patients could not be loaded", fix="see the message above")
            # 3 train
            charge.start()
            noise, tell = noise_for(site.name, 1), work.progress("training")

            def told(step: int, steps: int) -> None:
                progress(step, steps)
                tell(step, steps)

            train(bench, cohort, plan, config=config.training, noise=noise, progress=told, check=work.watch)
            # 4 settle without a digest: the gate lets out nothing under this charge
            charge.settle()
        # 5 keep
        model.load_trained(bench.weights())
        about = {"run": own, "of": run.resolve().name, "parts": parts, "private": plan.private, "plan": plan.to_flat()}
        keep(model, draft, {"settings": config.flat(), "personal": about})
        draft.rename(target)
    return target, plan


def personal_settings(
    run: Mapping[str, Any], *, steps: int, epsilon: float, proximal: float, more: Mapping[str, Any]
) -> RunConfig:
    """The run's settings, for one training of `steps` steps that costs `epsilon`. more: what else was typed.

    Raises: ConfigError, also for what is typed and decided otherwise (`OTHERS`).
    """
    for name, decided in ((name, OTHERS[start]) for name in more for start in OTHERS if name.startswith(start)):
        raise ConfigError(f"--set {name} does not go with personalise", why=decided, fix=f"leave --set {name} out")
    config = RunConfig.from_flat(
        {
            **run,
            **more,
            "federation.strategy": "fedavg",
            "privacy.epsilon": epsilon,
            "privacy.evaluation_share": 0.0,
            "privacy.noise_last": 1.0,
            "federation.rounds": 1,
            "training.local_steps": steps,
            "training.proximal": proximal,
        }
    )
    check_local(config)
    check_effect(config)
    return config


def affordable(site: Site, plan: PrivacyPlan) -> PrivacyPlan:
    """The plan, with more noise where the ledger has no room for it as it is.

    Raises: PolicyRefused, PlanInvalid; BudgetExhausted if it would need more than MAX_RAISE times the noise.
    """
    check_plan(plan, site.config)
    noise = site.ledger.least_noise(plan, rounds=1)
    if noise > plan.noise_multiplier * MAX_RAISE:
        raise BudgetExhausted(
            f"the ledger has room for this only with noise {noise:.3g}; the plan has {plan.noise_multiplier:.3g}",
            why="so much noise would leave nothing of what is learnt",
            fix="fewer --steps or a smaller --epsilon",
        )
    return replace(plan, noise_multiplier=noise)


def all_but(model: MultimodalModel, parts: str) -> Still:
    """What stays as it is when only `parts` are trained: all, the head, or scale and shift of the normalisation layers."""
    if parts == "all":
        return ()
    names = set(model.trained())
    if parts == "head":
        chosen = {name for name in names if name.startswith(("head.", "further."))}
    else:
        norms = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.LayerNorm | nn.GroupNorm)]
        chosen = {f"{name}.{own}" for name, module in norms for own, _ in module.named_parameters(recurse=False)}
    return tuple(sorted(names - chosen))


@contextlib.contextmanager
def drafted(target: Path) -> Iterator[Path]:
    """A new folder beside `target` that its owner alone can open. Unless it was renamed it is gone afterwards, and so is the
    folder around it if that is empty. What killed processes left there goes first.

    Raises: ConfigError if there can be none.
    """
    draft = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        target.parent.mkdir(mode=0o700, exist_ok=True)
        for left in target.parent.glob(".*"):
            if left == draft or is_left_over(left):  # the same number: it was another process', before this one
                shutil.rmtree(left)
        draft.mkdir(mode=0o700)
    except OSError as error:
        raise ConfigError(
            f"{target.parent} cannot be written ({error.strerror})",
            fix="make it a folder of the account that runs fedmm",
        ) from None
    try:
        yield draft
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        with contextlib.suppress(OSError):  # others' models are in it
            target.parent.rmdir()


def is_left_over(folder: Path) -> bool:
    """Is it the draft of a process that is not there any more?"""
    number = folder.suffix.removeprefix(".")
    if not number.isdecimal():
        return False
    try:
        os.kill(int(number), 0)  # 0: only asks
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):  # another account's; no process number, so no draft
        return False
    return False


def keep(model: MultimodalModel, folder: Path, about: Mapping[str, object]) -> None:
    """The model, in files that their owner alone can read."""
    save_spec(model.spec, folder, extra=about)
    save_model(model, folder)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        (folder / name).chmod(0o600)
