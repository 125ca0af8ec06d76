"""What people read and fill in of a kit: kit.toml, site.toml, README.txt."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Literal

from fedmm.schema import Labels
from fedmm.sites.description import Proposal
from fedmm.sites.kit import Federation

EXAMPLE = "site.example.toml"  # a link to deploy/; a wheel holds the file itself
DECIDE = "# DECIDE: "  # before a line that counts only once the hospital has removed this
MUST = (
    "epsilon",
    "delta",
    "public_patients",
)  # without them site.toml is refused: it fails closed until they are decided


def kit_text(role: Literal["coordinator", "hospital"], name: str, federation: str) -> str:
    places = 'runs = "runs"\nstate = "state"' if role == "coordinator" else 'hospital = "hospital"\nstate = "state"'
    ports = (
        'listen = "0.0.0.0"   # address that the public port is opened on\nlink = 9091\nmetrics = 9464'
        if role == "coordinator"
        else "node = 9094\nmetrics = 9464"
    )
    return f"""\
# Who this is, and where things lie. Paths: absolute, or relative to this folder.
[kit]
role = "{role}"
name = "{name}"
federation = "{federation}"

[places]
{places}

[ports]   # on loopback; 0 for metrics: none
{ports}
"""


def site_text(name: str, labels: Labels, proposal: Proposal) -> str:
    """The example policy for this hospital: its name and the federation's labels filled in, what it must decide left out."""
    proposed = proposal.model_dump(exclude_none=True)
    lines, section = [], ""
    for line in files("fedmm.sites").joinpath(EXAMPLE).read_text(encoding="utf-8").splitlines():
        key = line.partition("=")[0].strip()
        if line.startswith("["):
            section = line[1 : line.index("]")]
            lines += [line, *(_label_lines(labels) if section == "labels" else [])]
        elif section == "labels":
            continue
        elif (section, key) == ("hospital", "name"):
            lines.append(_with(line, json.dumps(name)))
        elif section == "privacy" and (key in MUST or key in proposed):
            line = _with(line, repr(proposed[key])) if key in proposed else line
            lines.append(DECIDE + line if key in MUST else line)
        else:
            lines.append(line)
    lines.insert(
        1, f'# Lines after "{DECIDE.strip()}" wait for you: choose the value, remove the mark. Until then it refuses.'
    )
    return "\n".join(lines) + "\n"


def _with(line: str, value: str) -> str:
    """`key = old  # why` with another value."""
    key, _, rest = line.partition("=")
    _, mark, comment = rest.partition("#")
    return f"{key.rstrip()} = {value}".ljust(32) + (f"{mark}{comment}" if mark else "")


def _label_lines(labels: Labels) -> list[str]:
    chosen = labels.model_dump(mode="json", exclude_defaults=True)
    return [*(f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in chosen.items()), ""]


def coordinator_readme(federation: str) -> str:
    return f"""\
Coordinator's kit of the federation {federation}.

  server.key superexec.secret   private: never leave this machine, never go by mail
  server.crt ca.crt crl.pem     who we are, who made the certificates, which were withdrawn
  federation.json federation.sig   who takes part, signed by the CA; the CA's own key is not in this folder
  kit.toml                      where things lie, which ports
  state/ runs/                  made while it runs: logs, run folders

  fedmm doctor THIS_FOLDER        everything that can be checked before the first connection
  fedmm coordinator up THIS_FOLDER  open the public port and wait for hospitals
  fedmm runs THIS_FOLDER          what runs, and what ran
"""


def hospital_readme(name: str, federation: Federation | str) -> str:
    title = federation if isinstance(federation, str) else federation.name
    return f"""\
Kit of {name} in the federation {title}.

  client.key node.key           private: for this hospital alone; they never leave its machine
  client.crt node.pub ca.crt    who we are, and who made the certificates
  federation.json federation.sig   who takes part, signed by the federation's CA
  kit.toml                      where things lie; the hospital folder may be elsewhere
  hospital/site.toml            THE HOSPITAL'S OWN POLICY: decide the lines marked "{DECIDE.strip()}"
  hospital/manifest.csv         to be put there: one row a study
  state/                        made while it runs

The ledger's signing key is made in the hospital folder at the first training, by the hospital, and is in no kit.

  fedmm check THIS_FOLDER/hospital   every problem of the data, with its fix
  fedmm doctor THIS_FOLDER           everything that can be checked before the first connection
  fedmm site up THIS_FOLDER          take part
"""
