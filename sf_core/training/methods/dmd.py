"""Self Forcing: the student rolls out clips, and a loss on them teaches it (arXiv 2506.08009, algorithm 1); DMD is one.

A step is one update of the student and `critic.updates` of the critic, whose clips are rolled out anew or are the
student's own. With `loss.context: teacher-forced` chunks attend to clean clips of the data instead of the student's
output: the baseline that shows what rolling out one's own brings.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ..config import TrainConfig
from ..data import Dataset
from ..distributed import Group
from ..encoders import Encoders
from ..optim import Optimizer
from ..step_random import StepRandom
from .base import Update, WanMethod
from .losses import Level, Prompts, ScorePair, critic_flow, distribution_matching
from .self_rollout import self_rollout


@dataclass(frozen=True)
class GeneratedClips:
    """Generated clips [B, C, F, H, W] and the prompts they followed.

    real  clips of the data with the same captions, where the method needs them
    """

    clips: Tensor
    prompts: Prompts
    real: Tensor | None = None


class SelfForcing(WanMethod, ABC):
    """Self Forcing, whatever the loss: the student's rollouts, and a critic that learns from them.

    A method says which networks score clips (`build_score_networks`, `critic_networks`) and what the student
    minimises (`generator_loss`).
    """

    scores: ScorePair | None

    def __init__(
        self, config: TrainConfig, encoders: Encoders, data: Dataset, group: Group, device: torch.device
    ) -> None:
        super().__init__(config, encoders, group, device)
        self.data = data
        self.sampling = config.rollout.sampling(config.sampling)
        self.critic = self.load_critic()
        self.modules["critic"] = self.critic.wan
        self.scores = self.build_score_networks()
        self.critic_optimizer = Optimizer(self.critic_networks(), config.critic.optimizer)
        learning = [Update(self.critic_optimizer, partial(self.critic_step, i)) for i in range(config.critic.updates)]
        self.updates = [Update(self.optimizer, self.generator_step, config.critic.ahead), *learning]
        self.generated: dict[tuple[int, ...], GeneratedClips] = {}

    def load_critic(self):
        model = self.config.model
        name = next(name for name in ("critic", "teacher", "student") if getattr(model, name))
        wan = self.load_compatible(getattr(model, name), f"model.{name}", torch.float32)
        return self.network(wan.requires_grad_(True))

    def build_score_networks(self) -> ScorePair | None:
        """The real and the fake score, where the loss compares them."""
        return None

    def critic_networks(self) -> list[torch.nn.Module]:
        """Modules that the critic's optimizer trains."""
        return [self.critic.wan]

    def generator_step(self, random: StepRandom, progress: float) -> dict[str, Tensor]:
        """The student's loss on clips that it rolls out with gradient."""
        generated = self.generate(random, "generator", training=True)
        self.generated[random.samples] = replace(generated, clips=generated.clips.detach())
        return {"generator": self.generator_loss(generated, random)}

    @abstractmethod
    def generator_loss(self, generated: GeneratedClips, random: StepRandom) -> Tensor:
        """The loss [] of generated clips, which carry gradient."""

    def critic_step(self, number: int, random: StepRandom, progress: float) -> dict[str, Tensor]:
        """The critic's losses in its update `number` of the step, on fresh rollouts or on the generator's."""
        purpose = f"critic {number}"
        fresh = self.config.critic.fresh or random.samples not in self.generated
        generated = self.generate(random, purpose, training=False) if fresh else self.generated[random.samples]
        level = self.config.loss.levels.draw(generated.clips, random, purpose)
        return self.critic_losses(generated, level, random, purpose)

    def critic_losses(
        self, generated: GeneratedClips, level: Level, random: StepRandom, purpose: str
    ) -> dict[str, Tensor]:
        """What the critic minimises first, then what is logged beside it."""
        return {"critic": critic_flow(self.critic, generated.clips, generated.prompts.embeds, level)}

    def generate(self, random: StepRandom, purpose: str, training: bool) -> GeneratedClips:
        """Clips of the student: the last frames of rollouts, the first frame of a late one re-encoded as a still.

        The score networks know clips that begin with a still only.
        """
        frames, walk = self.config.rollout.frames, self.config.rollout.draw(self.sampling, random, purpose)
        real = None
        if self.config.needs_clips:
            batch = self.data.batch(random, purpose, frames, plain=True)
            captions, real = batch.captions, batch.clips.to(self.device)
        else:
            captions = self.data.captions(random, purpose)
        context = None if self.config.loss.context == "own" else real
        embeds = self.encoders.embeds(captions).detach()
        size, noise = (frames, *self.size), random.noise(purpose)
        rolled = self_rollout(self.student, self.sampling, embeds, noise, size, walk, training, context)
        clips = rolled[:, :, -frames:]
        if walk.extra:
            still = self.encoders.still(rolled[:, :, : 1 - frames or None].detach())
            clips = torch.cat((still, clips[:, :, 1:]), 2)
        return GeneratedClips(clips, Prompts(embeds, self.null(len(embeds)).detach().expand_as(embeds)), real)


class DMD(SelfForcing):
    """Distribution matching distillation (arXiv 2311.18828, 2405.14867): clips follow real score - fake score."""

    def build_score_networks(self) -> ScorePair:
        return ScorePair(self.load_teacher(self.config.model.teacher), self.critic, self.config.loss.guidance)

    def generator_loss(self, generated: GeneratedClips, random: StepRandom) -> Tensor:
        level = self.config.loss.levels.draw(generated.clips, random, "generator")
        return distribution_matching(generated.clips, self.scores, generated.prompts, level)
