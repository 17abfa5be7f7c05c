"""Runs cases of a kind and prints what breaks, with the seed that shows it again."""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch

from tests.fuzz.run import KINDS, Failure, run


def show(failure: Failure, kind: str) -> None:
    sys.stdout.write(f"{failure.text}\nagain: python -m tests.fuzz {kind} --count 1 --seed {failure.seed}\n\n")
    sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--count", type=int, default=1000, help="cases (1000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first case (0); the next has the next")
    args = parser.parse_args()
    torch.set_num_threads(1)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        result = run(KINDS[args.kind], args.count, args.seed, Path(folder), lambda failure: show(failure, args.kind))
    sys.stdout.write(
        f"{args.count} {args.kind}: {result.taken} taken, {result.refused} refused, {len(result.failures)} failed, "
        f"slowest {result.slowest[0]:.2f} s (seed {result.slowest[1]}), {time.monotonic() - started:.0f} s in all\n"
    )
    return 1 if result.failures else 0


sys.exit(main())
