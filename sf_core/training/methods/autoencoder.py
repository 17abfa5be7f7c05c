"""The tiny autoencoder: principal components first, then the decoder on 32 x 32 crops around the shape.

Crops, because most of a clip is flat colour that the linear part already gets right; the picture is a torus, so a
crop may lie anywhere; a quarter lies far from the shape, and the last fifth of the steps sees full frames. Purely
learnt convolutional encoders stayed at 19-23 dB.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...tiny.autoencoder import SPACE, TinyAutoencoder, fit_linear, psnr, to_blocks
from ...tiny.data import SIZE, Clips, draw, render, trajectory
from ..config import TrainConfig
from ..optim import Average, Optimizer
from ..step_random import StepRandom
from .base import Method, Update

CROP, FRAMES = 32, 17
FULL_FRAMES_FROM = 0.8  # of the run; full frames from there on


class FitAutoencoder(Method):
    """Autoencoder training: the encoder is computed from principal components, the decoder is trained."""

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        torch.manual_seed(config.seed)
        vae = TinyAutoencoder()
        fit_linear(vae, sample_blocks(torch.Generator().manual_seed(config.seed)))
        vae.requires_grad_(False)
        vae.decoder[0].net.requires_grad_(True)
        self.vae, self.device = vae.to(device), device
        self.modules = {"student": self.vae}
        self.averages = {"student": Average(self.vae, config.average.decay, config.average.start)}
        self.updates = [Update(Optimizer([self.vae], config.optimizer), self.loss)]

    def loss(self, random: StepRandom, progress: float) -> dict[str, Tensor]:
        """Crops of a clip for each sample; later full frames for every fourth, which have as many pixels."""
        generators = random.generators("clips")
        if progress > FULL_FRAMES_FROM:
            frames = [full_frames(draw(1, one, "all")) for one in generators[:: (SIZE // CROP) ** 2]]
        else:
            frames = [crop(draw(1, one, "all"), one) for one in generators]
        loss, quality = decoder_loss(self.vae, torch.cat(frames).to(self.device))
        return {"loss": 1000 * loss, "dB": quality}


def decoder_loss(vae: TinyAutoencoder, frames: Tensor) -> tuple[Tensor, Tensor]:
    """Mean squared error and mean PSNR of reconstructed frames [B, 4k+1, H, W, 3]."""
    latents = vae.encode(frames).transpose(1, 2)
    with torch.autocast(frames.device.type, torch.bfloat16):
        decoded, _ = vae.decoder[0](latents, None)
    decoded = decoded[:, 3:].float().permute(0, 1, 3, 4, 2)  # of the first latent's frames the last counts
    return (decoded - frames).square().mean(), psnr(decoded.detach().clamp(0, 1), frames).mean()


def crop(clips: Clips, generator: torch.Generator) -> Tensor:
    """Frames [B, FRAMES, CROP, CROP, 3], cut on the latent grid around the shape, now and then anywhere."""
    frames = render(clips, FRAMES)
    x, y, _ = trajectory(clips, torch.tensor([FRAMES / 2]))
    reach = torch.where(torch.rand(len(clips), 1, generator=generator) < 0.75, CROP, SIZE)
    corner = torch.cat([y, x], 1) - CROP / 2 + reach * (torch.rand(len(clips), 2, generator=generator) - 0.5)
    corner = (corner / SPACE).round().long() * SPACE
    window = torch.arange(CROP)
    rows, columns = ((corner[:, i, None] + window) % SIZE for i in (0, 1))
    return torch.stack([f[:, r[:, None], c] for f, r, c in zip(frames, rows, columns, strict=True)])


def full_frames(clips: Clips) -> Tensor:
    """Frames [B, FRAMES, SIZE, SIZE, 3]."""
    return render(clips, FRAMES)


def sample_blocks(generator: torch.Generator, clips: int = 256) -> Tensor:
    """Blocks [n, block] of random clips, stills included, to take principal components of."""
    frames = render(draw(clips, generator, "all"), 33)
    return to_blocks(torch.cat([frames[:, :1].expand(-1, 3, -1, -1, -1), frames], 1)).flatten(0, 3)
