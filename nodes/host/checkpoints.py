"""A user's files in ComfyUI's own forms: a native MODEL from any causal Wan checkpoint, a native VAE from a TAEHV.

The core finds the weights in the file, and puts float8 into ComfyUI's own form (checkpoints/comfy.py); ComfyUI builds
the network around them, so that LoRAs, offloading and saving work as with its own loaders.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from weakref import WeakKeyDictionary

import comfy.sd
import torch
from comfy.latent_formats import Wan21, Wan22
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher
from comfy.quant_ops import QuantizedTensor
from torch import Tensor

from ...sf_core.autoencoders.taehv import TAEHV
from ...sf_core.checkpoints.autoencoder import load_autoencoder
from ...sf_core.checkpoints.comfy import (
    SCALED,
    multiplies_in_full,
    quantisation_metadata,
    to_comfy_fp8,
    wan_metadata,
)
from ...sf_core.checkpoints.load import Checkpoint, dequantised, load_checkpoint, plain_dtype
from ...sf_core.wan.fp8 import E4M3
from .model import Family, load_again, set_family, wan_config, wan_of

PRECISIONS = {"auto": None, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": E4M3}


# --- MODEL -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CheckpointSource:
    """What a MODEL is made from: a file, how it is sampled (None: guessed), its precision, a LoRA merged into it."""

    path: Path
    family: str | None
    precision: str
    lora: Path | None = None
    strength: float = 1.0

    def checkpoint(self) -> Checkpoint:
        """Raises CheckpointError for files that hold no causal Wan text-to-video model, or a LoRA of another."""
        loras = () if self.lora is None else ((self.lora, self.strength),)
        return load_checkpoint(self.path, self.family, loras)


def load_patcher(source: CheckpointSource, disable_dynamic: bool = False) -> ModelPatcher:
    """ComfyUI calls this where it needs a second copy of the weights. Raises as `CheckpointSource.checkpoint` does."""
    return from_checkpoint(source.checkpoint(), source, disable_dynamic)


def from_checkpoint(checkpoint: Checkpoint, source: CheckpointSource, disable_dynamic: bool = False) -> ModelPatcher:
    """The model in a checkpoint of that source."""
    dtype = PRECISIONS[source.precision]
    metadata, options = wan_metadata(checkpoint.config), {}
    if dtype is E4M3 or (dtype is None and checkpoint.dtype in SCALED):
        plain = plain_dtype(checkpoint.dtype)
        state, layers = to_comfy_fp8(checkpoint.state_dict, plain, dtype is E4M3, multiplies_in_full(source.path))
        metadata |= quantisation_metadata(layers)
    elif dtype is None:
        state = dict(checkpoint.state_dict)
    else:
        options["dtype"] = dtype
        state = dequantised(checkpoint.state_dict, dtype) if checkpoint.dtype in SCALED else dict(checkpoint.state_dict)
    patcher = comfy.sd.load_diffusion_model_state_dict(
        state, model_options=options, metadata=metadata, disable_dynamic=disable_dynamic
    )
    patcher.cached_patcher_init = (load_patcher, (source,))
    set_family(patcher, Family(checkpoint.sampling))
    return patcher


def quantise_model(patcher: ModelPatcher) -> ModelPatcher:
    """A MODEL with the matrices of its blocks in float8, and its patches; one that is float8 already as it is.

    Reads the weights anew by the MODEL's own loader, since those at work may have LoRAs in them. Raises ValueError for
    a MODEL whose loader gives no way to.
    """
    blocks = wan_of(patcher).blocks
    if any(weight.dtype in SCALED or isinstance(weight, QuantizedTensor) for weight in blocks.parameters()):
        return patcher
    if patcher.cached_patcher_init is None:
        raise ValueError(
            "Got a MODEL whose loader gives ComfyUI no way to read its weights again, which float8 is made from. Use "
            "Load Self Forcing Model or Load Diffusion Model, or leave this node out."
        )
    loader = patcher.cached_patcher_init
    if patcher.model not in _quantised:
        _quantised[patcher.model] = load_quantised(loader, disable_dynamic=not patcher.is_dynamic())
    clone = patcher.clone(model_override=_quantised[patcher.model].get_clone_model_override())
    clone.cached_patcher_init = (load_quantised, (loader,))
    clone.size = 0  # it was counted for the other weights; ComfyUI counts again
    return clone


_quantised: WeakKeyDictionary[BaseModel, ModelPatcher] = WeakKeyDictionary()  # made once, whatever LoRAs come and go


def load_quantised(loader: tuple, disable_dynamic: bool = False) -> ModelPatcher:
    """What a MODEL's own loader gives, with the matrices of the blocks in float8."""
    network = load_again(loader).model.diffusion_model
    state = network.state_dict()
    state, layers = to_comfy_fp8(state, state["blocks.0.self_attn.q.weight"].dtype, True)
    metadata = wan_metadata(wan_config(network)) | quantisation_metadata(layers)
    return comfy.sd.load_diffusion_model_state_dict(state, metadata=metadata, disable_dynamic=disable_dynamic)


# --- VAE -------------------------------------------------------------------------------------------------------------


FORMATS = {16: Wan21, 48: Wan22}  # by channels of the latents


def load_taehv(path: Path) -> comfy.sd.VAE:
    """The TAEHV for Wan 2.1 or Wan 2.2 latents in a file. Raises ValueError for another file.

    ComfyUI takes a float16 TAEHV of 16 channels for HunyuanVideo's, and gives one of 48 raw latents. taew2_1 and
    taew2_2 read and write Wan's latents as the model sees them; lighttaew2_1 those of the Wan VAE itself, and has the
    same layers: its name tells.
    """
    network = load_autoencoder(path, TAEHV, channels=None)
    state, form = network.state_dict(), FORMATS[network.channels]
    if network.space != form.spacial_downscale_ratio or "decoder.22.bias" not in state:
        raise ValueError(
            f"Got {path.name}, a TAEHV of another model; Wan models need one of theirs. "
            "Use taew2_1 or lighttaew2_1, or taew2_2 for LongLive 2."
        )
    vae = comfy.sd.VAE(dict(state))
    model, raw = vae.first_stage_model, "lighttae" in path.name.lower()
    model.latent_format = None if raw else form
    model.process_in = _unchanged if raw else form().process_in
    model.process_out = _unchanged if raw else form().process_out
    vae.process_output = lambda frames: frames.clamp_(0, 1)
    vae.patcher.cached_patcher_init = (load_taehv_patcher, (path,))
    return vae


def load_taehv_patcher(path: Path, disable_dynamic: bool = False) -> ModelPatcher:
    """Loads the network once more, as ComfyUI asks for a second copy of the weights."""
    return load_taehv(path).patcher


def _unchanged(latents: Tensor) -> Tensor:
    return latents
