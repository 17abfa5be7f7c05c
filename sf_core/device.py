"""What this machine has: devices, their memory, and how much of it was used."""

from __future__ import annotations

import argparse
import os
import sys

import torch
from torch import Tensor


def upload(x: Tensor, device: torch.device | str) -> Tensor:
    """A small tensor from the CPU, on `device`. A plain copy to a GPU would wait for all work that is queued there."""
    if torch.device(device).type == "cuda" and x.device.type == "cpu":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)

try:
    import resource
except ImportError:  # Windows
    resource = None


def device_named(text: str) -> torch.device:
    """A device by its name, for argparse; auto is the GPU where there is one."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if text == "auto":
        return torch.device("cuda" if there["cuda"] else "cpu")
    usable = " or ".join(kind for kind in there if there[kind])
    try:
        device = torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"got {text}, which is no device; use {usable}") from None
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if not there.get(device.type) or (device.index or 0) >= count:
        raise argparse.ArgumentTypeError(f"got {text}, which this machine or this torch lacks; use {usable}")
    return device


def usual_dtype(device: torch.device) -> torch.dtype:
    """What to compute in where nothing is said: bfloat16, but float32 on a CPU."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def synchronise(device: torch.device) -> None:
    """Waits until the device has done what it was told; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def memory_of(device: torch.device) -> int | None:
    """Bytes of memory a device has for us: of a GPU what is free, of a CPU all; None where nobody can tell."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)
    names = getattr(os, "sysconf_names", {})
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if "SC_PHYS_PAGES" in names else None


def ran_out(error: RuntimeError) -> bool:
    """Whether an error says that memory ran out; a CPU tells it by the words alone."""
    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)


def release(device: torch.device) -> None:
    """Gives memory that is no longer used back to the device."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def peak_memory_mib(device: torch.device) -> float | None:
    """MiB used at most: on the GPU, or else by the process; None where nobody can tell."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    if resource is None:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20, 1)
