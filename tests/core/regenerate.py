"""Weights that need no file: the golden tensors were made with weights drawn by this rule."""

import math
import zlib

import numpy as np
import torch


def weights(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, torch.Tensor]:
    """Float32 weights for a state dict of these shapes; each depends on its own name and the seed alone."""
    return {name: torch.from_numpy(_weight(name, tuple(shapes[name]), seed)) for name in sorted(shapes)}


def _weight(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    generator = np.random.RandomState((zlib.crc32(name.encode()) + 7919 * seed) & 0xFFFFFFFF)
    normal = generator.standard_normal(shape).astype(np.float32)
    kind = name.rsplit(".", 1)[-1]
    if kind == "bias":
        return (0.05 * normal).astype(np.float32)
    if kind == "gamma" or (kind == "weight" and len(shape) == 1):
        return (1 + 0.1 * normal).astype(np.float32)
    if kind == "modulation":
        return (normal / np.sqrt(shape[-1])).astype(np.float32)
    return (normal / np.sqrt(math.prod(shape[1:]))).astype(np.float32)
