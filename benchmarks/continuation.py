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
from sf_core.sampling.config import PRESETS
from sf_core.sampling.noise import SeededNoise
from sf_core.sampling.rollout import rollout
from sf_core.tiny import detect

AFTER = 15  # latent frames made after the cut: a second and 36 frames
CUTS = (21, 120)  # latent frames before it


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=96, help="videos (96)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    clips, prompts = ask(args.prompts, seed=0)
    embeds, wan, vae = tiny.load_text_encoder().encode(prompts), tiny.load_model(), tiny.load_autoencoder()

    def video(frames: int, **start) -> tuple[Tensor, float]:
        """Latents [B, C, frames, H, W], and seconds until the first new chunk."""
        began = time.process_time()
        chunks, first, made = rollout(wan, PRESETS["tiny"], embeds, SeededNoise(0), frames, 8, 8, **start), None, []
        for chunk in chunks:
            made.append(chunk.latents)
            if not chunk.span.given and first is None:
                first = time.process_time() - began
        return torch.cat(made, dim=2), first

    for cut in CUTS:
        whole, alone = video(cut + AFTER)
        rows = {"at once": (whole, alone)}
        prefix = whole[:, :, :cut].clone()
        rows["window"] = video(cut + AFTER, prefix=prefix)
        rows["all"] = video(cut + AFTER, prefix=prefix, whole_prefix=True)
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
