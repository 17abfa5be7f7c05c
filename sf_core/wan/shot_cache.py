"""The KV cache of videos of several shots: the first frames stay, and so do the first ones of the current shot.

A scene cut moves positions on by a jump, so that the shots before it lie further back than they are, and its chunk is
pinned once it is finished, in the place of the last shot's. Frames leave by rules of their own, so a table says what is
where: `held` has the frames in their order of age, and each has a slot, which the frame that comes in its place takes.

    chunk 4, window 12, sink 4                     held, after room is made for the chunk
    0..3 | 4..7 | 8..11                            a scene cut at 8: its frames are pinned when they are finished
    0..3 | 8..11 | 12..15                          the pin has slid beside the sink, and stays there
    0..3 | 8..11 | 16..19                          another cut, at 16: the old pin is kept while its chunk is made
    0..3 | 16..19 | 20..23                         the new pin has taken its place

Positions inside the window (`pinned` of the shape) are those of the list `held`: frames are kept with the positions
they were written at and turned, when they are read, by how far they have moved since; cuts then make no jump.

Source: LongLive 2.0 (NVlabs/LongLive), multi-shot sink and RoPE jump.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .attention import Attention, sdpa
from .cache import CachedAttention, CacheShape, RollingCache, SlotBuffer
from .config import WanConfig
from .rope import Rope


@dataclass(frozen=True)
class Shots:
    """What a model does at a scene cut.

    pinned   whether the first `sink` frames of the current shot stay as the first ones of the video do
    jump     latent frames by which positions move on at a cut
    forgets  whether everything but the sink is forgotten once the cut's chunk is denoised
    """

    pinned: bool = True
    jump: int = 8
    forgets: bool = False

    def __post_init__(self) -> None:
        if self.jump < 0:
            raise ValueError(f"Got a jump of {self.jump} latent frames; at a scene cut positions move on by 0 or more.")


class ShotCache(RollingCache):
    """Keys and values of a rollout of several shots; see the top of this file."""

    def __init__(
        self,
        config: WanConfig,
        shape: CacheShape,
        shots: Shots,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.shots, self.counts_inside = shots, shape.pinned
        super().__init__(config, shape, dtype, device)
        self.pinned = self.keeps_sinks = False  # no keys are kept twice

    def restart(self, first: int) -> None:
        super().restart(first)
        self.held: list[int] = []  # frames, the oldest first
        self.slot: dict[int, int] = {}  # of each of them
        self.position: dict[int, int] = {}  # that each was written at
        self.pin: tuple[int, int] | None = None  # (place in `held`, frames) of the current shot's first ones
        self.cut_at: int | None = None  # first frame of a shot that is not pinned yet
        self.jumped = 0  # latent frames by which positions have moved on

    def cut(self, frame: int) -> None:
        """Forgets everything but the sink."""
        self._keep(self.held[: self.sink])
        self.pin = None

    def begin_shot(self, frame: int) -> None:
        """A scene cut: the chunk that starts at `frame` is the first of another shot."""
        self._settle(frame)
        self.cut_at, self.jumped = frame, self.jumped + self.shots.jump

    def finish(self, attend: CachedAttention) -> CachedAttention:
        """The same, but for a cut that forgets: its chunk is written beside the sink alone."""
        start, frames = attend.frames.start, len(attend.frames)
        if not self.shots.forgets or self.cut_at != start:
            return attend
        self.cut(start)
        return self.chunk(start, frames, attend.attention)

    def chunk(self, start: int, frames: int, attention: Attention = sdpa) -> CachedAttention:
        new = [frame for frame in range(start, start + frames) if frame not in self.slot]
        if new:
            self._settle(start)
            self._make_room(len(new))
            free = sorted(set(range(self.slots)) - set(self.slot.values()))
            self.held += new
            self.slot |= dict(zip(new, free))
            self.position |= {frame: self._position(frame) for frame in new}
        return ShotAttention(self, start, frames, attention)

    def runs(self, start: int, frames: int) -> Iterator[tuple[int, int, int]]:
        offset = 0
        while offset < frames:
            slot, count = self.slot[start + offset], 1
            while offset + count < frames and self.slot[start + offset + count] == slot + count:
                count += 1
            yield slot, offset, count
            offset += count

    def filled(self, end: int) -> int:
        return len(self.held)

    def rope(self, start: int, frames: int) -> Rope:
        positions = [self._position(frame) for frame in range(start, start + frames)]
        return self._rope(positions, self.height, self.width)

    def turns(self) -> Rope | None:
        """What turns keys, slot by slot, to the positions their frames have now; None where all have kept theirs."""
        moved = {self.slot[frame]: self._position(frame) - self.position[frame] for frame in self.held}
        if not any(moved.values()):
            return None
        by = [moved[slot] for slot in sorted(moved)]
        turns = self._rope(by, 2, 2).turns  # one angle a frame: rows and columns stay
        return Rope(turns.repeat_interleave(self.tokens, dim=-3))

    def _position(self, frame: int) -> int:
        return self.held.index(frame) if self.counts_inside else frame + self.jumped

    def _settle(self, start: int) -> None:
        """Pins the first frames of the newest shot, when the chunk at `start` is no longer its first one."""
        if self.cut_at is None or start <= self.cut_at:
            return
        if self.shots.pinned and self.sink and self.cut_at in self.slot:
            at = self.held.index(self.cut_at)
            self.pin = at, min(self.sink, len(self.held) - at)
        self.cut_at = None

    def _make_room(self, frames: int) -> None:
        """Lets go of the oldest frames that are not protected, for as many that come."""
        over = len(self.held) + frames - self.slots
        if over <= 0:
            return
        protected = self.sink
        if self.pin:
            at, length = self.pin
            protected += length if at == self.sink else 0
            self.pin = (at - over if at >= protected else at), length
        self._keep(self.held[:protected] + self.held[protected + over :])

    def _keep(self, frames: list[int]) -> None:
        """Lets go of all other frames; their slots are free."""
        kept = set(frames)
        self.held = frames
        self.slot = {frame: slot for frame, slot in self.slot.items() if frame in kept}
        self.position = {frame: position for frame, position in self.position.items() if frame in kept}


class ShotAttention(CachedAttention):
    """Self-attention of one chunk over the cache of a video of several shots."""

    cache: ShotCache

    def __init__(self, cache: ShotCache, start: int, frames: int, attention: Attention) -> None:
        super().__init__(cache, start, frames, attention)
        self.turns = cache.turns() if cache.counts_inside else None

    def read_keys(self, keys: SlotBuffer, count: int, at: int) -> Tensor:
        read = super().read_keys(keys, count, at)
        return read if self.turns is None else Rope(self.turns.turns[..., at : at + count, :, :])(read)
