"""Distributed training: torchrun's processes, sharded weights (FSDP2), and full tensors from them.

Without `shard` every process has whole weights and gradients are averaged; with it FSDP2 shards weights, gradients
and optimizer states, and gathers one block at a time. Checkpoints always hold whole tensors, so that they load in any
number of processes, sharded or not.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


@dataclass(frozen=True)
class Group:
    """Process group of a run, as one of its processes sees it."""

    rank: int = 0
    size: int = 1

    @classmethod
    def join(cls, device: torch.device) -> Group:
        """This process among those that torchrun started, or alone."""
        if not dist.is_initialized() and "RANK" in os.environ and "WORLD_SIZE" in os.environ:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        return cls(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else cls()

    @staticmethod
    def leave() -> None:
        if dist.is_initialized():
            dist.destroy_process_group()

    @property
    def first(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        """Barrier: waits for every process."""
        if self.size > 1:
            dist.barrier()

    def mean(self, value: Tensor) -> Tensor:
        """Mean over the processes."""
        if self.size == 1:
            return value
        total = value.clone()
        dist.all_reduce(total)
        return total / self.size

    def average_gradients(self, params: Iterable[Tensor]) -> None:
        """All-reduces gradients to their mean, in place; sharded gradients are that already."""
        grads = [p.grad for p in params if p.grad is not None and not isinstance(p.grad, DTensor)]
        if self.size == 1 or not grads:
            return
        flat = torch.cat([grad.flatten() for grad in grads])
        dist.all_reduce(flat)
        flat /= self.size
        for grad, part in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(part.view_as(grad))

    def share(self, batch: int, micro: int | None) -> list[tuple[int, ...]]:
        """This process's share of a batch: the numbers of its samples, one tuple for each pass.

        Raises ValueError where the batch does not divide evenly.
        """
        mine, rest = divmod(batch, self.size)
        micro = min(micro or mine, mine)
        if rest or not mine or mine % micro:
            raise ValueError(
                f"Got a batch of {batch} for {self.size} processes in passes of {micro}; every pass takes as many "
                f"samples. Use a batch that is a multiple of {self.size * (micro or 1)}."
            )
        first = self.rank * mine
        return [tuple(range(at, at + micro)) for at in range(first, first + mine, micro)]


def local_device(name: str) -> torch.device:
    """The device of this process: of several GPUs, the one that torchrun gave it. ValueError for one that is not."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"Got device {name!r}, which is none. Use auto, cpu or cuda.") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("Got device cuda; this torch sees no GPU. Use device: cpu, or install a torch with CUDA.")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    return device


def shard(module: nn.Module, blocks: Iterable[nn.Module], precision: torch.dtype, device: torch.device) -> nn.Module:
    """Shards a module's weights over the processes (FSDP2), block by block; gradients are summed in float32.

    Weights go to the device a block at a time, so that it never holds a whole network.
    """
    if not dist.is_initialized():
        raise ValueError(
            "Got shard: true in a process of its own; weights are spread over the processes of torchrun. Start the run "
            "with torchrun --nproc-per-node N -m sf_core train ..., or leave shard out."
        )
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(
        param_dtype=None if precision == torch.float32 else precision,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    return fully_shard(module, mesh=mesh, mp_policy=policy)


def reshard(module: nn.Module) -> None:
    """Reshards weights that the last forward left gathered, before they are read or changed one by one."""
    if isinstance(module, FSDPModule):
        module.reshard()


def full_tensor(tensor: Tensor) -> Tensor:
    """The full tensor of a sharded one; every process has to call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_shard(tensor: Tensor) -> Tensor:
    """This process's shard of a tensor, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_like(value: Any, like: Tensor) -> Any:
    """A full tensor, sharded as `like` is; anything else as it is."""
    if isinstance(value, Tensor) and isinstance(like, DTensor) and value.shape == like.shape:
        return distribute_tensor(value.to(like.device, like.dtype), like.device_mesh, like.placements)
    return value


def gather(content: Any, keep: bool = True) -> Any:
    """Gathers nested dictionaries and lists: every tensor in full, on the CPU; every process has to call this.

    One that does not `keep` them has None in their places, and never more than one of them.
    """
    if isinstance(content, Tensor):
        full = full_tensor(content.detach())
        return full.cpu() if keep else None
    if isinstance(content, dict):
        return {key: gather(value, keep) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return type(content)(gather(value, keep) for value in content)
    return content


def gather_state(module: nn.Module, keep: bool = True) -> dict[str, Tensor]:
    """A module's state dict in full tensors, as `gather` gives them."""
    return gather(dict(module.state_dict()), keep)


@torch.no_grad()
def load_full(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Loads full weights into a module, sharded or not."""
    for name, own in module.state_dict().items():
        local_shard(own).copy_(local_shard(shard_like(state[name], own)))
