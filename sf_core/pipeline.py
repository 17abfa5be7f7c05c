"""The three networks a video takes, as `generate` asks for them: the built-in ones, or a user's files.

    source = BuiltIn()  |  Files(model, text_encoder, vae)
    source.plan(request)                        what it will take, before anything large is loaded
    source.encode(request, frames)              frames of a start or a source -> latents
    source.decoder(request)                     latents -> frames, streaming
    source.text_encoder(request)                prompt -> embeddings; dropped before the model comes: it is larger
    source.negative(text, prompt)               embeddings of what to lead away from; the prompt may be empty
    source.wan(request)                         the model, in float8 where that was asked for
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from . import memory, tiny
from .autoencoders import taehv, wan_vae
from .checkpoints.load import Checkpoint, Description, dequantised, describe, load_checkpoint, load_model
from .checkpoints.tensorfiles import map_tensors, read_header
from .device import memory_of
from .memory import Decoder, Plan
from .sampling.config import PRESETS, Sampling
from .text_encoder import bytes_loaded, load_text_encoder
from .wan.config import WanConfig
from .wan.fp8 import FLOAT8, Fp8Linear, quantise, quantise_block
from .wan.model import WanModel

ROOM = 2**30  # bytes that a text encoder takes beside its weights, roughly
TOGETHER = 16  # frames of a clip that are encoded at a time: 4 latents, what a tile takes in one turn


class Request(Protocol):
    """What of a request the networks depend on."""

    sampling: Sampling
    rollout_frames: int
    height: int
    width: int
    device: torch.device
    dtype: torch.dtype
    fp8: bool
    cache_dtype: torch.dtype | None
    tile: int | None
    rereads: bool
    guidance: float


class BuiltIn:
    """The built-in model."""

    name = "built-in"
    note = ""
    sampling = PRESETS["tiny"]
    width = height = 64

    @cached_property
    def model(self) -> WanModel:
        return tiny.load_model(torch.device("cpu"), torch.float32)

    def plan(self, request: Request) -> Plan:
        config, parameters = self.model.config, sum(weight.numel() for weight in self.model.parameters())
        return plan(request, config, parameters * request.dtype.itemsize, memory.BUILT_IN)

    def decoder(self, request: Request) -> taehv.DecoderStream:
        _refuse_tiles(request.tile, "the built-in decoder")
        return taehv.DecoderStream(tiny.load_autoencoder().to(request.device, request.dtype))

    def encode(self, request: Request, frames: Tensor) -> Tensor:
        """Frames [1, 1 + 4k, H, W, 3] in 0..1 -> latents [1, C, 1 + k, H, W] in model space, on the CPU."""
        return tiny.load_autoencoder().encode(frames)

    def text_encoder(self, request: Request) -> nn.Module:
        return tiny.load_text_encoder().to(request.device)

    def negative(self, text: nn.Module, prompt: str) -> Tensor:
        return text.encode([prompt]) if prompt.strip() else text.null(1)

    def wan(self, request: Request) -> WanModel:
        wan, device, dtype = self.model, request.device, request.dtype
        return in_float8(wan, device, dtype) if request.fp8 else wan.to(device, dtype)

    def left_out(self, text: nn.Module, prompt: str) -> Iterator[tuple[list[str], str]]:
        """(words, why they will not count). Raises ValueError if none of the prompt does."""
        text.tokens(prompt)
        yield text.unknown(prompt), "the built-in model does not know these words and leaves them out"
        yield text.truncated(prompt), "the built-in model has no room for these words and leaves them out"


@dataclass(frozen=True)
class Files:
    """A user's files. `vae` is a Wan VAE or, with `tiny_decoder`, a TAEHV; `lora` is merged into the model."""

    model: Path
    text: Path
    vae: Path
    tiny_decoder: bool = False
    tokenizer: Path | None = None
    family: str | None = None
    lora: Path | None = None
    lora_strength: float = 1.0

    width, height = 832, 480

    @cached_property
    def about(self) -> Description:
        """What the model is, from its header. Raises as `checkpoint.describe`."""
        return describe(self.model, self.family, self.lora, self.lora_strength)

    @property
    def name(self) -> str:
        return str(self.model)

    @property
    def note(self) -> str:
        return self.about.note

    @property
    def sampling(self) -> Sampling:
        return self.about.sampling

    def plan(self, request: Request) -> Plan:
        decoder = memory.TAEHV if self.tiny_decoder else memory.WAN_VAE
        return plan(request, self.about.config, weights_in(self.about, request.dtype), decoder)

    def autoencoder(self, request: Request) -> wan_vae.WanVAE | taehv.TAEHV:
        kind = taehv.TAEHV if self.tiny_decoder else wan_vae.WanVAE
        return _autoencoder(kind, self.vae, self.about.config.channels).to(request.device, request.dtype)

    @property
    def light(self) -> bool:
        """Whether the TAEHV is lighttaew2_1; nothing but the name tells."""
        return "lighttae" in self.vae.name.lower()

    def encode(self, request: Request, frames: Tensor) -> Tensor:
        """Frames [1, 1 + 4k, H, W, 3] in 0..1 -> latents [1, C, 1 + k, H, W] in model space, on the CPU.

        No more than `TOGETHER` frames are on the device at a time.
        """
        autoencoder = self.autoencoder(request)
        if self.tiny_decoder:
            stream = taehv.EncoderStream(autoencoder)
            stream.encode(frames[:, :1].expand(-1, 3, -1, -1, -1))  # its first latent is of 4 frames too: a still
        else:
            stream = wan_vae.EncoderStream(autoencoder, _tile(request.tile, autoencoder.margin))
        latents = torch.cat([stream.encode(piece).cpu() for piece in frames.split(TOGETHER, 1)], 2)
        return wan_vae.to_model_space(latents) if self.tiny_decoder and self.light else latents

    def decoder(self, request: Request) -> wan_vae.DecoderStream | taehv.DecoderStream:
        decoder = self.autoencoder(request)
        if self.tiny_decoder:
            _refuse_tiles(request.tile, "TAEHV")
            return LightDecoderStream(decoder) if self.light else taehv.DecoderStream(decoder)
        return wan_vae.DecoderStream(decoder, _tile(request.tile, decoder.margin))

    def text_encoder(self, request: Request) -> nn.Module:
        """UMT5, on the device if it fits there, else on the CPU."""
        room = memory_of(request.device)
        fits = room is None or bytes_loaded(self.text) + ROOM < room
        return load_text_encoder(self.text, self.tokenizer, request.device if fits else "cpu")

    def negative(self, text: nn.Module, prompt: str) -> Tensor:
        return text.encode([prompt])

    def wan(self, request: Request) -> WanModel:
        device, dtype = request.device, request.dtype
        if self.about.dtype is FLOAT8:
            wan = float8_model(load_checkpoint(self.model, self.family), device, dtype)  # takes no LoRA
            return quantise(wan) if request.fp8 else wan  # what the file has in another dtype
        lora = {"lora": self.lora, "strength": self.lora_strength}
        if request.fp8:
            return in_float8(load_model(self.model, family=self.family, **lora)[0], device, dtype)
        return load_model(self.model, device, dtype, self.family, **lora)[0]

    def left_out(self, text: nn.Module, prompt: str) -> Iterator[tuple[list[str], str]]:
        """(words, why they will not count)."""
        yield text.truncated(prompt), "the text encoder has no room for these words and leaves them out"


class LightDecoderStream(taehv.DecoderStream):
    """lighttaew2_1: TAEHV's layers, trained on latents as the Wan VAE makes them instead of the model's."""

    def decode(self, latents: Tensor) -> Tensor:
        return super().decode(wan_vae.from_model_space(latents))


Source = BuiltIn | Files


def plan(request: Request, config: WanConfig, weights: int, decoder: Decoder) -> Plan:
    return Plan(
        config=config,
        sampling=request.sampling,
        weights=weights,
        frames=request.rollout_frames,
        height=request.height,
        width=request.width,
        dtype=request.dtype,
        decoder=decoder,
        fp8=request.fp8,
        cache_dtype=request.cache_dtype,
        tile=request.tile,
        rereads=request.rereads,
        guided=request.guidance != 1,
    )


def weights_in(about: Description, dtype: torch.dtype) -> int:
    """Bytes of a file's weights once loaded to compute in `dtype`: float8 stays float8."""
    return about.weight_bytes if about.dtype is FLOAT8 else about.parameters * dtype.itemsize


def in_float8(wan: WanModel, device: torch.device, dtype: torch.dtype) -> WanModel:
    """The model on its device, its blocks in float8. One block goes at a time, so there is never a plain copy there."""
    for block in wan.blocks:
        quantise_block(block.to(device, dtype))
    for name, part in wan.named_children():
        if name != "blocks":
            part.to(device, dtype)
    return wan


def float8_model(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> WanModel:
    """The model of a float8 checkpoint: float8 weights of its blocks as they are, all else in `dtype`."""
    wan, state = WanModel(checkpoint.config, device="meta"), checkpoint.state_dict
    layers = [name.removesuffix(".weight") for name, tensor in state.items() if _stays(name, tensor)]
    kept = {}
    for layer in layers:
        weight, scale = state[f"{layer}.weight"], state.get(f"{layer}.weight_scale", torch.ones(()))
        kept[f"{layer}.weight"] = weight.to(device)
        kept[f"{layer}.scale_weight"] = scale.to(device).expand(len(weight)).reshape(-1, 1).contiguous()  # [out, 1]
        parent, _, leaf = layer.rpartition(".")
        setattr(wan.get_submodule(parent), leaf, Fp8Linear.of(wan.get_submodule(layer)))
    done = kept.keys() | {f"{layer}.weight_scale" for layer in layers}
    others = dequantised({name: tensor for name, tensor in state.items() if name not in done}, dtype, device)
    wan.load_state_dict(kept | others, assign=True)
    return wan.requires_grad_(False).eval()


def _stays(name: str, tensor: Tensor) -> bool:
    """Whether a weight is one that `Fp8Linear` holds."""
    return name.startswith("blocks.") and name.endswith(".weight") and tensor.ndim == 2 and tensor.dtype is FLOAT8


def _autoencoder(kind: type[nn.Module], path: Path, channels: int) -> nn.Module:
    """The autoencoder in a file, for latents of `channels`. Raises ValueError if there is none."""
    file = read_header(path)
    try:
        decoder = kind.from_state_dict(map_tensors(file, file.tensors))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if decoder.channels != channels:
        raise ValueError(
            f"{path}: Got an autoencoder for latents of {decoder.channels} channels; the model makes {channels}. "
            "Use the Wan 2.1 VAE, or taew2_1."
        )
    return decoder


def _tile(tile: int | None, margin: int) -> int | None:
    if tile is not None and tile <= 2 * margin:
        raise ValueError(f"Got --tile {8 * tile}; tiles overlap by {16 * margin} pixels. Use {32 * margin} or more.")
    return tile


def _refuse_tiles(tile: int | None, decoder: str) -> None:
    if tile is not None:
        raise ValueError(f"Got --tile with {decoder}, which takes little memory and has no tiles. Leave --tile out.")
