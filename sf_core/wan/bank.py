"""The memory bank: single frames kept beside the window, chosen by how well they fit the prompt.

A finished chunk leaves the keys and values of its first frame with the bank. While there is room the frame takes the
place of its interval; a full bank keeps the frames whose keys the prompt's keys agree with most, and the new one. Each
layer, and each video, chooses for itself. Frames keep the positions that they were made at.

The bank's slots lie before the sinks' and are filled from the last one backwards, so that bank, sinks and window are
one slice of the cache, and attention reads it as if there were no bank.

    bank of 3, sink 3, window 9          slots  [ - - 6 | 0 1 2 | 6 7 8 3 4 5 ]      one frame in the bank

Source: MemFlow, arXiv 2512.14699 (KlingTeam/MemFlow 7ed5147, whose plain pipeline records every chunk and whose
interactive one every third).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .cache import RollingCache, SlotBuffer


@dataclass(frozen=True)
class Bank:
    """Size and rules of a memory bank.

    frames       latent frames that it holds
    interval     chunks that share one of its places while there is room
    every_chunk  whether each chunk is recorded, and takes its interval's place from the one before; False: only the
                 first of each interval. None: each where a video has one prompt, the first where it has several
    selected     frames of sinks and bank that each head attends to, those its queries agree with most; None: all
    repeats      whether a full bank takes the same frame in again with every chunk until another is recorded, as the
                 published interactive pipeline does by mistake

    Raises ValueError for numbers below 1.
    """

    frames: int = 3
    interval: int = 3
    every_chunk: bool | None = None
    selected: int | None = None
    repeats: bool = False

    def __post_init__(self) -> None:
        for name in ("frames", "interval", "selected"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"Got a memory bank with {name} {value}; it must be 1 or more, or leave the bank out.")


class MemoryBank:
    """The bank of one rollout, in the slots that `cache` keeps for it. Chunks are numbered from 0."""

    def __init__(self, cache: RollingCache, bank: Bank, every_chunk: bool) -> None:
        self.cache, self.bank, self.every_chunk = cache, bank, every_chunk
        self.pending: list[tuple[Tensor, Tensor]] = []  # a layer's keys and values [B, N, S, D] of a frame
        self.place = 0  # where the pending frame goes, counted from 0
        self.is_new = False
        self.first: int | None = None  # number of the chunk that was recorded first

    def record(self, number: int, frame: int) -> None:
        """Remembers the first frame of a finished chunk, to be admitted before the next chunk."""
        self.first = number if self.first is None else self.first
        place, since = divmod(number - self.first, self.bank.interval)
        if since and not self.every_chunk:
            return
        layers = zip(self.cache.keys, self.cache.values)
        self.pending = [tuple(self.cache.frame_of(buffer, frame).clone() for buffer in layer) for layer in layers]
        self.place, self.is_new = place, True

    def admit(self, text_keys: tuple[Tensor, ...]) -> None:
        """Takes the pending frame in. `text_keys` are the prompt's cross-attention keys [B, N, tokens, D] per layer."""
        if not self.pending or not (self.is_new or self.bank.repeats):
            return
        full, place = self.place >= self.bank.frames, min(self.place, self.bank.frames - 1)
        for layer, frame in enumerate(self.pending):
            buffers = self.cache.keys[layer], self.cache.values[layer]
            if full:
                self._drop_worst(*buffers, text_keys[layer])
            for buffer, tokens in zip(buffers, frame):
                buffer.write((self.bank.frames - 1 - place) * self.cache.tokens, tokens)
        self.cache.banked = max(self.cache.banked, place + 1)
        self.is_new = False

    def _drop_worst(self, keys: SlotBuffer, values: SlotBuffer, text_keys: Tensor) -> None:
        """Puts the frames that agree most with the prompt first, in that order; the last place is to be overwritten."""
        tokens, count = self.cache.tokens, self.bank.frames
        held = [buffer.read(count * tokens).unflatten(2, (count, tokens)).flip(2) for buffer in (keys, values)]
        scores = (text_keys.mean(2).unsqueeze(2) * held[0].mean(3)).float().sum(-1).mean(1)  # [B, count]
        order = scores.argsort(dim=1, descending=True, stable=True)  # [B, count]
        for buffer, frames in zip((keys, values), held):
            at = order[:, None, :, None, None].expand_as(frames)
            buffer.write(0, frames.gather(2, at).flip(2).flatten(2, 3))
