"""SiD, score identity distillation (arXiv 2404.04057): DMD's two scores, with gradient through both of them."""

from __future__ import annotations

from torch import Tensor

from ..step_random import StepRandom
from .dmd import DMD, GeneratedClips
from .losses import score_identity


class SiD(DMD):
    """Self Forcing with score identity distillation."""

    def generator_loss(self, generated: GeneratedClips, random: StepRandom) -> Tensor:
        level = self.config.loss.levels.draw(generated.clips, random, "generator")
        return score_identity(generated.clips, self.scores, generated.prompts, level, self.config.loss.sid_alpha)
