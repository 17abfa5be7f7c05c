"""Rotary position embedding in three axes, computed in float64 and never looked up: there is no longest video."""

from __future__ import annotations

from collections.abc import Sequence as Frames
from dataclasses import dataclass

import torch
from torch import Tensor

from ..device import upload

BASE = 10000.0


def rope_angles(head_dim: int, frames: Frames[int], height: int, width: int, time_base: float = BASE) -> Tensor:
    """Angles [F, h, w, D/2] in float64 of absolute positions: frame number, row, column of 2 x 2 patches.

    The D/2 pairs are split over time, rows and columns, each with its own ladder 10000^(-i/n). Angles are computed, not
    looked up, so there is no longest video; in float64, because bfloat16 positions collide beyond 256.
    """
    pairs = head_dim // 2
    split = (pairs - 2 * (pairs // 3), pairs // 3, pairs // 3)
    axes = (torch.tensor(list(frames)), torch.arange(height // 2), torch.arange(width // 2))
    bases = (time_base, BASE, BASE)
    ladders = [base ** (-torch.arange(n, dtype=torch.float64) / n) for base, n in zip(bases, split)]
    t, h, w = (torch.outer(axis.double(), ladder) for axis, ladder in zip(axes, ladders))
    shape = (len(t), len(h), len(w))
    return torch.cat(
        (
            t[:, None, None].expand(*shape, -1),
            h[None, :, None].expand(*shape, -1),
            w[None, None, :].expand(*shape, -1),
        ),
        dim=-1,
    )


def jittered_bases(heads: int, jitter: float) -> tuple[float, ...] | None:
    """RoPE jitter: a base of the time axis for each head, BASE (1 + jitter e), e even in -1..1; None for jitter 0.

    Sinks pull a video back to its beginning where the angles of all heads nearly meet again; with bases of their own
    they never do. The numbers are the same in every rollout. Source: LoL, arXiv 2601.16914 (jitter 0.8).
    """
    if not jitter:
        return None
    even = torch.rand(heads, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1
    return tuple((BASE * (1 + jitter * even)).tolist())


@dataclass(frozen=True)
class Rope:
    """The rotations of the tokens of some frames: cosine and sine, [L, D/2, 2] in float32, of each head [N, L, ...]."""

    turns: Tensor

    @classmethod
    def at(
        cls,
        head_dim: int,
        frames: Frames[int],
        height: int,
        width: int,
        device: torch.device | str,
        time_bases: tuple[float, ...] | None = None,
    ) -> Rope:
        if time_bases is None:
            angles = rope_angles(head_dim, frames, height, width).flatten(0, 2)  # [L, D/2]
        else:
            heads = [rope_angles(head_dim, frames, height, width, base).flatten(0, 2) for base in time_bases]
            angles = torch.stack(heads)  # [N, L, D/2]
        return cls(upload(torch.stack((angles.cos(), angles.sin()), dim=-1).float(), device))

    def __call__(self, x: Tensor) -> Tensor:
        """Rotates the interleaved pairs of [B, N, L, D]."""
        pairs = x.float().unflatten(-1, (-1, 2))  # [B, N, L, D/2, 2]
        # As complex numbers it is one kernel; compilers prefer to see the arithmetic, and MPS may lack complex numbers.
        if torch.compiler.is_compiling() or x.device.type == "mps":
            (even, odd), (cos, sin) = pairs.unbind(-1), self.turns.unbind(-1)
            turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
        else:
            turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(self.turns))
        return turned.flatten(-2).to(x.dtype)
