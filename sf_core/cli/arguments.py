"""Values on the command line that several commands take, as types for argparse."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from ..sampling.schedule import evenly

MAX_SIZE = 2048  # pixels


def whole(low: int, high: int) -> Callable[[str], int]:
    """A whole number in low..high."""

    def parse(text: str) -> int:
        if not text.lstrip("+-").isdecimal() or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"got {text}; use a whole number from {low} to {high}")
        return int(text)

    return parse


def size(text: str) -> int:
    """A width or height in pixels."""
    pixels = whole(1, 10**9)(text)
    if pixels % 16 or pixels > MAX_SIZE:
        nearest = min(max(16, round(pixels / 16) * 16), MAX_SIZE)
        raise argparse.ArgumentTypeError(f"got {text}; use a multiple of 16 up to {MAX_SIZE}, e.g. {nearest}")
    return pixels


def steps(text: str) -> tuple[float, ...]:
    """A number of evenly spread timesteps, or the timesteps themselves."""
    if "," in text:
        try:
            return tuple(float(step) for step in text.split(",") if step.strip())
        except ValueError:
            raise argparse.ArgumentTypeError(f"got {text}; use numbers like 1000,750,500,250") from None
    return evenly(whole(1, 1000)(text))


def share(text: str) -> float:
    """A number above 0, at most 1."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError(f"got {text}; use a number above 0 and at most 1, e.g. 0.5")
    return number


def window(text: str) -> int | None:
    """Latent frames, or all of them."""
    return None if text == "all" else whole(1, 10**9)(text)
