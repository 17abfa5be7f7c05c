"""Run folder: checkpoint, losses and exported weights.

    checkpoint.pt       everything that changes: written whole or not at all, so that a run killed at any moment
                        continues from the last one
    losses.jsonl        a line a step
    model.safetensors   the averaged student, which the nodes and `generate --model` load

Nothing random is kept: random numbers depend on the step alone (step_random.py).
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

CHECKPOINT, LOSSES, MODEL = "checkpoint.pt", "losses.jsonl", "model.safetensors"
RECIPE = Path("runs/tiny")  # where `train tiny` keeps the stages that shipped configurations start from


def save_run(folder: Path, content: dict[str, Any]) -> None:
    write_atomically(folder / CHECKPOINT, lambda partial: torch.save(content, partial))


def load_run(folder: Path) -> dict[str, Any]:
    """A run's checkpoint; its tensors are views of the file.

    Raises FileNotFoundError where there is none, ValueError for a damaged one.
    """
    path = folder / CHECKPOINT
    if not path.is_file():
        raise FileNotFoundError(f"Got no {path}; a run that has saved a checkpoint is needed: {training_hint(folder)}.")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        reason = " ".join(str(error).split())[:120]
        raise ValueError(
            f"Got {path}, which is not a whole checkpoint ({reason}). Remove it and train again."
        ) from None


def training_hint(folder: Path) -> str:
    """How to make a run's folder that is not there, for error messages."""
    if folder.parent == RECIPE:
        return f"train it first, by python -m sf_core train tiny --stage {folder.name}"
    return "train it first"


def save_model(path: Path, state: dict[str, Tensor], metadata: dict[str, str], dtype: torch.dtype) -> None:
    """Saves weights in `dtype` as a safetensors file, with metadata."""
    plain = {name: value.to(dtype).contiguous() for name, value in state.items()}
    write_atomically(path, lambda partial: save_file(plain, partial, metadata))


def fingerprint(state: dict[str, Tensor]) -> str:
    """A hash of weights and their names."""
    whole = hashlib.blake2b(digest_size=16)
    for name, value in sorted(state.items()):
        whole.update(name.encode())
        whole.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return whole.hexdigest()


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file atomically: beside its place, moved there when the disk has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    try:
        write(partial)
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


class LossLog:
    """The losses of every step so far, as lines of JSON. Lines of steps that will be taken again are dropped."""

    def __init__(self, folder: Path, first: int) -> None:
        self.path = folder / LOSSES
        folder.mkdir(parents=True, exist_ok=True)
        kept = [json.dumps(line) for line in read_losses(folder) if line["step"] <= first]
        write_atomically(self.path, lambda partial: partial.write_text("".join(f"{line}\n" for line in kept)))

    def add(self, step: int, values: dict[str, float]) -> None:
        """Notes the losses of a step (from 1)."""
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")


def read_losses(folder: Path) -> list[dict[str, float]]:
    """A dictionary a step; a last line cut short by a kill is left out."""
    path = folder / LOSSES
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]
