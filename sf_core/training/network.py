"""Networks as losses see them: how they are computed in training, and their velocity of whole clips.

Weights stay float32 (or whatever the caller keeps); bfloat16 is autocast. How a part of the forward is called is given
by `BlockOps`: as it is, run again in the backward pass (a block's activations are then never kept), or through the
hooks that sharded training puts on modules.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..wan.attention import Attention, FullAttention, SelfAttention, sdpa
from ..wan.model import EAGER, BlockOps, Network, WanModel, run_block


def plain_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention [B, N, L, D] in three steps: backwards it is several times faster on a CPU than the fused kernel."""
    scores = (q @ k.mT) * q.shape[-1] ** -0.5
    scores = scores if mask is None else scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(-1).to(v.dtype) @ v


def training_attention(device: torch.device | str) -> Attention:
    """The attention kernel that trains fastest on a device."""
    return plain_attention if torch.device(device).type == "cpu" else sdpa


def call_through_hooks(part: Any, module: nn.Module, *args: Any) -> Any:
    """Calls a part through its module, whose hooks gather and free sharded weights."""
    return module(part, *args)


def training_ops(sharded: bool, recompute: bool) -> BlockOps:
    """Block operations of a run; `recompute` is gradient checkpointing."""
    call = call_through_hooks if sharded else EAGER.call

    def call_again(part: Any, module: nn.Module, *args: Any) -> Any:
        if part is not run_block or not torch.is_grad_enabled():
            return call(part, module, *args)
        # Nothing in a block is random, and its shapes are the same the second time.
        return checkpoint(call, part, module, *args, use_reentrant=False, preserve_rng_state=False)

    return EAGER._replace(call=call_again if recompute else call, recomputes=recompute)


def training_network(
    wan: WanModel,
    precision: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    sharded: bool = False,
    recompute: bool = False,
) -> Network:
    """A network that is trained, or judges: weights as they are, arithmetic in `precision`."""
    autocast = None if precision == torch.float32 else precision
    return Network(wan, torch.float32, training_attention(device), training_ops(sharded, recompute), autocast)


def predict_velocity(network: Network, x: Tensor, t: Tensor, embeds: Tensor, attend: SelfAttention) -> Tensor:
    """Velocity in float32 of x [B, C, F, H, W] at timesteps t [B, F or 1], under prompts [B, tokens, text_dim]."""
    return network.velocity(x, t, network.encode_prompt(embeds), attend)


def clip_attention(network: Network, clip: Tensor) -> FullAttention:
    """Self-attention among all tokens of a clip [B, C, F, H, W]."""
    frames, height, width = clip.shape[2:]
    return FullAttention(network.config, range(frames), height, width, clip.device, attention=network.attention)
