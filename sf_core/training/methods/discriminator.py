"""Tells generated clips from real ones by what the critic makes of them.

After some of the critic's blocks a learnt query looks at all tokens; what the queries saw is read together into one
logit per clip (after Seaweed-APT, arXiv 2501.08316).
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...wan.config import WanConfig
from ...wan.model import Network, run_block
from ..network import clip_attention, predict_velocity


class Look(nn.Module):
    """Attention of one learnt query over tokens: [B, L, dim] -> [B, dim]."""

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
    """`layers`: the blocks whose tokens are looked at, as shares of the depth."""

    def __init__(self, config: WanConfig, layers: tuple[float, ...]) -> None:
        super().__init__()
        self.layers = sorted({min(config.layers, max(1, round(share * config.layers))) - 1 for share in layers})
        self.looks = nn.ModuleList(Look(config.dim, config.heads) for _ in self.layers)
        width = config.dim * len(self.layers)
        self.read = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, config.dim), nn.SiLU(), nn.Linear(config.dim, 1)
        )

    def forward(self, features: list[Tensor]) -> Tensor:
        """Tokens [B, L, dim] of each layer -> logits [B]."""
        seen = [look(tokens) for look, tokens in zip(self.looks, features, strict=True)]
        return self.read(torch.cat(seen, -1).float()).squeeze(-1)

    def layers_of(self, network: Network, noisy: Tensor, t: Tensor, embeds: Tensor) -> tuple[list[Tensor], Tensor]:
        """The tokens of noisy clips [B, C, F, H, W] after each of the layers, in the critic's own forward, and its
        velocity.
        """
        kept, call = [], network.ops.call

        def watched(part, module, *args):
            out = call(part, module, *args)
            if part is run_block and args[2] in self.layers:
                kept.append(out)
            return out

        watching = replace(network, ops=network.ops._replace(call=watched))
        v = predict_velocity(watching, noisy, t, embeds, clip_attention(network, noisy))
        return kept, v
