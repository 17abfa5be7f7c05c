"""Memory of a rollout on ComfyUI's device, and what would fit where that is too little.

ComfyUI can keep weights elsewhere and bring them when they are needed; the KV cache and a chunk's forward must be
there, so a plan without weights is what is asked of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec

import comfy.model_management as management
import psutil
import torch
from comfy.model_patcher import ModelPatcher

from ...sf_core.device import Result, is_out_of_memory, use_threads_for
from ...sf_core.device import within_memory as run_within_memory
from ...sf_core.memory import MemoryPlan, format_bytes

SMALL = 64 * 1024**2  # bytes of a model


def load(
    patcher: ModelPatcher, memory: MemoryPlan, reserve_bytes: int = 0, others: Sequence[ModelPatcher] = ()
) -> None:
    """Brings the model to its device, with room for the KV cache, one chunk's forward and `reserve_bytes`.

    `others` come with it. Raises ValueError when cache and forward alone are larger than the device.
    """
    check(memory, patcher.load_device)
    management.load_models_gpu([patcher, *others], memory_required=memory.total + reserve_bytes)


@contextmanager
def loaded(
    patcher: ModelPatcher, memory: MemoryPlan, reserve_bytes: int = 0, others: Sequence[ModelPatcher] = ()
) -> Iterator[None]:
    """The model on its device and ready to run; raises as `load` does."""
    load(patcher, memory, reserve_bytes, others)
    patcher.pre_run()
    try:
        with threads_for(patcher, memory.chunk_tokens):
            yield
    finally:
        patcher.cleanup()


def within_memory(work: Callable[[], Result], what: str, remedy: str) -> Result:
    """The result of `work`. If memory runs out all that it held is freed before torch.OutOfMemoryError says what to do.

    ComfyUI knows that error: it unloads its models and shows the message.
    """
    return run_within_memory(
        work,
        lambda: torch.OutOfMemoryError(f"Got {what}, for which this device ran out of memory. {remedy}"),
        management.soft_empty_cache,
        lambda error: management.is_oom(error) or is_out_of_memory(error),
    )


@contextmanager
def threads_for(patcher: ModelPatcher, tokens: int) -> Iterator[None]:
    """On a CPU, as many threads as forwards of so many tokens keep busy in a small model."""
    threads = torch.get_num_threads()
    if patcher.load_device.type == "cpu" and patcher.model_size() < SMALL:
        use_threads_for(tokens)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def check(memory: MemoryPlan, device: torch.device) -> None:
    """Raises ValueError, with what would fit, where the device has not enough memory for a rollout."""
    limit = management.get_total_memory(device) - management.extra_reserved_memory()
    if memory.total <= limit:
        return
    fits = list(smaller(memory, limit))
    remedy = f"Set {', or '.join(fits)}; or make a smaller video." if fits else "Make a smaller video."
    raise ValueError(
        f"Got {memory.plan.frames} latent frames of {memory.width} x {memory.height} pixels, {memory.window} of them "
        f"in the window, which take {format_bytes(memory.total)} beside the model; this device has "
        f"{format_bytes(limit)}. {remedy}"
    )


def check_frames(frames: int, pixels: int, remedy: str) -> None:
    """Raises ValueError, with the remedy, where so many frames have no room in one tensor.

    The system gives more than it has, and ends ComfyUI when that is used.
    """
    device, needed = management.intermediate_device(), 3 * frames * pixels * management.intermediate_dtype().itemsize
    there = management.get_free_memory(device)
    if device.type == "cpu" and not counts_containers():
        there += psutil.swap_memory().free
    if needed > there:
        raise ValueError(
            f"Got {frames} frames to hand on, which take {format_bytes(needed)} in one piece; {format_bytes(there)} "
            f"are free. {remedy}"
        )


def counts_containers() -> bool:
    """Whether this ComfyUI takes what its container may use for what is free (after 0.27): swap is then not its own."""
    return find_spec("comfy.system_memory") is not None


def smaller(memory: MemoryPlan, limit: int) -> Iterator[str]:
    """Settings of the sampler with which a rollout fits, and what it takes then."""
    fp8, unguided = memory.with_fp8_cache(), replace(memory, guided=False)
    if memory.guided and unguided.total <= limit:
        yield f"cfg to 1 ({format_bytes(unguided.total)})"
    longest = memory.longest_window(limit)
    if longest is not None:
        yield f"a smaller window ({longest} at most)"
    if memory.plan.cache_dtype is not None:
        return
    if fp8.total <= limit:
        yield f"cache to fp8 ({format_bytes(fp8.total)})"
    elif (both := fp8.longest_window(limit)) is not None and both > (longest or 0):
        yield f"cache to fp8 and a smaller window ({both} at most)"
