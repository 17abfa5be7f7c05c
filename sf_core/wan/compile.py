"""torch.compile for the two parts of a block around self-attention.

Their shapes are those of a chunk, whatever the cache holds, and every block has the same layers: each part is compiled
once per chunk size and dtype and then serves all blocks of all chunks, and of later rollouts. Attention itself stays a
call of the kernel.

Compiling needs a working compiler (Triton on GPUs, a C++ compiler on CPUs), and layers that can be traced, which shows
only when it is first used. Where it does not work, one warning says so and the parts of that rollout run as they are.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

from ..device import console_text
from .model import EAGER, BlockOps

MODES = ("off", "default", "max-autotune")

SIZES = 64  # of chunks that are kept compiled; with Dynamo's own 8 the ninth size would run as it is, unsaid

log = logging.getLogger(__name__)


def compile_ops(mode: str = "default", backend: str | Callable = "inductor") -> BlockOps:
    """Block operations for a rollout, compiled when first used; `mode` is one of MODES.

    max-autotune tries more kernels: slower to start (minutes at full size), faster afterwards. Raises ValueError for
    another mode.
    """
    if mode not in MODES:
        raise ValueError(f"Got compile mode {mode!r}; there is {', '.join(MODES)}. Use default, or off.")
    if mode == "off":
        return EAGER
    fallback, (qkv, finish) = Fallback(), compiled_parts(mode, backend)
    return BlockOps(fallback.wrap(EAGER.qkv, qkv), fallback.wrap(EAGER.finish, finish))


@lru_cache
def compiled_parts(mode: str, backend: str | Callable) -> tuple[Callable, Callable]:
    """Both parts. Made once, so that what was compiled serves later rollouts, too."""
    # CUDA graphs would copy every chunk's tokens; the kernels are long enough without.
    inductor = "max-autotune-no-cudagraphs" if mode == "max-autotune" else None
    options = {"mode": inductor} if backend == "inductor" else {}
    dynamo = torch._dynamo.config
    limit = "recompile_limit" if hasattr(dynamo, "recompile_limit") else "cache_size_limit"  # before torch 2.6
    setattr(dynamo, limit, max(getattr(dynamo, limit), SIZES))
    qkv, finish = (torch.compile(part, backend=backend, dynamic=False, **options) for part in (EAGER.qkv, EAGER.finish))
    return qkv, finish


class Fallback:
    """Turns compiled functions back into the plain ones, all at once, when one cannot be compiled here."""

    def __init__(self) -> None:
        self.works = True

    def wrap(self, plain: Callable, compiled: Callable) -> Callable:
        def call(*args: Any) -> Any:
            if self.works:
                try:
                    return compiled(*args)
                except torch.OutOfMemoryError:
                    raise
                except RuntimeError as error:  # what Dynamo, Inductor and their compilers raise
                    self.works = False
                    reason = " ".join(str(error).split())[:200]
                    log.warning("torch.compile does not work here and is left out: %s", console_text(reason))
            return plain(*args)

        return call
