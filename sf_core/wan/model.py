"""The causal Wan DiT, forward only.

The forward is a handful of functions over a tree of layers that carry Wan's own names (`blocks.0.self_attn.q`, ...),
not methods of one class: the same code drives `WanModel` below and any other tree with these names, such as one that
ComfyUI has loaded, quantised or patched (wrap it in `WanLayers`). Two things are handed in:

    attend(layer, q, k, v)    self-attention: `FullAttention` over a clip, or `CachedAttention` of cache.py. It also
                              carries the positions (`attend.rope`) and the attention kernel.
    ops                       the parts of a block before and after self-attention, which torch.compile may replace:
                              their shapes do not change while a cache fills. It also says how a part is called, for
                              training: through a module's hooks, or to be run again in the backward pass.

`Network` puts a model together with how it is computed; rollout, training and benchmarks are given one.

The attention kernel is `attention(q, k, v, mask)`, [B, N, L, D] in and out: torch's by default, ComfyUI's in a graph.

Letters: B batch, C channels, F latent frames, H W latent size, S tokens per frame, L tokens, N heads, D head width.
Source: Wan 2.1 (arXiv 2503.20314) with one timestep per latent frame, as in Self Forcing (arXiv 2506.08009).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..device import upload
from .attention import Attention, SelfAttention, sdpa
from .config import WanConfig
from .rope import Rope

# --- Layers, with the names that checkpoints use ---------------------------------------------------------------------


class Attn(nn.Module):
    def __init__(self, config: WanConfig, linear: type[nn.Module], **factory) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (linear(config.dim, config.dim, **factory) for _ in range(4))
        self.norm_q = nn.RMSNorm(config.dim, eps=config.eps, **factory)
        self.norm_k = nn.RMSNorm(config.dim, eps=config.eps, **factory)


class Block(nn.Module):
    def __init__(self, config: WanConfig, linear: type[nn.Module], **factory) -> None:
        super().__init__()
        self.self_attn = Attn(config, linear, **factory)
        self.cross_attn = Attn(config, linear, **factory)
        self.norm3 = nn.LayerNorm(config.dim, eps=config.eps, **factory)
        self.ffn = nn.Sequential(
            linear(config.dim, config.ffn_dim, **factory),
            nn.GELU(approximate="tanh"),
            linear(config.ffn_dim, config.dim, **factory),
        )
        self.modulation = nn.Parameter(torch.zeros(1, 6, config.dim, **factory))

    def forward(self, part: Callable, *args):
        """`part` of the forward on this block, where hooks on modules have to see it (sharded training)."""
        return part(self, *args)


class Head(nn.Module):
    def __init__(self, config: WanConfig, linear: type[nn.Module], **factory) -> None:
        super().__init__()
        self.head = linear(config.dim, 4 * config.channels, **factory)
        self.modulation = nn.Parameter(torch.zeros(1, 2, config.dim, **factory))


class WanModel(nn.Module):
    """Wan's layers and nothing else; call `encode_prompt` and `velocity` on it.

    `linear` is the class of every linear layer (torch's by default); `device` and `dtype` go to all of them.
    """

    def __init__(
        self,
        config: WanConfig,
        linear: type[nn.Module] = nn.Linear,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        dim = config.dim
        self.config = config
        self.patch_embedding = nn.Conv3d(config.channels, dim, (1, 2, 2), (1, 2, 2), **factory)
        self.text_embedding = nn.Sequential(
            linear(config.text_dim, dim, **factory), nn.GELU(approximate="tanh"), linear(dim, dim, **factory)
        )
        self.time_embedding = nn.Sequential(
            linear(config.freq_dim, dim, **factory), nn.SiLU(), linear(dim, dim, **factory)
        )
        self.time_projection = nn.Sequential(nn.SiLU(), linear(dim, 6 * dim, **factory))
        self.blocks = nn.ModuleList(Block(config, linear, **factory) for _ in range(config.layers))
        self.head = Head(config, linear, **factory)

    def forward(self, part: Callable, *args):
        """`encode_prompt` or `velocity` on this model, where hooks on modules have to see it (sharded training)."""
        return part(self, *args)

    @torch.no_grad()
    def initialise(self) -> WanModel:
        """Wan's starting weights: Xavier everywhere, small embeddings, a head that outputs zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embedding.weight.flatten(1))
        nn.init.zeros_(self.patch_embedding.bias)
        for sequential in (self.text_embedding, self.time_embedding):
            for layer in (sequential[0], sequential[2]):
                nn.init.normal_(layer.weight, std=0.02)
        for part in (*self.blocks, self.head):
            nn.init.normal_(part.modulation, std=self.config.dim**-0.5)
        nn.init.zeros_(self.head.head.weight)
        return self


@dataclass(frozen=True)
class WanLayers:
    """A module tree with Wan's layer names that is not a `WanModel`, together with its shape."""

    config: WanConfig
    patch_embedding: nn.Module
    text_embedding: nn.Module
    time_embedding: nn.Module
    time_projection: nn.Module
    blocks: nn.ModuleList
    head: nn.Module

    @classmethod
    def of(cls, module: nn.Module, config: WanConfig) -> WanLayers:
        names = ("patch_embedding", "text_embedding", "time_embedding", "time_projection", "blocks", "head")
        return cls(config, *(getattr(module, name) for name in names))


Wan = WanModel | WanLayers


# --- The forward -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PromptKV:
    """Cross-attention keys and values of a prompt, [B, N, text_len, D] per layer.

    Made once per prompt by `encode_prompt`; every step of every chunk reuses them.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]


def encode_prompt(wan: Wan, embeds: Tensor, ops: BlockOps | None = None) -> PromptKV:
    """Cross-attention keys and values, all layers', of prompt embeddings [B, <= text_len, text_dim].

    Shorter prompts are padded with zeros to text_len and not masked, as the model was trained. Raises ValueError for
    longer ones and for another width.
    """
    config = wan.config
    if embeds.shape[-1] != config.text_dim:
        raise ValueError(
            f"Got prompt embeddings of width {embeds.shape[-1]}; this model needs {config.text_dim}. "
            "Encode the prompt with the text encoder that belongs to the model."
        )
    if embeds.shape[1] > config.text_len:
        raise ValueError(
            f"Got a prompt of {embeds.shape[1]} tokens; this model reads {config.text_len}. Shorten the prompt."
        )
    padded = F.pad(embeds, (0, 0, 0, config.text_len - embeds.shape[1]))
    context = wan.text_embedding(padded)  # [B, text_len, dim]
    call = (ops or EAGER).call
    keys, values = zip(*(call(prompt_kv, block, context, config) for block in wan.blocks))
    return PromptKV(keys, values)


def prompt_kv(block: nn.Module, context: Tensor, config: WanConfig) -> tuple[Tensor, Tensor]:
    """A block's keys and values [B, N, text_len, D] of an embedded prompt [B, text_len, dim]."""
    attn = block.cross_attn
    return split_heads(attn.norm_k(attn.k(context)), config.heads), split_heads(attn.v(context), config.heads)


def qkv(block: nn.Module, x: Tensor, e6: Tensor, rope: Rope, config: WanConfig) -> tuple[Tensor, ...]:
    """Queries and keys with positions, and values, [B, N, L, D], of tokens [B, L, dim]."""
    shift, scale = (block.modulation.to(x) + e6).unbind(2)[:2]
    attn, x = block.self_attn, modulated_norm(x, shift, scale, config.eps)
    # q and k are normalised over the full width, before the split into heads.
    q = rope(split_heads(attn.norm_q(attn.q(x)), config.heads))
    k = rope(split_heads(attn.norm_k(attn.k(x)), config.heads))
    return q, k, split_heads(attn.v(x), config.heads)


def finish(
    block: nn.Module,
    x: Tensor,
    attended: Tensor,
    e6: Tensor,
    keys: Tensor,
    values: Tensor,
    attention: Attention,
    config: WanConfig,
) -> Tensor:
    """The rest of a block after self-attention [B, N, L, D]: projection, cross-attention, feed-forward."""
    _, _, gate1, shift2, scale2, gate2 = (block.modulation.to(x) + e6).unbind(2)
    x = add_gated(x, block.self_attn.o(merge_heads(attended)), gate1)
    attn, y = block.cross_attn, block.norm3(x)
    q = split_heads(attn.norm_q(attn.q(y)), config.heads)
    x = x + attn.o(merge_heads(attention(q, keys, values, None)))
    return add_gated(x, block.ffn(modulated_norm(x, shift2, scale2, config.eps)), gate2)


def call(part: Callable, module: nn.Module, *args):
    """Runs a part of the forward on its module, as it is."""
    return part(module, *args)


class BlockOps(NamedTuple):
    """The two parts of a block around self-attention, and how parts are called.

    qkv         queries, keys and values of a block's tokens
    finish      all that comes after self-attention
    call        called as call(part, module, *args) for `encode_prompt` and `velocity` of a model, `prompt_kv` and
                `run_block` of a block
    recomputes  whether `call` runs blocks again in the backward pass; a cache must then keep what they attended to
    """

    qkv: Callable[..., tuple[Tensor, ...]] = qkv
    finish: Callable[..., Tensor] = finish
    call: Callable = call
    recomputes: bool = False


EAGER = BlockOps()


def velocity(
    wan: Wan, x: Tensor, t: float | Tensor, prompt: PromptKV, attend: SelfAttention, ops: BlockOps = EAGER
) -> Tensor:
    """The model's velocity (noise - x0) for noisy latents.

    x       [B, C, F, H, W] in model space, in the dtype to compute in; H and W even
    t       timestep 0..1000 = 1000 sigma: one number, or [B or 1, F or 1], one per latent frame
    prompt  from `encode_prompt`, for the same batch
    attend  self-attention: `FullAttention`, or `CachedAttention` of a chunk
    """
    config = wan.config
    frames, height, width = x.shape[2:]
    e = wan.time_embedding(time_frequencies(t, config.freq_dim, x))  # [B or 1, F or 1, dim]
    e6 = wan.time_projection(e).unflatten(-1, (6, config.dim))  # [B or 1, F or 1, 6, dim]
    # Contiguous, or the transposed layout would go through all blocks and cost each norm a copy.
    x = wan.patch_embedding(x).flatten(2).transpose(1, 2).contiguous()  # [B, L, dim]
    for layer, block in enumerate(wan.blocks):
        x = ops.call(run_block, block, x, e6, layer, prompt, attend, ops, config)
    shift, scale = (wan.head.modulation.to(x) + e.unsqueeze(2)).unbind(2)  # [B or 1, F or 1, dim]
    x = wan.head.head(modulated_norm(x, shift, scale, config.eps))  # [B, L, 4C]
    return rearrange(x, "b (f h w) (p q c) -> b c f (h p) (w q)", f=frames, h=height // 2, w=width // 2, p=2, q=2)


def run_block(
    block: nn.Module,
    x: Tensor,
    e6: Tensor,
    layer: int,
    prompt: PromptKV,
    attend: SelfAttention,
    ops: BlockOps,
    config: WanConfig,
) -> Tensor:
    """Tokens [B, L, dim] through one block."""
    q, k, v = ops.qkv(block, x, e6, attend.rope, config)
    attended = attend(layer, q, k, v)
    return ops.finish(block, x, attended, e6, prompt.keys[layer], prompt.values[layer], attend.attention, config)


@dataclass(frozen=True)
class Network:
    """A model and how it is computed: all that a forward needs beside its inputs.

    wan        the layers
    dtype      dtype in which latents and prompts enter the layers
    attention  attention kernel
    ops        parts of a block, plain or compiled, and how they are called
    autocast   dtype of torch.autocast around a forward; None: without. Training keeps float32 weights and computes in
               bfloat16 this way
    memory     layers that write finished chunks into the cache, where the model has a network for that (SGF+)
    """

    wan: Wan
    dtype: torch.dtype = torch.float32
    attention: Attention = sdpa
    ops: BlockOps = EAGER
    autocast: torch.dtype | None = None
    memory: Wan | None = None

    @property
    def writer(self) -> Network:
        """The network that writes the cache: this one, or that of the memory."""
        return self if self.memory is None else replace(self, wan=self.memory, memory=None)

    @property
    def config(self) -> WanConfig:
        return self.wan.config

    def encode_prompt(self, embeds: Tensor) -> PromptKV:
        """Cross-attention keys and values of embeddings [B, tokens, text_dim]. Raises as `encode_prompt` does."""
        with self._autocast(embeds.device):
            return self.ops.call(encode_prompt, self.wan, embeds.to(self.dtype), self.ops)

    def velocity(self, x: Tensor, t: float | Tensor, prompt: PromptKV, attend: SelfAttention) -> Tensor:
        """Velocity (noise - x0) in float32 of noisy latents x [B, C, F, H, W] at timesteps t; see `velocity`."""
        with self._autocast(x.device):
            return self.ops.call(velocity, self.wan, x.to(self.dtype), t, prompt, attend, self.ops).float()

    def _autocast(self, device: torch.device) -> AbstractContextManager:
        if self.autocast is None:
            return nullcontext()
        # Without its cache: forwards without gradient would leave copies of weights there that carry none, and the
        # exit step of a training rollout would compute with those.
        return torch.autocast(device.type, self.autocast, cache_enabled=False)


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """LayerNorm without weights of [B, L, dim], then scale and shift [B or 1, F or 1, dim] per frame."""
    normed = per_frame(F.layer_norm(x, x.shape[-1:], eps=eps), scale)
    return torch.addcmul(shift.unsqueeze(2), normed, 1 + scale.unsqueeze(2)).view_as(x)


def add_gated(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x + gate * y for tokens [B, L, dim] and a gate [B or 1, F or 1, dim] per frame."""
    return torch.addcmul(per_frame(x, gate), per_frame(y, gate), gate.unsqueeze(2)).view_as(x)


def per_frame(x: Tensor, e: Tensor) -> Tensor:
    """[B, L, dim] seen as [B, F or 1, tokens, dim], to fit a modulation [B or 1, F or 1, dim]."""
    return x.unflatten(1, (e.shape[1], -1))


def time_frequencies(t: float | Tensor, freq_dim: int, like: Tensor) -> Tensor:
    """Sinusoids [B or 1, F or 1, freq_dim] of timesteps, cosines first, on the device and in the dtype of `like`."""
    if not isinstance(t, Tensor):
        t = torch.tensor([[t]], dtype=torch.float64)
    wide = torch.float32 if t.device.type == "mps" else torch.float64  # MPS has no float64
    half = freq_dim // 2
    ladder = 10000.0 ** (-torch.arange(half, dtype=wide, device=t.device) / half)
    angles = t.to(wide).unsqueeze(-1) * ladder
    return upload(torch.cat((angles.cos(), angles.sin()), dim=-1).to(like.dtype), like.device)


def split_heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)  # [B, L, dim] -> [B, N, L, D]


def merge_heads(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)  # [B, N, L, D] -> [B, L, dim]
