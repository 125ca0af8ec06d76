"""python -m benchmarks.run [NAME ...] [--quick] [--format json]: each row of benchmarks/README.md is one file here.

A benchmark is a module with `measure(quick) -> {figure: value}`; every figure has its unit in its name and a `…_spread`
beside it where it was repeated. Timings live here, never in a test.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys

NAMES = (
    "accounting",
    "aggregate",
    "data",
    "dp_step",
    "engine",
    "ledger",
    "memory",
    "privacy",
    "proxy",
    "sites",
    "wire",
)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which ones ({', '.join(NAMES)}); none: all")
    parser.add_argument("--quick", action="store_true", help="a minute's worth")
    parser.add_argument("--format", choices=["text", "json"], default="text")
    args = parser.parse_args()
    if unknown := set(args.names) - set(NAMES):
        parser.error(f"unknown benchmark {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    results = {}
    for name in args.names or NAMES:
        results[name] = importlib.import_module(f"benchmarks.{name}").measure(quick=args.quick)
        if args.format == "text":
            print(name)
            for figure, value in results[name].items():
                print(f"  {figure:<44} {value:.6g}" if isinstance(value, float) else f"  {figure:<44} {value}")
    if args.format == "json":
        print(json.dumps(results, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
