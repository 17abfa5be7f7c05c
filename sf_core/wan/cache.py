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

Rules that some models were trained with:

    gap      pinned sinks stop short of the window's oldest frame, so that positions fill a trained range that is longer
             than the window (Self Gradient Forcing)
    decay    frames that leave the window are blended into the sinks: sink <- decay sink + (1 - decay) frame, keys and
             values, as if both stood at the sink's position (Reward Forcing)
    bank     single frames of long ago beside the sinks, chosen by the prompt (MemFlow, bank.py)
    ahead    chunks that are denoised together see each other and what is finished (Rolling Forcing)

Sources: the rolling cache of arXiv 2506.08009; attention sinks, arXiv 2309.17453; LongLive, arXiv 2509.22622; Rolling
Forcing, arXiv 2509.25161; Reward Forcing, arXiv 2512.04678.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .attention import Attention, sdpa
from .config import WanConfig
from .fp8 import E4M3, quantise_rows
from .rope import Rope, jittered_bases


@dataclass(frozen=True)
class CacheShape:
    """Size of a KV cache: `batch` videos of `height` x `width` latent pixels.

    slots   latent frames it can hold: the window, or the length of the video where there is no window
    sink    first frames that stay
    pinned  whether sinks move along with the window
    window  frames attended to, where the slots keep more of them than that; None: all slots
    gap     frames that lie between pinned sinks and the window's oldest other frame
    decay   of a sink, each time that a frame which leaves the window is blended into it; 1: sinks stay as they are
    bank    frames of a memory bank beside them; see bank.py
    chosen  frames of sinks and bank that each head attends to; None: all
    jitter  of the heads' RoPE bases, 0..1
    """

    batch: int
    height: int
    width: int
    slots: int
    sink: int = 0
    pinned: bool = False
    window: int | None = None
    gap: int = 0
    decay: float = 1.0
    bank: int = 0
    chosen: int | None = None
    jitter: float = 0.0


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
        self.gap, self.decay, self.bank_slots, self.chosen = shape.gap, shape.decay, shape.bank, shape.chosen
        self.time_bases = jittered_bases(config.heads, shape.jitter)
        self.tokens = config.tokens_per_frame(shape.height, shape.width)
        size = (shape.batch, config.heads, (self.bank_slots + shape.slots) * self.tokens, config.head_dim)
        buffer = Fp8SlotBuffer if dtype is E4M3 else SlotBuffer
        self.keys, self.values = ([buffer(size, dtype, device) for _ in range(config.layers)] for _ in range(2))
        self.pinned = shape.pinned and shape.sink > 0
        self.keeps_sinks = self.pinned or (shape.decay < 1 and shape.sink > 0)  # their keys, at their first positions
        self.banked = 0  # frames in the bank
        self.restart(first)

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in (*self.keys, *self.values))

    def restart(self, first: int) -> None:
        """Forgets everything but the bank; frame `first` comes next."""
        self.first, self.ring_first = first, first + self.sink
        self._sinks: list[Tensor] = []  # sink keys at their first positions, once they have to move
        self._moved = 0
        self._oldest = self.ring_first  # of the frames that have not left the window

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
        if start < self.first + self.sink:
            self._sinks, self._moved = [], 0  # the sinks are about to be written, at their first positions
        oldest = max(self.ring_first, start + frames - self.ring)
        if self.decay < 1 and self.sink:
            self._blend_into_sinks(oldest)
        if self.pinned:
            self._place_sinks(max(0, oldest - self.sink - self.first - self.gap))
        return CachedAttention(self, start, frames, attention)

    def ahead(self, start: int, frames: int, attention: Attention = sdpa) -> CachedAttention:
        """How unfinished frames from `start` on, one or more chunks, see each other and what is finished.

        Besides themselves: the sinks, just before as many of the newest finished frames as the window has room for.
        """
        finished = start - self.first
        recent = min(max(0, finished - self.sink), max(0, self.window - frames - self.sink))
        seen = min(self.sink, finished)
        self._place_sinks(max(0, finished - recent - seen))
        slots = [(self.bank_slots, self.bank_slots + seen), *self._stretches(start - recent, recent)]
        return CachedAttention(self, start, frames, attention, [run for run in slots if run[0] < run[1]]).read_only()

    def newest(self, start: int, frames: int, attention: Attention = sdpa) -> CachedAttention:
        """How a finished chunk sees the newest frames, a window of them with itself: sinks only while they are among
        these, at their first positions.
        """
        seen = min(start - self.first, max(0, self.window - frames))
        self._place_sinks(0)
        if start < self.first + self.sink:
            self._sinks = []  # the sinks are about to be written
        return CachedAttention(self, start, frames, attention, self._stretches(start - seen, seen))

    @property
    def ring(self) -> int:
        """Slots that are not sinks'."""
        return self.slots - self.sink

    def _stretches(self, start: int, frames: int) -> list[tuple[int, int]]:
        """Stretches of slots [from, to) of frames that are in the cache."""
        return [(slot, slot + count) for slot, _, count in self.runs(start, frames)]

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
            yield self.bank_slots + slot, offset, count
            offset += count

    @property
    def begin(self) -> int:
        """The first slot in use: that of the bank's newest frame, or of the first sink."""
        return self.bank_slots - self.banked

    def filled(self, end: int) -> int:
        """End of the slots in use, from `begin` on without a hole, once frame end - 1 is written."""
        if end <= self.first + self.sink:
            return self.bank_slots + end - self.first
        return self.bank_slots + min(self.sink + end - self.ring_first, self.slots)

    def before(self, start: int, frames: int) -> list[tuple[int, int]]:
        """Stretches of slots [from, to) that frames start .. start + frames - 1 see besides their own."""
        own = [(slot, slot + count) for slot, _, count in sorted(self.runs(start, frames))]
        edges = [self.begin, *(edge for run in own for edge in run), self.filled(start + frames)]
        others = list(zip(edges[::2], edges[1::2]))
        if self.window < self.slots:  # nothing is overwritten: slots are in the order of their frames
            first, last = others[0][0], own[0][0]
            newest = max(self.sink, own[-1][1] - (self.window - self.sink))
            others = [(first, min(self.sink, last)), (newest, last)]
        return [(low, high) for low, high in others if low < high]

    def frame_of(self, buffer: SlotBuffer, frame: int) -> Tensor:
        """Keys or values [B, N, S, D] of a frame that is in the cache."""
        (slot, _, _), *_ = self.runs(frame, 1)
        return buffer.read(self.tokens, slot * self.tokens)

    def rope(self, start: int, frames: int) -> Rope:
        return self._rope(range(start, start + frames), self.height, self.width)

    def _rope(self, frames: Sequence[int], height: int, width: int) -> Rope:
        return Rope.at(self.config.head_dim, frames, height, width, self.device, self.time_bases)

    def _turn(self, frames: int) -> Rope:
        """The rotation of keys to a position so many frames later: one angle, rows and columns stay."""
        return self._rope([frames], 2, 2)

    def _keep_sinks(self) -> None:
        """Keeps the sinks' keys as they were written, before the first change of them."""
        if not self._sinks:
            at = self.bank_slots * self.tokens
            self._sinks = [keys.read(self.sink * self.tokens, at).clone() for keys in self.keys]

    def _place_sinks(self, later: int) -> None:
        """Gives the sinks positions so many frames after their first ones."""
        if later == self._moved:
            return
        self._keep_sinks()
        turn = self._turn(later)
        for keys, sinks in zip(self.keys, self._sinks):
            keys.write(self.bank_slots * self.tokens, turn(sinks))
        self._moved = later

    def _blend_into_sinks(self, oldest: int) -> None:
        """Blends the frames that leave the window, those before `oldest`, into the sinks: the first into the first."""
        leaving = range(max(self._oldest, self.ring_first), oldest)
        self._oldest = oldest
        for i, frame in enumerate(leaving):
            sink = i % self.sink
            self._keep_sinks()
            there = (self.bank_slots + sink) * self.tokens
            part, turn = slice(sink * self.tokens, (sink + 1) * self.tokens), self._turn(self.first + sink - frame)
            for keys, values, sinks in zip(self.keys, self.values, self._sinks):
                left = turn(self.frame_of(keys, frame))
                sinks[:, :, part] = self.decay * sinks[:, :, part] + (1 - self.decay) * left
                kept, left = values.read(self.tokens, there), self.frame_of(values, frame)
                values.write(there, self.decay * kept + (1 - self.decay) * left)
        if leaving:
            self._moved = -1  # they have changed: to be written again wherever they are
            if not self.pinned:
                self._place_sinks(0)


class SlotBuffer:
    """Tokens [B, N, L, D] of one layer, as they are."""

    def __init__(self, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device | str) -> None:
        self.tokens = torch.empty(shape, dtype=dtype, device=device)

    @property
    def nbytes(self) -> int:
        return self.tokens.nbytes

    def write(self, at: int, tokens: Tensor) -> None:
        self.tokens[:, :, at : at + tokens.shape[2]] = tokens

    def read(self, count: int, at: int = 0) -> Tensor:
        """`count` tokens from `at` on, as a view where nothing has to be computed."""
        return self.tokens[:, :, at : at + count]


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

    def read(self, count: int, at: int = 0) -> Tensor:
        here = slice(at, at + count)
        return self.tokens[:, :, here].to(self.dtype) * self.scales[:, :, here].to(self.dtype)


class CachedAttention:
    """Self-attention of one chunk over the cache; call it as `attend(layer, q, k, v)`, [B, N, L, D].

    It writes the chunk's keys and values into the cache and attends to all that is filled. `read_only` leaves the cache
    alone and attends to [cached frames, chunk], so that a gradient never flows into earlier chunks; so it does where
    the window is a part of what is kept.

    before  stretches of slots [from, to) that it sees besides its own; None: the window
    """

    def __init__(
        self,
        cache: RollingCache,
        start: int,
        frames: int,
        attention: Attention,
        before: list[tuple[int, int]] | None = None,
    ) -> None:
        self.cache, self.attention, self.write = cache, attention, True
        self.frames = range(start, start + frames)
        self.rope = cache.rope(start, frames)
        self.runs = tuple(cache.runs(start, frames))
        self.begin, self.end = cache.begin * cache.tokens, cache.filled(start + frames) * cache.tokens
        self.before = cache.before(start, frames) if before is None else before
        self.attends_to_all = before is None and cache.window == cache.slots
        self.of_old = min(cache.sink, start + frames - cache.first) + cache.banked  # frames of sinks and bank

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
        if self.write and self.attends_to_all:
            count = self.end - self.begin
            k, v = self.read_keys(keys, count, self.begin), values.read(count, self.begin)
            if self.cache.chosen:
                k, v = choose_frames(q, k, v, self.of_old, self.cache.tokens, self.cache.chosen)
        else:
            k, v = self._append(partial(self.read_keys, keys), k), self._append(values.read, v)
        return self.attention(q, k, v, None)

    def read_keys(self, keys: SlotBuffer, count: int, at: int) -> Tensor:
        """`count` keys [B, N, count, D] from `at` on, with the positions that their frames have for this chunk."""
        return keys.read(count, at)

    def _write(self, buffer: SlotBuffer, chunk: Tensor) -> None:
        tokens = self.cache.tokens
        for slot, offset, count in self.runs:
            buffer.write(slot * tokens, chunk[:, :, offset * tokens : (offset + count) * tokens])

    def _append(self, read: Callable[[int, int], Tensor], chunk: Tensor) -> Tensor:
        """[frames that are seen besides the chunk, chunk] along the tokens, as a new tensor."""
        tokens = self.cache.tokens
        kept = [read((high - low) * tokens, low * tokens) for low, high in self.before]
        return torch.cat((*kept, chunk), dim=2)


def choose_frames(q: Tensor, keys: Tensor, values: Tensor, frames: int, tokens: int, count: int) -> tuple[Tensor, ...]:
    """Keys and values [B, N, L, D] without those of the first `frames` frames that a head's queries agree with least.

    `count` of them stay, for each video and head: those whose mean key is nearest to the mean query.
    """
    if frames <= count:
        return keys, values
    first, rest = zip(*(x.tensor_split((frames * tokens,), 2) for x in (keys, values)))
    first = [x.unflatten(2, (frames, tokens)) for x in first]  # [B, N, frames, S, D]
    scores = (q.mean(2).unsqueeze(2) * first[0].mean(3)).float().sum(-1)  # [B, N, frames]
    best = scores.topk(count, dim=2).indices.sort(2).values[..., None, None]
    kept = [x.gather(2, best.expand(-1, -1, -1, *x.shape[3:])).flatten(2, 3) for x in first]
    return tuple(torch.cat(pair, 2) for pair in zip(kept, rest))
