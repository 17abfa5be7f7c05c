"""Diffusion training: a bidirectional teacher, and the two classical ways to make it causal.

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
from functools import cache
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
from ..data import Batch, Dataset
from ..distributed import Group
from ..encoders import Encoders
from ..network import predict_velocity, training_attention
from ..step_random import StepRandom
from .base import Update, WanMethod

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

TokenRule = Callable[[Tensor, Tensor], Tensor]


def chunk_rule(chunk: Tensor, noisy: Tensor) -> TokenRule:
    """Attention rule: whether query token q sees key token k, by chunk and kind (bool: noisy) of tokens, [L] each."""

    def sees(q: Tensor, k: Tensor) -> Tensor:
        before, own = chunk[k] < chunk[q], chunk[k] == chunk[q]
        return (before & ~noisy[k]) | (own & (noisy[q] == noisy[k]))

    return sees


def chunk_indices(frames: int, sampling: Sampling) -> Tensor:
    """The chunk of every latent frame, [F]."""
    return torch.tensor([chunk.index for chunk in cut_into_chunks(frames, sampling) for _ in range(chunk.frames)])


def chunk_attention(
    config: WanConfig, chunks: Tensor, size: tuple[int, int], beside: bool, device: torch.device
) -> FullAttention:
    """Block-causal attention over a clip; `beside`: over [clean frames, noisy frames], both from position 0."""
    frames, copies = len(chunks), 2 if beside else 1
    tokens = config.tokens_per_frame(*size)
    chunk = chunks.repeat(copies).repeat_interleave(tokens).to(device)
    noisy = torch.arange(copies, device=device).repeat_interleave(frames * tokens) > 0
    mask, attention = build_mask(chunk, noisy, device)
    return FullAttention(config, [*range(frames)] * copies, *size, device, mask=mask, attention=attention)


def build_mask(chunk: Tensor, noisy: Tensor, device: torch.device):
    """The attention mask of tokens of these chunks and kinds, [L] each, and the kernel that takes it."""
    if device.type == "cuda":
        return block_mask(chunk, noisy), attend_flex
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
        *_list_blocks(some & ~full, chunk.device),
        *_list_blocks(full, chunk.device),
        BLOCK_SIZE=size,
        mask_mod=lambda batch, head, q, k: rule(q, k),
        seq_lengths=(length, length),
    )


def _list_blocks(blocks: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """How many blocks of each row are True, int32 [1, 1, rows], and the columns, those first, [1, 1, rows, columns]."""
    columns = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return tuple(x.int().to(device)[None, None].contiguous() for x in (blocks.sum(-1), columns))


def attend_flex(q: Tensor, k: Tensor, v: Tensor, mask=None) -> Tensor:
    """Torch's flex attention, compiled on GPUs, [B, N, L, D]; without a mask the fused kernel is as fast."""
    if mask is None:
        return sdpa(q, k, v)
    q, k = q.to(v.dtype), k.to(v.dtype)  # under autocast the norms of queries and keys may leave them wider
    return compile_flex(q.device.type)(q, k, v, block_mask=mask)


@cache
def compile_flex(device: str) -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention) if device == "cuda" else flex_attention


def add_clip_noise(clips: Tensor, sigma: Tensor, random: StepRandom, purpose: str) -> tuple[Tensor, Tensor]:
    """Noisy clips [B, C, F, H, W] at noise levels sigma [B, F], and the noise."""
    noise = random.normal(f"{purpose} noise", *clips.shape[1:]).to(clips)
    return add_noise(clips, noise, sigma[:, None, :, None, None]), noise


def velocity_given_context(
    network: Network, context: Tensor, t: Tensor, noisy: Tensor, sigma: Tensor, embeds: Tensor, attend: FullAttention
) -> Tensor:
    """Velocity of noisy frames [B, C, F, H, W] at noise levels [B, F], beside `context` at timesteps t [B, F]."""
    both, times = torch.cat((context, noisy), 2), torch.cat((t, 1000 * sigma), 1)
    return predict_velocity(network, both, times, embeds, attend)[:, :, noisy.shape[2] :]


class DiffusionForcing(WanMethod):
    """Diffusion forcing (arXiv 2407.01392): a noise level per chunk; chunks see earlier ones noisy as they are."""

    def __init__(
        self, config: TrainConfig, encoders: Encoders, data: Dataset, group: Group, device: torch.device
    ) -> None:
        super().__init__(config, encoders, group, device)
        self.data, self.flow = data, config.flow
        self.updates = [Update(self.optimizer, self.loss)]
        self.attention = cache(self.build_attention)

    def loss(self, random: StepRandom, progress: float) -> dict[str, Tensor]:
        """Flow matching: mean squared error of the velocity noise - x0, in the first steps of shorter clips."""
        frames = self.flow.frames
        if progress < self.flow.short:
            frames = self.config.sampling.chunk
            random = repeat_samples(random, self.flow.frames // frames)
        batch = self.data.batch(random, "flow", frames)
        clips, embeds = batch.clips.to(self.device), self.encoders.embeds(batch.captions)
        sigma = self.draw_sigma(random, frames).to(clips)  # [B, F]
        noisy, noise = add_clip_noise(clips, sigma, random, "flow")
        v = self.predict(clips, noisy, sigma, embeds, random)
        error = (v - (noise - clips)).square().mean((1, 3, 4))  # [B, F]
        return {"loss": masked_mean(error, self.loss_mask(batch, frames).to(error))}

    def chunks(self, frames: int) -> Tensor:
        """The chunk of every latent frame, [F]."""
        return chunk_indices(frames, self.config.sampling)

    def draw_sigma(self, random: StepRandom, frames: int) -> Tensor:
        """Noise levels 0..1 [B, F], one a chunk: uniform, then shifted."""
        chunks = self.chunks(frames)
        return shift_sigma(random.uniform("flow level", int(chunks[-1]) + 1), self.flow.shift)[:, chunks]

    def build_attention(self, frames: int) -> FullAttention:
        return chunk_attention(self.student.config, self.chunks(frames), self.size, False, self.device)

    def predict(self, clips: Tensor, noisy: Tensor, sigma: Tensor, embeds: Tensor, random: StepRandom) -> Tensor:
        """The student's velocity of noisy clips [B, C, F, H, W] at noise levels [B, F]."""
        return predict_velocity(self.student, noisy, 1000 * sigma, embeds, self.attention(clips.shape[2]))

    def loss_mask(self, batch: Batch, frames: int) -> Tensor:
        """bool [B, F]: a causal model's first chunk always begins with a still; that of a late clip does not count."""
        return ~(batch.late[:, None] & (self.chunks(frames) == 0))


class TeacherForcing(DiffusionForcing):
    """Teacher forcing: noisy chunks beside clean ones, which are what they see of earlier chunks."""

    def build_attention(self, frames: int) -> FullAttention:
        return chunk_attention(self.student.config, self.chunks(frames), self.size, True, self.device)

    def predict(self, clips: Tensor, noisy: Tensor, sigma: Tensor, embeds: Tensor, random: StepRandom) -> Tensor:
        context, level = clips, torch.zeros_like(sigma)
        if self.flow.context_sigma:
            chunks = self.chunks(clips.shape[2])
            uniform = random.uniform("context level", int(chunks[-1]) + 1)[:, chunks]
            level = (self.flow.context_sigma * uniform).to(sigma)
            context, _ = add_clip_noise(clips, level, random, "context")
        attention = self.attention(clips.shape[2])
        return velocity_given_context(self.student, context, 1000 * level, noisy, sigma, embeds, attention)


class Bidirectional(DiffusionForcing):
    """Bidirectional diffusion: one noise level a clip, and every token sees all others. A teacher."""

    def chunks(self, frames: int) -> Tensor:
        return torch.zeros_like(super().chunks(frames))

    def build_attention(self, frames: int) -> FullAttention:
        attention = self.student.attention
        return FullAttention(self.student.config, range(frames), *self.size, self.device, attention=attention)

    def loss_mask(self, batch: Batch, frames: int) -> Tensor:
        return torch.ones(len(batch.late), frames, dtype=torch.bool)


def masked_mean(error: Tensor, mask: Tensor) -> Tensor:
    """Masked mean [] of errors [B, F]: of each sample, then over samples, so that a batch may be cut anyhow."""
    return ((error * mask).sum(1) / mask.sum(1).clamp(min=1)).mean()


def repeat_samples(random: StepRandom, times: int) -> StepRandom:
    """Random numbers of `times` samples in the place of each."""
    return replace(random, samples=tuple(times * sample + i for sample in random.samples for i in range(times)))
