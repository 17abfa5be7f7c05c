"""Self Forcing: the student rolls out whole clips, and a loss on them is its teacher (arXiv 2506.08009, algorithm 1).

A step is one update of the student and `critic.updates` of the critic, whose clips are rolled out anew or are the
student's own. With `loss.context: teacher-forced` chunks attend to clean clips of the data instead of the student's
output: the baseline that shows what rolling out one's own brings.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ..config import TrainConfig
from ..data import Source
from ..distributed import Group
from ..encoders import World
from ..optim import Optimizer
from ..step_random import Draws
from .base import Update, WanTask
from .discriminator import Discriminator
from .losses import (
    Level,
    Prompts,
    Scores,
    critic_flow,
    discriminator_gan,
    distribution_matching,
    flow_matching,
    generator_gan,
    logit_slope,
    score_identity,
)
from .self_rollout import self_rollout


@dataclass(frozen=True)
class Made:
    """Generated clips [B, C, F, H, W] and what they followed; `real`: clips of the data with the same captions."""

    clips: Tensor
    prompts: Prompts
    real: Tensor | None = None


class SelfForcing(WanTask):
    """DMD and SiD."""

    def __init__(self, config: TrainConfig, world: World, data: Source, group: Group, device: torch.device) -> None:
        super().__init__(config, world, group, device)
        self.data = data
        self.sampling = config.rollout.sampling(config.sampling)
        self.critic = self.new_critic()
        self.modules["critic"] = self.critic.wan
        self.scores = self.judges()
        judges = self.trained_judges()
        self.critic_optimizer = Optimizer(judges, config.critic.optimizer)
        learning = [Update(self.critic_optimizer, partial(self.critic_step, i)) for i in range(config.critic.updates)]
        self.updates = [Update(self.optimizer, self.generator_step, config.critic.ahead), *learning]
        self.made: dict[tuple[int, ...], Made] = {}

    def new_critic(self):
        model = self.config.model
        name = next(name for name in ("critic", "teacher", "student") if getattr(model, name))
        wan = self.alike(getattr(model, name), f"model.{name}", torch.float32)
        return self.network(wan.requires_grad_(True))

    def judges(self) -> Scores:
        return Scores(self.teacher(self.config.model.teacher), self.critic, self.config.loss.guidance)

    def trained_judges(self) -> list[torch.nn.Module]:
        return [self.critic.wan]

    def generator_step(self, draws: Draws, progress: float) -> dict[str, Tensor]:
        made = self.roll(draws, "generator", training=True)
        self.made[draws.samples] = replace(made, clips=made.clips.detach())
        return {"generator": self.judged(made, draws)}

    def judged(self, made: Made, draws: Draws) -> Tensor:
        level = self.config.loss.levels.draw(made.clips, draws, "generator")
        if self.config.method == "sid":
            return score_identity(made.clips, self.scores, made.prompts, level, self.config.loss.sid_alpha)
        return distribution_matching(made.clips, self.scores, made.prompts, level)

    def critic_step(self, number: int, draws: Draws, progress: float) -> dict[str, Tensor]:
        purpose = f"critic {number}"
        fresh = self.config.critic.fresh or draws.samples not in self.made
        made = self.roll(draws, purpose, training=False) if fresh else self.made[draws.samples]
        level = self.config.loss.levels.draw(made.clips, draws, purpose)
        return self.critic_losses(made, level, draws, purpose)

    def critic_losses(self, made: Made, level: Level, draws: Draws, purpose: str) -> dict[str, Tensor]:
        return {"critic": critic_flow(self.critic, made.clips, made.prompts.embeds, level)}

    def roll(self, draws: Draws, purpose: str, training: bool) -> Made:
        """Clips of the student, the last frames of rollouts; the first frame of a late one becomes a still.

        The judges know clips that begin with a still only.
        """
        frames, walk = self.config.rollout.frames, self.config.rollout.draw(self.sampling, draws, purpose)
        real = None
        if self.config.needs_clips:
            batch = self.data.batch(draws, purpose, frames, plain=True)
            captions, real = batch.captions, batch.clips.to(self.device)
        else:
            captions = self.data.captions(draws, purpose)
        context = None if self.config.loss.context == "own" else real
        embeds = self.world.embeds(captions).detach()
        size, noise = (frames, *self.size), draws.noise(purpose)
        whole = self_rollout(self.student, self.sampling, embeds, noise, size, walk, training, context)
        clips = whole[:, :, -frames:]
        if walk.extra:
            still = self.world.still(whole[:, :, : 1 - frames or None].detach())
            clips = torch.cat((still, clips[:, :, 1:]), 2)
        return Made(clips, Prompts(embeds, self.null(len(embeds)).detach().expand_as(embeds)), real)


class Adversarial(SelfForcing):
    """GAN: the critic's features tell generated clips from the data's."""

    def judges(self) -> None:
        self.gan = self.config.loss.gan
        torch.manual_seed(self.config.seed)  # of the discriminator's weights
        discriminator = Discriminator(self.critic.config, self.gan.layers)
        self.discriminator = self.modules["discriminator"] = self.placed(discriminator, precision=torch.float32)

    def trained_judges(self) -> list[torch.nn.Module]:
        return [self.critic.wan, self.discriminator]

    def looked_at(self, noisy: Tensor, level: Level, embeds: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B] of noisy clips, and the velocity that the critic gave them in the same forward."""
        features, v = self.discriminator.layers_of(self.critic, noisy, level.timestep[:, None], embeds)
        return self.discriminator(features), v

    def judged(self, made: Made, draws: Draws) -> Tensor:
        level, embeds = self.config.loss.levels.draw(made.clips, draws, "generator"), made.prompts.embeds
        fake, _ = self.looked_at(level.apply(made.clips), level, embeds)
        real = None
        if self.gan.relativistic:
            with torch.no_grad():
                real, _ = self.looked_at(level.apply(made.real), level, embeds)
        return self.gan.generator_weight * generator_gan(fake, real)

    def critic_losses(self, made: Made, level: Level, draws: Draws, purpose: str) -> dict[str, Tensor]:
        gan, embeds = self.gan, made.prompts.embeds
        sides = level.apply(made.real), level.apply(made.clips)
        (real, _), (fake, v) = (self.looked_at(noisy, level, embeds) for noisy in sides)
        parts = {"discriminator": discriminator_gan(fake, real, gan.relativistic)}
        total = gan.critic_weight * parts["discriminator"]
        for name, weight, logit, noisy in (("r1", gan.r1, real, sides[0]), ("r2", gan.r2, fake, sides[1])):
            if weight:
                nudge = draws.normal(f"{purpose} {name}", *noisy.shape[1:]).to(noisy)
                nudged, _ = self.looked_at(noisy + gan.nudge * nudge, level, embeds)
                parts[name] = logit_slope(logit, nudged, gan.nudge)
                total = total + 0.5 * weight * parts[name]
        if gan.score_weight:
            parts["score"] = flow_matching(v, made.clips, level)
            total = total + gan.score_weight * parts["score"]
        return {"critic": total, **parts}
