"""Weights that need no file: the golden tensors were made with weights drawn by this rule."""

import math
import zlib

import numpy as np
import torch


def weights(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, torch.Tensor]:
    """Float32 weights for a state dict of these shapes; each depends on its own name and the seed alone."""
    return {name: torch.from_numpy(_weight(name, tuple(shapes[name]), seed)) for name in sorted(shapes)}


def normal(name: str, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Float32 normal numbers that depend on a name and a seed alone: noise, draws, prompts of the newer families."""
    generator = np.random.RandomState((zlib.crc32(name.encode()) + 7919 * seed) & 0xFFFFFFFF)
    return torch.from_numpy(generator.standard_normal(shape).astype(np.float32))


def prompt(text: str, shape: tuple[int, int, int]) -> torch.Tensor:
    """Embeddings [B, tokens, width] of a prompt's words: `text` N for video N; zero from some token on."""
    videos = []
    for video in range(shape[0]):
        words = f"{text}{video}"
        embeds = normal(f"prompt:{words}", (1, *shape[1:]))
        embeds[:, min(shape[1] - 2, 5 + len(words) % 20) :] = 0
        videos.append(embeds)
    return torch.cat(videos)


def _weight(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    drawn = normal(name, shape, seed).numpy()
    kind = name.rsplit(".", 1)[-1]
    if kind == "bias":
        return (0.05 * drawn).astype(np.float32)
    if kind == "gamma" or (kind == "weight" and len(shape) == 1):
        return (1 + 0.1 * drawn).astype(np.float32)
    if kind == "modulation":
        return (drawn / np.sqrt(shape[-1])).astype(np.float32)
    return (drawn / np.sqrt(math.prod(shape[1:]))).astype(np.float32)
