"""The rolling KV cache: a ring of frame slots, allocated once per rollout.

A slot holds one latent frame's keys and values. The first `sink` slots belong to the first frames for good; the
others are a ring in which the newest frame takes the place of the oldest. While a chunk is denoised its keys are
written straight into the slots it will own, over the frames that just left the window, so attention reads one slice
[B, N, slots * S, D] and nothing is ever moved, copied or asked back from the device. Softmax does not care for the
order of keys, which is why a ring is exact; positions live in the keys, which are stored with their rotary embedding.

    frame      0 1 2 | 3 4 5 | 6 7 8 | 9 10 11        window 9, sink 3
    slots      0 1 2 | 3 4 5 | 6 7 8 |                 frames 0..8 fill them
               0 1 2 | 9 10 11 | 6 7 8                 frames 9..11 replace 3..5

Pinned sinks also keep their keys as first written, and are turned to positions just before the window's oldest frame
whenever the window moves, so that no distance exceeds what training has seen (LongLive's relative positions). A
rotary embedding is a rotation: turning a key by the angle of n frames is the same as having placed it n frames later.

Training that runs a forward again in its backward pass must find what was there the first time. Such a cache keeps
every frame in a slot of its own (`keep`), and a window is what attention reads of them.

A cache in float8 keeps a scale per token and head and is turned back, one layer at a time, when it is read: half the
memory of bfloat16.

Sources: the rolling cache of arXiv 2506.08009; attention sinks, arXiv 2309.17453; LongLive, arXiv 2509.22622.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from .attention import Attention, sdpa
from .config import WanConfig
from .fp8 import E4M3, quantise_rows
from .rope import Rope


@dataclass(frozen=True)
class CacheShape:
    """Size of a KV cache: `batch` videos of `height` x `width` latent pixels.

    slots   latent frames it can hold: the window, or the length of the video where there is no window
    sink    first frames that stay
    pinned  whether sinks move along with the window
    window  frames attended to, where the slots keep more of them than that; None: all slots
    """

    batch: int
    height: int
    width: int
    slots: int
    sink: int = 0
    pinned: bool = False
    window: int | None = None


class RollingCache:
    """Keys and values of a rollout, [B, N, slots * S, D] per layer.

    dtype   of what is kept; torch.float8_e4m3fn keeps scales beside it
    first   number, and so position, of the first frame that will be written
    """

    def __init__(
        self,
        config: WanConfig,
        shape: CacheShape,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        first: int = 0,
    ) -> None:
        self.config, self.height, self.width, self.device = config, shape.height, shape.width, device
        self.slots, self.sink, self.window = shape.slots, shape.sink, shape.window or shape.slots
        self.tokens = config.tokens_per_frame(shape.height, shape.width)
        size = (shape.batch, config.heads, shape.slots * self.tokens, config.head_dim)
        buffer = Fp8SlotBuffer if dtype is E4M3 else SlotBuffer
        self.keys, self.values = ([buffer(size, dtype, device) for _ in range(config.layers)] for _ in range(2))
        self.pinned = shape.pinned and shape.sink > 0
        self.restart(first)

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in (*self.keys, *self.values))

    def restart(self, first: int) -> None:
        """Forgets everything; frame `first` comes next."""
        self.first, self.ring_first = first, first + self.sink
        self._sinks: list[Tensor] = []  # sink keys at their first positions, once they have to move
        self._moved = 0

    def cut(self, frame: int) -> None:
        """Forgets everything but the sinks; `frame` comes next."""
        self.ring_first = max(self.ring_first, frame)

    def begin_shot(self, frame: int) -> None:
        """A scene cut at `frame`: here everything but the sinks is forgotten."""
        self.cut(frame)

    def finish(self, attend: CachedAttention) -> CachedAttention:
        """The self-attention with which a chunk is written once it is denoised: that of its steps."""
        return attend

    def chunk(self, start: int, frames: int, attention: Attention = sdpa) -> CachedAttention:
        """How the chunk of frames start .. start + frames - 1 sees itself and the window before it.

        Chunks come in order; the newest frames may come again, in one chunk or several.
        """
        if self.pinned:
            self._move_sinks(max(self.ring_first, start + frames - self.ring))
        return CachedAttention(self, start, frames, attention)

    @property
    def ring(self) -> int:
        """Slots that are not sinks'."""
        return self.slots - self.sink

    def runs(self, start: int, frames: int) -> Iterator[tuple[int, int, int]]:
        """(slot, offset in the chunk, count) of each stretch of slots that the frames take, in order."""
        offset = 0
        while offset < frames:
            frame = start + offset
            if frame < self.first + self.sink:
                slot, room = frame - self.first, self.first + self.sink - frame
            else:
                at = (frame - self.ring_first) % self.ring
                slot, room = self.sink + at, self.ring - at
            count = min(room, frames - offset)
            yield slot, offset, count
            offset += count

    def filled(self, end: int) -> int:
        """Slots in use once frame end - 1 is written: always the first ones."""
        if end <= self.first + self.sink:
            return end - self.first
        return min(self.sink + end - self.ring_first, self.slots)

    def before(self, start: int, frames: int) -> list[tuple[int, int]]:
        """Stretches of slots [from, to) that frames start .. start + frames - 1 see besides their own."""
        own = [(slot, slot + count) for slot, _, count in sorted(self.runs(start, frames))]
        edges = [0, *(edge for run in own for edge in run), self.filled(start + frames)]
        others = list(zip(edges[::2], edges[1::2]))
        if self.window < self.slots:  # nothing is overwritten: slots are in the order of their frames
            first, last = others[0][0], own[0][0]
            newest = max(self.sink, own[-1][1] - (self.window - self.sink))
            others = [(first, min(self.sink, last)), (newest, last)]
        return [(low, high) for low, high in others if low < high]

    def rope(self, start: int, frames: int) -> Rope:
        return Rope.at(self.config.head_dim, range(start, start + frames), self.height, self.width, self.device)

    def _move_sinks(self, oldest: int) -> None:
        """Puts the sinks just before frame `oldest`, the window's oldest other frame."""
        later = oldest - self.sink - self.first
        if later == self._moved:
            return
        if not self._sinks:
            self._sinks = [keys.read(self.sink * self.tokens).clone() for keys in self.keys]
        turn = Rope.at(self.config.head_dim, [later], 2, 2, self.device)  # one angle: rows and columns stay
        for keys, sinks in zip(self.keys, self._sinks):
            keys.write(0, turn(sinks))
        self._moved = later


class SlotBuffer:
    """Tokens [B, N, L, D] of one layer, as they are."""

    def __init__(self, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device | str) -> None:
        self.tokens = torch.empty(shape, dtype=dtype, device=device)

    @property
    def nbytes(self) -> int:
        return self.tokens.nbytes

    def write(self, at: int, tokens: Tensor) -> None:
        self.tokens[:, :, at : at + tokens.shape[2]] = tokens

    def read(self, end: int) -> Tensor:
        """The first `end` tokens, as a view where nothing has to be computed."""
        return self.tokens[:, :, :end]


class Fp8SlotBuffer(SlotBuffer):
    """Tokens in float8 with a scale [B, N, L, 1] each, so that the largest number of each token and head is exact."""

    def __init__(self, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__(shape, dtype, device)
        self.scales = torch.empty((*shape[:3], 1), device=device)
        self.dtype = torch.float32  # of what was written last, and is read back

    @property
    def nbytes(self) -> int:
        return self.tokens.nbytes + self.scales.nbytes

    def write(self, at: int, tokens: Tensor) -> None:
        self.dtype = tokens.dtype
        here = slice(at, at + tokens.shape[2])
        self.tokens[:, :, here], self.scales[:, :, here] = quantise_rows(tokens)

    def read(self, end: int) -> Tensor:
        return self.tokens[:, :, :end].to(self.dtype) * self.scales[:, :, :end].to(self.dtype)


class CachedAttention:
    """Self-attention of one chunk over the cache; call it as `attend(layer, q, k, v)`, [B, N, L, D].

    It writes the chunk's keys and values into the cache and attends to all that is filled. `read_only` leaves the cache
    alone and attends to [cached frames, chunk], so that a gradient never flows into earlier chunks; so it does where
    the window is a part of what is kept.
    """

    def __init__(self, cache: RollingCache, start: int, frames: int, attention: Attention) -> None:
        self.cache, self.attention, self.write = cache, attention, True
        self.frames = range(start, start + frames)
        self.rope = cache.rope(start, frames)
        self.runs = tuple(cache.runs(start, frames))
        self.length = cache.filled(start + frames) * cache.tokens
        self.before = cache.before(start, frames)
        self.attends_to_all = cache.window == cache.slots

    def read_only(self) -> CachedAttention:
        """The same attention without writing."""
        reader = copy(self)
        reader.write = False
        return reader

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        if self.write:
            self._write(keys, k)
            self._write(values, v)
        filled = self.read_keys(keys), values.read(self.length)
        if self.write and self.attends_to_all:
            return self.attention(q, *filled, None)
        return self.attention(q, self._append(filled[0], k), self._append(filled[1], v), None)

    def read_keys(self, keys: SlotBuffer) -> Tensor:
        """Keys [B, N, filled * S, D] of a layer with the positions that their frames have for this chunk."""
        return keys.read(self.length)

    def _write(self, buffer: SlotBuffer, chunk: Tensor) -> None:
        tokens = self.cache.tokens
        for slot, offset, count in self.runs:
            buffer.write(slot * tokens, chunk[:, :, offset * tokens : (offset + count) * tokens])

    def _append(self, filled: Tensor, chunk: Tensor) -> Tensor:
        """[frames of the window before the chunk, chunk] along the tokens, as a new tensor."""
        tokens = self.cache.tokens
        kept = [filled[:, :, low * tokens : high * tokens] for low, high in self.before]
        return torch.cat((*kept, chunk), dim=2)
