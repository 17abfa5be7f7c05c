"""UniPC: a solver that takes a few steps along the flow and draws no fresh noise.

x_t = alpha x0 + sigma noise with alpha = 1 - sigma; in lambda = log(alpha / sigma) a step of length h would be exact if
the model's x0 did not change. A polynomial through the newest guesses of x0 stands for how it does: first the
corrector puts right the step that led here, now that the guess it lacked is known, then the predictor takes the next
one. The last step ends at the newest guess.

Source: arXiv 2302.04867, multistep, order 2, B(h) = e^h - 1, on the model's x0; the list of steps, its start a little
below sigma 1 and its whole timesteps as in LongLive 2.0 (NVlabs/LongLive).
"""

from __future__ import annotations

import math

from torch import Tensor

from .schedule import Step, shift_sigma, step_at

# The first unshifted level, 0.999 in float32: at sigma 1 there is no signal, and the logarithm has no end.
START = 0.9990000128746033


def unipc_steps(steps: tuple[float, ...], shift: float) -> tuple[Step, ...]:
    """(timestep, sigma) of each entry of a few-step list, timesteps as whole numbers, rounded down."""
    sigmas = [step_at(shift_sigma(START * step / 1000, shift)).sigma for step in steps]
    return tuple(Step(math.floor(1000 * sigma), sigma) for sigma in sigmas)


def unshifted(sigma: float, shift: float) -> float:
    """The entry (0..1000] of a few-step list whose step is at a noise level."""
    return min(1000.0, 1000 * sigma / (shift - (shift - 1) * sigma) / START)


class UniPC:
    """The way of one chunk through its steps; called as solver(i, x, x0) it gives the sample of step i + 1."""

    def __init__(self, steps: tuple[Step, ...]) -> None:
        self.sigmas = [*(step.sigma for step in steps), 0.0]
        self.lambdas = [math.log((1 - step.sigma) / step.sigma) for step in steps]
        self.guesses: list[Tensor] = []  # x0 of each step so far
        self.corrected: Tensor | None = None  # the sample of the newest step

    def __call__(self, i: int, x: Tensor, x0: Tensor) -> Tensor:
        self.guesses.append(x0)
        self.corrected = self.correct(i) if i else x
        return self.predict(i)

    def correct(self, i: int) -> Tensor:
        """The sample of step i >= 1, from that of the step before and all guesses up to that of step i."""
        base, decay, h = self._straight(i - 1, i)
        x0, before = self.guesses[i], self.guesses[i - 1]
        if self._order(i - 1) == 1:
            return base - decay * (x0 - before) / 2
        growth = math.expm1(-h)
        r = (self.lambdas[i - 2] - self.lambdas[i - 1]) / h
        p = -growth / h - 1
        b1, b2 = p / growth, 2 * (-p / h - 1 / 2) / growth
        a1 = (b1 - b2) / (1 - r)
        return base - decay * (a1 * (self.guesses[i - 2] - before) / r + (b1 - a1) * (x0 - before))

    def predict(self, i: int) -> Tensor:
        """The sample of step i + 1, from that of step i."""
        if i + 1 == len(self.lambdas):
            return self.guesses[i]
        base, decay, h = self._straight(i, i + 1)
        if self._order(i) == 1:
            return base
        r = (self.lambdas[i - 1] - self.lambdas[i]) / h
        return base - decay * (self.guesses[i - 1] - self.guesses[i]) / (2 * r)

    def _order(self, i: int) -> int:
        """Order of the predictor at step i: what guesses there are, and no more than steps that are left."""
        return min(2, i + 1, len(self.lambdas) - i)

    def _straight(self, i: int, to: int) -> tuple[Tensor, float, float]:
        """(the step from i as if x0 were constant, alpha (e^-h - 1), h)."""
        h = self.lambdas[to] - self.lambdas[i]
        decay = (1 - self.sigmas[to]) * math.expm1(-h)
        return self.sigmas[to] / self.sigmas[i] * self.corrected - decay * self.guesses[i], decay, h
