"""Videos of many times the training length, with the built-in model: what keeps them from drifting?

    python -m benchmarks.long_videos [--times 10] [--prompts 48] [--setting NAME] [--json]

One row for each way to sample. Windows are 36 frames, the length of a training clip; scores are those of `evaluate`.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from sf_core import tiny
from sf_core.autoencoders.stream import DecoderStream, latent_frames
from sf_core.cli.evaluate import WINDOW, ask
from sf_core.pipeline import Generation
from sf_core.sampling.config import PRESETS, Sampling, preset_of
from sf_core.sampling.plan import Plan, round_up_to_chunks
from sf_core.sampling.prompts import PromptSchedule
from sf_core.tiny import detect
from sf_core.wan.bank import Bank
from sf_core.wan.model import Network

BATCH = 16
OWN = PRESETS["tiny"]
SINK_3 = replace(OWN, sink=3)
SETTINGS = {
    "no sink": replace(OWN, sink=0),
    "sink 1": replace(OWN, pinned=False),
    "sink 1, pinned (the default)": OWN,
    "sink 3, pinned": SINK_3,
    "sink 6, pinned": replace(OWN, sink=6),
    "window 12, sink 6, pinned": replace(OWN, window=12, sink=6),
    "window 21, sink 15, pinned": replace(OWN, window=21, sink=15),
    "preset long": preset_of("long", OWN),
    "preset fast": preset_of("fast", OWN),
    "sink 3, pinned, position range 12": replace(SINK_3, position_range=12),
    "sink 3, pinned, sink decay 0.999": replace(SINK_3, sink_decay=0.999),
    "sink 3, pinned, sink decay 0.9": replace(SINK_3, sink_decay=0.9),
    "sink 1, memory bank 3": replace(OWN, pinned=False, bank=Bank(3, 3)),
    "sink 1, pinned, RoPE jitter 0.8": replace(OWN, rope_jitter=0.8),
    "sink 1, pinned, RoPE jitter 0.2": replace(OWN, rope_jitter=0.2),
    "sink 1, pinned, context noise 100": replace(OWN, context_noise=100),
    "sink 1, pinned, rolling sampler": replace(OWN, sampler="rolling"),
    "first-frame re-encode": replace(OWN, sink=0, reencode=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=10, help="windows of a training clip's length (10)")
    parser.add_argument("--prompts", type=int, default=48, help="videos (48)")
    parser.add_argument(
        "--setting", action="append", choices=SETTINGS, help="only this one; may be given several times"
    )
    parser.add_argument("--json", action="store_true", help="print JSON lines instead of a table's rows")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in args.setting or SETTINGS:
        windows = scores(SETTINGS[name], args.times, args.prompts)
        sys.stdout.write(
            (json.dumps({"setting": name, "windows": windows}) if args.json else row(name, windows)) + "\n"
        )
        sys.stdout.flush()


def row(name: str, windows: list[dict[str, float]]) -> str:
    """A row of the table: shares of prompts followed, residual and sharpness."""
    first, last = windows[0], windows[-1]
    later = sum(window["all"] for window in windows[1:]) / (len(windows) - 1)
    shares = f"{first['all']:.3f} | {last['all']:.3f} | {later:.3f}"
    residuals = f"{first['residual']:.4f} | {last['residual']:.4f}"
    return f"| {name} | {shares} | {residuals} | {first['sharpness']:.3f} | {last['sharpness']:.3f} |"


def scores(sampling: Sampling, times: int, count: int) -> list[dict[str, float]]:
    """Mean scores of each window of `count` videos."""
    clips, prompts = ask(count, seed=5)
    embeds, vae, network = (
        tiny.load_text_encoder().encode(prompts),
        tiny.load_autoencoder(),
        Network(tiny.load_transformer()),
    )
    sums: list[dict[str, float]] = [{} for _ in range(times)]
    for first in range(0, count, BATCH):
        asked = clips[first : first + BATCH]
        frames = round_up_to_chunks(latent_frames(times * WINDOW), sampling)
        plan = Plan(sampling, frames, 8, 8, len(embeds[first : first + BATCH]))
        prompted = PromptSchedule.of(embeds[first : first + BATCH])
        reencode = vae.still if sampling.reencode else None
        generation = Generation(network, plan, prompted, seed=5 + first, reencode=reencode)
        pieces = generation.frames(DecoderStream(vae), times * WINDOW)
        for total, piece in zip(sums, in_windows(pieces)):
            found = detect.matches(detect.read(piece), asked)
            measured = {"residual": detect.residual(piece, asked), "sharpness": detect.sharpness(piece)}
            for name, value in {**found, **measured}.items():
                total[name] = total.get(name, 0.0) + float(value.float().sum())
    return [{name: value / count for name, value in total.items()} for total in sums]


def in_windows(pieces: Iterator[Tensor]) -> Iterator[Tensor]:
    """Pieces [B, T, H, W, 3] of any length, put together to windows."""
    held: list[Tensor] = []
    for piece in pieces:
        held.append(piece)
        if sum(part.shape[1] for part in held) >= WINDOW:
            whole = torch.cat(held, 1)
            yield whole[:, :WINDOW]
            held = [whole[:, WINDOW:]]


if __name__ == "__main__":
    main()
