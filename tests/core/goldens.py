"""The golden tensors of the engine, and the tiny model they were made with."""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from sf_core.wan.config import WanConfig
from sf_core.wan.model import WanModel
from tests.core.regenerate import weights

FOLDER = Path(os.environ.get("SELF_FORCING_GOLDENS", Path(__file__).parents[1] / "golden"))
CONFIG = WanConfig(dim=128, heads=4, layers=2, ffn_dim=256, freq_dim=64, text_dim=64, text_len=32)
HEIGHT, WIDTH = 8, 12
TOKENS = CONFIG.tokens_per_frame(HEIGHT, WIDTH)
CAUSAL, REAL_SCORE, FAKE_SCORE = 1, 2, 3  # seeds of the weights


def golden(name: str) -> dict[str, Tensor]:
    return load_file(FOLDER / f"{name}.safetensors")


def golden_facts(name: str) -> dict:
    """Numbers recorded beside the tensors."""
    return json.loads((Path(__file__).parents[1] / "golden" / f"{name}.json").read_text())


def model(seed: int = CAUSAL) -> WanModel:
    wan = WanModel(CONFIG).requires_grad_(False)
    wan.load_state_dict(weights({name: tuple(t.shape) for name, t in wan.state_dict().items()}, seed))
    return wan


class RecordedNoise:
    """Noise that was drawn elsewhere: `initial` [B, C, F, H, W] of all generated frames and `again`, in call order."""

    def __init__(self, initial: Tensor, again: Iterable[Tensor]) -> None:
        self.initial, self.used = initial, 0
        self.again: Iterator[Tensor] = iter(again)

    def __call__(self, start: int, frames: int, step: int, shape: tuple[int, int, int, int]) -> Tensor:
        if step > 0:
            return next(self.again)
        self.used += frames
        return self.initial[:, :, self.used - frames : self.used]


def frames_second(x: Tensor) -> Tensor:
    """[B, F, C, H, W], as the goldens have it, to [B, C, F, H, W] and back."""
    return x.transpose(1, 2)
