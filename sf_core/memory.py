"""What a video takes of its device's memory, known before it is begun, and what to change where that is too much.

    weights + cache + keys and values of the prompt + the decoder + the larger of (a forward, a step of the decoder)

since chunks are made and decoded in turns. `checkpoint.memory_needed` knows all but the decoder. What decoders take
goes by pixels; it was counted, tensor by tensor, for 832 x 480 and for half the width and height. What convolution
kernels borrow besides is not in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from .checkpoints.load import Memory, memory_needed
from .sampling.config import Sampling
from .wan.config import WanConfig
from .wan.fp8 import FLOAT8, quantise
from .wan.model import WanModel

TILE = 32  # latent pixels: what is suggested
COARSE, BETWEEN = 550, 144  # numbers per pixel of a whole frame while tiles are used: before them, and beside them


@dataclass(frozen=True)
class Decoder:
    """Numbers (not bytes) that a streaming decoder holds.

    weights  in all
    kept     per pixel of a frame, from one chunk to the next
    working  per pixel of a frame, while it runs
    fine     of `kept`, what belongs to the sizes that can run tile by tile, 0 where none can
    """

    weights: int
    kept: int
    working: int
    fine: int = 0

    def held(self, pixels: int, tiled: bool) -> int:
        """Numbers that stay. Tiles' memories wait in the CPU's."""
        return self.weights + pixels * (self.kept - self.fine * tiled)

    def used(self, pixels: int, tile: int | None) -> int:
        """Numbers that come and go; `tile` in latent pixels."""
        if not tile:
            return pixels * self.working
        seen = min(pixels, (8 * tile) ** 2)
        return max(COARSE * pixels, BETWEEN * pixels + seen * (self.fine + self.working))


WAN_VAE = Decoder(weights=126_900_000, kept=2370, working=3200, fine=1970)
TAEHV = Decoder(weights=11_300_000, kept=132, working=600)
BUILT_IN = Decoder(weights=670_000, kept=85, working=320)


@dataclass(frozen=True)
class Plan:
    """All that decides how much memory a video takes: `frames` latent frames of `height` x `width` pixels.

    weights   bytes of the model's weights as they are, float8 or not; `fp8` makes them float8
    tile      of the decoder, in latent pixels; None: the whole picture at once
    rereads   whether the window is read again in one forward, as some prompt switches do
    guided    whether a negative prompt runs beside, with a cache of its own
    """

    config: WanConfig
    sampling: Sampling
    weights: int
    frames: int
    height: int
    width: int
    dtype: torch.dtype
    decoder: Decoder
    fp8: bool = False
    cache_dtype: torch.dtype | None = None
    tile: int | None = None
    rereads: bool = False
    guided: bool = False

    @property
    def weights_fp8(self) -> int:
        """Bytes of the weights with the blocks in float8; as many as ever where they are that already."""
        return min(self.weights, float8_bytes(self.config, self.dtype))

    @property
    def model(self) -> Memory:
        """What the rollout takes."""
        weights = self.weights_fp8 if self.fp8 else self.weights
        video = (self.height, self.width, self.frames)
        one = memory_needed(self.config, self.sampling, weights, *video, self.dtype, self.cache_dtype, self.rereads)
        twice = {name: 2 * getattr(one, name) for name in ("cache", "text", "activations")}
        return replace(one, **twice) if self.guided else one

    @property
    def decoding(self) -> tuple[int, int]:
        """Bytes that the decoder holds throughout, and what it takes besides while it runs."""
        pixels = self.height * self.width
        held, used = self.decoder.held(pixels, self.tile is not None), self.decoder.used(pixels, self.tile)
        return held * self.dtype.itemsize, used * self.dtype.itemsize

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        model, (held, used) = self.model, self.decoding
        return model.total - model.activations + held + max(model.activations, used)

    @property
    def window(self) -> int:
        """Latent frames that the cache holds."""
        return min(self.sampling.window or self.frames, self.frames)


@lru_cache
def float8_bytes(config: WanConfig, dtype: torch.dtype) -> int:
    """Bytes of a model's weights with the blocks in float8 and all else in `dtype`."""
    state = quantise(WanModel(config, device="meta", dtype=dtype)).state_dict()
    return sum(tensor.nbytes for tensor in state.values())


def changes(plan: Plan, limit: int) -> Iterator[tuple[str, Plan]]:
    """(option of `generate`, the plan with it), one change each, those that cost the least quality first."""
    tiled = plan.decoder is WAN_VAE and plan.tile is None and plan.height * plan.width > (8 * TILE) ** 2
    if tiled:
        yield f"--tile {8 * TILE}", replace(plan, tile=TILE)
    if plan.guided:
        yield "--guidance 1", replace(plan, guided=False)
    if plan.cache_dtype is None:
        yield "--fp8-cache", replace(plan, cache_dtype=FLOAT8)
    if not plan.fp8 and plan.weights_fp8 < plan.weights:
        yield "--fp8", replace(plan, fp8=True)
    if plan.decoder is WAN_VAE:
        yield "--taehv instead of --vae", replace(plan, decoder=TAEHV, tile=None)
    if (shorter := _shorter(plan, limit)) is not None:
        yield f"--window {shorter.window}", shorter


def _shorter(plan: Plan, limit: int) -> Plan | None:
    """The plan with the longest window that stays below `limit`, or the shortest possible; None if it is that."""
    sampling = plan.sampling
    least = sampling.sink + max(sampling.chunk, sampling.first_chunk or 0)
    windows = range(plan.window - sampling.chunk, least - 1, -sampling.chunk)
    low, high = 0, len(windows)
    while low < high:  # memory falls with the window
        middle = (low + high) // 2
        fits = _windowed(plan, windows[middle]).total <= limit
        low, high = (low, middle) if fits else (middle + 1, high)
    return _windowed(plan, windows[min(low, len(windows) - 1)]) if windows else None


def _windowed(plan: Plan, window: int) -> Plan:
    return replace(plan, sampling=replace(plan.sampling, window=window))


def advice(plan: Plan, limit: int) -> str:
    """A sentence: the options with which the video takes at most `limit` bytes, each with what it would take then.

    Where no single one is enough they are put together, one after the other.
    """
    alone = [(option, changed) for option, changed in changes(plan, limit) if changed.total <= limit]
    if alone:
        return f"Use {', '.join(f'{option} ({gib(changed.total)})' for option, changed in alone)}, or a smaller size."
    options: list[str] = []
    while plan.total > limit and (change := next(changes(plan, limit), None)):
        option, plan = change
        options.append(option)
    if plan.tile is None:
        options = [option for option in options if not option.startswith("--tile")]  # TAEHV came after it
    together = f"{' + '.join(options)} ({gib(plan.total)})"
    if plan.total <= limit:
        return f"Use {together}, or a smaller size."
    return f"Use a smaller size: even {together} is too much." if options else "Use a smaller size."


def gib(size: int) -> str:
    """Bytes for people."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**29 else f"{size / 2**20:.0f} MiB"
