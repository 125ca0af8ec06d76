"""deploy/nginx.conf.template, filled in for one coordinator's kit: python -m fedmm.sites.nginx KIT TEMPLATE > nginx.conf."""

from __future__ import annotations

import argparse
import base64
import re
import sys
from pathlib import Path

from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_public_key

from fedmm.errors import ConfigError, FedmmError
from fedmm.sites.kit import Federation, Kit, open_kit

EVERYWHERE = "0.0.0.0"
_PLAIN = re.compile(r"[A-Za-z0-9_./-]+")  # of a path that needs no quoting in nginx's language
_ADDRESS = re.compile(r"[0-9A-Fa-f.]+|\[[0-9A-Fa-f:.]+\]")


def nginx_conf(kit: Kit, template: str, *, listen: str = EVERYWHERE) -> str:
    """The configuration. listen: an IP address of this machine. Members that were withdrawn are not in it.

    Raises: ConfigError for a path that nginx's language would take for something else, or a key that is none.
    """
    folder = kit.folder.absolute()
    for path in (folder, kit.state):
        if not _PLAIN.fullmatch(str(path)):
            raise ConfigError(f"{path} has characters that mean something to nginx", fix="move the kit to a plain path")
    if not _ADDRESS.fullmatch(listen):
        raise ConfigError(f"{listen!r} is no IP address", fix="--listen 203.0.113.7, or --listen [2001:db8::1]")
    values = {
        "KIT": str(folder),
        "STATE": str(kit.state),
        "LISTEN": f"{listen}:{kit.federation.coordinator.port}",
        "LINK": str(kit.config.ports.link),
        "NODES": "\n".join(_nodes(kit.federation)),
    }
    return re.sub(r"@([A-Z]+)@", lambda found: values[found[1]], template)


def _nodes(federation: Federation) -> list[str]:
    """Lines of the map from member to header. Names are compared as they are: a regular expression regards case."""
    return [
        f'    "~^{re.escape(member.name)}$" "{node_key_header(member.node_key)}";'
        for member in federation.hospitals
        if not member.revoked
    ]


def node_key_header(line: str) -> str:
    """What Flower's SuperNode sends as flwr-public-key for an OpenSSH line: base64 of the key as PEM. Raises: ConfigError."""
    try:
        key = load_ssh_public_key(line.encode())
    except (ValueError, TypeError):
        raise ConfigError(
            "federation.json has a node_key that is no OpenSSH key", fix="provision it once more"
        ) from None
    return base64.b64encode(key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)).decode()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fedmm.sites.nginx", description=__doc__)
    parser.add_argument("kit", metavar="KIT", type=Path, help="the coordinator's kit")
    parser.add_argument("template", metavar="TEMPLATE", type=Path, help="deploy/nginx.conf.template")
    parser.add_argument("--listen", default=EVERYWHERE, metavar="ADDRESS", help="of this machine (all)")
    args = parser.parse_args()
    try:
        kit = open_kit(args.kit, role="coordinator")
        (kit.make_state() / "logs").mkdir(exist_ok=True, mode=0o700)
        print(nginx_conf(kit, args.template.read_text(encoding="utf-8"), listen=args.listen), end="")
    except FedmmError as error:
        print(f"fedmm: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
