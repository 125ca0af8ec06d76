"""Settings that would do nothing. Whoever types one believes in an effect that is not there, and pays epsilon for it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from fedmm.config import ROBUST, RunConfig
from fedmm.errors import ConfigError
from fedmm.schema import MODALITIES

DEFAULT = RunConfig()


class Idle(NamedTuple):
    """is_given: is it set, and to no effect? The rest is what the error says."""

    is_given: bool
    what: str
    why: str
    fix: str


def check_effect(config: RunConfig) -> None:
    """Does each of these settings that was changed do something, as the others are? What hangs on the hospitals' labels is not
    looked at: they are known later. Raises: ConfigError for the first that does nothing.
    """
    for idle in (
        *_of_one_step(config),
        *_of_the_model(config),
        *_of_a_study(config),
        *_of_privacy(config),
        *_of_the_rule(config),
    ):
        if idle.is_given:
            raise ConfigError(idle.what, why=idle.why, fix=idle.fix)


def _of_one_step(config: RunConfig) -> Iterator[Idle]:
    one = config.training.local_steps == 1
    yield Idle(
        one and config.training.proximal > 0,
        f"training.proximal = {config.training.proximal:g} does nothing with training.local_steps = 1",
        why="it pulls back to the weights that a round begins with, and the only step begins there",
        fix="2 or more local steps (personalise: --steps), or no pull",
    )
    yield Idle(
        one and config.federation.strategy == "scaffold",
        "federation.strategy = scaffold does nothing with training.local_steps = 1",
        why="the hospitals' corrections cancel in the average, so one step is that of fedavg",
        fix="2 or more local steps, or federation.strategy = fedavg",
    )


def _of_the_model(config: RunConfig) -> Iterator[Idle]:
    model = config.model
    yield Idle(
        model.tuning != DEFAULT.model.tuning and not any(model.pretrained(name) for name in MODALITIES),
        f"model.tuning = {model.tuning} does nothing: no encoder starts from a pretrained folder",
        why="it chooses what is trained of a pretrained encoder; the others leave no choice",
        fix=f"set one of {', '.join(f'model.{name}_from' for name in MODALITIES)}, or leave model.tuning out",
    )
    yield Idle(
        model.lora_rank != DEFAULT.model.lora_rank and model.tuning != "lora",
        f"model.lora_rank = {model.lora_rank} does nothing with model.tuning = {model.tuning}",
        why="it is the rank of the low-rank additions, and there are none",
        fix="model.tuning = lora, or leave model.lora_rank out",
    )


def _of_a_study(config: RunConfig) -> Iterator[Idle]:
    training, reader = config.training, config.data.report_tokenizer
    yield Idle(
        training.augment_copies > 1 and not training.augment and training.modality_dropout == 0,
        f"training.augment_copies = {training.augment_copies} does nothing but take time",
        why="nothing varies a study (training.augment) or hides a modality, so all copies are the same",
        fix="name modalities in training.augment, or leave training.augment_copies out",
    )
    yield Idle(
        bool(reader) and "report" in training.augment.split(","),
        f"training.augment: report does nothing with data.report_tokenizer = {reader}",
        why="which of its tokens make a word or a negation is not known, so such reports stay as they are",
        fix="take report out of training.augment",
    )
    yield Idle(
        training.focal_gamma != DEFAULT.training.focal_gamma and training.loss != "focal",
        f"training.focal_gamma = {training.focal_gamma:g} does nothing with training.loss = {training.loss}",
        why="only focal loss has a gamma",
        fix="training.loss = focal, or leave training.focal_gamma out",
    )


def _of_privacy(config: RunConfig) -> Iterator[Idle]:
    settings, default = config.flat(), DEFAULT.flat()
    for name in ("training.clip_rule", "training.clip_groups", "privacy.noise_last"):
        yield Idle(
            not config.privacy.enabled and settings[name] != default[name],
            f"{name} = {settings[name]} does nothing without privacy",
            why="no patient's gradient is clipped and no noise is added",
            fix=f"leave it at {default[name]}",
        )


def _of_the_rule(config: RunConfig) -> Iterator[Idle]:
    federation, default = config.federation, DEFAULT.federation
    robust = federation.strategy in ROBUST
    yield Idle(
        federation.byzantine > 0 and not robust,
        f"federation.byzantine = {federation.byzantine} does nothing with federation.strategy = {federation.strategy}",
        why="it averages whatever passes the checks, so one hospital that lies can move the model",
        fix=f"federation.strategy = one of {', '.join(ROBUST)}, or leave federation.byzantine out",
    )
    for name in ("server_learning_rate", "server_momentum", "weights"):
        value = getattr(federation, name)
        yield Idle(
            robust and value != getattr(default, name),
            f"federation.{name} = {value} does nothing with federation.strategy = {federation.strategy}",
            why="what it finds becomes the weights, without a step size or a memory, and all hospitals count alike",
            fix=f"leave federation.{name} out, or choose another strategy",
        )
    yield Idle(
        federation.clip_norm >= config.training.max_update_norm,
        f"federation.clip_norm = {federation.clip_norm:g} does nothing with "
        f"training.max_update_norm = {config.training.max_update_norm:g}",
        why="hospitals shorten their updates to that, and a longer one is refused",
        fix="a federation.clip_norm below training.max_update_norm",
    )
