"""Memory of a video, known before it is begun, and what to change where that is too much.

    weights + KV cache + prompt + decoder + the larger of (a forward, a step of the decoder)

since chunks are made and decoded in turns. What decoders take goes by pixels; it was counted, tensor by tensor, for
832 x 480 (1280 x 704 with Wan 2.2) and for half the width and height. What convolution kernels borrow besides is not in
it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import torch

from .sampling.config import fit_window
from .sampling.context import allocate_cache
from .sampling.plan import Plan
from .wan.config import WanConfig
from .wan.fp8 import E4M3, quantise_model
from .wan.model import WanModel

LONGEST_TRAINED = 21  # latent frames of a training clip, 81 frames of video


@dataclass(frozen=True)
class DecoderMemory:
    """Numbers (not bytes) that a streaming decoder holds.

    weights  in all
    kept     per pixel of a frame, from one chunk to the next
    working  per pixel of a frame, while it runs
    fine     of `kept`, what belongs to the sizes that can run tile by tile, 0 where none can
    coarse   per pixel of a frame while tiles are used, before they run
    between  the same, beside them
    space    pixels of a latent pixel's side
    tile     side of the tiles that are suggested, in latent pixels; None where there are none
    """

    weights: int
    kept: int
    working: int
    fine: int = 0
    coarse: int = 0
    between: int = 0
    space: int = 8
    tile: int | None = None

    def held(self, pixels: int, tiled: bool) -> int:
        """Numbers that stay. Tiles' memories wait in the CPU's."""
        return self.weights + pixels * (self.kept - self.fine * tiled)

    def used(self, pixels: int, tile: int | None) -> int:
        """Numbers that come and go; `tile` in latent pixels."""
        if not tile:
            return pixels * self.working
        seen = min(pixels, (self.space * tile) ** 2)
        return max(self.coarse * pixels, self.between * pixels + seen * (self.fine + self.working))


WAN_VAE = DecoderMemory(126_900_000, kept=2370, working=3200, fine=1970, coarse=550, between=144, tile=32)
WAN22_VAE = DecoderMemory(
    704_700_000, kept=1790, working=3200, fine=1700, coarse=400, between=176, space=16, tile=32
)  # fmt: skip
TAEHV = DecoderMemory(weights=11_300_000, kept=132, working=600)
TAEHV22 = DecoderMemory(weights=11_500_000, kept=33, working=250, space=16)
BUILT_IN = DecoderMemory(weights=1_030_000, kept=88, working=320)


@dataclass(frozen=True)
class MemoryUse:
    """Bytes of a device that a video takes.

    activations  a forward, while it runs
    decoder      its weights and what it keeps from one chunk to the next
    decoding     a step of the decoder, while it runs
    """

    weights: int
    cache: int
    prompt: int
    activations: int
    decoder: int = 0
    decoding: int = 0

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return self.weights + self.cache + self.prompt + self.decoder + self.working

    @property
    def working(self) -> int:
        """The part that comes and goes while chunks are made and decoded."""
        return max(self.activations, self.decoding)


@dataclass(frozen=True)
class MemoryPlan:
    """All that decides how much memory a video takes; `use` says how much that is.

    dtype      of what is computed with
    weights    bytes of the model's weights as they are, float8 or not; `fp8` makes them float8. 0 where somebody else
               looks after them, as ComfyUI does
    decoder    None: decoding is not counted
    tile       of the decoder, in latent pixels; None: the whole picture at once
    rereads    whether the window is read again in one forward, as some prompt switches do
    guided     whether a negative prompt runs beside, with a cache of its own
    keeps_all  whether the cache overwrites nothing (training with gradient checkpointing)
    networks   sets of weights, each with its keys of the prompt: 2 where another than the one that denoises writes the
               cache
    offload    whether blocks wait in the CPU's memory: two of them at a time are on the device
    """

    config: WanConfig
    plan: Plan
    dtype: torch.dtype
    weights: int = 0
    decoder: DecoderMemory | None = None
    fp8: bool = False
    tile: int | None = None
    rereads: bool = False
    guided: bool = False
    keeps_all: bool = False
    networks: int = 1
    offload: bool = False

    @cached_property
    def use(self) -> MemoryUse:
        """Bytes, with b bytes a number and S = height/16 * width/16 tokens a latent frame, for each video and branch:

        cache        2 layers slots S dim b, where slots are min(window, frames) and those of a memory bank; in float8
                     b is 1, and each token and head has a float32 scale; sinks whose positions move along keep their
                     first keys too, once the window moves: layers sink S dim b
        prompt       2 layers text_len dim b: keys and values
        activations  chunk S (2 ffn_dim + 20 dim) b, and 3 min(window, frames) S dim b where a float8 cache is turned
                     back; with `rereads` the whole window takes the chunk's place,
                     with the rolling sampler all chunks under way

        The cache is exact. Activations are an estimate: the feed-forward with both its halves alive and what a block
        holds besides, fitted to measured peaks (10 % above them for 1 to 3 layers in float32 and bfloat16).
        """
        config, size = self.config, self.dtype.itemsize
        cache_dtype = self.plan.cache_dtype or self.dtype
        branches = 2 if self.guided else 1
        cache = allocate_cache(config, self.plan, cache_dtype, "meta", branches, self.keeps_all)
        videos = self.plan.batch * branches
        moves = cache.keeps_sinks and (self.plan.frames > self.plan.window or self.plan.is_rolling)
        first_keys = config.layers * cache.sink * cache.tokens * config.dim * size if moves else 0
        tokens = (cache.slots if self.rereads else self.plan.frames_at_once) * cache.tokens
        turned_back = 3 * cache.slots * cache.tokens * config.dim if cache_dtype.itemsize == 1 else 0
        held, used = self._decoder_numbers
        return MemoryUse(
            weights=self._weights_there,
            cache=cache.nbytes + videos * first_keys,
            prompt=self.networks * videos * 2 * config.layers * config.text_len * config.dim * size,
            activations=videos * (tokens * (2 * config.ffn_dim + 20 * config.dim) + turned_back) * size,
            decoder=held * size,
            decoding=used * size,
        )

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return self.use.total

    @property
    def chunk_tokens(self) -> int:
        """Tokens of a forward."""
        return self.plan.sampling.chunk * self.config.tokens_per_frame(self.plan.height, self.plan.width)

    @property
    def weights_fp8(self) -> int:
        """Bytes of the weights with the blocks in float8; as many as ever where they are that already."""
        return min(self.weights, self.networks * float8_bytes(self.config, self.dtype))

    @property
    def _weights_there(self) -> int:
        """Bytes of the weights that are on the device at the peak."""
        every = self.weights_fp8 if self.fp8 else self.weights
        if not self.offload:
            return every
        blocks = every * block_share(self.config, self.dtype, self.fp8)
        return round(every - blocks + 2 * blocks / (self.config.layers * self.networks))

    @property
    def width(self) -> int:
        """Pixels."""
        return self.config.space * self.plan.width

    @property
    def height(self) -> int:
        """Pixels."""
        return self.config.space * self.plan.height

    @property
    def window(self) -> int:
        """Latent frames that the cache holds."""
        return self.plan.window

    @property
    def shortest_window(self) -> int:
        """The shortest window there can be: sink and chunk, a deep sink shrinking with it, and what a shot pins."""
        sampling = self.plan.sampling
        chunk = max(sampling.chunk, sampling.first_chunk or 0)
        if sampling.shots:
            return sampling.sink + (min(sampling.sink, chunk) if sampling.shots.pinned else 0) + chunk
        return chunk if sampling.sink > sampling.chunk else sampling.sink + chunk

    def with_window(self, window: int) -> MemoryPlan:
        return self._replace_plan(sampling=fit_window(self.plan.sampling, window))

    def with_fp8_cache(self) -> MemoryPlan:
        return self._replace_plan(cache_dtype=E4M3)

    def longest_window(self, limit: int, step: int = 1) -> int | None:
        """The longest window that stays within `limit` bytes, shorter than this one by multiples of `step`.

        None if not even the shortest does. With shots it is a multiple of the chunk.
        """
        chunk = self.plan.sampling.chunk if self.plan.sampling.shots else 1
        windows = range(self.window // chunk * chunk, self.shortest_window - 1, -max(step, chunk))
        found = bisect_left(windows, True, key=lambda window: self.with_window(window).total <= limit)
        return windows[found] if found < len(windows) else None

    def _replace_plan(self, **changes) -> MemoryPlan:
        return replace(self, plan=replace(self.plan, **changes))

    @property
    def _decoder_numbers(self) -> tuple[int, int]:
        """Numbers that the decoder holds throughout, and what it takes besides while it runs."""
        if self.decoder is None:
            return 0, 0
        pixels = self.height * self.width
        return self.decoder.held(pixels, self.tile is not None), self.decoder.used(pixels, self.tile)


@lru_cache
def float8_bytes(config: WanConfig, dtype: torch.dtype) -> int:
    """Bytes of a model's weights with the blocks in float8 and all else in `dtype`."""
    state = quantise_model(WanModel(config, device="meta", dtype=dtype)).state_dict()
    return sum(tensor.nbytes for tensor in state.values())


@lru_cache
def block_share(config: WanConfig, dtype: torch.dtype, fp8: bool) -> float:
    """Share of a model's bytes that are its blocks'."""
    wan = WanModel(config, device="meta", dtype=dtype)
    state = (quantise_model(wan) if fp8 else wan).state_dict()
    blocks = sum(tensor.nbytes for name, tensor in state.items() if name.startswith("blocks."))
    return blocks / sum(tensor.nbytes for tensor in state.values())


def smaller_plans(plan: MemoryPlan, limit: int) -> Iterator[tuple[str, MemoryPlan]]:
    """(option of `generate`, the plan with it), one change each, those that cost the least quality first."""
    decoder = plan.decoder
    if decoder and decoder.tile and plan.tile is None:
        side = decoder.space * decoder.tile
        if plan.height * plan.width > side**2:
            yield f"--tile {side}", replace(plan, tile=decoder.tile)
    if plan.guided:
        yield "--guidance 1", replace(plan, guided=False)
    if plan.plan.cache_dtype is None:
        yield "--fp8-cache", plan.with_fp8_cache()
    if not plan.fp8 and plan.weights_fp8 < plan.weights:
        yield "--fp8", replace(plan, fp8=True)
    if decoder and decoder.tile:
        small = TAEHV22 if plan.config.channels == 48 else TAEHV
        yield "--taehv instead of --vae", replace(plan, decoder=small, tile=None)
    if plan.weights and not plan.offload and plan.decoder is not BUILT_IN:
        yield "--offload", replace(plan, offload=True)
    shorter = range(plan.window - plan.plan.sampling.chunk, plan.shortest_window - 1, -plan.plan.sampling.chunk)
    if shorter:
        window = plan.longest_window(limit, plan.plan.sampling.chunk)
        window = shorter[-1] if window is None else min(window, shorter[0])
        yield f"--window {window}", plan.with_window(window)


def advise(plan: MemoryPlan, limit: int) -> str:
    """A sentence: the options with which the video takes at most `limit` bytes, each with what it would take then.

    Where no single one is enough they are put together, one after the other.
    """
    alone = [(option, changed) for option, changed in smaller_plans(plan, limit) if changed.total <= limit]
    if alone:
        options = ", ".join(f"{option} ({format_bytes(changed.total)})" for option, changed in alone)
        return f"Use {options}, or a smaller size."
    options: list[str] = []
    while plan.total > limit and (change := next(smaller_plans(plan, limit), None)):
        option, plan = change
        options.append(option)
    if plan.tile is None:
        options = [option for option in options if not option.startswith("--tile")]  # TAEHV came after it
    together = f"{' + '.join(options)} ({format_bytes(plan.total)})"
    if plan.total <= limit:
        return f"Use {together}, or a smaller size."
    return f"Use a smaller size: even {together} is too much." if options else "Use a smaller size."


def format_bytes(size: int) -> str:
    """Bytes for people."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**29 else f"{size / 2**20:.0f} MiB"
