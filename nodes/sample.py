"""Size in, latents out: the empty latent, and the rollout."""

from __future__ import annotations

import comfy.model_management as management
import torch
from comfy_api.latest import io

from ..sf_core.autoencoders.stream import latent_frames
from ..sf_core.wan.config import WanConfig
from . import inputs
from .host.conditioning import OPEN_SIZE
from .host.generation import REMEDY, begin_notes, prepare_generation
from .host.memory import within_memory
from .host.model import WAN_SIZE, family_of, wan_of
from .host.progress import PreviewProgress


class SelfForcingLatent(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SelfForcingLatent",
            display_name="Self Forcing Latent",
            category=inputs.CATEGORY,
            description="The size and length of the video to make. A size of 0 is left to the model.",
            search_aliases=["empty latent video", "empty wan latent", "video size", "video length", "resolution"],
            inputs=[
                io.Int.Input(
                    "width", default=0, min=0, max=8192, step=16,
                    tooltip="Width in pixels, a multiple of 16. 0: the prefix's, or else the model's own, 832 for Wan "
                    "2.1 1.3B and 64 for the built-in model; other samplers than Self Forcing's see 832.",
                ),
                io.Int.Input(
                    "height", default=0, min=0, max=8192, step=16,
                    tooltip="Height in pixels, a multiple of 16. 0: the prefix's, or else the model's own, 480 for Wan "
                    "2.1 1.3B and 64 for the built-in model; other samplers than Self Forcing's see 480.",
                ),
                io.Int.Input(
                    "frames", display_name="length", default=81, min=1, max=200_001, step=4,
                    tooltip="Length in frames; rounded up to 1, 5, 9, ... (a latent frame is 4 frames). Ignored when "
                    "seconds is above 0.",
                ),
                io.Float.Input(
                    "seconds", default=0.0, min=0.0, max=100_000.0, step=0.25,
                    tooltip="Length in seconds at the given fps. 0: use frames instead.",
                ),
                io.Float.Input(
                    "fps", default=16.0, min=1.0, max=120.0, step=1.0, advanced=True,
                    tooltip="Frames per second that seconds are counted with. 16 is Wan 2.1's own rate.",
                ),
                io.Int.Input("batch_size", default=1, min=1, max=64,
                    tooltip="Batch size: videos made at once, each different.",
                ),
                io.Model.Input(
                    "model", optional=True,
                    tooltip="Model that the latent is for, where it is not one of Wan 2.1: those of LongLive 2 have 48 "
                    "channels and sizes that are multiples of 32, such as 1280 x 704, at 24 fps.",
                ),
            ],
            outputs=[io.Latent.Output(tooltip="Empty video latent for Self Forcing Sampler.")],
        )  # fmt: skip

    @classmethod
    @inputs.check_numbers
    def execute(cls, width, height, frames, seconds, fps, batch_size, model=None) -> io.NodeOutput:
        length = latent_frames(max(1, round(seconds * fps)) if seconds > 0 else frames)
        config = WanConfig() if model is None else wan_of(model).config
        usual = WAN_SIZE if model is None else family_of(model).size
        size = latent_size(width or usual[0], height or usual[1], config.space)
        shape = [batch_size, config.channels, length, *size]
        # One zero, seen as so many: an hour of empty latents would be gigabytes of memory that nobody reads.
        empty = {"samples": torch.zeros((), device=management.intermediate_device()).expand(shape)}
        return io.NodeOutput(empty if width and height else {**empty, OPEN_SIZE: (width, height)})


def latent_size(width: int, height: int, space: int) -> tuple[int, int]:
    """(height, width) in latent pixels of `space` pixels. Raises ValueError unless both are even."""
    step = 2 * space
    if width % step or height % step:
        nearest = [max(step, round(pixels / step) * step) for pixels in (width, height)]
        raise ValueError(
            f"Got {width} x {height} pixels; width and height must be multiples of {step}. "
            f"Use {nearest[0]} x {nearest[1]}."
        )
    return height // space, width // space


class SelfForcingSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SelfForcingSampler",
            display_name="Self Forcing Sampler",
            category=inputs.CATEGORY,
            description="Makes a video a few latent frames at a time, each chunk attending to the ones before it.",
            search_aliases=[
                "autoregressive sampler", "causal sampler", "rolling kv cache", "wan sampler", "causvid", "long video",
                "video to video", "continue video",
            ],
            inputs=[
                inputs.model(), inputs.positive(), inputs.latent(), inputs.seed(), inputs.preset(),
                inputs.steps(), inputs.chunk(), inputs.window(), inputs.sink(), inputs.prefix(), inputs.cache(),
                inputs.compiled(), inputs.negative(), inputs.cfg(), inputs.denoise(), inputs.history(),
                inputs.keep_prefix(),
            ],
            outputs=[io.Latent.Output(tooltip="Latents of the video, for Self Forcing Decode or VAE Decode.")],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    @inputs.check_numbers
    def execute(cls, **given) -> io.NodeOutput:
        given = inputs.RolloutInputs(**given)
        generation = prepare_generation(given)
        progress = PreviewProgress(generation.model, begin_notes(generation, cls), given.compile != "off")

        def sample() -> torch.Tensor:
            with generation.loaded():
                return generation.latents(progress, first=0 if given.keep_prefix else generation.plan.prefix)

        samples = within_memory(sample, generation.what, REMEDY)
        return io.NodeOutput({"samples": generation.model.model.process_latent_out(samples)})


NODES = [SelfForcingLatent, SelfForcingSampler]
