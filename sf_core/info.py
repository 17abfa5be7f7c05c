"""Lists the built-in model, the sampling presets and this machine's devices."""

from __future__ import annotations

import argparse
import platform

import torch

from . import __version__, tiny
from .config import PRESETS, Sampling


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Nothing to choose."""


def run(args: argparse.Namespace) -> str:
    lines = [f"Self Forcing {__version__}, torch {torch.__version__}, Python {platform.python_version()}", ""]
    lines += ["Built-in model", *_model(), "", "Presets (generate --preset)"]
    lines += [f"  {name:6} {_sampling(sampling)}" for name, sampling in PRESETS.items()]
    return "\n".join([*lines, "", "Devices", *_devices()])


def _model() -> list[str]:
    parts = {
        "wan": tiny.load_model(torch.device("cpu"), torch.float32),
        "text": tiny.load_text_encoder(),
        "autoencoder": tiny.load_autoencoder(),
    }
    config = parts["wan"].config
    sizes = {name: sum(weight.numel() for weight in part.parameters()) / 1e6 for name, part in parts.items()}
    return [
        *(f"  {name:12} {size:.2f} M parameters" for name, size in sizes.items()),
        f"  layers {config.layers}, dim {config.dim}, heads {config.heads}, latent channels {config.channels}",
        f"  knows the words: {' '.join(parts['text'].words)}",
    ]


def _sampling(sampling: Sampling) -> str:
    steps = ", ".join(f"{step:g}" for step in sampling.steps)
    window = "all" if sampling.window is None else sampling.window
    return f"steps {steps}; shift {sampling.shift:g}; chunk {sampling.chunk}; window {window}; sink {sampling.sink}"


def _devices() -> list[str]:
    cuda = [f"  cuda:{i}  {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    mps = ["  mps"] if torch.backends.mps.is_available() else []
    return [*cuda, *mps, f"  cpu     {torch.get_num_threads()} threads"]
