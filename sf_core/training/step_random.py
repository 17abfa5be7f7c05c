"""The randomness of training: every number belongs to (seed, step, purpose, sample).

No generator lives from one step to the next, so there is no random state to save: a resumed run draws what it would
have drawn. A sample's numbers do not depend on which process or pass computes it, so a batch gives the same losses in
one process or in many, at once or accumulated. All is drawn on the CPU, and the global generator is left alone.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from ..sampling.noise import SeededNoise


@dataclass(frozen=True)
class Draws:
    """What is random about some `samples` (their numbers in the whole batch) of one step."""

    seed: int
    step: int
    samples: tuple[int, ...]

    def of_batch(self, purpose: str) -> torch.Generator:
        """A generator for what the whole batch has in common."""
        return self._generator(purpose)

    def of_samples(self, purpose: str) -> list[torch.Generator]:
        return [self._generator(purpose, sample) for sample in self.samples]

    def shared(self, purpose: str, below: int, count: int = 1) -> list[int]:
        """`count` whole numbers in 0 .. below - 1 that the whole batch has in common."""
        return torch.randint(below, (count,), generator=self.of_batch(purpose)).tolist()

    def whole(self, purpose: str, below: int) -> Tensor:
        """A whole number in 0 .. below - 1 for each sample, [B]."""
        return torch.cat([torch.randint(below, (1,), generator=one) for one in self.of_samples(purpose)])

    def uniform(self, purpose: str, *shape: int) -> Tensor:
        """Numbers in [0, 1), [B, *shape]."""
        return torch.stack([torch.rand(shape, generator=one) for one in self.of_samples(purpose)])

    def normal(self, purpose: str, *shape: int) -> Tensor:
        """Gaussian numbers, [B, *shape]."""
        return torch.stack([torch.randn(shape, generator=one) for one in self.of_samples(purpose)])

    def noise(self, purpose: str) -> SampleNoise:
        """Noise of a rollout."""
        return SampleNoise(tuple(self._number(purpose, sample) for sample in self.samples))

    def _generator(self, *what: object) -> torch.Generator:
        return torch.Generator().manual_seed(self._number(*what))

    def _number(self, *what: object) -> int:
        """Below 2^63: torch takes larger seeds only as negative ones."""
        text = "/".join(map(str, (self.seed, self.step, *what)))
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


@dataclass(frozen=True)
class SampleNoise:
    """Noise of a rollout (see noise.py) in which every video of the batch has a seed of its own."""

    seeds: tuple[int, ...]

    def __call__(self, start: int, frames: int, step: int, shape: tuple[int, int, int, int]) -> Tensor:
        return torch.cat([SeededNoise(seed)(start, frames, step, (1, *shape[1:])) for seed in self.seeds])
