"""A user's files in ComfyUI's own forms: a native MODEL from any causal Wan checkpoint, a native VAE from a TAEHV.

The core finds the weights in the file, and puts float8 into ComfyUI's own form (checkpoints/comfy.py); ComfyUI builds
the network around them, so that LoRAs, offloading and saving work as with its own loaders.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from weakref import WeakKeyDictionary

import comfy.sd
import torch
from comfy.latent_formats import Wan21, Wan22
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher
from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor
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
from ...sf_core.checkpoints.load import Checkpoint, dequantised, formats_of, load_checkpoint, plain_dtype
from ...sf_core.checkpoints.tensorfiles import map_tensors, read_header
from ...sf_core.wan.fp8 import E4M3
from .model import WAN22_SIZE, WAN_SIZE, Family, family_of, load_again, set_family, wan_config, wan_of

PRECISIONS = {"auto": None, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": E4M3}
ATTENTION_CHOICE = re.compile(r"(?:^|\.)(blocks\.\d+\.(?:\w+\.)*comfy_attention\.config)$")


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
        return load_checkpoint(self.path, self.family, loras, takes_quantised=True)


def load_patcher(source: CheckpointSource, disable_dynamic: bool = False) -> ModelPatcher:
    """ComfyUI calls this where it needs a second copy of the weights. Raises as `CheckpointSource.checkpoint` does."""
    return from_checkpoint(source.checkpoint(), source, disable_dynamic)


def load_memory_patcher(source: CheckpointSource, disable_dynamic: bool = False) -> ModelPatcher:
    """The same for the network that writes the cache."""
    checkpoint = source.checkpoint()
    return build_patcher(checkpoint, checkpoint.memory, source, disable_dynamic)


def from_checkpoint(checkpoint: Checkpoint, source: CheckpointSource, disable_dynamic: bool = False) -> ModelPatcher:
    """The model in a checkpoint of that source."""
    patcher = build_patcher(checkpoint, checkpoint.state_dict, source, disable_dynamic)
    patcher.cached_patcher_init = (load_patcher, (source,))
    memory = None
    if checkpoint.memory is not None:
        memory = build_patcher(checkpoint, checkpoint.memory, source, disable_dynamic)
        memory.cached_patcher_init = (load_memory_patcher, (source,))
    size = WAN22_SIZE if checkpoint.config.space == 16 else WAN_SIZE
    set_family(patcher, Family(checkpoint.sampling, size=size, memory=memory))
    return patcher


def build_patcher(
    checkpoint: Checkpoint, weights: Mapping[str, Tensor], source: CheckpointSource, disable_dynamic: bool
) -> ModelPatcher:
    """A MODEL of a checkpoint's weights, those that denoise or those that write the cache."""
    dtype = PRECISIONS[source.precision]
    metadata, options = wan_metadata(checkpoint.config), {}
    if checkpoint.quantised:
        check_formats(checkpoint.quantised, source)
        state = dict(weights)
        metadata |= quantisation_metadata(checkpoint.quantised)
    elif dtype is E4M3 or (dtype is None and checkpoint.dtype in SCALED):
        plain = plain_dtype(checkpoint.dtype)
        state, layers = to_comfy_fp8(weights, plain, dtype is E4M3, multiplies_in_full(source.path))
        metadata |= quantisation_metadata(layers)
    elif dtype is None:
        state = dict(weights)
    else:
        options["dtype"] = dtype
        state = dequantised(weights, dtype) if checkpoint.dtype in SCALED else dict(weights)
    return comfy.sd.load_diffusion_model_state_dict(
        state | attention_choices(source.path),
        model_options=options,
        metadata=metadata,
        disable_dynamic=disable_dynamic,
    )


def check_formats(quantised: dict[str, dict], source: CheckpointSource) -> None:
    """Raises ValueError for layers that this ComfyUI does not know, and for another precision than the file's."""
    formats, title = formats_of(quantised), source.path.name
    if unknown := [name for name in formats if name not in QUANT_ALGOS]:
        raise ValueError(
            f"Got {title}, quantised as {' and '.join(unknown)}; this ComfyUI knows {', '.join(QUANT_ALGOS)}. Update "
            "ComfyUI, or get the bf16 or fp8 version."
        )
    if PRECISIONS[source.precision] is not None:
        raise ValueError(
            f"Got the precision {source.precision} for {title}, quantised as {' and '.join(formats)}; its layers stay "
            "as they are. Set precision to auto, or get the bf16 version."
        )


def attention_choices(path: Path) -> dict[str, Tensor]:
    """Tensors by which a file names the attention that its layers prefer, for a ComfyUI that knows them."""
    file = read_header(path)
    names = {name[at.start(1) :]: name for name in file.tensors if (at := ATTENTION_CHOICE.search(name))}
    mapped = map_tensors(file, names.values()) if names else {}
    return {name: mapped[at] for name, at in names.items()}


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
    family = family_of(patcher)
    if family.memory is not None:
        set_family(clone, replace(family, memory=quantise_model(family.memory)))
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
