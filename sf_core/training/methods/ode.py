"""ODE distillation: the student jumps from points of a teacher's trajectory to its end (CausVid, arXiv 2412.07772).

It makes of a many-step causal model a few-step one that Self Forcing can start from. The teacher is causal and sees
clean clips of the data as context, as teacher forcing taught it; so does the student.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from ...sampling.schedule import shift_sigma, x0_from_velocity
from ...wan.model import Network
from ..config import TrainConfig
from ..data import Dataset
from ..distributed import Group
from ..encoders import Encoders
from ..step_random import StepRandom
from .base import Update, WanMethod
from .diffusion import chunk_attention, chunk_indices, velocity_given_context


class TeacherDistillation(WanMethod, ABC):
    """Distillation from a causal teacher on clips of the data: what ODE and consistency distillation share."""

    def __init__(
        self, config: TrainConfig, encoders: Encoders, data: Dataset, group: Group, device: torch.device
    ) -> None:
        super().__init__(config, encoders, group, device)
        self.data, self.flow = data, config.flow
        self.teacher = self.load_teacher(config.model.teacher)
        self.chunks = chunk_indices(self.flow.frames, config.sampling)
        self.attend = chunk_attention(self.student.config, self.chunks, self.size, True, device)
        self.updates = [Update(self.optimizer, self.loss)]

    def loss(self, random: StepRandom, progress: float) -> dict[str, Tensor]:
        batch = self.data.batch(random, "flow", self.flow.frames)
        return {"loss": self.clip_loss(batch.clips.to(self.device), self.encoders.embeds(batch.captions), random)}

    @abstractmethod
    def clip_loss(self, clips: Tensor, embeds: Tensor, random: StepRandom) -> Tensor:
        """The loss [] of clips [B, C, F, H, W] under prompts [B, tokens, text_dim]."""

    def predict_x0(self, network: Network, clips: Tensor, noisy: Tensor, sigma: Tensor, embeds: Tensor) -> Tensor:
        """A network's x0 of noisy clips [B, C, F, H, W] at noise levels [B, F], clean clips as context."""
        v = velocity_given_context(network, clips, torch.zeros_like(sigma), noisy, sigma, embeds, self.attend)
        return x0_from_velocity(noisy, v, sigma[:, None, :, None, None])

    @torch.no_grad()
    def guided_velocity(self, clips: Tensor, noisy: Tensor, sigma: Tensor, embeds: Tensor) -> Tensor:
        """The teacher's velocity with guidance: null + guidance (prompt - null)."""
        if self.flow.guidance == 1:
            return velocity_given_context(
                self.teacher, clips, torch.zeros_like(sigma), noisy, sigma, embeds, self.attend
            )
        clips, noisy, sigma = (torch.cat((x, x)) for x in (clips, noisy, sigma))
        both = torch.cat((embeds, self.null(len(embeds)).expand_as(embeds)))
        v = velocity_given_context(self.teacher, clips, torch.zeros_like(sigma), noisy, sigma, both, self.attend)
        cond, uncond = v.chunk(2)
        return uncond + self.flow.guidance * (cond - uncond)

    def expand_chunks(self, values: Tensor) -> Tensor:
        """Values of chunks for their frames, [B, chunks] -> [B, F]."""
        return values[:, self.chunks]


class ODE(TeacherDistillation):
    """ODE distillation: squared distance between the student's x0 and the end of the teacher's trajectory."""

    def clip_loss(self, clips: Tensor, embeds: Tensor, random: StepRandom) -> Tensor:
        steps = [step.sigma for step in self.config.sampling.steps_of(False)]
        points, end = self.trajectory(clips, embeds, random, steps)
        uniform = random.uniform("flow level", int(self.chunks[-1]) + 1)
        chosen = self.expand_chunks(uniform.mul(len(steps)).long())  # [B, F]
        at = chosen.to(self.device)[None, :, None, :, None, None].expand(1, *clips.shape)
        start = torch.stack(points).gather(0, at)[0]
        sigma = torch.tensor(steps).to(clips)[chosen.to(self.device)]
        return (self.predict_x0(self.student, clips, start, sigma, embeds) - end).square().mean()

    def trajectory(
        self, clips: Tensor, embeds: Tensor, random: StepRandom, stops: list[float]
    ) -> tuple[list[Tensor], Tensor]:
        """The teacher's Euler trajectory: its points at the noise levels `stops` (falling) and its end.

        Clips [B, C, F, H, W] are the clean context; all chunks go side by side.
        """
        count = self.flow.teacher_steps
        even = [shift_sigma(1 - i / count, self.flow.shift) for i in range(count)]
        levels = sorted({*even, *stops}, reverse=True)
        x = random.normal("trajectory", *clips.shape[1:]).to(clips)
        points = {}
        for sigma, after in zip(levels, [*levels[1:], 0.0]):
            points[sigma] = x
            level = torch.full((len(x), x.shape[2]), sigma, device=x.device)
            x = x + (after - sigma) * self.guided_velocity(clips, x, level, embeds)
        return [points[stop] for stop in stops], x
