"""Stage 1: the autoencoder. Principal components first, then the decoder on 32 x 32 crops around the shape.

Crops, because most of a clip is flat colour that the linear part already gets right; the picture is a torus, so a
crop may lie anywhere; a quarter lies far from the shape, and the last fifth of the steps sees whole pictures. Purely
learnt convolutional encoders stayed at 19-23 dB.
"""

import torch
from torch import Tensor

from .autoencoder import SPACE, TinyAutoencoder, fit_linear, psnr, to_blocks
from .data import SIZE, Clips, draw, render, trajectory
from .loop import Run, steps
from .optim import Average, Optimizer

CROP, FRAMES = 32, 17


def fit_autoencoder(run: Run, total: int, batch: int) -> None:
    """Trains for `total` steps and writes autoencoder.pt."""
    generator = run.generator("autoencoder")
    torch.manual_seed(run.seed)
    vae = TinyAutoencoder()
    fit_linear(vae, sample_blocks(generator))
    vae.requires_grad_(False)
    vae.decoder[0].net.requires_grad_(True)
    optimizer = Optimizer([vae.decoder[0].net], lr=1e-3, muon_lr=3e-3, decay_from=0.3)
    average = Average(vae, 0.99)
    first = 0
    if run.path("autoencoder").exists():
        saved = run.load("autoencoder")
        vae.load_state_dict(saved["live"])
        average.values, average.steps, first = saved["model"], saved["step"], saved["step"]
        optimizer.load_state_dict(saved["optimizer"])
        run.resume(generator, saved)

    def save(done: int) -> None:
        state = {"model": average.values, "live": vae.state_dict(), "optimizer": optimizer.state_dict()}
        run.save("autoencoder", {**state, "generator": generator.get_state(), "step": done})

    losses = {}
    for step in steps(run, "autoencoder", first, total, losses, save):
        whole = step > 0.8 * total
        clips = draw(batch // 4 if whole else batch, generator, "all")
        frames = render(clips, FRAMES) if whole else crops(clips, generator)
        loss, quality = decoder_loss(vae, frames)
        loss.backward()
        optimizer.step(step / total)
        average.update(vae)
        losses.update(loss=1000 * loss, dB=quality)


def decoder_loss(vae: TinyAutoencoder, frames: Tensor) -> tuple[Tensor, Tensor]:
    """Mean squared error and mean PSNR of reconstructed frames [B, 4k+1, H, W, 3]."""
    latents = vae.encode(frames).transpose(1, 2)
    with torch.autocast("cpu", torch.bfloat16):
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


def sample_blocks(generator: torch.Generator, clips: int = 256) -> Tensor:
    """Blocks [n, block] of random clips, stills included, to take principal components of."""
    frames = render(draw(clips, generator, "all"), 33)
    return to_blocks(torch.cat([frames[:, :1].expand(-1, 3, -1, -1, -1), frames], 1)).flatten(0, 3)
