"""The published algorithm, to measure against: `python -m sf_core bench --against benchmarks/published.py:Published`.

A restatement of guandeh17/Self-Forcing, pipeline/causal_inference.py and wan/modules/causal_model.py, on the same
weights: norms and modulation in plain float32 operations, rotary embedding as complex numbers of float64, keys and
values of a window moved down by copies once it is full, and a forward of the clean chunk after each chunk, the last one
too. Same latents as ours.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sf_core.cli.bench import Job
from sf_core.sampling.noise import Noise
from sf_core.wan.model import WanModel, split_heads, time_frequencies
from sf_core.wan.rope import rope_angles


class Published:
    def prepare(self, job: Job, state_dict: dict[str, Tensor]) -> None:
        with torch.device("meta"):
            self.wan = WanModel(job.config)
        self.wan.load_state_dict({name: t.to(job.device) for name, t in state_dict.items()}, assign=True)

    @torch.inference_mode()
    def rollout(self, job: Job, embeds: Tensor, noise: Noise) -> Iterator[Tensor]:
        plan = job.plan
        shape, forward = (1, job.config.channels, plan.height, plan.width), Forward(self.wan, job, embeds)
        for chunk in plan.chunks:
            steps = plan.steps(chunk)
            x = noise(chunk.start, chunk.frames, 0, shape).to(job.device)
            for i, (timestep, sigma) in enumerate(steps):
                x0 = (x.double() - sigma * forward(x, timestep, chunk.start).double()).float()
                if i + 1 < len(steps):
                    again = noise(chunk.start, chunk.frames, i + 1, shape).to(job.device)
                    x = (1 - steps[i + 1].sigma) * x0 + steps[i + 1].sigma * again
            yield x0
            forward(x0, plan.sampling.context_noise, chunk.start)


class Forward:
    """The network with its cache of `window` frames, [B, L, N, D] per layer, oldest first."""

    def __init__(self, wan: WanModel, job: Job, embeds: Tensor) -> None:
        self.wan, self.config, self.dtype, self.plan = wan, job.config, job.dtype, job.plan
        self.tokens = self.config.tokens_per_frame(self.plan.height, self.plan.width)
        shape = (1, self.plan.window * self.tokens, self.config.heads, self.config.head_dim)
        self.cache = [[torch.zeros(shape, dtype=job.dtype, device=job.device) for _ in "kv"] for _ in wan.blocks]
        self.end = self.held = 0  # tokens so far, and those of them in the cache
        padded = F.pad(embeds, (0, 0, 0, self.config.text_len - embeds.shape[1]))
        self.context, self.prompt = wan.text_embedding(padded), [None] * len(wan.blocks)

    def __call__(self, x: Tensor, timestep: float, start: int) -> Tensor:
        wan, config, frames = self.wan, self.config, x.shape[2]
        x = x.to(self.dtype)
        t = torch.full((1, frames), timestep, dtype=torch.float64, device=x.device)
        e = wan.time_embedding(time_frequencies(t, config.freq_dim, x))  # [1, F, dim]
        e6 = wan.time_projection(e).unflatten(-1, (6, config.dim)).float()
        angles = rope_angles(config.head_dim, range(start, start + frames), self.plan.height, self.plan.width)
        angles = angles.flatten(0, 2).to(x.device)
        turns = torch.polar(torch.ones_like(angles), angles)[:, None]  # [L, 1, D/2]
        x = wan.patch_embedding(x).flatten(2).transpose(1, 2)
        self._make_room(start * self.tokens, x.shape[1])
        for layer, block in enumerate(wan.blocks):
            x = self._block(layer, block, x, e6, turns)
        shift, scale = (wan.head.modulation.float() + e.unsqueeze(2).float()).unbind(2)
        x = wan.head.head(_modulate(_layer_norm(x, config.eps), shift, scale).to(self.dtype))
        size = (frames, self.plan.height // 2, self.plan.width // 2)
        return (
            x.unflatten(1, size).unflatten(-1, (2, 2, -1)).permute(0, 6, 1, 2, 4, 3, 5).flatten(3, 4).flatten(4).float()
        )

    def _make_room(self, start: int, tokens: int) -> None:
        """Moves the window down by what is new where it does not fit."""
        new = start + tokens - self.end
        size = self.cache[0][0].shape[1]
        if new > 0 and self.held + new > size:
            sink, over = self.plan.sink * self.tokens, self.held + new - size
            for kept in (kept for pair in self.cache for kept in pair):
                kept[:, sink : self.held - over] = kept[:, sink + over : self.held].clone()
            self.held -= over
        self.end, self.held = start + tokens, self.held + max(0, new)

    def _block(self, layer: int, block: nn.Module, x: Tensor, e6: Tensor, turns: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = (block.modulation.float() + e6).unbind(2)
        attn, config = block.self_attn, self.config
        y = _modulate(_layer_norm(x, config.eps), shift1, scale1).to(self.dtype)
        q, k = (
            _rms_norm(linear(y), norm, config.eps) for linear, norm in ((attn.q, attn.norm_q), (attn.k, attn.norm_k))
        )
        q, k, v = (z.unflatten(-1, (config.heads, -1)) for z in (q, k, attn.v(y)))
        keys, values = self.cache[layer]
        here = slice(self.held - x.shape[1], self.held)
        keys[:, here], values[:, here] = _turn(k, turns), v
        seen = (z.transpose(1, 2) for z in (_turn(q, turns), keys[:, : self.held], values[:, : self.held]))
        y = F.scaled_dot_product_attention(*seen).transpose(1, 2).flatten(2)
        x = _gate(x, attn.o(y), gate1)
        x = x + self._cross(layer, block, x)
        y = block.ffn(_modulate(_layer_norm(x, config.eps), shift2, scale2).to(self.dtype))
        return _gate(x, y, gate2)

    def _cross(self, layer: int, block: nn.Module, x: Tensor) -> Tensor:
        attn, norm, config = block.cross_attn, block.norm3, self.config
        if self.prompt[layer] is None:
            k = split_heads(_rms_norm(attn.k(self.context), attn.norm_k, config.eps), config.heads)
            self.prompt[layer] = k, split_heads(attn.v(self.context), config.heads)
        y = F.layer_norm(x.float(), x.shape[-1:], norm.weight.float(), norm.bias.float(), config.eps).to(self.dtype)
        q = split_heads(_rms_norm(attn.q(y), attn.norm_q, config.eps), config.heads)
        return attn.o(F.scaled_dot_product_attention(q, *self.prompt[layer]).transpose(1, 2).flatten(2))


def _layer_norm(x: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x.float(), x.shape[-1:], eps=eps)


def _rms_norm(x: Tensor, norm: nn.RMSNorm, eps: float) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) * norm.weight


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """[B, L, dim] scaled and shifted by [B, F, dim] of each frame."""
    frames = x.unflatten(1, (shift.shape[1], -1))
    return (frames * (1 + scale.unsqueeze(2)) + shift.unsqueeze(2)).flatten(1, 2)


def _gate(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    return x + (y.unflatten(1, (gate.shape[1], -1)).float() * gate.unsqueeze(2)).flatten(1, 2).to(x.dtype)


def _turn(x: Tensor, turns: Tensor) -> Tensor:
    """[B, L, N, D] turned as complex numbers of float64."""
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turns).flatten(-2).to(x.dtype)
