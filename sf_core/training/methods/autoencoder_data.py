"""What the autoencoder is trained on: principal components first, then the decoder on 32 x 32 crops around the shape.

Crops, because most of a clip is flat colour that the linear part already gets right; the picture is a torus, so a
crop may lie anywhere; a quarter lies far from the shape, and the last fifth of the steps sees whole pictures. Purely
learnt convolutional encoders stayed at 19-23 dB.
"""

import torch
from torch import Tensor

from ...tiny.autoencoder import SPACE, TinyAutoencoder, psnr, to_blocks
from ...tiny.data import SIZE, Clips, draw, render, trajectory

CROP, FRAMES = 32, 17


def decoder_loss(vae: TinyAutoencoder, frames: Tensor) -> tuple[Tensor, Tensor]:
    """Mean squared error and mean PSNR of reconstructed frames [B, 4k+1, H, W, 3]."""
    latents = vae.encode(frames).transpose(1, 2)
    with torch.autocast(frames.device.type, torch.bfloat16):
        decoded, _ = vae.decoder[0](latents, None)
    decoded = decoded[:, 3:].float().permute(0, 1, 3, 4, 2)  # of the first latent's frames the last counts
    return (decoded - frames).square().mean(), psnr(decoded.detach().clamp(0, 1), frames).mean()


def crops(clips: Clips, generator: torch.Generator) -> Tensor:
    """Frames [B, FRAMES, CROP, CROP, 3], cut on the latent grid around the shape, now and then anywhere."""
    frames = render(clips, FRAMES)
    x, y, _ = trajectory(clips, torch.tensor([FRAMES / 2]))
    reach = torch.where(torch.rand(len(clips), 1, generator=generator) < 0.75, CROP, SIZE)
    corner = torch.cat([y, x], 1) - CROP / 2 + reach * (torch.rand(len(clips), 2, generator=generator) - 0.5)
    corner = (corner / SPACE).round().long() * SPACE
    window = torch.arange(CROP)
    rows, columns = ((corner[:, i, None] + window) % SIZE for i in (0, 1))
    return torch.stack([f[:, r[:, None], c] for f, r, c in zip(frames, rows, columns, strict=True)])


def whole_pictures(clips: Clips) -> Tensor:
    """Frames [B, FRAMES, SIZE, SIZE, 3]."""
    return render(clips, FRAMES)


def sample_blocks(generator: torch.Generator, clips: int = 256) -> Tensor:
    """Blocks [n, block] of random clips, stills included, to take principal components of."""
    frames = render(draw(clips, generator, "all"), 33)
    return to_blocks(torch.cat([frames[:, :1].expand(-1, 3, -1, -1, -1), frames], 1)).flatten(0, 3)
