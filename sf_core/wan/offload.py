"""Blocks that wait in the CPU's memory and come to the device one at a time, the next while one computes.

A model of 14B does not fit a home card, but its blocks do, two at a time: one that is computed with and the next, which
a stream of its own copies meanwhile. Everything else stays on the device. A forward of a chunk takes longer than the
copy of a block where chunks are large; where they are small, the bus sets the pace.

    ops = EAGER._replace(call=BlockLoader(wan, device))

ComfyUI offloads by itself; this is for the command line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .model import WanModel, call


class BlockLoader:
    """Calls parts of the forward, with each block's weights on the device while it runs.

    wan     its blocks on the CPU, all else on the device
    device  where it computes
    inner   what calls a part then
    """

    def __init__(self, wan: WanModel, device: torch.device, inner: Callable = call) -> None:
        self.blocks, self.device, self.inner = list(wan.blocks), device, inner
        self.number = {block: i for i, block in enumerate(self.blocks)}
        self.kept = [self._keep(tensors_of(block)) for block in self.blocks]
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.arrived: dict[int, torch.cuda.Event] = {}
        self.sent: dict[int, list[Tensor]] = {}  # copies on the device, of the next block at most

    def __call__(self, part: Callable, module: nn.Module, *args):
        number = self.number.get(module)
        if number is None:
            return self.inner(part, module, *args)
        here = self.sent.pop(number, None) or self._send(number)
        self.sent = {following: self._send(following) for following in [(number + 1) % len(self.blocks)]}
        if self.stream is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(self.arrived[number])
            for tensor in here:
                tensor.record_stream(current)
        with lent(module, here):
            return self.inner(part, module, *args)

    def _keep(self, tensors: list[Tensor]) -> list[Tensor]:
        """A block's weights in memory that the device can copy from by itself."""
        for tensor in tensors if self.device.type == "cuda" else ():
            tensor.data = tensor.data.pin_memory()
        return [tensor.data for tensor in tensors]

    def _send(self, number: int) -> list[Tensor]:
        """Copies of a block's weights on the device, under way."""
        if self.stream is None:
            return [tensor.to(self.device, copy=True) for tensor in self.kept[number]]
        with torch.cuda.stream(self.stream):
            copies = [tensor.to(self.device, non_blocking=True) for tensor in self.kept[number]]
        self.arrived[number] = self.stream.record_event()
        return copies


def tensors_of(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers, always in the same order."""
    return [*module.parameters(), *module.buffers()]


@contextmanager
def lent(module: nn.Module, copies: list[Tensor]) -> Iterator[None]:
    """The module with these in the place of its own weights."""
    own = [tensor.data for tensor in tensors_of(module)]
    for tensor, copy in zip(tensors_of(module), copies):
        tensor.data = copy
    try:
        yield
    finally:
        for tensor, data in zip(tensors_of(module), own):
            tensor.data = data
