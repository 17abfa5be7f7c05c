"""The tiny world's autoencoder as a task: principal components first, then the decoder on crops around the shape."""

from __future__ import annotations

import torch
from torch import Tensor

from ...tiny.autoencoder import TinyAutoencoder, fit_linear
from ...tiny.data import SIZE, draw
from ..config import TrainConfig
from ..optim import Average, Optimizer
from ..step_random import Draws
from .autoencoder_data import CROP, crops, decoder_loss, sample_blocks, whole_pictures
from .base import Task, Update

WHOLE_FROM = 0.8  # of the run; whole pictures from there on


class FitAutoencoder(Task):
    """Trains the decoder; the encoder is computed."""

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

    def loss(self, draws: Draws, progress: float) -> dict[str, Tensor]:
        """Crops of a clip for each sample; later whole pictures for every fourth, which have as many pixels."""
        generators = draws.of_samples("clips")
        if progress > WHOLE_FROM:
            frames = [whole_pictures(draw(1, one, "all")) for one in generators[:: (SIZE // CROP) ** 2]]
        else:
            frames = [crops(draw(1, one, "all"), one) for one in generators]
        loss, quality = decoder_loss(self.vae, torch.cat(frames).to(self.device))
        return {"loss": 1000 * loss, "dB": quality}
