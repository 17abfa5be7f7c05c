"""GAN: a discriminator on the critic's features tells generated clips from the data's (after arXiv 2501.08316).

Both sides are noised alike and have the same captions. The gradient penalties R1 and R2 are approximate: a finite
difference of the logits along one random direction, `loss.gan.nudge` (epsilon) wide.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..step_random import StepRandom
from .discriminator import Discriminator
from .dmd import GeneratedClips, SelfForcing
from .losses import Level, discriminator_gan, flow_matching, generator_gan, gradient_penalty


class GAN(SelfForcing):
    """Self Forcing with a discriminator; the critic is its backbone and, by its score loss, stays a score network."""

    def build_score_networks(self) -> None:
        """The discriminator instead: logits, not scores, are compared."""
        self.gan = self.config.loss.gan
        torch.manual_seed(self.config.seed)  # of the discriminator's weights
        discriminator = Discriminator(self.critic.config, self.gan.layers)
        self.discriminator = self.modules["discriminator"] = self.place(discriminator, precision=torch.float32)

    def critic_networks(self) -> list[torch.nn.Module]:
        return [self.critic.wan, self.discriminator]

    def discriminate(self, noisy: Tensor, level: Level, embeds: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B] of noisy clips, and the velocity that the critic gave them in the same forward."""
        features, v = self.discriminator.features(self.critic, noisy, level.timestep[:, None], embeds)
        return self.discriminator(features), v

    def generator_loss(self, generated: GeneratedClips, random: StepRandom) -> Tensor:
        level, embeds = self.config.loss.levels.draw(generated.clips, random, "generator"), generated.prompts.embeds
        fake, _ = self.discriminate(level.apply(generated.clips), level, embeds)
        real = None
        if self.gan.relativistic:
            with torch.no_grad():
                real, _ = self.discriminate(level.apply(generated.real), level, embeds)
        return self.gan.generator_weight * generator_gan(fake, real)

    def critic_losses(
        self, generated: GeneratedClips, level: Level, random: StepRandom, purpose: str
    ) -> dict[str, Tensor]:
        """Discriminator loss, approximate R1 and R2, and the critic's flow matching; their weighted sum first."""
        gan, epsilon, embeds = self.gan, self.gan.nudge, generated.prompts.embeds
        sides = level.apply(generated.real), level.apply(generated.clips)
        (real, _), (fake, v) = (self.discriminate(noisy, level, embeds) for noisy in sides)
        metrics = {"discriminator": discriminator_gan(fake, real, gan.relativistic)}
        total = gan.critic_weight * metrics["discriminator"]
        for name, weight, logit, noisy in (("r1", gan.r1, real, sides[0]), ("r2", gan.r2, fake, sides[1])):
            if weight:
                direction = random.normal(f"{purpose} {name}", *noisy.shape[1:]).to(noisy)
                perturbed, _ = self.discriminate(noisy + epsilon * direction, level, embeds)
                metrics[name] = gradient_penalty(logit, perturbed, epsilon)
                total = total + 0.5 * weight * metrics[name]
        if gan.score_weight:
            metrics["score"] = flow_matching(v, generated.clips, level)
            total = total + gan.score_weight * metrics["score"]
        return {"critic": total, **metrics}
