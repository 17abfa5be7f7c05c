"""torch.compile for the two parts of a block around self-attention.

Their shapes are those of a chunk, whatever the cache holds, and every block has the same layers: each part is compiled
once per chunk size and dtype and then serves all blocks of all chunks. Attention itself stays a call of the kernel.

Compiling needs a working compiler (Triton on GPUs, a C++ compiler on CPUs), which shows only when it is first used.
Where there is none, one warning says so and the parts run as they are.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from .model import EAGER, Stages

MODES = ("off", "default", "max-autotune")

log = logging.getLogger(__name__)


def compile_stages(mode: str = "default", backend: str | Callable = "inductor") -> Stages:
    """The stages of a block, compiled when first used; `mode` is one of MODES.

    max-autotune tries more kernels: slower to start (minutes at full size), faster afterwards. Raises ValueError for
    another mode.
    """
    if mode not in MODES:
        raise ValueError(f"Got compile mode {mode!r}; there is {', '.join(MODES)}. Use default, or off.")
    if mode == "off":
        return EAGER
    # CUDA graphs would copy every chunk's tokens; the kernels are long enough without.
    inductor = "max-autotune-no-cudagraphs" if mode == "max-autotune" else None
    options = {"mode": inductor} if backend == "inductor" else {}
    guard = Guard()
    options |= {"backend": backend, "dynamic": False}
    before, after = (guard.wrap(stage, torch.compile(stage, **options)) for stage in (EAGER.before, EAGER.after))
    return Stages(before, after)


class Guard:
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
                    log.warning("torch.compile does not work here and is left out: %s", reason)
            return plain(*args)

        return call
