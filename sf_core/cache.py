"""The rolling KV cache: a ring of frame slots, allocated once per rollout.

A slot holds one latent frame's keys and values. The first `sink` slots belong to the first frames for good; the
others are a ring in which the newest frame takes the place of the oldest. While a chunk is denoised its keys are
written straight into the slots it will own, over the frames that just left the window, so attention reads one slice
[B, N, slots * S, D] and nothing is ever moved, copied or asked back from the device. Softmax does not care for the
order of keys, which is why a ring is exact; positions live in the keys, which are stored with their rotary embedding.

    frame      0 1 2 | 3 4 5 | 6 7 8 | 9 10 11        window 9, sink 3
    slots      0 1 2 | 3 4 5 | 6 7 8 |                 frames 0..8 fill them
               0 1 2 | 9 10 11 | 6 7 8                 frames 9..11 replace 3..5

Pinned sinks also keep their keys without positions, and get positions just before the window's oldest frame whenever
the window moves, so that no distance exceeds what training has seen (LongLive's relative positions). Sources: the
rolling cache of arXiv 2506.08009; attention sinks, arXiv 2309.17453; LongLive, arXiv 2509.22622.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .config import Sampling, WanConfig
from .model import Attention, Rope, sdpa


class RollingCache:
    """Keys and values of a rollout, [B, N, slots * S, D] per layer.

    slots   frames it can hold: the window, or the length of the video where there is no window
    sink    first frames that stay
    pinned  whether sinks move along with the window
    origin  position of the first frame that will be written; later frames count on from there
    """

    def __init__(
        self,
        config: WanConfig,
        batch: int,
        height: int,
        width: int,
        slots: int,
        sink: int = 0,
        pinned: bool = False,
        origin: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.config, self.height, self.width, self.device = config, height, width, device
        self.slots, self.sink, self.origin = slots, sink, origin
        self.tokens = config.tokens_per_frame(height, width)
        self.keys, self.values = (
            [self._empty(batch, slots, dtype) for _ in range(config.layers)] for _ in range(2)
        )
        self.bare_sinks = [self._empty(batch, sink, dtype) for _ in range(config.layers)] if pinned and sink else []
        self._pinned_at = 0

    @classmethod
    def for_rollout(cls, config: WanConfig, sampling: Sampling, frames: int, **size) -> RollingCache:
        """The cache that `frames` latent frames need under `sampling`; never larger than the video."""
        slots = frames if sampling.window is None else min(sampling.window, frames)
        return cls(config, slots=slots, sink=min(sampling.sink, slots), pinned=sampling.pinned, **size)

    def _empty(self, batch: int, frames: int, dtype: torch.dtype) -> Tensor:
        shape = (batch, self.config.heads, frames * self.tokens, self.config.head_dim)
        return torch.empty(shape, dtype=dtype, device=self.device)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values, *self.bare_sinks))

    def chunk(self, start: int, frames: int, attention: Attention = sdpa) -> ChunkAttention:
        """How the chunk of frames start .. start + frames - 1 sees itself and the window before it.

        `start` counts from the first frame this cache was given. Chunks come in order; the newest may come repeatedly.
        """
        if self.bare_sinks:
            self._pin_sinks(start + frames)
        return ChunkAttention(self, start, frames, attention)

    def runs(self, start: int, frames: int) -> Iterator[tuple[int, int, int]]:
        """(slot, offset in the chunk, count) of each stretch of slots that the frames take, at most three."""
        offset = 0
        while offset < frames:
            frame = start + offset
            if frame < self.sink:
                slot, room = frame, self.sink - frame
            else:
                ring = self.slots - self.sink
                at = (frame - self.sink) % ring
                slot, room = self.sink + at, ring - at
            count = min(room, frames - offset)
            yield slot, offset, count
            offset += count

    def filled(self, end: int) -> int:
        """Slots in use once frame end - 1 is written: always the first ones."""
        return min(end, self.slots)

    def rope(self, start: int, frames: int) -> Rope:
        first = self.origin + start
        return Rope.at(self.config.head_dim, range(first, first + frames), self.height, self.width, self.device)

    def _pin_sinks(self, end: int) -> None:
        """Gives the sinks the positions just before the window that ends at frame `end`."""
        at = max(0, end - self.slots)
        if at == self._pinned_at:
            return
        rope = self.rope(at, self.sink)
        for keys, bare in zip(self.keys, self.bare_sinks):
            keys[:, :, : bare.shape[2]] = rope(bare)
        self._pinned_at = at


class ChunkAttention:
    """Self-attention of one chunk over the cache; call it as `attend(layer, q, k, v)`, [B, N, L, D].

    Without gradients it writes the chunk's keys and values into the cache and attends to all that is filled. With
    gradients it leaves the cache alone and attends to [cached frames, chunk], so that nothing flows into earlier
    chunks.
    """

    def __init__(self, cache: RollingCache, start: int, frames: int, attention: Attention) -> None:
        self.cache, self.attention = cache, attention
        self.frames = range(start, start + frames)
        self.rope = cache.rope(start, frames)
        self.runs = tuple(cache.runs(start, frames))
        self.length = cache.filled(start + frames) * cache.tokens

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, roped = self.rope(q), self.rope(k)
        if torch.is_grad_enabled():
            keys, values = self._beside(self.cache.keys[layer], roped), self._beside(self.cache.values[layer], v)
            return self.attention(q, keys, values, None)
        self._write(self.cache.keys[layer], roped)
        self._write(self.cache.values[layer], v)
        if self.cache.bare_sinks and self.frames.start < self.cache.sink:
            self._write_sinks(self.cache.bare_sinks[layer], k)
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        return self.attention(q, keys[:, :, : self.length], values[:, :, : self.length], None)

    def _write(self, ring: Tensor, chunk: Tensor) -> None:
        tokens = self.cache.tokens
        for slot, offset, count in self.runs:
            source = chunk[:, :, offset * tokens : (offset + count) * tokens]
            ring[:, :, slot * tokens : (slot + count) * tokens] = source

    def _write_sinks(self, sinks: Tensor, chunk: Tensor) -> None:
        tokens, first = self.cache.tokens, self.frames.start
        count = min(self.cache.sink - first, len(self.frames))
        sinks[:, :, first * tokens : (first + count) * tokens] = chunk[:, :, : count * tokens]

    def _beside(self, ring: Tensor, chunk: Tensor) -> Tensor:
        """[frames of the window before the chunk, chunk] along the tokens, as a new tensor."""
        tokens, kept, at = self.cache.tokens, [], 0
        for slot, _, count in sorted(self.runs):
            kept.append(ring[:, :, at * tokens : slot * tokens])
            at = slot + count
        kept.append(ring[:, :, at * tokens : max(at * tokens, self.length)])
        return torch.cat((*kept, chunk), dim=2)
