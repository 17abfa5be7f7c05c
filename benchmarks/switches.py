"""Prompt switches of the built-in model: is the second prompt followed two chunks after it took over?

    python benchmarks/switches.py [--prompts 48]

Random pairs of prompts; scores are those of `evaluate`, of the 36 frames that begin two chunks after the switch.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sf_core import tiny
from sf_core.autoencoders.stream import DecoderStream
from sf_core.cli.evaluate import WINDOW, ask
from sf_core.pipeline import Generation
from sf_core.sampling.config import PRESETS, Sampling
from sf_core.sampling.plan import Plan
from sf_core.sampling.prompts import TRANSITIONS, PromptSchedule, TimedPrompt
from sf_core.tiny import detect
from sf_core.wan.model import Network

SWITCH, LATER = 21, 6  # latent frames: where the second prompt starts, and how long after it reading begins
BLEND = 6  # latent frames, 1.5 s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=48, help="pairs of prompts (48)")
    count = parser.parse_args().prompts
    torch.set_num_threads(1)
    own = PRESETS["tiny"]
    ways = [(f"{transition}, the default sink", own, transition) for transition in TRANSITIONS]
    ways += [(f"recache, sink {sink}", replace(own, sink=sink), "recache") for sink in (0, 3)]
    for name, sampling, transition in ways:
        found, residual = scores(count, sampling, transition)
        shown = "  ".join(f"{attribute} {share:.3f}" for attribute, share in found.items())
        sys.stdout.write(f"{name:26} {shown}  residual {residual:.4f}\n")


def scores(count: int, sampling: Sampling, transition: str) -> tuple[dict[str, float], float]:
    """Share of second prompts followed, for each attribute, and the mean residual."""
    (_, first), (asked, second) = ask(count, seed=0), ask(count, seed=1)
    text, blend = tiny.load_text_encoder(), BLEND if transition == "blend" else 0
    prompts = TimedPrompt(0, text.encode(first)), TimedPrompt(SWITCH, text.encode(second), transition, blend)
    plan = Plan(sampling, SWITCH + LATER + WINDOW // 4, 8, 8, count)
    generation = Generation(Network(tiny.load_transformer()), plan, PromptSchedule(prompts))
    latents = generation.latents()[:, :, SWITCH + LATER - 1 :]
    video = DecoderStream(tiny.load_autoencoder()).decode(latents)[:, 1:]
    found = detect.matches(detect.read(video), asked)
    return {name: right.float().mean().item() for name, right in found.items()}, detect.residual(video, asked).mean()


if __name__ == "__main__":
    main()
