"""Attention: what self-attention is to the model, and the kernels that compute it.

A kernel is `attention(q, k, v, mask)`, [B, N, L, D] in and out: torch's own, or flash-attention's or SageAttention's by
name:

    attention = attention_kernel("flash", device, dtype)

Their packages are imported when they are asked for. Both want a CUDA GPU and half precision, and neither takes a mask,
which a rollout never has.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import WanConfig
from .rope import Rope

Attention = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


class SelfAttention(Protocol):
    """Self-attention of one forward: queries and keys come with positions, [B, N, L, D] each."""

    rope: Rope
    attention: Attention

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor: ...


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Torch's attention, [B, N, L, D]; a boolean mask [L, L] is True where a query may look."""
    if q.dtype == torch.bfloat16 and q.device.type == "cpu" and mask is None and not torch.is_grad_enabled():
        return attention_by_rows(q, k, v)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def attention_by_rows(q: Tensor, k: Tensor, v: Tensor, rows: int = 256) -> Tensor:
    """Attention, `rows` queries at a time, as plain matrix products.

    Torch's fused kernel does not use a CPU's bfloat16 units; matrix products do, three times as fast where there are
    some.
    """
    out, scale = torch.empty_like(q), q.shape[-1] ** -0.5
    for at in range(0, q.shape[2], rows):
        scores = (q[:, :, at : at + rows] * scale) @ k.mT
        out[:, :, at : at + rows] = scores.softmax(-1) @ v
    return out


class FullAttention:
    """Self-attention within one sequence of frames, without a cache.

    frames   position of each frame; may repeat (teacher forcing puts clean and noisy frames side by side)
    height, width   latent size
    mask     boolean [L, L], True where the row's token may look at the column's; None: everything (bidirectional)
    """

    def __init__(
        self,
        config: WanConfig,
        frames: Sequence[int],
        height: int,
        width: int,
        device: torch.device | str = "cpu",
        mask: Tensor | None = None,
        attention: Attention = sdpa,
    ) -> None:
        self.rope = Rope.at(config.head_dim, frames, height, width, device)
        self.mask = mask
        self.attention = attention

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.attention(q, k, v, self.mask)


# --- Kernels by name ------------------------------------------------------------------------------------------------

FLASH = {"flash_attn_interface": "flash-attention 3", "flash_attn": "flash-attention 2"}  # the newer one first
HALF = (torch.float16, torch.bfloat16)


def attention_kernel(name: str, device: torch.device, dtype: torch.dtype) -> Attention:
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
