"""Flow matching in numbers: x_t = (1 - sigma) x0 + sigma noise, and the network's velocity is noise - x0.

The published scheduler is a table of 1000 sigmas, sigma_i = s u / (1 + (s - 1) u) with u = 1 - i/1000, timestep =
1000 sigma. A few-step list is read through that table ("warped"): step 750 means entry 250. Everything here is Python
numbers, so no device is ever asked for an index. Source: guandeh17/Self-Forcing, utils/scheduler.py; arXiv
2506.08009.
"""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import NamedTuple

from torch import Tensor

TABLE_SIZE = 1000


class Step(NamedTuple):
    """One denoising step: the timestep told to the network (0..1000) and the noise level sigma (0..1)."""

    timestep: float
    sigma: float


def shift_sigma(u: float, shift: float) -> float:
    """Noise level of the unshifted level `u` in 0..1: more steps at high noise the larger the shift."""
    return shift * u / (1 + (shift - 1) * u)


def even_steps(steps: int) -> tuple[float, ...]:
    """Timesteps evenly spaced from 1000 down, before the shift."""
    return tuple(1000 * (steps - i) / steps for i in range(steps))


@lru_cache
def sigma_table(shift: float) -> tuple[float, ...]:
    """The 1000 sigmas, falling from 1."""
    return tuple(shift_sigma(1 - i / TABLE_SIZE, shift) for i in range(TABLE_SIZE))


def sigma_at(timestep: float, shift: float) -> float:
    """Sigma of the table entry whose timestep (1000 sigma) is nearest; the noisier one of two equally near."""
    return min(sigma_table(shift), key=lambda sigma: abs(1000 * sigma - timestep))


def few_steps(steps: tuple[float, ...], shift: float, warp: bool = True) -> tuple[Step, ...]:
    """(timestep, sigma) of each entry of a few-step list; without `warp` the timesteps are taken as they stand.

    Warped sigmas are float32 numbers, so that a list that has been a tensor on the way is the same list.
    """
    if warp:
        return tuple(step_at(shift_sigma(step / 1000, shift)) for step in steps)
    return tuple(Step(step, sigma_at(step, shift)) for step in steps)


def step_at(sigma: float) -> Step:
    """The step at a noise level (0..1), rounded to float32."""
    (sigma,) = struct.unpack("f", struct.pack("f", sigma))
    return Step(1000 * sigma, sigma)


def add_noise(x0: Tensor, noise: Tensor, sigma: float | Tensor) -> Tensor:
    """x_t of the flow at `sigma`; shapes broadcast."""
    return (1 - sigma) * x0 + sigma * noise


def x0_from_velocity(x: Tensor, velocity: Tensor, sigma: float | Tensor) -> Tensor:
    """The clean latents that a velocity (noise - x0) points to from x_t."""
    return x - sigma * velocity
