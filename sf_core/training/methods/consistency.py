"""Consistency distillation: from two neighbouring points of a trajectory the same x0 (arXiv 2303.01469).

Another way to a few-step model that Self Forcing can start from; teacher and context are those of ode.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...sampling.schedule import shift_sigma
from ..config import TrainConfig
from ..data import Dataset
from ..distributed import Group
from ..encoders import Encoders
from ..optim import Average
from ..step_random import StepRandom
from .diffusion import add_clip_noise
from .ode import TeacherDistillation


class Consistency(TeacherDistillation):
    """Consistency distillation: squared distance between x0 predicted at two neighbouring noise levels.

    The cleaner one's is predicted, without gradient, by a moving average of the student.
    """

    def __init__(
        self, config: TrainConfig, encoders: Encoders, data: Dataset, group: Group, device: torch.device
    ) -> None:
        super().__init__(config, encoders, data, group, device)
        self.averages["target"] = Average(self.student.wan, self.flow.consistent)

    def clip_loss(self, clips: Tensor, embeds: Tensor, random: StepRandom) -> Tensor:
        count = self.flow.teacher_steps
        entry = self.expand_chunks(random.uniform("flow level", int(self.chunks[-1]) + 1).mul(count).long())  # [B, F]
        sigma, after = (shift_sigma(1 - (entry + i) / count, self.flow.shift).to(clips) for i in (0, 1))
        noisy, _ = add_clip_noise(clips, sigma, random, "flow")
        with torch.no_grad():
            way = (after - sigma)[:, None, :, None, None]
            nearer = noisy + way * self.guided_velocity(clips, noisy, sigma, embeds)
            with self.averages["target"].swap_in():
                target = self.predict_x0(self.student, clips, nearer, after, embeds)
        return (self.predict_x0(self.student, clips, noisy, sigma, embeds) - target).square().mean()
