"""Going on from where a video stopped: what it costs to read a window's worth of it again, or all, and what differs.

    python benchmarks/continuation.py [--prompts 96]

The built-in model makes videos at once; the same videos are cut, and continued from their latents. Scores are those of
`evaluate`, of the 36 frames that begin a second after the cut.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sf_core import tiny
from sf_core.cli.evaluate import WINDOW, ask
from sf_core.pipeline import Generation
from sf_core.sampling.config import PRESETS
from sf_core.sampling.plan import Plan
from sf_core.sampling.prompts import PromptSchedule
from sf_core.tiny import detect
from sf_core.wan.model import Network

AFTER = 15  # latent frames made after the cut: a second and 36 frames
CUTS = (21, 120)  # latent frames before it


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=96, help="videos (96)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    clips, prompts = ask(args.prompts, seed=0)
    prompted = PromptSchedule.of(tiny.load_text_encoder().encode(prompts))
    network, vae = Network(tiny.load_transformer()), tiny.load_autoencoder()

    def video(frames: int, prefix: Tensor | None = None, full_history: bool = False) -> tuple[Tensor, float]:
        """Latents [B, C, frames, H, W], and seconds until the first new chunk."""
        given = 0 if prefix is None else prefix.shape[2]
        plan = Plan(PRESETS["tiny"], frames, 8, 8, prompted.batch, given, full_history)
        began, first, made = time.process_time(), None, []
        for chunk, x0 in Generation(network, plan, prompted, prefix=prefix).chunks():
            made.append(x0)
            if not chunk.given and first is None:
                first = time.process_time() - began
        return torch.cat(made, dim=2), first

    for cut in CUTS:
        whole, alone = video(cut + AFTER)
        rows = {"at once": (whole, alone)}
        prefix = whole[:, :, :cut].clone()
        rows["window"] = video(cut + AFTER, prefix=prefix)
        rows["all"] = video(cut + AFTER, prefix=prefix, full_history=True)
        for name, (latents, seconds) in rows.items():
            new, expected = latents[:, :, cut:], whole[:, :, cut:]
            frames = torch.cat([vae.decode(piece) for piece in latents[:, :, cut - 1 :].split(16)])[:, -WINDOW:]
            followed = detect.matches(detect.read(frames), clips)["all"].float().mean().item()
            apart = (new[:, :, :3] - expected[:, :, :3]).norm() / expected[:, :, :3].norm()
            later = (new[:, :, -3:] - expected[:, :, -3:]).norm() / expected[:, :, -3:].norm()
            residual = detect.residual(frames, clips).mean().item()
            sys.stdout.write(
                f"cut at {cut:4}  {name:8} first new chunk after {1000 * seconds / args.prompts:7.2f} ms a video  "
                f"apart {apart:.2e}, {later:.2e} in the last chunk  followed {followed:.3f}  residual {residual:.4f}\n"
            )


if __name__ == "__main__":
    main()
