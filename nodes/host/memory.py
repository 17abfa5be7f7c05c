"""What a rollout takes of its device beside the weights, and what would fit where that is too much.

ComfyUI can keep weights elsewhere and bring them when they are needed; the cache and a chunk's forward must be there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

import comfy.model_management as management
import psutil
import torch
from comfy.model_patcher import ModelPatcher

from ...sf_core.checkpoints.load import Memory, memory_needed
from ...sf_core.device import ran_out
from ...sf_core.memory import gib
from ...sf_core.sampling.config import Sampling
from ...sf_core.wan.config import WanConfig
from ...sf_core.wan.fp8 import FLOAT8

Result = TypeVar("Result")


SMALL, SMALL_FRAME = 64 * 1024**2, 256 * 256  # bytes of a model, pixels


def load(patcher: ModelPatcher, needed: Rollout, beside: int = 0, others: Sequence[ModelPatcher] = ()) -> None:
    """Brings the model to its device, with room for the KV cache, one chunk's forward and `beside` bytes.

    `others` come with it. Raises ValueError when cache and forward alone are larger than the device.
    """
    check(needed, patcher.load_device)
    management.load_models_gpu([patcher, *others], memory_required=needed.bytes + beside)


@contextmanager
def loaded(
    patcher: ModelPatcher, needed: Rollout, beside: int = 0, others: Sequence[ModelPatcher] = ()
) -> Iterator[None]:
    """The model on its device and ready to run; raises as `load` does."""
    load(patcher, needed, beside, others)
    patcher.pre_run()
    try:
        with threads_for(patcher, 64 * needed.height * needed.width):
            yield
    finally:
        patcher.cleanup()


def within_memory(work: Callable[[], Result], what: str, remedy: str) -> Result:
    """What `work` gives. If memory runs out all that it held is freed before torch.OutOfMemoryError says what to do.

    ComfyUI knows that error: it unloads its models and shows the message.
    """
    try:
        return work()
    except RuntimeError as error:
        if not management.is_oom(error) and not ran_out(error):
            raise
    # Outside of the except block, where nothing refers to the tensors that were being worked with any more.
    management.soft_empty_cache()
    raise torch.OutOfMemoryError(f"Got {what}, for which this device ran out of memory. {remedy}")


@contextmanager
def threads_for(patcher: ModelPatcher, pixels: int) -> Iterator[None]:
    """One thread for a model and frames so small that, on a CPU, handing work over takes longer than the work."""
    threads = torch.get_num_threads()
    if patcher.load_device.type == "cpu" and patcher.model_size() < SMALL and pixels <= SMALL_FRAME:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class Rollout:
    """All that decides it: `batch` videos of `frames` latent frames, `height` x `width` latent pixels.

    rereads  whether the window is read again in one forward, as at some prompt switches
    guided   whether a negative prompt runs beside, with a cache of its own
    """

    config: WanConfig
    sampling: Sampling
    batch: int
    frames: int
    height: int
    width: int
    dtype: torch.dtype
    cache_dtype: torch.dtype | None
    rereads: bool = False
    guided: bool = False

    @property
    def bytes(self) -> int:
        return self._videos * self._one.total

    @property
    def activations(self) -> int:
        """The part of these bytes that a forward takes."""
        return self._videos * self._one.activations

    @property
    def work(self) -> int:
        """The part of these bytes that comes and goes: all but the cache."""
        return self._videos * (self._one.total - self._one.cache)

    @property
    def _videos(self) -> int:
        return self.batch * (2 if self.guided else 1)

    @property
    def _one(self) -> Memory:
        size = (8 * self.height, 8 * self.width, self.frames)
        return memory_needed(self.config, self.sampling, 0, *size, self.dtype, self.cache_dtype, self.rereads)

    @property
    def window(self) -> int:
        """Latent frames that the cache holds."""
        return min(self.sampling.window or self.frames, self.frames)

    def with_window(self, window: int) -> Rollout:
        return replace(self, sampling=replace(self.sampling, window=window))

    def longest_window(self, limit: int) -> int:
        """The longest window that stays within `limit` bytes; below `shortest` if none does."""
        low, high = (self.with_window(self.shortest + i).bytes for i in (0, 1))
        return self.shortest + (limit - low) // max(1, high - low)  # memory is a straight line over the window

    @property
    def shortest(self) -> int:
        """The shortest window there can be."""
        return self.sampling.sink + max(self.sampling.chunk, self.sampling.first_chunk or 0)


def check(rollout: Rollout, device: torch.device) -> None:
    """Raises ValueError, with what would fit, where the device has not enough memory for a rollout."""
    limit = management.get_total_memory(device) - management.extra_reserved_memory()
    if rollout.bytes <= limit:
        return
    fits = list(smaller(rollout, limit))
    remedy = f"Set {', or '.join(fits)}; or make a smaller video." if fits else "Make a smaller video."
    raise ValueError(
        f"Got {rollout.frames} latent frames of {8 * rollout.width} x {8 * rollout.height} pixels, {rollout.window} of "
        f"them in the window, which take {gib(rollout.bytes)} beside the model; this device has {gib(limit)}. {remedy}"
    )


def check_frames(frames: int, pixels: int, remedy: str) -> None:
    """Raises ValueError, with the remedy, where so many frames have no room in one tensor.

    The system gives more than it has, and ends ComfyUI when that is used.
    """
    device, needed = management.intermediate_device(), 3 * frames * pixels * management.intermediate_dtype().itemsize
    there = management.get_free_memory(device)
    if device.type == "cpu":
        there += psutil.swap_memory().free
    if needed > there:
        raise ValueError(
            f"Got {frames} frames to hand on, which take {gib(needed)} in one piece; {gib(there)} are free. {remedy}"
        )


def smaller(rollout: Rollout, limit: int) -> Iterator[str]:
    """Settings of the sampler with which a rollout fits, and what it takes then."""
    float8, plain = replace(rollout, cache_dtype=FLOAT8), replace(rollout, guided=False)
    if rollout.guided and plain.bytes <= limit:
        yield f"cfg to 1 ({gib(plain.bytes)})"
    alone = rollout.longest_window(limit)
    if alone >= rollout.shortest:
        yield f"a smaller window ({alone} at most)"
    if rollout.cache_dtype is not None:
        return
    if float8.bytes <= limit:
        yield f"cache to fp8 ({gib(float8.bytes)})"
    elif (both := float8.longest_window(limit)) > max(alone, rollout.shortest - 1):
        yield f"cache to fp8 and a smaller window ({both} at most)"
