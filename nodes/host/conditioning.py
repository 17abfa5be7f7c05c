"""Latents and prompts on wires, as the core wants them."""

from __future__ import annotations

from dataclasses import replace
from itertools import takewhile

import comfy.model_management as management
import comfy.sd
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...sf_core.sampling.context import Reencode
from ...sf_core.sampling.prompt_text import EncodedPrompt, StartTime
from ...sf_core.wan.model import WanLayers

OPEN_SIZE = "self_forcing_open_size"  # key of a LATENT: (width, height) in pixels, 0 where the model may choose
START = "self_forcing_entrance"  # key of a CONDITIONING entry: the StartTime of a prompt after the first
SCENE = "self_forcing_scene"  # the same: embeddings for the first chunk of a new shot, and for its others


def read_latents(latent: dict, wan: WanLayers, what: str = "latent") -> Tensor:
    """The samples [B, C, F, H, W] of a LATENT that fits the model. Raises ValueError where it does not."""
    samples, channels = latent["samples"], wan.config.channels
    if samples.ndim != 5 or samples.shape[1] != channels:
        raise ValueError(
            f"Got a {what} of shape {list(samples.shape)}; this model needs [batch, {channels}, frames, height, "
            "width]. Make it with Self Forcing Latent, or with VAE Encode and the VAE that belongs to the model."
        )
    return samples


def settle_size(latent: dict, prefix: dict | None, own: tuple[int, int], space: int) -> dict:
    """A LATENT whose size was left open, at the size of the prefix, or else at the model's `own` (width, height).

    Stock nodes keep the key of a LATENT that they put something into; one that is no longer a single zero has its size.
    """
    if OPEN_SIZE not in latent or any(latent["samples"].stride()):
        return latent
    if prefix is not None:
        own = tuple(space * side for side in prefix["samples"].shape[:-3:-1])
    width, height = (asked or side for asked, side in zip(latent[OPEN_SIZE], own))
    samples = latent["samples"]
    empty = samples.new_zeros(()).expand(*samples.shape[:3], height // space, width // space)
    return {key: value for key, value in latent.items() if key != OPEN_SIZE} | {"samples": empty}


def start_later(conditioning: list, start: StartTime) -> list:
    """The first entry of a prompt's CONDITIONING as one that comes in later.

    The start time stands in the entry's dict. For stock samplers the entry starts when sampling is over, so that they
    follow the first prompt alone.
    """
    embeds, values = conditioning[0]
    return [embeds, {**values, START: start, "start_percent": 1.0}]


def take_scheduled(conditioning: list) -> list:
    """The first entry and those right after it that come in later; the rest is what others have combined with it."""
    first, *others = conditioning
    return [first, *takewhile(lambda entry: START in entry[1], others)]


def read_prompts(conditioning: list, batch: int, has_shots: bool = False) -> list[EncodedPrompt]:
    """The first entry and those right after it that come in later, with embeddings [B, tokens, width] for `batch`.

    Whatever else stock nodes have combined with it is left out. Raises ValueError if there is no entry.

    has_shots  for a model that is told of scene cuts
    """
    if not conditioning:
        raise ValueError("Got empty conditioning; the sampler needs a prompt. Connect Self Forcing Prompt.")
    first, *later = take_scheduled(conditioning)
    prompts = [EncodedPrompt(StartTime(), first[0]), *(_later_prompt(*entry, has_shots) for entry in later)]
    repeat = comfy.utils.repeat_to_batch_size
    return [
        replace(p, embeds=repeat(p.embeds, batch), scene=None if p.scene is None else repeat(p.scene, batch))
        for p in prompts
    ]


def _later_prompt(embeds: Tensor, values: dict, has_shots: bool) -> EncodedPrompt:
    start = values[START]
    if has_shots and SCENE in values:
        scene, embeds = values[SCENE]
        return EncodedPrompt(replace(start, transition="cut", blend=0), embeds, scene)
    return EncodedPrompt(start, embeds)


def read_negative(conditioning: list | None, batch: int) -> Tensor:
    """Embeddings [B, tokens, width] of a negative prompt. Raises ValueError if there is none."""
    if not conditioning:
        raise ValueError(
            "Got cfg other than 1 without a negative prompt; guidance leads away from one. Connect a prompt to "
            "negative (an empty one of CLIP Text Encode will do), or set cfg to 1, which distilled models are made for."
        )
    return comfy.utils.repeat_to_batch_size(conditioning[0][0], batch)


def still_encoder(patcher: ModelPatcher, vae: comfy.sd.VAE, free: int) -> Reencode:
    """First-frame re-encode by a VAE of ComfyUI, after which the model has its place and `free` bytes again."""

    def still(latents: Tensor) -> Tensor:
        """Latents [B, C, F, H, W] in model space -> the latent [B, C, 1, H, W] of a still of their last frame."""
        raw = patcher.model.process_latent_out(latents[:, :, -4:])
        frames = [vae.decode(video)[0, -1:] for video in raw.split(1)]  # [1, 8H, 8W, 3] each
        stills = torch.cat([vae.encode(frame) for frame in frames])
        management.load_models_gpu([patcher], memory_required=free)  # the VAE may have taken its place
        return patcher.model.process_latent_in(stills).to(latents)

    return still
