"""The core's own rollout, as the pack has loaded it, to compare what nodes make with."""

from __future__ import annotations

import torch
from torch import Tensor


def core_latents(
    wan, sampling, prompt, frames, height, width, *, negative=None, guidance=1.0, reencode=None, memory=None
) -> Tensor:
    """Latents [B, C, F, H, W] in model space with seed 0; `prompt`: embeddings, or (start, embeddings, transition)s."""
    from any_folder_name.sf_core.pipeline import Generation
    from any_folder_name.sf_core.sampling.plan import Plan
    from any_folder_name.sf_core.sampling.prompts import PromptSchedule, TimedPrompt
    from any_folder_name.sf_core.wan.model import Network

    timed = [(0, prompt)] if isinstance(prompt, torch.Tensor) else prompt
    prompts = PromptSchedule(tuple(TimedPrompt(*entry) for entry in timed), negative, guidance)
    plan = Plan(sampling, frames, height, width, prompts.batch)
    return Generation(Network(wan, memory=memory), plan, prompts, reencode=reencode).latents()
