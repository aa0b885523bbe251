"""`qkernels doctor`: is this installation healthy, which kernels can run here, and if not, why not."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from .common import Subparsers, command_parser, print_json

NAME, SUMMARY = "doctor", "diagnose this installation"


def add_parser(commands: Subparsers) -> argparse.ArgumentParser:
    parser = command_parser(commands, NAME, SUMMARY, "  qkernels doctor\n  qkernels doctor --json")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def run(args: argparse.Namespace) -> int:
    from .diagnosis import diagnose, kernel_tables

    checks, tables = diagnose(), kernel_tables()
    healthy = all(check.ok for check in checks)
    if args.json:
        kernels = {device: {name: list(reasons) for name, reasons in table.rows} for device, table in tables.items()}
        print_json({"healthy": healthy, "checks": [asdict(check) for check in checks], "kernels": kernels})
        return 0 if healthy else 1
    for check in checks:
        print(f"{'ok ' if check.ok else 'BAD'}  {check.name:<12} {check.found}")
        if check.advice:
            print(f"     {'':<12} -> {check.advice}")
    for table in tables.values():
        print(f"\nkernels for {table.problem}\n{table}")
    well = "it works, and there is advice: see ->" if any(check.advice for check in checks) else "everything is well"
    print(f"\n{well if healthy else 'something is wrong: see the lines marked BAD'}")
    return 0 if healthy else 1
