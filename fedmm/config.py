"""All settings: `RunConfig` is what the coordinator asks for, `SiteConfig` is what a hospital decides.

A run setting has one dotted name (`privacy.epsilon`) in `--set`, in `[tool.flwr.app.config]`, in a run's config.json and
in docs/settings.md, which is generated from here.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, ValidationError, create_model, field_validator, model_validator

from fedmm.errors import ConfigError, PolicyRefused
from fedmm.schema import MODALITIES, MODALITY, PRETRAINED_NAME, Frozen, InputSpec, Labels

Scalar = str | int | float | bool
SITE_FILE = "site.toml"
PLACES = ("federation.out", "data.hospitals", "training.device")  # may differ where a run goes on: no result follows


# --- what the coordinator asks for ------------------------------------------------------------------------------------


class DataConfig(InputSpec):
    hospitals: str = Field("demo/hospitals", description="Folder of hospital folders; for engines on one machine.")

    @property
    def inputs(self) -> InputSpec:
        """The part that belongs to a saved model."""
        return InputSpec(**self.model_dump(exclude={"hospitals"}))


class Leaves(Frozen):
    fusion: str = Field("concat", description="How the modalities are joined.")
    width: int = Field(32, ge=4, le=1024, description="D, size of each modality's embedding.")
    tuning: Literal["full", "frozen", "lora", "last"] = Field(
        "frozen",
        description="What is trained of a pretrained encoder: all, nothing, low-rank additions, the last layer.",
    )
    lora_rank: int = Field(4, ge=1, le=64, description="Rank of the additions of tuning = lora.")
    task_weights: Literal["equal", "uncertainty"] = Field(
        "equal", description="How several kinds of labels share the loss; uncertainty: by a learnt variance each."
    )

    def encoder(self, modality: str) -> str:
        """Name of the modality's encoder."""
        return str(getattr(self, modality))

    def pretrained(self, modality: str) -> str:
        """Name of the folder that the modality's encoder starts from; empty: none."""
        return str(getattr(self, f"{modality}_from"))


_LEAF = {
    name: (str, Field(kind.encoder, description=f"{name} encoder.".capitalize())) for name, kind in MODALITY.items()
}
_FROM = {
    f"{name}_from": (
        str,
        Field("", pattern=PRETRAINED_NAME, description=f"Pretrained folder of the {name} encoder; empty: none."),
    )
    for name in MODALITIES
}
if TYPE_CHECKING:

    class ModelConfig(Leaves):
        """Beside these, for each modality NAME: its encoder and NAME_from."""

        def __init__(self, **settings: Any) -> None: ...

else:
    ModelConfig = create_model("ModelConfig", __base__=Leaves, **_LEAF, **_FROM)


class TrainingConfig(Frozen):
    batch_size: int = Field(
        128, ge=1, le=100_000, description="Public expected patients per step; divides the noisy sum."
    )
    sampling_rate: float = Field(1.0, gt=0, le=1, description="Probability that a patient takes part in a step.")
    local_steps: int = Field(1, ge=1, le=10_000, description="Steps per round at each hospital.")
    learning_rate: float = Field(0.3, gt=0, le=100, description="Step size of the local optimiser.")
    optimizer: Literal["sgd", "adam"] = Field("sgd", description="Local optimiser; fresh in each round.")
    max_studies: int = Field(
        5, ge=1, le=64, description="Public cap on studies per patient in a step, drawn at random."
    )
    physical_studies: int = Field(
        128, ge=1, le=65_536, description="Studies in memory at once; does not change results."
    )
    modality_dropout: float = Field(
        0.2, ge=0, lt=1, description="Probability that a present modality is hidden in a step."
    )
    clipping: Literal["hooks", "ghost"] = Field(
        "ghost",
        description="How gradients of patients are clipped. ghost: book-keeping in one backward pass. hooks: Opacus' own, one "
        "gradient for each study in memory: 2 to 100 times as slow, and the reference.",
    )
    clip_rule: Literal["flat", "auto"] = Field(
        "flat", description="Longer gradients are cut to C (flat), or all are brought to about C (auto, AUTO-S)."
    )
    clip_groups: Literal["all", "modality"] = Field(
        "all", description="One bound C for a patient's gradient, or equal shares of it for each modality's part."
    )
    augment: str = Field(
        "",
        pattern=r"^[a-z_]*(,[a-z_]+)*$",
        description="Modalities that are augmented on the fly, with commas between.",
    )
    augment_copies: int = Field(
        1, ge=1, le=64, description="Augmented copies of each study, averaged before the patient's gradient is clipped."
    )
    loss: Literal["cross_entropy", "focal"] = Field("cross_entropy", description="Loss of findings and of the class.")
    focal_gamma: float = Field(2.0, ge=0, le=10, description="How much focal loss looks away from what is easy.")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="Part of each target that is spread evenly.")
    positive_weight: float = Field(
        1.0, gt=0, le=100, description="Weight of a present finding against an absent one; public, never counted."
    )
    proximal: float = Field(0.0, ge=0, le=100, description="Pull towards the round's global weights (mu of FedProx).")
    max_update_norm: float = Field(
        1000.0, gt=0, le=1e9, description="Longest change of the weights in a round; a longer one is shortened to it."
    )
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N.")


class PrivacyConfig(Frozen):
    enabled: bool = Field(True, description="Off only where every site.toml allows it; then all output says so.")
    unit: Literal["patient", "record"] = Field(
        "patient", description="Whose participation is hidden; record only where site.toml allows it."
    )
    epsilon: float = Field(8.0, gt=0, le=20, description="Budget of the whole run at each hospital.")
    evaluation_share: float = Field(
        0.1, ge=0, le=0.9, description="Part of epsilon for noisy test scores after the last round; 0: none."
    )
    delta: float = Field(1e-4, gt=0, lt=0.01, description="Probability with which the guarantee may fail.")
    noise_last: float = Field(
        1.0, ge=0.25, le=4, description="Noise of the last quarter of the rounds, in units of the first quarter's."
    )
    max_grad_norm: float = Field(0.4, gt=0, le=1e6, description="C, longest gradient that one patient may contribute.")


# Strategies that withstand f lying hospitals, with a and b of the n >= a f + b that they need (federation/robust.py)
ROBUST = {"fedmedian": (2, 1), "fedtrimmedavg": (2, 1), "krum": (2, 3), "multikrum": (2, 3), "geomedian": (2, 1)}


class FederationConfig(Frozen):
    rounds: int = Field(60, ge=1, le=10_000, description="Rounds of the run.")
    strategy: Literal[
        "fedavg",
        "fedavgm",
        "fedadam",
        "fedyogi",
        "scaffold",
        "fedmedian",
        "fedtrimmedavg",
        "krum",
        "multikrum",
        "geomedian",
    ] = Field(
        "fedavgm",
        description="Server optimiser; scaffold: fedavg with control variates; from fedmedian on: rules that withstand "
        "lying hospitals and count all alike.",
    )
    byzantine: int = Field(
        0,
        ge=0,
        le=1000,
        description="f, how many hospitals may lie: min_hospitals must be 2 f + 1, for krum and multikrum 2 f + 3.",
    )
    clip_norm: float = Field(
        0.0,
        ge=0,
        le=1e9,
        description="Each hospital's update is shortened to this L2 length before it counts; 0: it is not.",
    )
    wire: Literal["fp32", "fp16", "int8", "topk"] = Field(
        "fp32",
        description="How hospitals send their updates: exactly, in half precision, in 8 bits rounded at random, or the largest "
        "hundredth with what is left kept for the next round.",
    )
    server_learning_rate: float = Field(1.0, gt=0, le=100, description="Step size of the server optimiser.")
    server_momentum: float = Field(
        0.9, ge=0, lt=1, description="Momentum (fedavgm) or first moment (fedadam, fedyogi)."
    )
    average: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Decay of the running average of the weights that becomes the model; 0: the last ones.",
    )
    start_from: str = Field("", description="Folder of a model (fedmm pretrain) to start from; empty: random weights.")
    weights: Literal["uniform", "declared", "noisy"] = Field(
        "uniform", description="How hospitals count in the average: alike, by declared bound, by noisy count."
    )
    min_hospitals: int = Field(1, ge=1, le=10_000, description="Fewer usable replies than this end the run.")
    retries: int = Field(
        2,
        ge=0,
        le=100,
        description="How often hospitals out of reach are asked again in a round, while too few answered.",
    )
    connect_seconds: float = Field(
        120.0, ge=0, le=604_800, description="Wait for min_hospitals to be connected, at the start and in each round."
    )
    evaluate_every: int = Field(10, ge=0, le=10_000, description="Rounds between evaluations; 0: only after the last.")
    round_timeout: float = Field(3600.0, gt=0, le=604_800, description="Seconds to wait for the replies of a round.")
    out: str = Field("", description="Run folder of a new run; empty: runs/<time> where the ServerApp runs.")
    seed: int = Field(1, ge=0, lt=2**31, description="Model initialisation; never noise, sampling or augmentation.")

    @property
    def needed(self) -> int:
        """Hospitals without which a robust strategy withstands nobody; 1 for the others."""
        times, more = ROBUST.get(self.strategy, (0, 1))
        return times * self.byzantine + more


class RunConfig(Frozen):
    """Settings of a run. Defaults equal `[tool.flwr.app.config]` in pyproject.toml (a test)."""

    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    training: TrainingConfig = TrainingConfig()
    privacy: PrivacyConfig = PrivacyConfig()
    federation: FederationConfig = FederationConfig()

    @classmethod
    def from_flat(cls, settings: Mapping[str, Any]) -> RunConfig:
        """From dotted keys. Raises: ConfigError naming each wrong key and what it may be."""
        known = cls().flat()
        tree: dict[str, dict[str, Any]] = {}
        for key, value in settings.items():
            section, _, name = key.partition(".")
            if key not in known:
                raise ConfigError(f"unknown setting {key!r}", fix=_nearest(key, known))
            tree.setdefault(section, {})[name] = value
        try:
            return cls.model_validate(tree)
        except ValidationError as error:
            raise ConfigError(_explain(error), fix="docs/settings.md lists every setting and its range") from None

    def flat(self) -> dict[str, Scalar]:
        """Dotted keys with scalar values, in order of definition."""
        return {f"{s}.{n}": v for s, fields in self.model_dump().items() for n, v in fields.items()}

    def replace(self, **settings: Any) -> RunConfig:
        """A copy with dotted keys changed: `config.replace(**{"privacy.epsilon": 3})`."""
        return RunConfig.from_flat({**self.flat(), **settings})


def parse_settings(pairs: list[str]) -> dict[str, str]:
    """`["a.b=1"]` to `{"a.b": "1"}`. Raises: ConfigError."""
    settings = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set {pair!r} has no '='", fix="write --set privacy.epsilon=3")
        settings[key.strip()] = value.strip()
    return settings


def settings_table() -> str:
    """The table of docs/settings.md, in Markdown."""
    lines = ["| setting | default | range | meaning |", "|---|---|---|---|"]
    for section, field in RunConfig.model_fields.items():
        properties = field.annotation.model_json_schema()["properties"]  # type: ignore[union-attr]
        for name, info in properties.items():
            lines.append(
                f"| `{section}.{name}` | `{info['default']}` | {_range(info)} | {info.get('description', '')} |"
            )
    return "\n".join(lines) + "\n"


SETTINGS_PAGE = """# Settings of a run

One name everywhere: `fedmm simulate … --set NAME=VALUE`, `flwr run . -c "NAME=VALUE"`, a run's `config.json`.
Made from `fedmm/config.py` by `make settings`; a test keeps it so.

"""


def write_settings_page(path: Path = Path("docs/settings.md")) -> None:
    """docs/settings.md."""
    path.write_text(SETTINGS_PAGE + settings_table(), encoding="utf-8")


# --- what a hospital decides ------------------------------------------------------------------------------------------


class HospitalSection(Frozen):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$", description="Public name of this hospital.")


class SitePrivacy(Frozen):
    """No defaults for what decides the promise: a missing line is a refusal."""

    epsilon: float = Field(gt=0, description="Ceiling over everything that ever leaves, all runs together.")
    delta: float = Field(gt=0, lt=0.01, description="Delta at which the ledger is read.")
    public_patients: int = Field(ge=1, description="A public lower bound of the patients here; delta depends on it.")
    allow_not_private: bool = Field(False, description="May a run without privacy use this folder? Research data only.")
    min_noise_multiplier: float = Field(0.3, gt=0, description="Least noise, in units of the clipping norm.")
    max_sampling_rate: float = Field(1.0, gt=0, le=1, description="Highest sampling rate that is accepted.")
    isolate_patients: bool = Field(
        False, description="Compute each patient in a batch of its own: slower, and rounding cannot couple patients."
    )
    allow_record_unit: bool = Field(
        False, description="May a run hide single records only? The ledger still charges it for whole patients."
    )

    @model_validator(mode="after")
    def _delta_is_small(self) -> SitePrivacy:
        if self.delta >= 1 / (10 * self.public_patients):
            raise ValueError(
                f"delta {self.delta:g} must be below 1 / (10 x public_patients) = {1 / (10 * self.public_patients):g}"
            )
        return self


class SiteRelease(Frozen):
    counts: Literal["no", "declared", "noisy"] = Field(
        "no", description="May public_patients, or a noisy count that is charged once, leave as a weight?"
    )
    metrics: Literal["no", "noisy", "exact"] = Field(
        "no", description="noisy: score histograms, charged. exact: unprotected test scores; research data only."
    )
    modalities: tuple[str, ...] = Field(
        MODALITIES, description="What this hospital says in public that it has; of the others' parts nothing leaves."
    )

    @field_validator("modalities")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if not names or set(names) - set(MODALITIES):
            raise ValueError(f"some of {', '.join(MODALITIES)}")
        return tuple(name for name in MODALITIES if name in names)


class SiteRuns(Frozen):
    """Which runs are accepted at all."""

    kinds: tuple[Literal["train", "evaluate"], ...] = Field(("train", "evaluate"), description="What may be asked for.")
    models: tuple[str, ...] = Field(
        (), description="Digests of the model configurations that are accepted; none: every shipped architecture."
    )
    min_patients: int = Field(
        0, ge=0, le=10**6, description="Fewer training patients than this take no part; decided by a noisy count."
    )
    max_abs_weight: float = Field(
        1000.0, gt=0, le=1e30, description="Weights larger than this are refused; honest ones stay below 10."
    )


class SiteLedger(Frozen):
    path: str = Field("ledger.sqlite", min_length=1, description="Ledger file, relative to the hospital folder.")


class SiteLimits(Frozen):
    """What a training may take of this hospital's machine. 0 and empty: what the run asks for."""

    device: str = Field("", pattern=r"^(auto|cpu|cuda(:[0-9]{1,3})?)?$", description="auto, cpu, cuda or cuda:N.")
    memory_mb: int = Field(0, ge=0, description="MiB: of the GPU, or of this process' data where it trains on the CPU.")
    physical_studies: int = Field(0, ge=0, le=65_536, description="Most studies in memory at once.")
    seconds: float = Field(0.0, ge=0, allow_inf_nan=False, description="Longest time for one answer, waiting included.")
    threads: int = Field(0, ge=0, le=1024, description="Threads of a training and of decoding files.")
    trainings: int = Field(1, ge=1, le=64, description="How many runs may train at once; one run never twice at once.")


class SiteCache(Frozen):
    """What is kept of the hospital's files, decoded, in HOSPITAL/.fedmm, so that none is opened twice."""

    gigabytes: float = Field(
        50.0, ge=0, description="Most that it may take on disk; what was not used longest goes first."
    )
    encrypted: bool = Field(
        False, description="AES-256-GCM under cache.key beside the ledger; then it is in memory in use."
    )


class SiteConfig(Frozen):
    """site.toml of one hospital. Fails closed: no file, no training."""

    hospital: HospitalSection
    labels: Labels
    privacy: SitePrivacy
    release: SiteRelease = SiteRelease()
    runs: SiteRuns = SiteRuns()
    ledger: SiteLedger = SiteLedger()
    limits: SiteLimits = SiteLimits()
    cache: SiteCache = SiteCache()

    @model_validator(mode="after")
    def _exact_metrics_are_research(self) -> SiteConfig:
        if self.release.metrics == "exact" and not self.privacy.allow_not_private:
            raise ValueError(
                "release.metrics = 'exact' is for research data: it needs privacy.allow_not_private = true"
            )
        return self


def load_site(hospital: Path) -> SiteConfig:
    """Read HOSPITAL/site.toml. Raises: PolicyRefused if it is missing, unreadable or wrong (it fails closed)."""
    path = hospital / SITE_FILE
    try:
        settings = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PolicyRefused(
            f"no {SITE_FILE} in the hospital folder",
            why="without the hospital's own policy nothing may be trained",
            fix=f"copy deploy/site.example.toml to {path} and fill it in",
        ) from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise PolicyRefused(
            f"{SITE_FILE} cannot be read ({type(error).__name__})", fix="compare it with deploy/site.example.toml"
        ) from None
    try:
        return SiteConfig.model_validate(settings)
    except ValidationError as error:
        raise PolicyRefused(
            f"{SITE_FILE} is not valid: {_names(error)}",  # crosses to the coordinator: names of lines, never values
            why=_explain(error, values=False),
            fix="compare it with deploy/site.example.toml",
        ) from None


def find_hospitals(folder: Path) -> list[Path]:
    """Hospital folders (those with a manifest or a policy) in order of name; FOLDER itself when it is one.

    Raises: ConfigError if there is none.
    """
    marks = (SITE_FILE, "manifest.csv", "manifest.parquet")
    if any((folder / mark).exists() for mark in marks):
        return [folder]
    found = sorted(p for p in folder.glob("*") if p.is_dir() and any((p / m).exists() for m in marks))
    if not found:
        raise ConfigError(
            f"no hospital folder in {folder}",
            why="a hospital folder has a manifest.csv and a site.toml",
            fix="make some with: fedmm synth demo/hospitals",
        )
    return found


def installed_version() -> str:
    try:
        return version("fedmm")
    except PackageNotFoundError:  # run from a checkout or a Flower bundle
        return "0+unknown"


# --- explanations -----------------------------------------------------------------------------------------------------


def _names(error: ValidationError) -> str:
    return ", ".join(".".join(str(part) for part in item["loc"][:2]) or "settings" for item in error.errors())


def _explain(error: ValidationError, *, values: bool = True) -> str:
    parts = []
    for item in error.errors(include_url=False):
        name = ".".join(str(part) for part in item["loc"]) or "settings"
        given = item.get("input")
        shown = f" (given: {given!r})" if values and isinstance(given, str | int | float | bool) else ""
        parts.append(f"{name}: {item['msg'].removeprefix('Value error, ')}{shown}")
    return "; ".join(parts)


def _nearest(key: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(key, known, n=3, cutoff=0.4)
    return f"did you mean {' or '.join(close)}?" if close else "docs/settings.md lists every setting"


def _range(info: Mapping[str, Any]) -> str:
    if "enum" in info:
        return ", ".join(f"`{value}`" for value in info["enum"])
    if "const" in info:
        return f"`{info['const']}`"
    signs = (("exclusiveMinimum", "> "), ("minimum", ">= "), ("exclusiveMaximum", "< "), ("maximum", "<= "))
    return ", ".join(f"{sign}{info[key]:.12g}" for key, sign in signs if key in info) or str(info.get("type", ""))
