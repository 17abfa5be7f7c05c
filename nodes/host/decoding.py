"""A VAE of ComfyUI as a streaming decoder of the core."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import comfy.model_management as management
import comfy.sd
import comfy.utils
from comfy.ldm.wan.vae import WanVAE as HostWanVAE
from comfy.ldm.wan.vae2_2 import WanVAE as HostWan22VAE
from comfy.taesd.taehv import TAEHV as HostTAEHV
from torch import Tensor

from ...sf_core import memory
from ...sf_core.autoencoders import taehv, wan_vae
from ...sf_core.autoencoders.stream import DecoderStream, pixel_frames
from ...sf_core.autoencoders.wan22_vae import Wan22VAE
from . import tiny
from .generation import TailBuffer
from .memory import check_frames
from .progress import as_preview, check_cancelled, frame_picture

SMALLEST_TILE = 16  # latent pixels; tiles also look at some on each side, so smaller ones do little else


def check_channels(samples: Tensor, vae: comfy.sd.VAE) -> None:
    if samples.shape[1] != vae.latent_channels:
        raise ValueError(
            f"Got latents with {samples.shape[1]} channels (shape {list(samples.shape)}); this VAE decodes "
            f"{vae.latent_channels}. Connect the VAE that belongs to the model that made them."
        )


def check_tile(tile: int, decoder: StreamingDecoder | None) -> None:
    smallest = SMALLEST_TILE * (decoder.space if decoder else 8)
    if 0 < tile < smallest:
        raise ValueError(
            f"Got tiles of {tile} pixels; such small ones work mostly on what is beyond their edges. Set tile to "
            f"{smallest} or more, or to 0 for the whole picture at once."
        )


Stream = DecoderStream | wan_vae.DecoderStream


@dataclass(frozen=True)
class StreamingDecoder:
    """A VAE of ComfyUI and how the core streams it.

    stream          makes the stream, with the weights on their device; takes the side of tiles in latent pixels
    to_model_space  of raw latents
    memory          what it takes
    remedy          what to do if that is too much
    """

    vae: comfy.sd.VAE
    stream: Callable[[int | None], Stream]
    to_model_space: Callable[[Tensor], Tensor]
    memory: memory.DecoderMemory
    remedy: str = "Make a smaller video."

    @property
    def space(self) -> int:
        """Pixels to a latent pixel."""
        return self.memory.space

    def pixels(self, samples: Tensor) -> int:
        """Pixels of a frame of latents [B, C, F, H, W]."""
        return samples.shape[3] * samples.shape[4] * self.space**2

    def decode(self, samples: Tensor, tile: int | None) -> Tensor:
        """Raw latents [B, C, F, H, W] -> frames [B, 4F-3, 8H, 8W, 3] on ComfyUI's intermediate device.

        One video after the other, with progress, previews and Cancel.
        """
        pixels, length = self.pixels(samples), len(samples) * pixel_frames(samples.shape[2])
        check_frames(length, pixels, "Use Self Forcing Stream with a file, and set its keep to 81.")
        self.load(self.held(pixels, tile) + self.used(pixels, tile))
        stream, bar = self.stream(tile), comfy.utils.ProgressBar(len(samples) * samples.shape[2])
        kept = TailBuffer(length, length, dim=0)
        for video in samples.split(1):
            stream.reset()
            for piece in video.split(4 if tile else 3, dim=2):
                check_cancelled()
                frames = self.piece(stream, piece)
                kept.append(frames)
                picture = as_preview(frame_picture(frames[-1]))
                bar.update_absolute(bar.current + piece.shape[2], preview=picture)
        return kept.tensor.unflatten(0, (len(samples), -1))

    def piece(self, stream: Stream, raw: Tensor) -> Tensor:
        """The next raw latents [1, C, F, H, W] of a video -> frames [T, 8H, 8W, 3] on ComfyUI's intermediate device."""
        frames = stream.decode(self.to_model_space(raw.to(self.vae.device)))[0]
        return frames.to(management.intermediate_device(), management.intermediate_dtype())

    def held(self, pixels: int, tile: int | None) -> int:
        """Bytes it keeps for frames of so many pixels, beside the weights that ComfyUI loads.

        Weights in dynamic memory come and go, so the stream has a copy of them.
        """
        copied = 0 if self.vae.patcher.is_dynamic() else self.memory.weights
        return (self.memory.held(pixels, tile is not None) - copied) * self.vae.vae_dtype.itemsize

    def used(self, pixels: int, tile: int | None) -> int:
        """Bytes that it takes while it decodes."""
        return self.memory.used(pixels, tile) * self.vae.vae_dtype.itemsize

    def load(self, reserve_bytes: int) -> None:
        """Brings the VAE to its device, with `reserve_bytes` free beside it."""
        whole = isinstance(self.vae.first_stage_model, tiny.HostAutoencoder)  # plain torch layers are not brought later
        management.load_models_gpu([self.vae.patcher], memory_required=reserve_bytes, force_full_load=whole)


def streaming_decoder(host_vae: comfy.sd.VAE) -> StreamingDecoder | None:
    """How a VAE is streamed; None for those that are not."""
    model = host_vae.first_stage_model
    if isinstance(model, tiny.HostAutoencoder):
        return StreamingDecoder(
            host_vae, lambda _: DecoderStream(model.autoencoder), model.to_model_space, memory.BUILT_IN
        )
    if isinstance(model, HostTAEHV) and model.latent_channels in (16, 48):
        return StreamingDecoder(
            host_vae,
            lambda _: DecoderStream(taehv.TAEHV.from_state_dict(_weights(host_vae))),
            model.process_in,
            memory.TAEHV if model.latent_channels == 16 else memory.TAEHV22,
        )
    if isinstance(model, HostWan22VAE):
        return StreamingDecoder(
            host_vae,
            lambda tile: wan_vae.DecoderStream(Wan22VAE.from_state_dict(_weights(host_vae)), tile),
            Wan22VAE.statistics.to_model_space,
            memory.WAN22_VAE,
            "Set tile to 512, or use taew2_2 from Load TAEHV.",
        )
    if isinstance(model, HostWanVAE) and (host_vae.output_channels, host_vae.conv_out_channels) == (3, 3):
        return StreamingDecoder(
            host_vae,
            lambda tile: wan_vae.DecoderStream(wan_vae.WanVAE.from_state_dict(_weights(host_vae)), tile),
            wan_vae.to_model_space,
            memory.WAN_VAE,
            "Set tile to 256, or use a TAEHV from Load TAEHV.",
        )
    return None


def _weights(host_vae: comfy.sd.VAE) -> dict[str, Tensor]:
    """A VAE's weights on its device, in its dtype; copies only of those that ComfyUI keeps elsewhere."""
    return {name: weight.to(host_vae.device, host_vae.vae_dtype) for name, weight in host_vae.get_sd().items()}
