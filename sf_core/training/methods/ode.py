"""How a many-step causal model becomes a few-step one that Self Forcing can start from.

    ode           the student jumps from points of a teacher's trajectory to its end (CausVid, arXiv 2412.07772)
    consistency   from two neighbours on it the student must land on the same clip (arXiv 2303.01469)

The teacher is causal and sees clean clips of the data as context, as teacher forcing taught it; so does the student.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from ...sampling.schedule import shift_sigma, x0_from_velocity
from ...wan.model import Network
from ..config import TrainConfig
from ..data import Source
from ..distributed import Group
from ..encoders import World
from ..optim import Average
from ..step_random import Draws
from .base import Update, WanTask
from .diffusion import beside_clean, chunks_of, forced_attention, noised


class FromTeacher(WanTask, ABC):
    """What both have in common: clips, a guided causal teacher, levels per chunk."""

    def __init__(self, config: TrainConfig, world: World, data: Source, group: Group, device: torch.device) -> None:
        super().__init__(config, world, group, device)
        self.data, self.flow = data, config.flow
        self.guide = self.teacher(config.model.teacher)
        self.chunks = chunks_of(self.flow.frames, config.sampling)
        self.attend = forced_attention(self.student.config, self.chunks, self.size, True, device)
        self.updates = [Update(self.optimizer, self.loss)]

    def loss(self, draws: Draws, progress: float) -> dict[str, Tensor]:
        batch = self.data.batch(draws, "flow", self.flow.frames)
        return {"loss": self.jump_loss(batch.clips.to(self.device), self.world.embeds(batch.captions), draws)}

    @abstractmethod
    def jump_loss(self, clips: Tensor, embeds: Tensor, draws: Draws) -> Tensor:
        """Loss of clips [B, C, F, H, W] under prompts [B, tokens, text_dim]."""

    def jump(self, network: Network, clips: Tensor, noisy: Tensor, sigma: Tensor, embeds: Tensor) -> Tensor:
        """Clean latents that a network sees in noisy ones at levels [B, F], clean clips as context."""
        v = beside_clean(network, clips, torch.zeros_like(sigma), noisy, sigma, embeds, self.attend)
        return x0_from_velocity(noisy, v, sigma[:, None, :, None, None])

    @torch.no_grad()
    def guided(self, clips: Tensor, noisy: Tensor, sigma: Tensor, embeds: Tensor) -> Tensor:
        """The teacher's velocity with guidance."""
        if self.flow.guidance == 1:
            return beside_clean(self.guide, clips, torch.zeros_like(sigma), noisy, sigma, embeds, self.attend)
        clips, noisy, sigma = (torch.cat((x, x)) for x in (clips, noisy, sigma))
        both = torch.cat((embeds, self.null(len(embeds)).expand_as(embeds)))
        v = beside_clean(self.guide, clips, torch.zeros_like(sigma), noisy, sigma, both, self.attend)
        wanted, unasked = v.chunk(2)
        return unasked + self.flow.guidance * (wanted - unasked)

    def per_chunk(self, values: Tensor) -> Tensor:
        """[B, chunks] -> [B, F]."""
        return values[:, self.chunks]


class Ode(FromTeacher):
    """Squared distance between the student's jump and the trajectory's end."""

    def jump_loss(self, clips: Tensor, embeds: Tensor, draws: Draws) -> Tensor:
        steps = [step.sigma for step in self.config.sampling.steps_of(False)]
        points, end = self.trajectory(clips, embeds, draws, steps)
        chosen = self.per_chunk(draws.uniform("flow level", int(self.chunks[-1]) + 1).mul(len(steps)).long())  # [B, F]
        at = chosen.to(self.device)[None, :, None, :, None, None].expand(1, *clips.shape)
        start = torch.stack(points).gather(0, at)[0]
        sigma = torch.tensor(steps).to(clips)[chosen.to(self.device)]
        return (self.jump(self.student, clips, start, sigma, embeds) - end).square().mean()

    def trajectory(
        self, clips: Tensor, embeds: Tensor, draws: Draws, stops: list[float]
    ) -> tuple[list[Tensor], Tensor]:
        """The teacher's points at the levels `stops` (falling), and where it ends, all chunks side by side."""
        count = self.flow.teacher_steps
        even = [shift_sigma(1 - i / count, self.flow.shift) for i in range(count)]
        levels = sorted({*even, *stops}, reverse=True)
        x = draws.normal("trajectory", *clips.shape[1:]).to(clips)
        points = {}
        for sigma, after in zip(levels, [*levels[1:], 0.0]):
            points[sigma] = x
            level = torch.full((len(x), x.shape[2]), sigma, device=x.device)
            x = x + (after - sigma) * self.guided(clips, x, level, embeds)
        return [points[stop] for stop in stops], x


class Consistency(FromTeacher):
    """Squared distance between jumps from two neighbouring levels; the cleaner one's is an average's, held still."""

    def __init__(self, config: TrainConfig, world: World, data: Source, group: Group, device: torch.device) -> None:
        super().__init__(config, world, data, group, device)
        self.averages["target"] = Average(self.student.wan, self.flow.consistent)

    def jump_loss(self, clips: Tensor, embeds: Tensor, draws: Draws) -> Tensor:
        count = self.flow.teacher_steps
        entry = self.per_chunk(draws.uniform("flow level", int(self.chunks[-1]) + 1).mul(count).long())  # [B, F]
        sigma, after = (shift_sigma(1 - (entry + i) / count, self.flow.shift).to(clips) for i in (0, 1))
        noisy, _ = noised(clips, sigma, draws, "flow")
        with torch.no_grad():
            way = (after - sigma)[:, None, :, None, None]
            nearer = noisy + way * self.guided(clips, noisy, sigma, embeds)
            with self.averages["target"].in_place():
                target = self.jump(self.student, clips, nearer, after, embeds)
        return (self.jump(self.student, clips, noisy, sigma, embeds) - target).square().mean()
