"""Small training runs in the tiny world, for tests."""

import json
from pathlib import Path

import torch

from sf_core.training.config import TrainConfig, build
from sf_core.training.distributed import Group
from sf_core.training.run_folder import read_losses
from sf_core.training.train import train

SMALL = {"world": "tiny", "dim": 24, "layers": 2, "heads": 2, "ffn_dim": 32}
SAMPLING = {"chunk": 1, "shift": 3, "steps": [1000, 500]}
FAST = {"lr": 1e-3, "clip": 1.0}


def content(method: str, out: Path, **changes) -> dict:
    """The mapping of a configuration: two latent frames, chunks of one, four clips."""
    started = {"student": str(out.parent / "causal"), "teacher": str(out.parent / "teacher")}
    models = {"bidirectional": {"student": "new"}, "teacher-forcing": {"student": str(out.parent / "teacher")}}
    return {
        "method": method,
        "out": str(out),
        "model": {**SMALL, **models.get(method, started)},
        "data": {"procedural": "trained", "pool": 8},
        "sampling": SAMPLING,
        "rollout": {"frames": 2},
        "flow": {"frames": 2, "teacher_steps": 4},
        "optimizer": FAST,
        "critic": {"updates": 2, "optimizer": FAST},
        "steps": 3,
        "batch": 4,
        "precision": "float32",
        "device": "cpu",
        **changes,
    }


def config(method: str, out: Path, **changes) -> TrainConfig:
    return build(TrainConfig, content(method, out, **changes))


def trained(method: str, out: Path, **changes) -> Path:
    """The folder of a finished run."""
    train(config(method, out, **changes), Group(), torch.device("cpu"))
    return out


def written(method: str, out: Path, **changes) -> Path:
    """The configuration as a file (JSON is YAML)."""
    out.parent.mkdir(parents=True, exist_ok=True)
    path = out.parent / f"{out.name}.yaml"
    path.write_text(json.dumps(content(method, out, **changes)))
    return path


def losses(folder: Path, name: str | None = None) -> list:
    """The losses of every step: all of them, or one."""
    lines = read_losses(folder)
    return [line[name] for line in lines] if name else lines
