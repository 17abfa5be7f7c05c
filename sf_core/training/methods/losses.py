"""Losses on whole clips: distribution matching, score identity, adversarial.

A clip is noised to a random level, and two bidirectional score networks predict its x0: the real score (a frozen
teacher, with guidance) and the fake score (the critic, trained on the generator's clips all along).

    DMD   the clip moves along real - fake, normalised per clip               arXiv 2311.18828, 2405.14867
    SiD   (real - fake)((real - x) - alpha (real - fake)), through both nets  arXiv 2404.04057
    GAN   logits of a discriminator on the critic's features                  arXiv 2501.08316 (approximate R1 and R2)

Clips are [B, C, F, H, W] in model space, prompts [B, tokens, text_dim].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...sampling.schedule import add_noise, shift_sigma, sigma_at, x0_from_velocity
from ...wan.model import Network
from ..network import clip_attention, predict_velocity
from ..step_random import StepRandom

LEAST_SCALE = 1e-4  # of DMD's and SiD's normaliser, for clips that the real score does not change


@dataclass(frozen=True)
class Level:
    """Noise level of clips: the timestep networks are given, 0..1000, and sigma, 0..1, [B]; noise [B, C, F, H, W]."""

    timestep: Tensor
    sigma: Tensor
    noise: Tensor

    def apply(self, clip: Tensor) -> Tensor:
        return add_noise(clip, self.noise, self._broadcast(self.sigma))

    def velocity(self, network: Network, noisy: Tensor, embeds: Tensor) -> Tensor:
        """A network's velocity; its x0 is noisy - sigma velocity."""
        return predict_velocity(network, noisy, self.timestep[:, None], embeds, clip_attention(network, noisy))

    def x0(self, network: Network, noisy: Tensor, embeds: Tensor) -> Tensor:
        """A network's x0 of noisy clips, [B, C, F, H, W]."""
        return x0_from_velocity(noisy, self.velocity(network, noisy, embeds), self._broadcast(self.sigma))

    def repeat(self) -> Level:
        """The level of the same clips twice in a batch, under two prompts."""
        return Level(self.timestep.repeat(2), self.sigma.repeat(2), self.noise)

    def _broadcast(self, sigma: Tensor) -> Tensor:
        return sigma.view(-1, 1, 1, 1, 1)


@dataclass(frozen=True)
class Levels:
    """Distribution of noise levels: uniform entries of the table of `shift`, kept within lowest..highest timestep."""

    shift: float = 5.0
    lowest: float = 20.0
    highest: float = 980.0

    def __post_init__(self) -> None:
        if not 0 <= self.lowest < self.highest <= 1000 or self.shift <= 0:
            raise ValueError(
                f"Got noise levels from timestep {self.lowest} to {self.highest} with shift {self.shift}; they must "
                "rise and lie in 0..1000, and shift must be above 0. The published training uses 20, 980 and 5."
            )

    def draw(self, clip: Tensor, random: StepRandom, purpose: str) -> Level:
        entries = random.integers(f"{purpose} level", 1000).tolist()
        steps = [min(max(1000 * shift_sigma(k / 1000, self.shift), self.lowest), self.highest) for k in entries]
        sigmas = [sigma_at(step, self.shift) for step in steps]
        noise = random.normal(f"{purpose} noise", *clip.shape[1:])
        return Level(torch.tensor(steps).to(clip), torch.tensor(sigmas).to(clip), noise.to(clip))


@dataclass(frozen=True)
class Prompts:
    """Prompt embeddings, and those of no prompt (or a negative one); [B, tokens, text_dim] each."""

    embeds: Tensor
    null: Tensor


@dataclass(frozen=True)
class ScorePair:
    """The real and the fake score. The real one is guided: null + guidance (prompt - null), as everywhere here.

    The published training writes prompt + 3 (prompt - null), which is a guidance of 4.
    """

    real: Network
    fake: Network
    guidance: float = 4.0

    def x0(self, noisy: Tensor, level: Level, prompts: Prompts) -> tuple[Tensor, Tensor]:
        """(real, fake) x0 of noisy clips, [B, C, F, H, W] each."""
        fake = level.x0(self.fake, noisy, prompts.embeds)
        if self.guidance == 1:
            return level.x0(self.real, noisy, prompts.embeds), fake
        both = level.repeat().x0(self.real, torch.cat((noisy, noisy)), torch.cat((prompts.embeds, prompts.null)))
        cond, uncond = both.chunk(2)
        return uncond + self.guidance * (cond - uncond), fake


def normaliser(clip: Tensor, real: Tensor) -> Tensor:
    """DMD's normaliser: mean distance of each clip from the real score's x0, [B, 1, 1, 1, 1]."""
    return (clip - real).detach().abs().mean((1, 2, 3, 4), keepdim=True).clamp(min=LEAST_SCALE)


def distribution_matching(clip: Tensor, scores: ScorePair, prompts: Prompts, level: Level) -> Tensor:
    """DMD: half the squared distance to the clip moved along real - fake; its gradient is their difference."""
    with torch.no_grad():
        real, fake = scores.x0(level.apply(clip), level, prompts)
        target = clip - (fake - real) / normaliser(clip, real)
    return 0.5 * (clip - target).square().mean()


def score_identity(clip: Tensor, scores: ScorePair, prompts: Prompts, level: Level, alpha: float = 1.0) -> Tensor:
    """SiD: (real - fake)((real - x) - alpha (real - fake)), normalised; the gradient takes both scores in."""
    real, fake = scores.x0(level.apply(clip), level, prompts)
    difference = real - fake
    loss = difference * ((real - clip) - alpha * difference) / normaliser(clip, real)
    return loss.mean()


def critic_flow(fake: Network, clip: Tensor, embeds: Tensor, level: Level) -> Tensor:
    """Critic loss: flow matching of the fake score on the generator's clips, which get no gradient."""
    clip = clip.detach()
    return flow_matching(level.velocity(fake, level.apply(clip), embeds), clip, level)


def flow_matching(v: Tensor, clip: Tensor, level: Level) -> Tensor:
    """Flow matching loss: squared distance of the velocity of noisy clips from noise - clip."""
    return (v - (level.noise - clip)).square().mean()


def generator_gan(fake: Tensor, real: Tensor | None = None) -> Tensor:
    """The generator's loss from logits [B] of its clips; relative to those of `real` clips where they are given."""
    return F.softplus(-(fake if real is None else fake - real)).mean()


def discriminator_gan(fake: Tensor, real: Tensor, relativistic: bool) -> Tensor:
    """The discriminator's loss from logits [B] of generated and real clips."""
    if relativistic:
        return F.softplus(-(real - fake)).mean()
    return F.softplus(fake).mean() + F.softplus(-real).mean()


def gradient_penalty(logit: Tensor, perturbed: Tensor, epsilon: float) -> Tensor:
    """Approximate R1 (of real clips) or R2 (of generated ones): squared slope of the logits along a random direction.

    perturbed  logits [B] of the clips moved by `epsilon` along it (arXiv 2501.08316)
    """
    return ((perturbed - logit) / epsilon).square().mean()
