"""Devices: their memory, what to do where it runs out, copies that do not wait, and time."""

from __future__ import annotations

import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

try:
    import resource
except ImportError:  # Windows
    resource = None

TOKENS_OF_A_THREAD = 96  # measured on the built-in model: two threads are faster from 96 x 96 pixels on


def default_device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def default_dtype(device: torch.device) -> torch.dtype:
    """Dtype to compute in where nothing is said: bfloat16, but float32 on a CPU."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def console_text(text: object) -> str:
    """Text for the console or the log, whose letters it may not have: those as backslash escapes."""
    encoding = getattr(sys.stderr, "encoding", None) or "ascii"
    return str(text).encode(encoding, "backslashreplace").decode(encoding)


def synchronise(device: torch.device) -> None:
    """Waits until the device has done what it was told; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def upload(x: Tensor, device: torch.device | str) -> Tensor:
    """A small tensor from the CPU, on `device`. A plain copy to a GPU would wait for all work that is queued there."""
    if torch.device(device).type == "cuda" and x.device.type == "cpu":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


class HostCopy:
    """A tensor on its way to the CPU. Nothing waits for it: it goes by a stream of its own, through pinned memory."""

    def __init__(self, x: Tensor) -> None:
        self.tensor, self.arrived = x, None
        if x.device.type == "cuda":
            made, stream = torch.cuda.current_stream(x.device), _copy_stream(x.device)
            self.tensor = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
            stream.wait_stream(made)
            with torch.cuda.stream(stream):
                self.tensor.copy_(x, non_blocking=True)
                self.arrived = stream.record_event()
            x.record_stream(stream)  # whose memory is used again only once it has been copied
        elif x.device.type != "cpu":
            self.tensor = x.cpu()

    @property
    def is_there(self) -> bool:
        return self.arrived is None or self.arrived.query()

    def wait(self) -> Tensor:
        """The tensor on the CPU, once it is there."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.tensor


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def use_threads_for(tokens: int) -> None:
    """As many of the CPU's threads as forwards of so many tokens keep busy in a model of a few MB: handing work over
    takes longer than the work where there are fewer. A large model keeps all busy.
    """
    torch.set_num_threads(min(torch.get_num_threads(), 1 + tokens // TOKENS_OF_A_THREAD))


def available_memory(device: torch.device) -> int | None:
    """Memory of a device in bytes: of a GPU what is free, of a CPU all; None where nobody can tell.

    In a container that has a limit, all is what the limit says.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)
    names = getattr(os, "sysconf_names", {})
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if "SC_PHYS_PAGES" in names else None
    return min(filter(None, (total, _cgroup("limit"))), default=None)


def free_memory(device: torch.device) -> int | None:
    """Memory of a device that nobody uses, in bytes; None where nobody can tell. Containers' limits count."""
    if device.type == "cuda":
        return available_memory(device)
    try:
        found = re.search(r"^MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except OSError:  # not Linux
        found = None
    limit, used = _cgroup("limit"), _cgroup("used")
    rooms = [int(found[1]) * 1024] if found else []
    rooms += [max(0, limit - used)] if limit and used is not None else []
    return min(rooms, default=None)


CGROUP = Path("/sys/fs/cgroup")
CGROUP_FILES = {  # of version 2, and of version 1
    "limit": ("memory.max", "memory/memory.limit_in_bytes"),
    "used": ("memory.current", "memory/memory.usage_in_bytes"),
}


def _cgroup(what: str) -> int | None:
    """Bytes that this container may use ("limit") or uses ("used"); None where there is no container, or no limit."""
    for name in CGROUP_FILES[what]:
        try:
            return int((CGROUP / name).read_text())
        except (OSError, ValueError):  # "max" is no number
            continue
    return None


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error says that memory ran out; a CPU tells it by the words alone."""
    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)


def release_memory(device: torch.device) -> None:
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


Result = TypeVar("Result")


def within_memory(
    work: Callable[[], Result],
    error: Callable[[], Exception],
    release: Callable[[], None],
    is_out_of_memory: Callable[[RuntimeError], bool] = is_out_of_memory,
) -> Result:
    """The result of `work`; where memory runs out, all that it held is freed and `release` called before `error`."""
    try:
        return work()
    except RuntimeError as problem:
        if not is_out_of_memory(problem):
            raise
        traceback.clear_frames(problem.__traceback__)
    # Outside of the except block, where nothing refers to the tensors that were being worked with any more.
    release()
    raise error()


@dataclass
class Timer:
    """Seconds spent in each stage of some work; a device is waited for where a stage ends, unless it is `queued`."""

    device: torch.device
    seconds: dict[str, float] = field(default_factory=dict)
    marks: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
            synchronise(self.device)
        finally:
            self.add(stage, time.perf_counter() - started)

    @contextmanager
    def queued(self, stage: str) -> Iterator[None]:
        """Measures by marks in a GPU's own queue, so that nothing waits; `settle` adds them up."""
        if self.device.type != "cuda":
            with self.measure(stage):
                yield
            return
        started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        started.record()
        yield
        ended.record()
        self.marks.append((stage, started, ended))

    def each(self, stage: str, items: Iterator) -> Iterator:
        """The items, with the time spent on making them measured."""
        while True:
            with self.queued(stage):
                item = next(items, None)
            if item is None:
                return
            yield item

    def settle(self) -> None:
        """Waits for the device, and counts what it had queued."""
        synchronise(self.device)
        for stage, started, ended in self.marks:
            self.add(stage, started.elapsed_time(ended) / 1000)
        self.marks.clear()

    def add(self, stage: str, seconds: float) -> None:
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds
