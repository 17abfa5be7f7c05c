"""Trains a model by a configuration: Self Forcing or one of its baselines.

python -m sf_core train tiny-dmd                                a shipped configuration, after `train tiny`
python -m sf_core train my.yaml --set optimizer.lr=1e-5         a file, one value changed
torchrun --nproc-per-node 8 -m sf_core train my.yaml            on eight GPUs
"""

from __future__ import annotations

import argparse
import os

from ..training.config import read_config
from ..training.distributed import Group, local_device
from ..training.memory import plan_memory
from ..training.train import train
from .arguments import int_in


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("config", help="a YAML file, or the name of a shipped configuration")
    add("--set", action="append", default=[], metavar="KEY=VALUE", dest="changes", help="change a value of it")
    add("--plan", action="store_true", help="say what memory the run takes, and end")
    shared = "with --plan: how many processes share the batch, and with shard: true the weights (WORLD_SIZE, else 1)"
    add("--processes", type=int_in(1, 100_000), metavar="N", default=os.environ.get("WORLD_SIZE", "1"), help=shared)


def run(args: argparse.Namespace) -> str | None:
    config = read_config(args.config, args.changes)
    if args.plan:
        return str(plan_memory(config, args.processes))
    device = local_device(config.device)
    group = Group.join(device)
    try:
        train(config, group, device)
    finally:
        group.leave()
    return f"{config.out}: {config.steps} steps of {config.method}" if group.first else None
