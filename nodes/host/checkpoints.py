"""A user's files in ComfyUI's own forms: a native MODEL from any causal Wan checkpoint, a native VAE from a TAEHV.

The core finds the weights in the file; ComfyUI builds the network around them, so that LoRAs, offloading and saving
work as with its own loaders. Float8 is ComfyUI's own format too: one scale for each matrix, and metadata that names
the quantised layers. What reads or writes the latents stays as it is; see fp8.py.

On GPUs with float8 units ComfyUI also turns activations to float8, with a scale of 1 unless the file has another.
What is quantised here is exempt from that, since it costs more than the weights do; so are files that ask for it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from weakref import WeakKeyDictionary

import comfy.sd
import torch
from comfy.latent_formats import Wan21
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher
from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor
from torch import Tensor

from ...sf_core.autoencoders.taehv import TAEHV
from ...sf_core.checkpoints.autoencoder import load_autoencoder
from ...sf_core.checkpoints.identify import is_scale, metadata_entry
from ...sf_core.checkpoints.load import Checkpoint, dequantised, formats_of, load_checkpoint, plain_dtype
from ...sf_core.checkpoints.tensorfiles import map_tensors, read_header
from ...sf_core.wan.config import WanConfig
from ...sf_core.wan.fp8 import E4M3, LARGEST
from .model import Family, family_of, load_again, set_family, wan_config, wan_of

PRECISIONS = {"auto": None, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": E4M3}
ATTENTION_CHOICE = re.compile(r"(?:^|\.)(blocks\.\d+\.(?:\w+\.)*comfy_attention\.config)$")
IN_FULL = "full_precision_matrix_mult"  # as ComfyUI calls it
SCALED = {torch.float8_e4m3fn: "float8_e4m3fn", torch.float8_e5m2: "float8_e5m2"}  # ComfyUI's names


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
    set_family(patcher, Family(checkpoint.sampling, memory=memory))
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


def multiplies_in_full(path: Path) -> bool:
    """Whether a float8 file asks for products in full precision, in any of the three forms that ComfyUI knows."""
    file = read_header(path)
    layers = metadata_entry(file.metadata, "_quantization_metadata").get("layers", {}).values()
    marks = [name for name in file.tensors if name.endswith("comfy_quant")]
    told = (json.loads(bytes(mark.tolist())) for mark in map_tensors(file, marks).values())
    return any(layer.get(IN_FULL, False) for layer in (*layers, *told)) or any(
        name.endswith("scaled_fp8") and tensor.numel() == 2 for name, tensor in file.tensors.items()
    )


def quantisation_metadata(layers: dict[str, dict]) -> dict[str, str]:
    """The metadata that names quantised layers."""
    return {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}


def wan_metadata(config: WanConfig) -> dict[str, str]:
    """What ComfyUI cannot read off the weights' shapes, as the metadata of a file would say it."""
    fields = {
        "causal_ar": True,
        "num_heads": config.heads,
        "freq_dim": config.freq_dim,
        "text_dim": config.text_dim,
        "text_len": config.text_len,
        "eps": config.eps,
    }
    return {"config": json.dumps({"transformer": fields})}


def to_comfy_fp8(
    state: dict[str, Tensor], dtype: torch.dtype, quantise: bool, in_full: bool = False
) -> tuple[dict[str, Tensor], dict[str, dict]]:
    """A state dict in ComfyUI's form of float8, and for each quantised layer its format.

    Matrices that are float8 stay what they are, except that scales per row, which ComfyUI has not, become one scale
    per matrix. `quantise` makes float8 of the other matrices of the blocks. Other float8 tensors are turned to `dtype`.
    `in_full` keeps activations as they are for the matrices that stay; for those made here they always are.
    """
    done: dict[str, Tensor] = {}
    layers = {}
    for name, tensor in state.items():
        if is_scale(name):
            continue
        layer, scale = name.removesuffix(".weight"), state.get(f"{name}_scale", torch.ones(()))
        matrix = tensor.ndim == 2 and name.endswith(".weight")
        if matrix and tensor.dtype in SCALED and not scale.ndim:
            done |= {name: tensor, f"{name}_scale": scale}
            layers[layer] = {"format": SCALED[tensor.dtype]} | ({IN_FULL: True} if in_full else {})
            if (inputs := state.get(f"{layer}.input_scale")) is not None:
                done[f"{layer}.input_scale"] = inputs
        elif matrix and (tensor.dtype in SCALED or (quantise and name.startswith("blocks."))):
            done |= quantise_matrix(name, dequantised({name: tensor, f"{name}_scale": scale}, torch.float32)[name])
            layers[layer] = {"format": SCALED[E4M3], IN_FULL: True}
        else:
            done[name] = tensor.to(dtype) if tensor.dtype in SCALED else tensor
    return done, layers


def quantise_matrix(name: str, matrix: Tensor) -> dict[str, Tensor]:
    """A matrix [out, in] as float8 with one scale: weight = float8 * scale."""
    scale = matrix.abs().amax().float().clamp(min=1e-12) / LARGEST
    return {name: (matrix / scale).to(E4M3), f"{name}_scale": scale}


# --- VAE -------------------------------------------------------------------------------------------------------------


def load_taehv(path: Path) -> comfy.sd.VAE:
    """The TAEHV for Wan 2.1 latents in a file. Raises ValueError for another file.

    ComfyUI takes a float16 TAEHV of 16 channels for HunyuanVideo's. taew2_1 reads and writes Wan's latents as the model
    sees them; lighttaew2_1 those of the Wan VAE itself, and has the same layers: its name tells.
    """
    network = load_autoencoder(path, TAEHV, channels=16)
    state = network.state_dict()
    if network.space != 8 or "decoder.22.bias" not in state:
        raise ValueError(
            f"Got {path.name}, a TAEHV of another model; Wan 2.1 models need one of theirs. "
            "Use taew2_1 or lighttaew2_1."
        )
    vae = comfy.sd.VAE(dict(state))
    model, raw = vae.first_stage_model, "lighttae" in path.name.lower()
    model.latent_format = None if raw else Wan21
    model.process_in = _unchanged if raw else Wan21().process_in
    model.process_out = _unchanged if raw else Wan21().process_out
    vae.process_output = lambda frames: frames.clamp_(0, 1)
    vae.patcher.cached_patcher_init = (load_taehv_patcher, (path,))
    return vae


def load_taehv_patcher(path: Path, disable_dynamic: bool = False) -> ModelPatcher:
    """Loads the network once more, as ComfyUI asks for a second copy of the weights."""
    return load_taehv(path).patcher


def _unchanged(latents: Tensor) -> Tensor:
    return latents
