"""The diffusion losses: a bidirectional teacher, and the two classical ways to make it causal.

Every token belongs to a chunk and is clean or noisy; one rule says who sees whom, for a dense mask on the CPU and for
flex attention on a GPU:

    a token sees clean tokens of earlier chunks, and tokens of its own chunk and kind

Teacher forcing puts a clean copy of the clip beside the noisy one, so a noisy chunk sees what the cache holds when the
model generates perfectly. Diffusion forcing has no clean copy: its tokens all count as of one kind, noisy or not, and
a chunk sees earlier chunks at noise levels of their own (arXiv 2407.01392). All predict noise - x0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...sampling.config import Sampling
from ...sampling.plan import cut_into_chunks
from ...sampling.schedule import add_noise, shift_sigma
from ...wan.attention import FullAttention, sdpa
from ...wan.config import WanConfig
from ...wan.model import Network
from ..config import TrainConfig
from ..data import Batch, Source
from ..distributed import Group
from ..encoders import World
from ..network import predict_velocity, training_attention
from ..step_random import Draws
from .base import Update, WanTask

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

Sees = Callable[[Tensor, Tensor], Tensor]


def chunk_rule(chunk: Tensor, noisy: Tensor) -> Sees:
    """Whether token q may look at token k, from the chunk and kind (bool: noisy) of every token, [L] each."""

    def sees(q: Tensor, k: Tensor) -> Tensor:
        before, own = chunk[k] < chunk[q], chunk[k] == chunk[q]
        return (before & ~noisy[k]) | (own & (noisy[q] == noisy[k]))

    return sees


def chunks_of(frames: int, sampling: Sampling) -> Tensor:
    """The chunk of every latent frame, [F]."""
    return torch.tensor([chunk.index for chunk in cut_into_chunks(frames, sampling) for _ in range(chunk.frames)])


def forced_attention(
    config: WanConfig, chunks: Tensor, size: tuple[int, int], beside: bool, device: torch.device
) -> FullAttention:
    """Attention over a clip in chunks; `beside`: over [clean frames, noisy frames], both at positions 0, 1, ..."""
    frames, copies = len(chunks), 2 if beside else 1
    tokens = config.tokens_per_frame(*size)
    chunk = chunks.repeat(copies).repeat_interleave(tokens).to(device)
    noisy = torch.arange(copies, device=device).repeat_interleave(frames * tokens) > 0
    mask, attention = masked(chunk, noisy, device)
    return FullAttention(config, [*range(frames)] * copies, *size, device, mask=mask, attention=attention)


def masked(chunk: Tensor, noisy: Tensor, device: torch.device):
    """The mask of tokens of these chunks and kinds, [L] each, and the kernel that takes it."""
    if device.type == "cuda":
        return block_mask(chunk, noisy), flex
    tokens = torch.arange(len(chunk), device=device)
    return chunk_rule(chunk, noisy)(tokens[:, None], tokens[None, :]), training_attention(device)


def block_mask(chunk: Tensor, noisy: Tensor, size: int = 128) -> BlockMask:
    """Flex attention's mask of `size` x `size` blocks, equal to `create_block_mask`'s.

    That one computes the dense mask first: 4 GiB as booleans, and several times more on the way, for 21 frames of
    832 x 480 beside themselves. Here a block is known by which (chunk, kind) its tokens have, of which there are few.
    """
    from torch.nn.attention.flex_attention import BlockMask

    rule, length = chunk_rule(chunk, noisy), len(chunk)
    label = (2 * chunk + noisy).cpu()  # [L]
    labels = torch.arange(int(label.max()) + 1)
    allowed = chunk_rule(labels // 2, labels % 2 > 0)(labels[:, None], labels[None, :]).float()  # [labels, labels]
    blocks = -(-length // size)
    holds = torch.zeros(blocks, len(labels))
    holds[torch.arange(length) // size, label] = 1
    some, barred = (holds @ pairs @ holds.T > 0 for pairs in (allowed, 1 - allowed))  # [blocks, blocks] each
    whole = torch.arange(blocks) < length // size  # a block that ends beyond the last token is never full
    full = some & ~barred & whole[:, None] & whole[None, :]
    return BlockMask.from_kv_blocks(
        *_listed(some & ~full, chunk.device),
        *_listed(full, chunk.device),
        BLOCK_SIZE=size,
        mask_mod=lambda batch, head, q, k: rule(q, k),
        seq_lengths=(length, length),
    )


def _listed(blocks: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """How many blocks of each row are True, int32 [1, 1, rows], and the columns, those first, [1, 1, rows, columns]."""
    columns = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return tuple(x.int().to(device)[None, None].contiguous() for x in (blocks.sum(-1), columns))


def flex(q: Tensor, k: Tensor, v: Tensor, mask=None) -> Tensor:
    """Torch's flex attention, compiled on GPUs, [B, N, L, D]; without a mask the fused kernel is as fast."""
    if mask is None:
        return sdpa(q, k, v)
    q, k = q.to(v.dtype), k.to(v.dtype)  # under autocast the norms of queries and keys may leave them wider
    return compiled_flex(q.device.type)(q, k, v, block_mask=mask)


@cache
def compiled_flex(device: str) -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention) if device == "cuda" else flex_attention


def noised(clips: Tensor, sigma: Tensor, draws: Draws, purpose: str) -> tuple[Tensor, Tensor]:
    """Clips [B, C, F, H, W] at levels [B, F], and the noise."""
    noise = draws.normal(f"{purpose} noise", *clips.shape[1:]).to(clips)
    return add_noise(clips, noise, sigma[:, None, :, None, None]), noise


def beside_clean(
    network: Network, context: Tensor, t: Tensor, noisy: Tensor, sigma: Tensor, embeds: Tensor, attend: FullAttention
) -> Tensor:
    """Velocity of noisy frames [B, C, F, H, W] at levels [B, F] that see `context` frames at timesteps t [B, F]."""
    both, times = torch.cat((context, noisy), 2), torch.cat((t, 1000 * sigma), 1)
    return predict_velocity(network, both, times, embeds, attend)[:, :, noisy.shape[2] :]


class Flow(WanTask):
    """Teacher, teacher forcing or diffusion forcing."""

    def __init__(self, config: TrainConfig, world: World, data: Source, group: Group, device: torch.device) -> None:
        super().__init__(config, world, group, device)
        self.data, self.flow = data, config.flow
        self.updates = [Update(self.optimizer, self.loss)]
        self.attend = cache(partial(self._attend, beside=config.method == "teacher-forcing"))

    def _attend(self, frames: int, beside: bool) -> FullAttention:
        chunks = chunks_of(frames, self.config.sampling)
        if self.config.method == "bidirectional":
            chunks = torch.zeros_like(chunks)
            attention = self.student.attention
            return FullAttention(self.student.config, range(frames), *self.size, self.device, attention=attention)
        return forced_attention(self.student.config, chunks, self.size, beside, self.device)

    def loss(self, draws: Draws, progress: float) -> dict[str, Tensor]:
        frames = self.flow.frames
        if progress < self.flow.short:
            frames = self.config.sampling.chunk
            draws = more_samples(draws, self.flow.frames // frames)
        batch = self.data.batch(draws, "flow", frames)
        clips, embeds = batch.clips.to(self.device), self.world.embeds(batch.captions)
        sigma = self.levels(draws, frames).to(clips)  # [B, F]
        noisy, noise = noised(clips, sigma, draws, "flow")
        guess = self.guess(clips, noisy, sigma, embeds, draws)
        error = (guess - (noise - clips)).square().mean((1, 3, 4))  # [B, F]
        return {"loss": counted_mean(error, self.counts(batch, frames).to(error))}

    def levels(self, draws: Draws, frames: int) -> Tensor:
        """Noise levels [B, F]: one a clip for a teacher, else one a chunk."""
        chunks = chunks_of(frames, self.config.sampling)
        chunks = torch.zeros_like(chunks) if self.config.method == "bidirectional" else chunks
        return shift_sigma(draws.uniform("flow level", int(chunks[-1]) + 1), self.flow.shift)[:, chunks]

    def guess(self, clips: Tensor, noisy: Tensor, sigma: Tensor, embeds: Tensor, draws: Draws) -> Tensor:
        attend = self.attend(clips.shape[2])
        if self.config.method != "teacher-forcing":
            return predict_velocity(self.student, noisy, 1000 * sigma, embeds, attend)
        context, level = clips, torch.zeros_like(sigma)
        if self.flow.context_sigma:
            chunks = chunks_of(clips.shape[2], self.config.sampling)
            drawn = draws.uniform("context level", int(chunks[-1]) + 1)[:, chunks]
            level = (self.flow.context_sigma * drawn).to(sigma)
            context, _ = noised(clips, level, draws, "context")
        return beside_clean(self.student, context, 1000 * level, noisy, sigma, embeds, attend)

    def counts(self, batch: Batch, frames: int) -> Tensor:
        """bool [B, F]: a causal model's first chunk always begins with a still; that of a late clip does not count."""
        if self.config.method == "bidirectional":
            return torch.ones(len(batch.late), frames, dtype=torch.bool)
        first = chunks_of(frames, self.config.sampling) == 0
        return ~(batch.late[:, None] & first)


def counted_mean(error: Tensor, counts: Tensor) -> Tensor:
    """Mean of each sample over what counts, then over samples, so that a batch may be cut anyhow."""
    return ((error * counts).sum(1) / counts.sum(1).clamp(min=1)).mean()


def more_samples(draws: Draws, times: int) -> Draws:
    """`times` samples in the place of each."""
    return replace(draws, samples=tuple(times * sample + i for sample in draws.samples for i in range(times)))
