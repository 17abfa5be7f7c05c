"""Noise that belongs to (seed, latent frame, step), drawn on the CPU from generators of its own.

Each latent frame of each step has its own generator, so a frame's noise depends neither on the length of the video
nor on how it is cut into chunks, the same seed gives the same noise on every device, and the global generator is
never touched.
"""

from __future__ import annotations

import hashlib
from typing import Protocol

import torch
from torch import Tensor

MAX_SEED = 2**64 - 1


class Noise(Protocol):
    def __call__(self, start: int, frames: int, step: int, shape: tuple[int, int, int, int]) -> Tensor:
        """Noise [B, C, frames, H, W] for frames start .. start + frames - 1; step 0 is what a chunk starts from.

        `shape` is (B, C, H, W).
        """


class SeededNoise:
    """Gaussian noise of a seed (0 .. 2^64 - 1), float32 on the CPU."""

    def __init__(self, seed: int) -> None:
        if not 0 <= seed <= MAX_SEED:
            raise ValueError(f"Got seed {seed}; seeds are whole numbers from 0 to {MAX_SEED}.")
        self.seed = seed

    def __call__(self, start: int, frames: int, step: int, shape: tuple[int, int, int, int]) -> Tensor:
        drawn = [torch.randn(shape, generator=self._generator(start + i, step)) for i in range(frames)]
        return torch.stack(drawn, dim=2)

    def _generator(self, frame: int, step: int) -> torch.Generator:
        digest = hashlib.blake2b(f"{self.seed}/{frame}/{step}".encode(), digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "little", signed=True))
