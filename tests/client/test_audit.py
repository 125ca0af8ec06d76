"""The whole audit on small hospitals: honest code passes, and each of six breaks is found by what is meant to find it.

False alarms: each statistical check fails honest code with probability 1e-6, the bound of all views together with at most 5 %
(and in practice far less: it must exceed the whole claim).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message
from torch import Tensor

import fedmm.privacy.clip
from client.audit import AuditedHospital
from client.gate import Trained
from client.site import Site
from fedmm.cli import main
from fedmm.cli_audit import run_audit
from fedmm.data.synthetic import synthesize
from fedmm.errors import ConfigError, HospitalInvalid, RunFailed
from fedmm.federation.messages import TrainAsk
from fedmm.privacy.charge import Charge
from fedmm.privacy.engine import PatientOptimizer
from fedmm.privacy.ledger import Ledger
from fedmm.privacy.noise import SystemNoise
from fedmm.privacy.plan import Event, Rate
from fedmm.training import loop
from fedmm.training.loop import forget_workbenches
from tests.fixed_noise import fixed_noise
from tests.privacy.test_broken import TwoPassesOfColumns

SMALL: dict[str, Any] = {
    "data.image_size": 16,
    "data.report_tokens": 32,
    "data.report_buckets": 64,
    "data.audio_seconds": 0.5,
    "model.width": 8,
    "training.device": "cpu",
    "federation.rounds": 4,
    "federation.min_hospitals": 1,
}
CLAIM, CANARIES = 1.5, 1000


@pytest.fixture(scope="module")
def hospitals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("audited") / "hospitals"
    synthesize(folder, count=2, patients=60, seed=3)
    return folder


@pytest.fixture(autouse=True)
def fresh_models() -> Any:
    """A broken engine must not stay in a workbench of this process."""
    forget_workbenches()
    yield
    forget_workbenches()


Auditor = Callable[..., dict[str, Any]]


@pytest.fixture
def audited(hospitals: Path, tmp_path: Path) -> Auditor:
    def run(**how: Any) -> dict[str, Any]:
        settings = {**SMALL, **how.pop("settings", {})}
        return run_audit(hospitals, tmp_path / "audit", claimed=CLAIM, canaries=CANARIES, settings=settings, **how)

    return run


def failed(result: dict[str, Any]) -> set[str]:
    return {check["name"] for check in result["checks"] if not check["passed"]}


def test_honest_code_passes_and_its_ledgers_stay_untouched(audited: Auditor, hospitals: Path, tmp_path: Path) -> None:
    result = audited()
    assert failed(result) == set()
    assert result["verdict"] == "consistent"
    assert 0 <= result["lower_bound"] <= CLAIM == result["claimed_epsilon"]
    assert {view["canary"] for view in result["views"]} == {"dirac", "stranger", "one modality", "mislabelled"}
    assert len({view["seen_by"] for view in result["views"]}) == 3
    assert json.loads((tmp_path / "audit" / "audit.json").read_text()) == result
    assert not list(hospitals.glob("*/ledger*"))


# --- broken on purpose --------------------------------------------------------------------------------------------------


def test_a_quarter_of_the_noise_is_found(audited: Auditor, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = PatientOptimizer.add_noise

    def too_little(self: PatientOptimizer) -> None:
        planned, self.noise_multiplier = self.noise_multiplier, self.noise_multiplier / 4
        honest(self)
        self.noise_multiplier = planned

    monkeypatch.setattr(PatientOptimizer, "add_noise", too_little)
    result = audited()
    assert result["verdict"] == "broken"
    assert "spread of the noise" in failed(result)
    assert result["lower_bound"] > CLAIM  # by the canaries alone


def test_no_clipping_is_found(audited: Auditor, monkeypatch: pytest.MonkeyPatch) -> None:
    def unclipped(norm_GP: Tensor, max_norm: float, *, rule: str = "flat") -> tuple[Tensor, int]:
        return torch.ones_like(norm_GP), 0

    monkeypatch.setattr("fedmm.training.loop.rehearse", lambda *_, **__: None)  # it would refuse to begin
    monkeypatch.setattr(fedmm.privacy.clip, "clip_factors", unclipped)
    result = audited()
    assert result["verdict"] == "broken"
    assert "sensitivity without noise, C = 0.01" in failed(result)
    assert result["lower_bound"] > CLAIM


def test_ghost_clipping_with_a_loss_of_shape_s_1_is_found(audited: Auditor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "PrivateEngine", TwoPassesOfColumns)
    result = audited(settings={"training.clipping": "ghost", "federation.rounds": 1})
    assert result["verdict"] == "broken"
    assert "sensitivity without noise, C = 0.01" in failed(result)


def test_sampling_twice_is_found(audited: Auditor, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = SystemNoise.sample

    def twice(self: SystemNoise, count: int, rate: Rate) -> list[int]:
        return sorted({*honest(self, count, rate), *honest(self, count, rate)})

    monkeypatch.setattr(SystemNoise, "sample", twice)
    result = audited(settings={"training.sampling_rate": 0.2})
    assert result["verdict"] == "broken"
    assert "sampling rate" in failed(result)


def test_a_ledger_that_forgets_a_round_is_found(audited: Auditor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put back to an older copy between rounds, as by a careless restore."""
    honest = AuditedHospital.fit

    def fit(self: AuditedHospital, site: Site, ask: TrainAsk, message: Message) -> Trained:
        ledger = site.folder / "ledger.sqlite"
        if site.name == self.name and ask.round == 2:
            site.close()
            shutil.copy(ledger, ledger.with_suffix(".before"))
        if site.name == self.name and ask.round == 3:
            for part in site.folder.glob("ledger.sqlite-*"):
                part.unlink()
            shutil.copy(ledger.with_suffix(".before"), ledger)
        return honest(self, site, ask, message)

    monkeypatch.setattr(AuditedHospital, "fit", fit)
    result = audited()
    assert result["verdict"] == "broken"
    assert "every round that left is in the ledger" in failed(result)
    assert "steps taken are steps charged" in failed(result)


def test_a_fixed_noise_seed_is_found(audited: Auditor) -> None:
    result = audited(noise_for=fixed_noise, settings={"federation.rounds": 1})
    assert result["verdict"] == "broken"
    assert failed(result) == {"independence of the noise"}


def test_a_head_without_noise_is_found_although_it_is_a_hundredth_of_the_weights(
    audited: Auditor, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = PatientOptimizer.add_noise

    def forgetful(self: PatientOptimizer) -> None:
        honest(self)
        self.params[-1].grad = self.params[-1].summed_grad.clone()

    monkeypatch.setattr(PatientOptimizer, "add_noise", forgetful)
    result = audited(settings={"federation.rounds": 1})
    assert result["verdict"] == "broken"
    assert "spread of the noise" in failed(result)


def test_a_ledger_that_writes_down_more_noise_than_was_added_is_found(
    audited: Auditor, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = Ledger.reserve

    def generous(self: Ledger, event: Event, **of: Any) -> Charge:
        return honest(self, replace(event, noise_multiplier=2 * event.noise_multiplier), **of)

    monkeypatch.setattr(Ledger, "reserve", generous)
    monkeypatch.setattr(Ledger, "resume", lambda *_, **__: None)
    result = audited(settings={"federation.rounds": 1})
    assert result["verdict"] == "broken"
    assert failed(result) == {"charged is what was planned"}


# --- the command --------------------------------------------------------------------------------------------------------


def test_the_command_answers_with_the_keys_of_its_contract_and_says_no_with_exit_code_1(
    hospitals: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = [f"--set={name}={value}" for name, value in {**SMALL, "federation.rounds": 1}.items()]
    words = ["audit", str(hospitals / "hospital_2"), "--canaries", "40", "--format", "json", *given]
    assert main([*words, "--out", str(tmp_path / "one")]) == 0
    told = json.loads(capsys.readouterr().out)
    contract = {"lower_bound", "claimed_epsilon", "canaries", "guesses", "correct", "significance", "verdict"}
    assert contract <= set(told)
    assert told["hospital"] == "hospital_2"
    assert told["claimed_epsilon"] == 1.5
    monkeypatch.setattr("fedmm.training.proof.LIMIT", 0.5)  # as if a patient moved the sum too far
    assert main([*words[:4], *given, "--out", str(tmp_path / "two")]) == 1
    assert "PRIVACY IS BROKEN: failed: sensitivity" in capsys.readouterr().out


def test_without_a_research_policy_no_real_patient_is_in_the_copy(hospitals: Path, tmp_path: Path) -> None:
    strict = changed_policy(
        hospitals / "hospital_1",
        tmp_path / "strict",
        ("allow_not_private = true", "allow_not_private = false"),
        ('"exact"', '"no"'),
    )
    result = run_audit(strict, tmp_path / "audit", canaries=40, settings={**SMALL, "federation.rounds": 1})
    assert result["real_patients"] is False
    names = {
        line.split(",")[0] for line in (tmp_path / "audit/hospitals/hospital_1/manifest.csv").read_text().split("\n")
    }
    assert not any(name.startswith("mislabelled") for name in names)
    assert len(names) < 20


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--canaries", "4"], "prove nothing"),
        (["--set", "privacy.epsilon=3"], "decided by the audit"),
        (["--set", "privacy.enabled=false"], "claims no epsilon"),
        (["--set", "privacy.unit=record"], "canaries are patients"),
        (["--canaries", "1000000", *(f"--set={n}={v}" for n, v in SMALL.items())], "fewer canaries"),
    ],
)
def test_what_an_audit_cannot_be_made_of_is_refused_with_the_reason(
    hospitals: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], why: str
) -> None:
    assert main(["audit", str(hospitals), "--out", str(tmp_path / "audit"), *words]) == 2
    assert why in capsys.readouterr().err


def test_a_folder_with_something_in_it_is_not_written_to(hospitals: Path, tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("mine")
    with pytest.raises(ConfigError, match="not an empty folder"):
        run_audit(hospitals, tmp_path)


def changed_policy(source: Path, target: Path, *lines: tuple[str, str]) -> Path:
    shutil.copytree(source, target)
    policy = (target / "site.toml").read_text()
    for old, new in lines:
        assert old in policy
        policy = policy.replace(old, new)
    (target / "site.toml").write_text(policy)
    return target


def test_a_hospital_that_reads_its_ledger_at_a_smaller_delta_is_audited_at_that(
    hospitals: Path, tmp_path: Path
) -> None:
    strict = changed_policy(hospitals / "hospital_1", tmp_path / "strict", ("delta = 1e-4", "delta = 1e-6"))
    result = run_audit(strict, tmp_path / "audit", canaries=40, settings={**SMALL, "federation.rounds": 1})
    assert (result["delta"], result["verdict"]) == (1e-6, "consistent")


def test_a_hospital_that_takes_no_part_ends_the_audit_with_its_reason(hospitals: Path, tmp_path: Path) -> None:
    for number in (1, 2):
        lines = [("allow_not_private", "min_noise_multiplier = 90.0\nallow_not_private")] if number == 1 else []
        changed_policy(hospitals / f"hospital_{number}", tmp_path / "both" / f"h{number}", *lines)
    with pytest.raises(RunFailed, match="took part in no round"):
        run_audit(tmp_path / "both", tmp_path / "audit", canaries=40, settings={**SMALL, "federation.rounds": 1})


def test_a_broken_second_hospital_is_told_before_anything_is_written(hospitals: Path, tmp_path: Path) -> None:
    for number in (1, 2):
        changed_policy(hospitals / f"hospital_{number}", tmp_path / "both" / f"h{number}")
    (tmp_path / "both/h2/manifest.csv").write_text("patient_id\n")
    with pytest.raises(HospitalInvalid, match="fails its own check"):
        run_audit(tmp_path / "both", tmp_path / "audit", settings=SMALL)
    assert not (tmp_path / "audit").exists()


def test_canaries_of_weights_that_are_clipped_apart_are_as_long_as_all_shares_together(
    audited: Auditor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a quarter of the noise, as above: canaries in one share alone would be half as long."""
    honest = PatientOptimizer.add_noise

    def too_little(self: PatientOptimizer) -> None:
        planned, self.noise_multiplier = self.noise_multiplier, self.noise_multiplier / 4
        honest(self)
        self.noise_multiplier = planned

    monkeypatch.setattr(PatientOptimizer, "add_noise", too_little)
    wide = {"training.clip_groups": "modality", "model.width": 16, "data.report_buckets": 128}
    assert audited(settings=wide)["lower_bound"] > CLAIM


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_honest_code_passes_every_time(audited: Auditor, seed: int) -> None:
    """20 audits, each with a coin and noise of its own (there is no seed to set)."""
    result = audited()
    assert failed(result) == set()
    assert result["verdict"] == "consistent"
