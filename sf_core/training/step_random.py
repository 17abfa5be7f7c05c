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
class StepRandom:
    """Random numbers of one training step, for some `samples` of it (their places in the whole batch).

    `purpose` names what is drawn: two purposes are independent, the same one gives the same numbers again.
    """

    seed: int
    step: int
    samples: tuple[int, ...]

    def batch_generator(self, purpose: str) -> torch.Generator:
        """A CPU generator for what the whole batch has in common."""
        return self._generator(purpose)

    def generators(self, purpose: str) -> list[torch.Generator]:
        """CPU generators, one a sample."""
        return [self._generator(purpose, sample) for sample in self.samples]

    def batch_integers(self, purpose: str, below: int, count: int = 1) -> list[int]:
        """`count` integers in 0 .. below - 1 that the whole batch has in common."""
        return torch.randint(below, (count,), generator=self.batch_generator(purpose)).tolist()

    def integers(self, purpose: str, below: int) -> Tensor:
        """An integer in 0 .. below - 1 for each sample, int64 [B]."""
        return torch.cat([torch.randint(below, (1,), generator=one) for one in self.generators(purpose)])

    def uniform(self, purpose: str, *shape: int) -> Tensor:
        """Uniform numbers in [0, 1), float32 [B, *shape]."""
        return torch.stack([torch.rand(shape, generator=one) for one in self.generators(purpose)])

    def normal(self, purpose: str, *shape: int) -> Tensor:
        """Standard normal numbers, float32 [B, *shape]."""
        return torch.stack([torch.randn(shape, generator=one) for one in self.generators(purpose)])

    def noise(self, purpose: str) -> SampleNoise:
        """The noise of a rollout, each sample's from a seed of its own."""
        return SampleNoise(tuple(self._seed(purpose, sample) for sample in self.samples))

    # The names by which self_rollout.py calls these.

    def _generator(self, *what: object) -> torch.Generator:
        return torch.Generator().manual_seed(self._seed(*what))

    def _seed(self, *what: object) -> int:
        """A hash, below 2^63: torch takes larger seeds only as negative ones."""
        text = "/".join(map(str, (self.seed, self.step, *what)))
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


@dataclass(frozen=True)
class SampleNoise:
    """Noise of a rollout (see noise.py) in which every video of the batch has a seed of its own."""

    seeds: tuple[int, ...]

    def __call__(self, start: int, frames: int, step: int, shape: tuple[int, int, int, int]) -> Tensor:
        return torch.cat([SeededNoise(seed)(start, frames, step, (1, *shape[1:])) for seed in self.seeds])
