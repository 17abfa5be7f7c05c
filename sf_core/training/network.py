"""Networks as losses see them: velocities and clean latents, in the precision of the run.

Weights stay float32 (or whatever the caller keeps); `precision` bfloat16 is autocast. How a part of the forward is
entered is given by `Stages`: as it is, run again in the backward pass (`recomputed`: a block's activations are then
never kept), or through the hooks that sharded training puts on modules (`hooked`).
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..wan.attention import Attend, Attention, Sequence, sdpa
from ..wan.config import WanConfig
from ..wan.model import EAGER, Stages, WanModel, encode_text, through_block, velocity


def plain_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention [B, N, L, D] in three steps: backwards it is several times faster on a CPU than the fused kernel."""
    scores = (q @ k.mT) * q.shape[-1] ** -0.5
    scores = scores if mask is None else scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(-1).to(v.dtype) @ v


def attention_on(device: torch.device | str) -> Attention:
    """The kernel that trains fastest on a device."""
    return plain_attention if torch.device(device).type == "cpu" else sdpa


def hooked(part: Any, module: nn.Module, *args: Any) -> Any:
    """Enters a part through its module, whose hooks gather and free sharded weights."""
    return module(part, *args)


def stages_for(sharded: bool, recompute: bool) -> Stages:
    """How parts are entered in a run."""
    enter = hooked if sharded else EAGER.enter

    def again(part: Any, module: nn.Module, *args: Any) -> Any:
        if part is not through_block or not torch.is_grad_enabled():
            return enter(part, module, *args)
        # Nothing in a block is random, and its shapes are the same the second time.
        return checkpoint(enter, part, module, *args, use_reentrant=False, preserve_rng_state=False)

    return EAGER._replace(enter=again if recompute else enter, again=recompute)


@dataclass(frozen=True)
class Network:
    """A model with the way it is computed."""

    wan: WanModel
    precision: torch.dtype = torch.float32
    stages: Stages = EAGER

    @property
    def config(self) -> WanConfig:
        return self.wan.config

    def arithmetic(self, device: torch.device) -> AbstractContextManager:
        # Without its cache: forwards without gradient would leave copies of weights there that carry none, and the
        # exit step of a rollout would compute with those.
        enabled = self.precision != torch.float32
        return torch.autocast(device.type, self.precision, enabled=enabled, cache_enabled=False)

    def velocity(self, x: Tensor, t: Tensor, embeds: Tensor, attend: Attend) -> Tensor:
        """Float32 velocity of x [B, C, F, H, W] at timesteps t [B, F or 1], under prompts [B, tokens, text_dim]."""
        enter = self.stages.enter
        with self.arithmetic(x.device):
            text = enter(encode_text, self.wan, embeds, self.stages)
            return enter(velocity, self.wan, x, t, text, attend, self.stages).float()

    def whole(self, clip: Tensor) -> Sequence:
        """Attention among all tokens of a clip [B, C, F, H, W]."""
        frames, height, width = clip.shape[2:]
        attention = attention_on(clip.device)
        return Sequence(self.config, range(frames), height, width, clip.device, attention=attention)
