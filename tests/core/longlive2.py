"""The golden tensors of LongLive 2.0, and the rollouts they were made with."""

import os
import zlib
from collections.abc import Iterator

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from sf_core.sampling.config import Sampling
from sf_core.sampling.prompts import TimedPrompt
from sf_core.wan.config import WanConfig
from sf_core.wan.model import WanModel
from sf_core.wan.shot_cache import Shots
from tests.core.goldens import FOLDER, HEIGHT, WIDTH, frames_second, golden_facts
from tests.core.regenerate import weights
from tests.core.rolling import roll_out

CONFIG = WanConfig(
    dim=128, heads=4, layers=2, ffn_dim=256, channels=48, freq_dim=64, text_dim=64, text_len=32
)  # fmt: skip
FACTS = golden_facts("longlive2")
CUT = "The scene transitions. "


def tensors(file: str) -> dict[str, Tensor]:
    """The committed cut, or that file of the full set."""
    full = "SELF_FORCING_GOLDENS" in os.environ
    return load_file(FOLDER / "longlive2" / f"{file}.safetensors" if full else FOLDER / "longlive2.safetensors")


def model() -> WanModel:
    wan = WanModel(CONFIG).requires_grad_(False)
    wan.load_state_dict(weights({name: tuple(t.shape) for name, t in wan.state_dict().items()}, seed=1))
    return wan


def normal(name: str, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """What was drawn for an input of that name."""
    drawn = np.random.RandomState((zlib.crc32(name.encode()) + 7919 * seed) & 0xFFFFFFFF).standard_normal(shape)
    return torch.from_numpy(drawn.astype(np.float32))


def prompt(text: str) -> Tensor:
    """Embeddings [1, text_len, text_dim] of a prompt."""
    embeds = normal(f"prompt:{text}", (CONFIG.text_len, CONFIG.text_dim))
    embeds[5 + len(text) % (CONFIG.text_len - 8) :] = 0
    return embeds[None]


def sampling(fact: dict) -> Sampling:
    """The settings of a recorded rollout."""
    other = fact["inference_overrides"]
    count = fact["sampling_steps"]
    return Sampling(
        steps=tuple(1000 * (count - i) / count for i in range(count)),
        shift=5.0,
        chunk=fact["chunk"],
        first_chunk=1 if other.get("independent_first_frame") else None,
        window=fact["window"],
        sink=fact["sink"],
        pinned=other.get("use_relative_rope", False),
        solver="unipc",
        shots=Shots(
            fact["multi_shot_sink"], int(fact["multi_shot_rope_offset"]), other.get("shot_clean_recache", False)
        ),
        holds_prefix=True,
    )


def chunk_starts(fact: dict) -> list[int]:
    return sorted({call["first_frame"] for call in fact["calls"]})


def prompts(fact: dict) -> Iterator[TimedPrompt]:
    """A prompt for each chunk; the first video's prefix says where scenes change."""
    for at, start in enumerate(chunk_starts(fact)):
        texts = [fact["prompt_texts"][row[min(at, len(row) - 1)]] for row in fact["prompts"]]
        cut = at > 0 and texts[0].startswith(CUT)
        yield TimedPrompt(start, torch.cat([prompt(text) for text in texts]), "cut" if cut else "recache")


class DrawnNoise:
    """The one draw of a clip, [B, C, F, H, W], from latent frame `first` on."""

    def __init__(self, case: str, fact: dict, first: int) -> None:
        shape = (fact["batch"], fact["frames"], CONFIG.channels, HEIGHT, WIDTH)
        self.noise, self.first = frames_second(normal(f"input:{case}.noise", shape)), first

    def __call__(self, start: int, frames: int, step: int, shape: tuple[int, int, int, int]) -> Tensor:
        assert step == 0, "UniPC draws nothing but the first noise"
        return self.noise[:, :, start - self.first : start - self.first + frames]


def replay(case: str, negative: Tensor | None = None) -> Tensor:
    """The latents [B, F, C, H, W] of a recorded rollout, those it was given included."""
    fact = FACTS[case]
    given = fact["initial_frames"]
    prefix = normal(f"input:{case}.initial_latent", (1, given, CONFIG.channels, HEIGHT, WIDTH)) if given else None
    whole = given if given % fact["chunk"] == 0 else 0  # a single latent is held inside the first chunk
    return frames_second(
        roll_out(
            model(), sampling(fact), list(prompts(fact)), DrawnNoise(case, fact, whole), whole + fact["frames"],
            HEIGHT, WIDTH, prefix=None if prefix is None else frames_second(prefix), negative=negative,
            guidance=fact["guidance_scale"],
        )
    )  # fmt: skip


def lora_tensors(wan: WanModel, rank: int = 8) -> dict[str, Tensor]:
    """A LoRA for all linears of the blocks, under the published names, as the golden tensors were made with it."""
    tensors = {}
    for name, weight in wan.named_parameters():
        if name.startswith("blocks.") and weight.ndim == 2:
            layer = f"base_model.model.{name.removesuffix('.weight')}"
            for half, shape, scale in (("A", (rank, weight.shape[1]), 1), ("B", (weight.shape[0], rank), 0.5)):
                drawn = normal(f"lora:{layer}.lora_{half}.weight", shape, seed=1)
                tensors[f"{layer}.lora_{half}.weight"] = scale * drawn / shape[1] ** 0.5
    return tensors
