"""Counting of a rollout: latent frames -> chunks -> steps. All of it is known before the first step.

plan = Plan(sampling, frames=21, height=60, width=104)
plan.chunks               (Chunk(index=0, start=0, frames=3, ...), ...)
plan.steps(chunk)         its (timestep, sigma) list
plan.total_steps          forwards with a new x0 in the whole rollout
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch

from ..autoencoders.stream import pixel_frames
from .config import Sampling
from .schedule import Step


@dataclass(frozen=True)
class Chunk:
    """Latent frames start .. start + frames - 1 that are generated together, or `given` by a prefix.

    held     first ones of a chunk to be made that a prefix gives
    cached   whether they enter the KV cache: of a long prefix only what the first new chunk attends to does
    is_last  whether nothing comes after them
    """

    index: int
    start: int
    frames: int
    given: bool
    cached: bool
    is_last: bool
    held: int = 0

    @property
    def end(self) -> int:
        return self.start + self.frames


@dataclass(frozen=True)
class Plan:
    """Size and chunks of a rollout.

    sampling       how the model is sampled
    frames         latent frames in all, those of the prefix included
    height, width  latent size, even (8 latent pixels are 64 pixels)
    batch          videos made at once
    prefix         latent frames that are given
    full_history   the prefix is a video that was generated, and goes on as if it had never stopped: all of it is read,
                   however long, at the context noise of generated frames
    strength       how much of a source video gives way to noise before it is denoised, in (0, 1]; 1: all of it
    cache_dtype    dtype of the KV cache; None: the network's. torch.float8_e4m3fn takes half the memory of bfloat16

    Raises ValueError for a size that is odd, a prefix that leaves nothing to make, a strength out of range.
    """

    sampling: Sampling
    frames: int
    height: int
    width: int
    batch: int = 1
    prefix: int = 0
    full_history: bool = False
    strength: float = 1.0
    cache_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if self.height < 2 or self.width < 2 or self.height % 2 or self.width % 2:
            raise ValueError(
                f"Got latents of {self.height} x {self.width}; both must be even and at least 2. "
                "Use a height and width in pixels that are multiples of 16."
            )
        if not 0 < self.strength <= 1:
            raise ValueError(
                f"Got strength {self.strength:g}; it is above 0 and at most 1, which replaces all of the source."
            )
        _check_length(self.frames, self.prefix)

    @property
    def window(self) -> int:
        """Latent frames attended to, the current chunk included; never more than the video has."""
        return min(self.sampling.window or self.frames, self.frames)

    @property
    def sink(self) -> int:
        """First latent frames that never leave the window."""
        return min(self.sampling.sink, self.window)

    @property
    def is_rolling(self) -> bool:
        """Whether several chunks are denoised at once."""
        return self.sampling.sampler == "rolling"

    @property
    def frames_at_once(self) -> int:
        """Latent frames of the largest forward, prompt switches aside."""
        sampling = self.sampling
        largest = max(sampling.chunk, sampling.first_chunk or 0)
        return min(self.frames, largest * len(sampling.steps) if self.is_rolling else largest)

    @property
    def slots(self) -> int:
        """Latent frames that the KV cache holds: the window, and sinks that the window may lie beyond."""
        return min(self.frames, self.window + self.sink) if self.is_rolling else self.window

    @property
    def gap(self) -> int:
        """Latent frames between pinned sinks and the oldest other frame, once the window has moved so far."""
        sampling = self.sampling
        return (sampling.position_range - sampling.window) if sampling.position_range and sampling.window else 0

    @cached_property
    def chunks(self) -> tuple[Chunk, ...]:
        """All chunks in order, those of the prefix first; see `cut_into_chunks`."""
        return cut_into_chunks(self.frames, self.sampling, self.prefix, self.full_history)

    def steps(self, chunk: Chunk) -> tuple[Step, ...]:
        """The (timestep, sigma) list of a chunk; the first one that is generated may have its own."""
        opening = 0 if self.full_history else self.prefix
        return self.sampling.steps_of(chunk.start + chunk.held == opening, self.strength)

    @cached_property
    def total_steps(self) -> int:
        """Denoising steps of the whole rollout; the forwards that write finished chunks into the cache not counted."""
        steps = [len(self.steps(chunk)) for chunk in self.chunks if not chunk.given]
        return len(steps) - 1 + steps[-1] if self.is_rolling else sum(steps)


def cut_into_chunks(frames: int, sampling: Sampling, prefix: int = 0, full_history: bool = False) -> tuple[Chunk, ...]:
    """Chunks of `frames` latent frames, the first `prefix` of which are given.

    A prefix is read in chunks too, the odd one first (one image: 1, n, n, ...) or, where the model holds it, as the
    first frames of the first new chunk. Where it is longer than the window only what the first new chunk attends to is
    cached, or all of it with `full_history`. The last chunk may be shorter than the others.
    """
    n = sampling.chunk
    odd, whole = prefix % n, prefix // n
    held = odd if sampling.holds_prefix else 0
    sizes = [size for size in (odd - held, *[n] * whole) if size]
    given, left = len(sizes), frames - prefix + held
    while left:
        first = sampling.first_chunk if not sizes and sampling.first_chunk else n
        sizes.append(min(first, left))
        left -= sizes[-1]
    oldest, last = 0 if full_history else _oldest_attended(prefix, sampling), len(sizes) - 1
    return tuple(
        Chunk(i, start, size, i < given, start + size > oldest or start < sampling.sink, i == last, held * (i == given))
        for i, (start, size) in enumerate(zip(accumulate(sizes, initial=0), sizes))
    )


def _oldest_attended(prefix: int, sampling: Sampling) -> int:
    """The oldest frame of a prefix, sinks aside, that the first new chunk attends to; 0 where the window holds it."""
    if sampling.window is None or prefix <= sampling.window:
        return 0
    return prefix - (sampling.window - sampling.sink - sampling.chunk)


def round_up_to_chunks(frames: int, sampling: Sampling, prefix: int = 0) -> int:
    """Latent frames rounded up so that the last chunk is a full one, as the model was trained."""
    _check_length(frames, prefix)
    if sampling.holds_prefix:
        prefix -= prefix % sampling.chunk
    first = sampling.chunk if prefix else sampling.first_chunk or sampling.chunk
    beyond = max(0, frames - prefix - first)
    return prefix + first + -(-beyond // sampling.chunk) * sampling.chunk


def _check_length(frames: int, prefix: int) -> None:
    if not 0 <= prefix < frames:
        raise ValueError(
            f"Got {frames} latent frames in all with a prefix of {prefix}; at least one frame must be left to make. "
            f"Ask for {prefix + 1} latent frames ({pixel_frames(prefix + 1)} frames of video) or more, or give a "
            "shorter prefix."
        )
