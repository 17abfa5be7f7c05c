"""Attention kernels by name: torch's own, flash-attention's, SageAttention's.

    attention = attention_named("flash", device, dtype)
    seen = attention(q, k, v)                               # [B, N, L, D] each

The packages are imported when they are asked for. Both want a CUDA GPU and half precision, and neither takes a mask,
which a rollout never has.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
from torch import Tensor

from .model import Attention, sdpa

FLASH = {"flash_attn_interface": "flash-attention 3", "flash_attn": "flash-attention 2"}  # the newer one first
HALF = (torch.float16, torch.bfloat16)


def attention_named(name: str, device: torch.device, dtype: torch.dtype) -> Attention:
    """The kernel of that name, one of KERNELS, to run on `device` in `dtype`.

    Raises ImportError where its package is not installed, ValueError for a device or dtype it cannot run on.
    """
    if name != "sdpa" and (device.type != "cuda" or dtype not in HALF):
        precision = str(dtype).removeprefix("torch.")
        raise ValueError(
            f"Got the attention {name} on {device} in {precision}; it needs a CUDA GPU and bfloat16 or float16. "
            "Use sdpa."
        )
    return KERNELS[name]()


def _sdpa() -> Attention:
    return sdpa


def _flash() -> Attention:
    flash = _function("flash_attn_func", FLASH, "flash-attn")

    def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        _refuse(mask)
        out = flash(*(x.transpose(1, 2) for x in (q, k, v)))  # [B, L, N, D]; version 3 gives the log-sum-exp too
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return attention


def _sage() -> Attention:
    sage = _function("sageattn", {"sageattention": "SageAttention"}, "sageattention")

    def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        _refuse(mask)
        return sage(q, k, v, tensor_layout="HND")

    return attention


KERNELS = {"sdpa": _sdpa, "flash": _flash, "sage": _sage}


def _function(name: str, modules: dict[str, str], package: str) -> Callable:
    """The function of that name in the first of the modules that can be imported."""
    for module in modules:
        try:
            return getattr(importlib.import_module(module), name)
        except ImportError as error:
            reason = error
    raise ImportError(
        f"Got the attention of {' or '.join(modules.values())}, which cannot be imported ({reason}). Install the "
        f"package {package} (pip install {package}), or use sdpa."
    ) from reason


def _refuse(mask: Tensor | None) -> None:
    if mask is not None:
        raise ValueError("Got a mask, which this attention kernel does not take. Use sdpa.")
