"""Inputs that several nodes have, each described once.

0 (or -1, where 0 means something) leaves a number as the preset has it, and "auto" leaves a choice.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass

from comfy.model_patcher import ModelPatcher
from comfy.sd import VAE
from comfy_api.latest import io

from ..sf_core.sampling.config import LENGTHS, PRESETS, Sampling, override, preset_of
from ..sf_core.sampling.families import FAMILIES
from ..sf_core.sampling.noise import MAX_SEED
from ..sf_core.wan.compile import MODES
from ..sf_core.wan.fp8 import E4M3

CATEGORY = "Self Forcing"
AUTO = "auto"
CACHES = {AUTO: None, "fp8": E4M3}
NAMED = (*PRESETS, *LENGTHS, *FAMILIES)


def check_numbers(execute: Callable[..., io.NodeOutput]) -> Callable[..., io.NodeOutput]:
    """A node's execute that begins with a look at its numbers: ComfyUI lets nan pass, and all that comes by a wire.

    Raises ValueError for a number that is not between an input's min and max.
    """
    signature = inspect.signature(execute)

    @functools.wraps(execute)
    def checked(cls, *args, **inputs) -> io.NodeOutput:
        given = {**signature.bind_partial(cls, *args).arguments, **inputs}
        for slot in cls.define_schema().inputs:
            value = given.get(slot.id)
            if isinstance(slot, (io.Int.Input, io.Float.Input)) and isinstance(value, (int, float)):
                if not slot.min <= value <= slot.max:
                    raise ValueError(
                        f"Got {slot.id} {value}; it is a number from {slot.min} to {slot.max}. Change {slot.id}."
                    )
        return execute(cls, *args, **inputs)

    return checked


def model() -> io.Input:
    return io.Model.Input(
        "model",
        tooltip="Model: a causal Wan text-to-video model from any loader, with or without LoRAs.",
    )


def positive() -> io.Input:
    return io.Conditioning.Input(
        "positive",
        tooltip="Prompt, or those of Self Forcing Prompt with their times. Of other conditioning the first entry "
        "is used.",
    )


def latent() -> io.Input:
    return io.Latent.Input(
        "latent",
        tooltip="Size, length and batch of the video, prefix included. Its content counts only where denoise is below "
        "1: then it is the clip to make another of.",
    )


def seed(least: int = 0) -> io.Input:
    drawn = " -1 draws another one for each run." if least < 0 else ""
    return io.Int.Input(
        "seed", default=0, min=least, max=MAX_SEED, control_after_generate=True,
        tooltip="Seed of the noise: the same seed gives the same frames. A longer video with the same seed starts "
        "with them too." + drawn,
    )  # fmt: skip


def preset() -> io.Input:
    return io.Combo.Input(
        "preset", options=[AUTO, *NAMED], default=AUTO,
        tooltip="Preset: steps, shift, chunk and window that belong together. auto: what the model was made for; cli: "
        "the published script (shift 5); demo: the published web demo (shift 8); tiny: the built-in model; long: the "
        "model's own with a deep sink, for minutes; fast: its own with a window of 12 or three chunks; the others: "
        "published models by name.",
    )  # fmt: skip


def steps() -> io.Input:
    return io.Int.Input(
        "steps", default=0, min=0, max=100,
        tooltip="Denoising steps per chunk, evenly spaced before the shift. 0: the preset's (4).",
    )  # fmt: skip


def chunk() -> io.Input:
    return io.Int.Input(
        "chunk", default=0, min=0, max=100, advanced=True,
        tooltip="Chunk size: latent frames made together (4 frames each). 0: the preset's (3), which is what the "
        "model was trained with.",
    )  # fmt: skip


def window() -> io.Input:
    return io.Int.Input(
        "window", default=0, min=0, max=100_000,
        tooltip="Window: latent frames that a chunk attends to, itself included; memory and time grow with it. 0: the "
        "preset's. A number as large as the video means all of it.",
    )  # fmt: skip


def sink() -> io.Input:
    return io.Int.Input(
        "sink", default=-1, min=-1, max=100_000, advanced=True,
        tooltip="Attention sink: first latent frames that never leave the window; steadies long videos. -1: the "
        "preset's.",
    )  # fmt: skip


def prefix() -> io.Input:
    return io.Latent.Input(
        "prefix", optional=True,
        tooltip="Prefix: latents the video starts with, an image or a clip from VAE Encode at the same size, or "
        "another sampler's output to go on from. They count in its length.",
    )  # fmt: skip


def cache() -> io.Input:
    return io.Combo.Input(
        "cache", options=list(CACHES), default=AUTO, optional=True, advanced=True,
        tooltip="Data type of the KV cache, the model's memory of earlier frames. auto: that of the model; fp8: float8 "
        "with scales, half the memory of bf16 and a little slower.",
    )  # fmt: skip


def compiled() -> io.Input:
    return io.Combo.Input(
        "compile", options=list(MODES), default="off", optional=True, advanced=True,
        tooltip="torch.compile. default: faster after a first step that takes a minute or so; max-autotune: "
        "faster still after several. Needs Triton on GPUs, a C++ compiler on CPUs; without them the video is made as "
        "with off.",
    )  # fmt: skip


def negative() -> io.Input:
    return io.Conditioning.Input(
        "negative", optional=True,
        tooltip="Negative prompt: what the video should not be, where cfg is not 1. Not needed by step-distilled "
        "models.",
    )  # fmt: skip


def cfg() -> io.Input:
    return io.Float.Input(
        "cfg", default=1.0, min=0.0, max=30.0, step=0.1, optional=True, advanced=True,
        tooltip="Classifier-free guidance away from the negative prompt. 1, for Self Forcing and other distilled "
        "models: none. Any other value doubles time and cache.",
    )  # fmt: skip


def denoise() -> io.Input:
    return io.Float.Input(
        "denoise", default=1.0, min=0.01, max=1.0, step=0.01, optional=True,
        tooltip="Denoising strength, for video to video: how much of the latent's content gives way. 1: all of it, an "
        "ordinary new video. 0.4 to 0.7 keep its layout and motion. Below 1 the latent comes from VAE Encode.",
    )  # fmt: skip


def history() -> io.Input:
    return io.Combo.Input(
        "history", options=["window", "all"], default="window", optional=True, advanced=True,
        tooltip="History: what of a prefix that is longer than the window the model reads again. window: what the "
        "next chunk sees, quick however long it is. all: everything, which goes on exactly as if the video had not "
        "been cut.",
    )  # fmt: skip


def keep_prefix() -> io.Input:
    return io.Boolean.Input(
        "keep_prefix", default=True, optional=True, advanced=True,
        tooltip="Prefix kept as a part of the output. Off: only what comes after it.",
    )  # fmt: skip


def tile() -> io.Input:
    return io.Int.Input(
        "tile", default=0, min=0, max=8192, step=64, optional=True, advanced=True,
        tooltip="Tile size in pixels: the side of what the Wan VAE decodes one after the other, for small GPUs: 128 or "
        "more, 256 is good. Less memory, more time, the same frames. 0: the whole picture.",
    )  # fmt: skip


# --- What was set on a node ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RolloutInputs:
    """Inputs of Self Forcing Sampler, as they stand on the node; Stream has some more."""

    model: ModelPatcher
    positive: list
    latent: dict
    seed: int
    preset: str = AUTO
    steps: int = 0
    chunk: int = 0
    window: int = 0
    sink: int = -1
    prefix: dict | None = None
    cache: str = AUTO
    compile: str = "off"
    negative: list | None = None
    cfg: float = 1.0
    denoise: float = 1.0
    history: str = "window"
    keep_prefix: bool = True

    def sampling(self, own: Sampling) -> Sampling:
        """The preset (`own` for auto) with what the user has set."""
        return change_sampling(own, self.preset, self.steps, self.chunk, self.window, self.sink)


@dataclass(frozen=True)
class StreamInputs(RolloutInputs):
    """Inputs of Self Forcing Stream."""

    vae: VAE = None
    fps: float = 16.0
    file: str = ""
    keep: int = 0
    tile: int = 0


def change_sampling(
    own: Sampling, preset: str = AUTO, steps: int = 0, chunk: int = 0, window: int = 0, sink: int = -1, **changes
) -> Sampling:
    """The preset (`own` for auto) with what the user has set; 0, -1 for the sink, or None leaves a field as it is."""
    changes |= {"steps": steps or None, "chunk": chunk or None, "window": window or None}
    changes |= {"sink": None if sink < 0 else sink}
    given = {name: value for name, value in changes.items() if value is not None}
    return override(named_sampling(preset, own), **given)


def named_sampling(preset: str, own: Sampling) -> Sampling:
    """The sampling of a preset or a family, for a model that is sampled as `own` by itself."""
    if preset == AUTO:
        return own
    return FAMILIES[preset].sampling if preset in FAMILIES else preset_of(preset, own)
