"""The discriminator of GAN training: logits of clips from the critic's features (after Seaweed-APT, arXiv 2501.08316).

After some of the critic's blocks an attention pool, one learnt query over all tokens, sums the clip up; a small MLP
turns the pools' outputs into one logit per clip, high for real ones.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...wan.config import WanConfig
from ...wan.model import Network, run_block
from ..network import clip_attention, predict_velocity


class AttentionPool(nn.Module):
    """Attention pooling: one learnt query over all tokens, [B, L, dim] -> [B, dim]."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Parameter(0.02 * torch.randn(dim))
        self.norm, self.keys, self.values = nn.LayerNorm(dim), nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = self.norm(tokens.float())
        keys, values = (
            part(tokens).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.keys, self.values)
        )
        query = self.query.view(1, 1, self.heads, -1).transpose(1, 2).expand(len(tokens), -1, -1, -1)
        return F.scaled_dot_product_attention(query.to(keys.dtype), keys, values).flatten(1)  # [B, dim]


class Discriminator(nn.Module):
    """Attention pools on the critic's blocks, and an MLP: clips -> logits.

    layers  blocks whose tokens are pooled, as shares 0..1 of the critic's depth
    """

    def __init__(self, config: WanConfig, layers: tuple[float, ...]) -> None:
        super().__init__()
        self.layers = sorted({min(config.layers, max(1, round(share * config.layers))) - 1 for share in layers})
        self.looks = nn.ModuleList(AttentionPool(config.dim, config.heads) for _ in self.layers)
        width = config.dim * len(self.layers)
        self.read = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, config.dim), nn.SiLU(), nn.Linear(config.dim, 1)
        )

    def forward(self, features: list[Tensor]) -> Tensor:
        """Logits [B] from the tokens [B, L, dim] of each layer (`features`)."""
        pooled = [pool(tokens) for pool, tokens in zip(self.pools, features, strict=True)]
        return self.read(torch.cat(pooled, -1).float()).squeeze(-1)

    @property
    def pools(self) -> nn.ModuleList:
        """Attention pools, one a layer; `looks` is their name in checkpoints."""
        return self.looks

    def features(self, network: Network, noisy: Tensor, t: Tensor, embeds: Tensor) -> tuple[list[Tensor], Tensor]:
        """Features of noisy clips [B, C, F, H, W] at timesteps t [B, 1], and the critic's velocity, from one forward.

        Features are the tokens [B, L, dim] after each of the layers.
        """
        tokens, call = [], network.ops.call

        def record(part, module, *args):
            out = call(part, module, *args)
            if part is run_block and args[2] in self.layers:
                tokens.append(out)
            return out

        recording = replace(network, ops=network.ops._replace(call=record))
        v = predict_velocity(recording, noisy, t, embeds, clip_attention(network, noisy))
        return tokens, v
