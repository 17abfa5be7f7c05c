"""The seam to ComfyUI: models, memory, attention, progress and latents, as the core wants them and the host has them.

The core walks Wan's layer names, so it drives the network that ComfyUI has loaded, patched, quantised or offloaded,
through ComfyUI's own layers. On wires everything is native: a MODEL is a ModelPatcher, a LATENT is raw VAE space.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

import comfy.sd
import comfy.utils
import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy.ldm.wan.model import WanModel
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher
from PIL import Image
from torch import Tensor

from ...sf_core.sampling.config import PRESETS, Sampling
from ...sf_core.wan.config import WanConfig
from ...sf_core.wan.model import WanLayers

FAMILY = "self_forcing_family"
WAN_SIZE = (832, 480)  # width and height in pixels that Wan 2.1 1.3B was trained at
WAN22_SIZE = (1280, 704)  # the same of Wan 2.2 5B


@dataclass(frozen=True)
class Family:
    """What a MODEL knows about its own sampling: it travels with the MODEL through LoRAs and other patches.

    sampling   how it is sampled
    trained    latent frames of the chunks it was trained with; None: those of `sampling`
    preview    newest latents [B, C, F, H, W] in model space -> picture; None: ComfyUI's own preview for the latents
    reencoder  the VAE that makes stills for first-frame re-encode; None: without
    size       width and height in pixels of a video whose size is left to the model
    only_size  whether it draws well at no other size than that
    memory     the network that writes the cache, where it is another than the MODEL (SGF+)
    """

    sampling: Sampling = PRESETS["cli"]
    trained: int | None = None
    preview: Callable[[Tensor], Image.Image] | None = None
    reencoder: comfy.sd.VAE | None = None
    size: tuple[int, int] = WAN_SIZE
    only_size: bool = False
    memory: ModelPatcher | None = None


def set_family(patcher: ModelPatcher, family: Family) -> None:
    patcher.set_attachments(FAMILY, family)


def family_of(patcher: ModelPatcher) -> Family:
    return patcher.get_attachment(FAMILY) or Family()


# --- The network -----------------------------------------------------------------------------------------------------


def wan_of(patcher: ModelPatcher) -> WanLayers:
    """The Wan layers of a MODEL. Raises ValueError for anything that is not a Wan text-to-video model."""
    module = patcher.model.diffusion_model
    if not isinstance(module, WanModel):
        raise ValueError(
            f"Got a MODEL of type {type(patcher.model).__name__}; this node samples Wan video models. "
            "Connect Load Tiny Self Forcing, or a Self Forcing checkpoint of Wan 2.1 from Load Diffusion Model."
        )
    if module.in_dim != module.out_dim or module.img_emb is not None:
        raise ValueError(
            f"Got a Wan model with {module.in_dim} input channels, made for image or control inputs; this node needs a "
            "text-to-video model. Use a text-to-video checkpoint, and the prefix input to start from an image."
        )
    layers = WanLayers.of(module, wan_config(module))
    return replace(layers, patch_embedding=_in_float32(module.patch_embedding))


def wan_config(module: WanModel) -> WanConfig:
    return WanConfig(
        dim=module.dim,
        ffn_dim=module.ffn_dim,
        heads=module.num_heads,
        layers=module.num_layers,
        channels=module.in_dim,
        freq_dim=module.freq_dim,
        text_dim=module.text_dim,
        text_len=module.text_len,
        eps=module.eps,
    )


def _in_float32(layer: torch.nn.Module) -> Callable[[Tensor], Tensor]:
    """ComfyUI keeps the patch embedding in float32, whatever the other layers are."""
    return lambda x: layer(x.float()).to(x.dtype)


def host_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, patched: PatchedAttention) -> Tensor:
    return optimized_attention(
        q, k, v, q.shape[1], mask=mask, skip_reshape=True, skip_output_reshape=True,
        transformer_options=patched.options, **patched.preferred(),
    )  # fmt: skip


@lru_cache
def untraced_attention() -> Callable:
    """`host_attention` as a call that torch.compile leaves alone: some of ComfyUI's kernels ask for free memory."""
    return torch.compiler.disable(host_attention)


@dataclass(frozen=True, eq=False)
class PatchedAttention:
    """ComfyUI's attention, [B, N, L, D] in and out, with whatever transformer_options put in its place.

    The kernel gets this object and not the options, which change from block to block: compiled code would check them.

    layer  which of a block's attention layers it belongs to
    now    "block": the block that runs, of which ComfyUI after 0.27 wants to know `comfy_attention`, the attention that
           a checkpoint prefers for a layer
    """

    options: dict
    kernel: Callable
    layer: str = "self_attn"
    now: dict[str, torch.nn.Module] = field(default_factory=dict)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.kernel(q, k, v, mask, self)

    def preferred(self) -> dict[str, Any]:
        """What is told to `optimized_attention` of it: nothing where a layer prefers none, as in ComfyUI 0.27."""
        layer = getattr(self.now.get("block"), self.layer, None)
        attention = getattr(layer, "comfy_attention", None)
        return {} if attention is None else {"preferred_attention": attention}


def attention_of(options: dict, compiled: bool = False) -> PatchedAttention:
    """ComfyUI's attention with the patches in transformer_options."""
    return PatchedAttention(options, untraced_attention() if compiled else host_attention)


class TraceableBlock(torch.nn.Module):
    """A block whose feed-forward is its layers one after the other, which torch.compile can trace.

    ComfyUI after 0.27 has it in one call with the activation, at which a graph ends.
    """

    def __init__(self, block: torch.nn.Module) -> None:
        super().__init__()
        self.self_attn, self.cross_attn, self.norm3 = block.self_attn, block.cross_attn, block.norm3
        self.modulation = block.modulation
        self.ffn = torch.nn.Sequential(block.ffn[0], torch.nn.GELU(approximate="tanh"), block.ffn[2])


def traceable(layers: WanLayers) -> WanLayers:
    """The layers with blocks that torch.compile can trace, but for those whose activation an INT8 kernel computes."""
    blocks = [TraceableBlock(block) if has_own_forward(block.ffn) else block for block in layers.blocks]
    return replace(layers, blocks=torch.nn.ModuleList(blocks))


def has_own_forward(ffn: torch.nn.Module) -> bool:
    """Whether a feed-forward is two layers with a forward around them that is no more than both and tanh-GELU."""
    if type(ffn) is torch.nn.Sequential or {"0", "2"} - ffn._modules.keys():
        return False
    return "INT8" not in getattr(ffn[2].weight, "_layout_cls", "")


def load_again(loader: tuple) -> ModelPatcher:
    """A MODEL with weights of its own, as its `cached_patcher_init` (function, arguments, index of several) says."""
    load, arguments, *index = loader
    loaded = load(*arguments, disable_dynamic=True)
    return loaded[index[0]] if index else loaded


_static: WeakKeyDictionary[BaseModel, ModelPatcher] = WeakKeyDictionary()


def for_compiling(patcher: ModelPatcher) -> ModelPatcher:
    """The MODEL as torch.compile can trace it: weights that come and go by ComfyUI's dynamic memory cannot be.

    Loads the weights a second time where they do, and keeps them as long as the first are kept.
    """
    if not patcher.is_dynamic():
        return patcher
    if patcher.cached_patcher_init is None:
        raise ValueError(
            "Got a MODEL whose loader gives ComfyUI no way to load it again, which compiling needs while dynamic "
            "memory is on. Use Load Self Forcing Model, or set compile to off."
        )
    if patcher.model not in _static:
        _static[patcher.model] = load_again(patcher.cached_patcher_init)
    return patcher.clone(disable_dynamic=True, model_override=_static[patcher.model].get_clone_model_override())


# --- Memory ----------------------------------------------------------------------------------------------------------


# --- Latents and prompts ---------------------------------------------------------------------------------------------


# --- Progress --------------------------------------------------------------------------------------------------------
