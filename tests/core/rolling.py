"""A rollout in one call, for tests."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from sf_core.sampling.config import Sampling
from sf_core.sampling.context import Reencode
from sf_core.sampling.noise import Noise
from sf_core.sampling.plan import Chunk, Plan
from sf_core.sampling.prompts import Guide, PromptSchedule, TimedPrompt
from sf_core.sampling.rollout import OnStep, rollout
from sf_core.wan.attention import Attention, sdpa
from sf_core.wan.model import EAGER, BlockOps, Network, Wan


def roll_chunks(
    wan: Wan,
    sampling: Sampling,
    prompt: Tensor | Sequence[TimedPrompt],
    noise: Noise,
    frames: int,
    height: int,
    width: int,
    *,
    prefix: Tensor | None = None,
    full_history: bool = False,
    source: Tensor | None = None,
    strength: float = 1.0,
    negative: Tensor | None = None,
    guidance: float = 1.0,
    guide: Guide | None = None,
    reencode: Reencode | None = None,
    dtype: torch.dtype | None = None,
    cache_dtype: torch.dtype | None = None,
    attention: Attention = sdpa,
    ops: BlockOps = EAGER,
    on_step: OnStep | None = None,
) -> Iterator[tuple[Chunk, Tensor]]:
    """(chunk, latents [B, C, frames, H, W]) of prompt embeddings [B, tokens, text_dim], or of prompts with times.

    dtype  of the computation; None: that of the embeddings
    """
    prompts = (TimedPrompt(0, prompt),) if isinstance(prompt, Tensor) else tuple(prompt)
    schedule = PromptSchedule(prompts, negative, guidance, guide)
    given = 0 if prefix is None else prefix.shape[2]
    plan = Plan(sampling, frames, height, width, schedule.batch, given, full_history, strength, cache_dtype)
    network = Network(wan, dtype or prompts[0].embeds.dtype, attention, ops)
    return rollout(network, plan, schedule, noise, prefix=prefix, source=source, reencode=reencode, on_step=on_step)


def roll_out(*args, **options) -> Tensor:
    """The latents [B, C, F, H, W] of `roll_chunks`."""
    return torch.cat([x0 for _, x0 in roll_chunks(*args, **options)], 2)
