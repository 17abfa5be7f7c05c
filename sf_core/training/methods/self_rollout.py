"""Rolling out one's own generations, by the loop that generates (arXiv 2506.08009, algorithm 1).

Every chunk is denoised as in production, attending to the model's own earlier output through the rolling cache, but
stops at a random exit step; only the forward of that step carries gradient. Chunks then enter the cache without
gradient, so nothing flows from a chunk into an earlier one, and memory holds one forward per chunk.

For long videos `extra` chunks come first, without gradient; only the last frames are judged.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...sampling.config import Sampling
from ...sampling.noise import Noise
from ...sampling.rollout import Course, Span, plan_spans, rollout
from ..network import Network, attention_on
from ..step_random import Draws

EXITS = ("shared", "per-chunk")


@dataclass(frozen=True)
class SelfRollout:
    """How clips for a loss are rolled out.

    frames         latent frames that are judged, the last of the rollout
    exits          one exit step for all chunks of a rollout ("shared"), or one for each ("per-chunk")
    gradient       frames that carry gradient, counted from the end; None: all that are judged
    extra_chunks   at most so many chunks come before, without gradient and with every step
    extra_share    share of rollouts that have such chunks
    context_sigma  noise level of what enters the cache
    window         latent frames attended to in training, where it differs from inference; smaller than the clip, the
                   last chunk cannot see the first, as in a long video (the paper's remedy for flicker)

    Raises ValueError for an unknown kind of exit and for lengths below 1.
    """

    frames: int = 21
    exits: str = "shared"
    gradient: int | None = None
    extra_chunks: int = 0
    extra_share: float = 1 / 3
    context_sigma: float = 0.0
    window: int | None = None

    def __post_init__(self) -> None:
        if self.exits not in EXITS:
            raise ValueError(f"Got exits {self.exits!r}; there is {' and '.join(EXITS)}.")
        if self.frames < 1 or self.extra_chunks < 0 or (self.gradient is not None and self.gradient < 1):
            raise ValueError(
                f"Got a rollout of {self.frames} latent frames, gradient in {self.gradient}, {self.extra_chunks} extra "
                "chunks; frames and gradient must be 1 or more, extra chunks 0 or more."
            )

    def sampling(self, sampling: Sampling) -> Sampling:
        """What is sampled in training, for a model that is sampled so."""
        return replace(sampling, window=self.window) if self.window else sampling

    def draw(self, sampling: Sampling, draws: Draws, purpose: str) -> Walk:
        """Exit steps and extra chunks of one rollout; the whole batch has them in common.

        Where the first chunk has steps of its own, so is its exit.
        """
        late = torch.rand((), generator=draws.of_batch(f"{purpose} late")) < self.extra_share
        more = self.extra_chunks > 0 and bool(late)
        extra = 1 + draws.shared(f"{purpose} extra", self.extra_chunks)[0] if more else 0
        chunks = len(plan_spans(self.frames + extra * sampling.chunk, sampling))
        steps, first_steps = (len(sampling.steps_of(first)) for first in (False, True))
        exits = draws.shared(f"{purpose} exit", steps, chunks if self.exits == "per-chunk" else 1)
        exits = exits * (chunks // len(exits))
        if first_steps != steps:
            exits[:1] = draws.shared(f"{purpose} first exit", first_steps)
        return Walk(tuple(exits), extra, self.gradient or self.frames, self.context_sigma)


@dataclass(frozen=True)
class Walk:
    """One rollout: the exit step of each chunk (from 0), chunks before the judged ones, frames with gradient."""

    exits: tuple[int, ...]
    extra: int = 0
    gradient: int = 21
    context_sigma: float = 0.0

    def course(self, begin: int, total: int, training: bool, span: Span, context: Tensor | None = None) -> Course:
        """How a chunk is gone through, where frames begin .. total - 1 are judged.

        Extra chunks need not end where these begin: a first chunk may be longer or shorter than the others.
        """
        judged = span.end > begin
        seen = None if context is None else context[:, :, span.start : span.end]
        carries = training and judged and span.end > total - self.gradient
        return Course(self.exits[span.index] + 1 if judged else None, carries, self.context_sigma, seen)


def roll_out(
    network: Network,
    sampling: Sampling,
    embeds: Tensor,
    noise: Noise,
    size: tuple[int, int, int],
    walk: Walk,
    training: bool = True,
    context: Tensor | None = None,
) -> Tensor:
    """A whole rollout [B, C, extra frames + frames, H, W] that follows prompts [B, tokens, text_dim].

    size      (frames, H, W) of what is judged
    training  without it nothing carries gradient
    context   clips of that size that enter the cache in the place of what was made
    """
    frames, height, width = size
    begin = walk.extra * sampling.chunk
    total = begin + frames
    with network.arithmetic(embeds.device), torch.set_grad_enabled(training):
        chunks = rollout(
            network.wan, sampling, embeds, noise, total, height, width,
            cache_dtype=network.precision,
            attention=attention_on(embeds.device),
            stages=network.stages,
            course=lambda span: walk.course(begin, total, training, span, context),
        )  # fmt: skip
        return torch.cat([chunk.latents for chunk in chunks], 2)
