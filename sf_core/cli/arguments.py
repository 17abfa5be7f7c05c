"""Values on the command line that several commands take, as types for argparse."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import torch

from ..device import default_device

MAX_SIZE = 2048  # pixels
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def int_in(low: int, high: int) -> Callable[[str], int]:
    """A whole number in low..high."""

    def parse(text: str) -> int:
        if not text.lstrip("+-").isdecimal() or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"got {text}; use a whole number from {low} to {high}")
        return int(text)

    return parse


def number_in(low: float, high: float) -> Callable[[str], float]:
    """A number in low..high; nan and inf are none."""

    def parse(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not low <= number <= high:
            raise argparse.ArgumentTypeError(f"got {text}; use a number from {low:g} to {high:g}")
        return number

    return parse


def size(text: str) -> int:
    """A width or height in pixels."""
    pixels = int_in(1, 10**9)(text)
    if pixels % 16 or pixels > MAX_SIZE:
        nearest = min(max(16, round(pixels / 16) * 16), MAX_SIZE)
        raise argparse.ArgumentTypeError(f"got {text}; use a multiple of 16 up to {MAX_SIZE}, e.g. {nearest}")
    return pixels


def steps(text: str) -> tuple[float, ...] | int:
    """A number of evenly spread timesteps, or the timesteps themselves."""
    if "," in text:
        try:
            return tuple(float(step) for step in text.split(",") if step.strip())
        except ValueError:
            raise argparse.ArgumentTypeError(f"got {text}; use numbers like 1000,750,500,250") from None
    return int_in(1, 1000)(text)


def fraction(text: str) -> float:
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
    return None if text == "all" else int_in(1, 10**9)(text)


def device(text: str) -> torch.device:
    """A device by its name; auto is the GPU where there is one."""
    if text == "auto":
        return default_device()
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    usable = " or ".join(kind for kind in there if there[kind])
    try:
        found = torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"got {text}, which is no device; use {usable}") from None
    count = torch.cuda.device_count() if found.type == "cuda" else 1
    if not there.get(found.type) or (found.index or 0) >= count:
        raise argparse.ArgumentTypeError(f"got {text}, which this machine or this torch lacks; use {usable}")
    return found


def add_loras(parser: argparse._ActionsContainer) -> None:
    """The options that name LoRAs and their strengths."""
    lora = "LoRA merged into the model (LongLive's lora.pt); may be given several times"
    parser.add_argument("--lora", type=Path, action="append", metavar="FILE", help=lora)
    strength = "LoRA strength (1); for several LoRAs several times, in the same order"
    parser.add_argument("--lora-strength", type=number_in(-10, 10), action="append", metavar="NUMBER", help=strength)


def read_loras(args: argparse.Namespace) -> tuple[tuple[Path, float], ...]:
    """(file, strength) of each LoRA that `add_loras`'s options name."""
    loras, strengths = args.lora or [], args.lora_strength or []
    if len(strengths) > len(loras):
        raise ValueError(
            f"Got --lora-strength {len(strengths)} times for {len(loras)} LoRAs; each is the strength of the --lora at "
            "its place. Leave out what is too much, or name another --lora."
        )
    return tuple(zip(loras, [*strengths, *[1.0] * (len(loras) - len(strengths))]))
