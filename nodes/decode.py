"""Latents in, frames out, a piece of the clip at a time."""

from __future__ import annotations

from collections.abc import Callable

import comfy.model_management as management
import comfy.utils
import torch
from comfy.taesd.taehv import TAEHV as HostTAEHV
from comfy_api.latest import io
from torch import Tensor

from ..sf_core.taehv import TAEHV, DecoderStream
from . import host, tiny

PIECE = 3  # latent frames between two looks at the Cancel button


class SelfForcingDecode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SelfForcingDecode",
            display_name="Self Forcing Decode",
            category="Self Forcing",
            description="Decodes a video piece by piece, so that memory does not grow with its length. Streams the "
            "built-in autoencoder and TAEHV; any other VAE decodes as VAE Decode does.",
            search_aliases=["vae decode", "streaming decode", "taehv decode", "decode video", "latent to video"],
            inputs=[
                io.Latent.Input("latent", tooltip="The video's latents, from Self Forcing Sampler."),
                io.Vae.Input("vae", tooltip="The VAE that belongs to the model: the built-in one, TAEHV or Wan 2.1's."),
            ],
            outputs=[io.Image.Output(tooltip="The frames, one after the other; videos of a batch follow each other.")],
        )

    @classmethod
    def execute(cls, latent, vae) -> io.NodeOutput:
        samples = latent["samples"]
        check_channels(samples, vae)
        decode = streaming_decoder(vae) if samples.ndim == 5 else None
        if decode is None:
            return io.NodeOutput(vae.decode(samples).flatten(0, -4))
        with host.threads_for(vae.patcher):
            return io.NodeOutput(collect(decode, samples).flatten(0, 1))


def check_channels(samples: Tensor, vae) -> None:
    if samples.shape[1] != vae.latent_channels:
        raise ValueError(
            f"Got latents with {samples.shape[1]} channels (shape {list(samples.shape)}); this VAE decodes "
            f"{vae.latent_channels}. Connect the VAE that belongs to the model that made them."
        )


def streaming_decoder(vae) -> Callable[[Tensor], Tensor] | None:
    """Raw latents [B, C, F, H, W] -> frames [B, T, H, W, 3] with state kept between calls; None for other VAEs."""
    model = vae.first_stage_model
    if isinstance(model, tiny.HostAutoencoder):
        management.load_models_gpu([vae.patcher], force_full_load=True)
        stream, to_model_space = DecoderStream(model.autoencoder), model.to_model_space
    elif isinstance(model, HostTAEHV) and model.latent_channels in (16, 48):
        management.load_models_gpu([vae.patcher])
        # The few MB are copied: ComfyUI may keep them in an offloaded form that only its own layers can compute with.
        weights = {name: weight.to(vae.device, vae.vae_dtype, copy=True) for name, weight in vae.get_sd().items()}
        stream, to_model_space = DecoderStream(TAEHV.from_state_dict(weights)), model.process_in
    else:
        return None
    return lambda raw: stream.decode(to_model_space(raw.to(vae.device)))


def collect(decode: Callable[[Tensor], Tensor], samples: Tensor) -> Tensor:
    """All frames [B, T, H, W, 3] on ComfyUI's intermediate device, with progress, previews and Cancel."""
    bar, pieces = comfy.utils.ProgressBar(samples.shape[2]), []
    for piece in samples.split(PIECE, dim=2):
        host.check_cancelled()
        frames = decode(piece)
        pieces.append(frames.to(management.intermediate_device(), management.intermediate_dtype()))
        bar.update_absolute(bar.current + piece.shape[2], preview=host.as_preview(host.frame_picture(frames[0, -1])))
    return torch.cat(pieces, dim=1)


NODES = [SelfForcingDecode]
