"""Self-rollout: a student's own generations, with gradient through one step of each chunk.

    for chunk in plan.chunks:
        context.enter(chunk)
        x0 = denoise until the chunk's exit step, whose forward alone carries gradient
        context.append(chunk, x0 without gradient)

It runs over the `Context` and `denoise` of inference. Nothing flows from a chunk into an earlier one, and memory holds
one forward per chunk. For long videos `extra` chunks come first, without gradient; only the last frames are judged.
Source: arXiv 2506.08009, algorithm 1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...sampling.config import Sampling
from ...sampling.context import Context
from ...sampling.noise import Noise
from ...sampling.plan import Chunk, Plan, cut_into_chunks
from ...sampling.prompts import PromptSchedule
from ...sampling.rollout import denoise
from ...sampling.schedule import add_noise
from ...wan.model import Network
from ..step_random import StepRandom

EXITS = ("shared", "per-chunk")


@dataclass(frozen=True)
class RolloutConfig:
    """Self-rollout of the clips for a loss.

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

    def draw(self, sampling: Sampling, random: StepRandom, purpose: str) -> ExitSchedule:
        """Exit steps and extra chunks of one rollout; the whole batch has them in common.

        Where the first chunk has steps of its own, so is its exit.
        """
        late = torch.rand((), generator=random.batch_generator(f"{purpose} late")) < self.extra_share
        more = self.extra_chunks > 0 and bool(late)
        extra = 1 + random.batch_integers(f"{purpose} extra", self.extra_chunks)[0] if more else 0
        chunks = len(cut_into_chunks(self.frames + extra * sampling.chunk, sampling))
        steps, first_steps = (len(sampling.steps_of(first)) for first in (False, True))
        exits = random.batch_integers(f"{purpose} exit", steps, chunks if self.exits == "per-chunk" else 1)
        exits = exits * (chunks // len(exits))
        if first_steps != steps:
            exits[:1] = random.batch_integers(f"{purpose} first exit", first_steps)
        return ExitSchedule(tuple(exits), extra, self.gradient or self.frames, self.context_sigma)


@dataclass(frozen=True)
class ExitSchedule:
    """Exit step of each chunk of one rollout (from 0), and what else is drawn for it.

    extra          chunks before the judged ones, which take every step
    gradient       frames that carry gradient, counted from the end
    context_sigma  noise level 0..1 of the latents that enter the cache
    """

    exits: tuple[int, ...]
    extra: int = 0
    gradient: int = 21
    context_sigma: float = 0.0

    def steps(self, chunk: Chunk, begin: int) -> int | None:
        """Steps that a chunk takes where frames from `begin` on are judged; None: all, of a chunk before them.

        Extra chunks need not end where judged frames begin: a first chunk may be longer or shorter than the others.
        """
        return self.exits[chunk.index] + 1 if chunk.end > begin else None

    def has_gradient(self, chunk: Chunk, begin: int, end: int) -> bool:
        """Whether the exit step of a chunk carries gradient where frames begin .. end - 1 are judged."""
        return chunk.end > max(begin, end - self.gradient)


def self_rollout(
    network: Network,
    sampling: Sampling,
    embeds: Tensor,
    noise: Noise,
    size: tuple[int, int, int],
    schedule: ExitSchedule,
    training: bool = True,
    forced: Tensor | None = None,
) -> Tensor:
    """A whole rollout [B, C, extra frames + frames, H, W] that follows prompts [B, tokens, text_dim].

    size      (frames, H, W) of what is judged
    training  without it nothing carries gradient
    forced    clips of that size that enter the cache in the place of what was made (teacher forcing)
    """
    frames, height, width = size
    begin = schedule.extra * sampling.chunk
    cache_dtype = network.autocast or network.dtype
    plan = Plan(sampling, begin + frames, height, width, len(embeds), cache_dtype=cache_dtype)
    made = []
    with torch.set_grad_enabled(training):
        context = Context(network, plan, PromptSchedule.of(embeds))
        for chunk in plan.chunks:
            context.enter(chunk)
            steps, draw = plan.steps(chunk), context.noise(noise, chunk)
            gradient = training and schedule.has_gradient(chunk, begin, plan.frames)
            x0 = denoise(context, steps[: schedule.steps(chunk, begin)], draw, gradient=gradient)
            made.append(x0)
            seen = x0.detach() if forced is None else context.part(forced, chunk)
            if schedule.context_sigma and not chunk.is_last:
                seen = add_noise(seen, draw(len(steps)), schedule.context_sigma)  # a number that no step has
            context.append(chunk, seen)
        return torch.cat(made, 2)
