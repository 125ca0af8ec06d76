"""`fedmm provision` and `fedmm doctor`: kits for real sites, and what is wrong with one."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from fedmm.errors import ConfigError
from fedmm.terminal import EXIT_NO, Adder, format_argument, print_json

if TYPE_CHECKING:
    from fedmm.sites.doctor import Check

MARK = {"ok": "ok      ", "warning": "warning ", "problem": "PROBLEM "}


def provision(args: argparse.Namespace) -> int:
    if args.csr or args.answer:
        return _at_hospital(args)
    if args.description is None:
        raise ConfigError("which federation?", fix="fedmm provision federation.toml --out KITS")
    if args.hospital:
        raise ConfigError("--hospital goes with --csr only", fix="fedmm provision --help")
    if (args.revoke and (args.renew or args.request)) or (args.new_keys and (args.request or not args.renew)):
        raise ConfigError(
            "these do not go together: --revoke; --renew, with --new-keys or --request", fix="fedmm provision --help"
        )
    return _at_coordinator(args)


def _at_coordinator(args: argparse.Namespace) -> int:
    from fedmm.sites.description import read_description
    from fedmm.sites.provision import open_office
    from fedmm.sites.request import Request, read_message

    description = read_description(args.description)
    request = read_message(args.request, Request) if args.request else None
    if request and args.renew not in (None, request.name):
        raise ConfigError(f"the request is that of {request.name}, not of {args.renew}", fix="check the file")
    with open_office(args.out, description) as office:
        if request:
            office.admit(request, again=args.renew is not None)
        elif args.revoke:
            office.revoke(args.revoke)
        elif args.renew:
            office.renew(args.renew, new_keys=args.new_keys)
        else:
            office.provision()
    print("\n".join(office.news or ["nothing is new"]))
    if office.todo:
        print("\nto do:\n" + "\n".join(f"  {line}" for line in office.todo))
    return 0


def _at_hospital(args: argparse.Namespace) -> int:
    from fedmm.sites.request import REQUEST, Answer, accept_answer, make_request, read_message

    others = (args.description, args.revoke, args.renew, args.request, args.new_keys, args.csr and args.answer)
    if any(others) or (args.answer and args.hospital):
        raise ConfigError("--csr NAME or --answer FILE stand alone, with --out KIT", fix="fedmm provision --help")
    if args.csr:
        request = make_request(args.csr, args.out, hospital=args.hospital)
        print(f"private keys are in {args.out} and stay there\nrequest {request.fingerprint()}")
        print(f"\nto do:\n  send {args.out / REQUEST} to the coordinator, and read the request's number out by phone")
        return 0
    federation, fingerprint = accept_answer(read_message(args.answer, Answer), args.out)
    print(f"{args.out} is a kit of {federation.name}, signed description {federation.serial}\nCA {fingerprint}")
    print(
        f"\nto do:\n  compare the CA's number with the coordinator's by phone\n  decide {args.out}/hospital/site.toml"
    )
    print(f"  fedmm doctor {args.out}")
    return 0


def doctor(args: argparse.Namespace) -> int:
    from fedmm.sites.doctor import as_json, examine, is_ok

    def show(check: Check) -> None:
        print(f"{MARK[check.state]} {check.name:<12} {check.detail}", flush=True)
        if check.fix:
            print(f"{'':<22}fix: {check.fix}", flush=True)

    checks = examine(args.kit, progress=None if args.format == "json" else show)
    if args.format == "json":
        print_json(as_json(checks))
    return 0 if is_ok(checks) else EXIT_NO


def add_commands(add: Adder) -> None:
    sub = add(
        "provision",
        provision,
        "make the kits of a federation: CA, certificates, keys, signed description",
        "fedmm provision federation.toml --out KITS",
    )
    sub.add_argument("description", metavar="FEDERATION", type=Path, nargs="?", help="federation.toml (coordinator)")
    sub.add_argument(
        "--out", required=True, type=Path, metavar="FOLDER", help="folder of kits; with --csr, --answer: the kit"
    )
    sub.add_argument("--revoke", metavar="NAME", help="a hospital takes no part any more")
    sub.add_argument("--renew", metavar="NAME", help="a new certificate for a hospital, or for coordinator")
    sub.add_argument(
        "--new-keys", action="store_true", help="with --renew: new keys too; the old certificates are withdrawn"
    )
    sub.add_argument("--request", type=Path, metavar="FILE", help="admit a hospital that made its own keys")
    sub.add_argument("--csr", metavar="NAME", help="at a hospital: make keys here, and the request for them")
    sub.add_argument("--answer", type=Path, metavar="FILE", help="at a hospital: complete the kit with what came back")
    sub.add_argument("--hospital", type=Path, metavar="FOLDER", help="with --csr: send its ledger's public key too")

    sub = add("doctor", doctor, "check a kit, its machine and its connection", "fedmm doctor KITS/north")
    sub.add_argument("kit", metavar="KIT", type=Path, help="folder of a kit")
    format_argument(sub)
