"""Latents in, frames out, a piece of the clip at a time."""

from __future__ import annotations

from comfy_api.latest import io

from . import inputs
from .host.decoding import check_channels, check_tile, streaming_decoder
from .host.memory import threads_for, within_memory


class SelfForcingDecode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SelfForcingDecode",
            display_name="Self Forcing Decode",
            category=inputs.CATEGORY,
            description="Decodes a video piece by piece, so that memory does not grow with its length. Streams the "
            "Wan VAEs, TAEHV and the built-in autoencoder; any other VAE decodes as VAE Decode does.",
            search_aliases=["vae decode", "streaming decode", "taehv decode", "decode video", "latent to video"],
            inputs=[
                io.Latent.Input("latent", tooltip="Latents of the video, from Self Forcing Sampler."),
                io.Vae.Input("vae", tooltip="VAE that belongs to the model: the built-in one, TAEHV or Wan's."),
                inputs.tile(),
            ],
            outputs=[io.Image.Output(tooltip="Frames, one after the other; videos of a batch follow each other.")],
        )  # fmt: skip

    @classmethod
    @inputs.check_numbers
    def execute(cls, latent, vae, tile=0) -> io.NodeOutput:
        samples = latent["samples"]
        check_channels(samples, vae)
        decoder = streaming_decoder(vae) if samples.ndim == 5 else None
        check_tile(tile, decoder)
        if decoder is None:
            return io.NodeOutput(vae.decode(samples).flatten(0, -4))
        height, width = (decoder.space * side for side in samples.shape[3:])
        what = f"{samples.shape[2]} latent frames of {width} x {height} pixels to decode"
        with threads_for(vae.patcher, decoder.pixels(samples)):
            frames = within_memory(lambda: decoder.decode(samples, tile // decoder.space or None), what, decoder.remedy)
        return io.NodeOutput(frames.flatten(0, 1))


NODES = [SelfForcingDecode]
