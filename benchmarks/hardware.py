"""What a 1.3B model at 832 x 480 takes of a GPU, computed by the plan that nodes and command line go by:

    python -m benchmarks.hardware

Settings are those of the README's table. The text encoder is not counted: it is unloaded before the video is made.
"""

import sys

import torch

from sf_core.memory import TAEHV, WAN_VAE, MemoryPlan, format_bytes
from sf_core.sampling.config import override
from sf_core.sampling.families import FAMILIES
from sf_core.sampling.plan import Plan
from sf_core.wan.config import WAN_1_3B
from sf_core.wan.fp8 import E4M3
from sf_core.wan.model import WanModel

WIDTH, HEIGHT, FRAMES = 832, 480, 81  # latent frames of a video longer than any window
SETTINGS = {  # GiB of the card -> weights in float8, cache in float8, window, sink, decoder, its tile in pixels
    8: (True, True, 9, 3, TAEHV, None),
    12: (False, True, 12, 3, TAEHV, None),
    16: (False, False, 12, 3, WAN_VAE, 256),
    24: (False, False, 21, 3, WAN_VAE, None),
}


def plan_of(fp8: bool, fp8_cache: bool, window: int, sink: int, decoder, tile: int | None) -> MemoryPlan:
    """The plan of one video in bfloat16."""
    sampling = override(FAMILIES["self-forcing"].sampling, window=window, sink=sink)
    plan = Plan(sampling, FRAMES, HEIGHT // 8, WIDTH // 8, cache_dtype=E4M3 if fp8_cache else None)
    with torch.device("meta"):
        weights = 2 * sum(parameter.numel() for parameter in WanModel(WAN_1_3B).parameters())
    return MemoryPlan(WAN_1_3B, plan, torch.bfloat16, weights, decoder, fp8, tile and tile // 8)


if __name__ == "__main__":
    for card, settings in SETTINGS.items():
        plan = plan_of(*settings)
        use = plan.use
        parts = ", ".join(f"{name} {format_bytes(getattr(use, name))}" for name in ("weights", "cache", "decoding"))
        sys.stdout.write(f"{card} GB: {format_bytes(plan.total)} ({parts})\n")
