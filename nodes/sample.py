"""Size in, latents out: the empty latent, and the rollout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import comfy.model_management as management
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io
from torch import Tensor

from ..sf_core.compile import MODES
from ..sf_core.config import PRESETS, Sampling
from ..sf_core.families import FAMILIES
from ..sf_core.fp8 import FLOAT8
from ..sf_core.model import Attention, Stages, WanLayers
from ..sf_core.noise import MAX_SEED, Noise, SeededNoise
from ..sf_core.rollout import Progress, plan_spans, rollout, whole_chunks
from ..sf_core.storyboard import cues
from . import host
from .room import Rollout

CATEGORY = "Self Forcing"
AUTO = "auto"
CACHES = {AUTO: None, "fp8": FLOAT8}
REMEDY = "Set cache to fp8 or a smaller window, load the model in fp8, or make a smaller video."
NAMED = PRESETS | {name: family.sampling for name, family in FAMILIES.items()}


class SelfForcingLatent(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SelfForcingLatent",
            display_name="Self Forcing Latent",
            category=CATEGORY,
            description="The size and length of the video to make.",
            search_aliases=["empty latent video", "empty wan latent", "video size", "video length", "resolution"],
            inputs=[
                io.Int.Input(
                    "width", default=832, min=16, max=8192, step=16,
                    tooltip="Width in pixels, a multiple of 16. 832 for Wan 2.1 1.3B, 64 for the built-in model.",
                ),
                io.Int.Input(
                    "height", default=480, min=16, max=8192, step=16,
                    tooltip="Height in pixels, a multiple of 16. 480 for Wan 2.1 1.3B, 64 for the built-in model.",
                ),
                io.Int.Input(
                    "frames", default=81, min=1, max=200_001, step=4,
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
                io.Int.Input("batch_size", default=1, min=1, max=64, tooltip="Videos made at once, each different."),
            ],
            outputs=[io.Latent.Output(tooltip="An empty video latent for Self Forcing Sampler.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, width, height, frames, seconds, fps, batch_size) -> io.NodeOutput:
        length = latent_frames(frames, seconds, fps)
        shape = [batch_size, 16, length, *latent_size(width, height)]
        return io.NodeOutput({"samples": torch.zeros(shape, device=management.intermediate_device())})


def latent_frames(frames: int, seconds: float, fps: float) -> int:
    """Latent frames that hold at least so many frames, or seconds where they are given: 1 + ceil((frames - 1) / 4)."""
    wanted = max(1, round(seconds * fps)) if seconds > 0 else frames
    return 1 + -(-(wanted - 1) // 4)


def latent_size(width: int, height: int) -> tuple[int, int]:
    """(height, width) in latent pixels. Raises ValueError unless both are multiples of 16 pixels."""
    if width % 16 or height % 16:
        nearest = [max(16, round(pixels / 16) * 16) for pixels in (width, height)]
        raise ValueError(
            f"Got {width} x {height} pixels; width and height must be multiples of 16. Use {nearest[0]} x {nearest[1]}."
        )
    return height // 8, width // 8


class SelfForcingSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SelfForcingSampler",
            display_name="Self Forcing Sampler",
            category=CATEGORY,
            description="Makes a video a few latent frames at a time, each chunk attending to the ones before it.",
            search_aliases=[
                "autoregressive sampler", "causal sampler", "rolling kv cache", "wan sampler", "causvid", "long video",
            ],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="A causal Wan text-to-video model from any loader, with or without LoRAs.",
                ),
                io.Conditioning.Input(
                    "positive",
                    tooltip="The prompt, or those of Self Forcing Prompt with their times. Of other conditioning the "
                    "first entry is used.",
                ),
                io.Latent.Input(
                    "latent",
                    tooltip="Size, length and batch of the video, prefix included; its content is not used.",
                ),
                io.Int.Input(
                    "seed", default=0, min=0, max=MAX_SEED, control_after_generate=True,
                    tooltip="The same seed gives the same frames. A longer video with the same seed starts with "
                    "them too.",
                ),
                io.Combo.Input(
                    "preset", options=[AUTO, *NAMED], default=AUTO,
                    tooltip="Steps, shift, chunk and window that belong together. auto: what the model was made for; "
                    "cli: the published script (shift 5); demo: the published web demo (shift 8); tiny: the built-in "
                    "model; the others: published models by name.",
                ),
                io.Int.Input(
                    "steps", default=0, min=0, max=100,
                    tooltip="Denoising steps per chunk, evenly spaced before the shift. 0: the preset's (4).",
                ),
                io.Int.Input(
                    "chunk", default=0, min=0, max=100, advanced=True,
                    tooltip="Latent frames made together (4 frames each). 0: the preset's (3), which is what the model "
                    "was trained with.",
                ),
                io.Int.Input(
                    "window", default=0, min=0, max=100_000,
                    tooltip="Latent frames the model sees, the current chunk included; memory and time grow with it. "
                    "0: the preset's. A number as large as the video means all of it.",
                ),
                io.Int.Input(
                    "sink", default=-1, min=-1, max=100_000, advanced=True,
                    tooltip="First latent frames that never leave the window; steadies long videos. -1: the preset's.",
                ),
                io.Latent.Input(
                    "prefix", optional=True,
                    tooltip="Latents the video starts with: an image or a clip from VAE Encode at the same size, or "
                    "another sampler's output to go on from. They stay in the output and count in its length.",
                ),
                io.Combo.Input(
                    "cache", options=list(CACHES), default=AUTO, optional=True, advanced=True,
                    tooltip="Numbers that the model's memory of earlier frames is kept in. auto: those it computes "
                    "with; fp8: float8 with scales, half the memory of bf16 and a little slower.",
                ),
                io.Combo.Input(
                    "compile", options=list(MODES), default="off", optional=True, advanced=True,
                    tooltip="torch.compile. default: faster after a first step that takes a minute or so; "
                    "max-autotune: faster still after several. Needs Triton on GPUs, a C++ compiler on CPUs; without "
                    "them the video is made as with off.",
                ),
            ],
            outputs=[io.Latent.Output(tooltip="The video's latents, for Self Forcing Decode or VAE Decode.")],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model, positive, latent, seed, preset, steps, chunk, window, sink, prefix=None, cache=AUTO, compile="off"
    ) -> io.NodeOutput:
        sampling = sampling_of(preset, host.family_of(model).sampling, steps, chunk, window, sink)
        model = model if compile == "off" else host.for_compiling(model)
        wan = host.wan_of(model)
        shape = host.latents_of(latent, wan).shape
        start = None if prefix is None else host.latents_of(prefix, wan, "prefix")
        compiled = compile != "off"
        job = Job(
            model, wan, sampling, SeededNoise(seed), CACHES[cache], host.attention_of(model, compiled),
            host.stages_of(compile), host.SamplingProgress(model, cls, compiled),
        )  # fmt: skip
        what = f"{shape[2]} latent frames of {8 * shape[4]} x {8 * shape[3]} pixels"
        samples = host.within_memory(lambda: sample(job, positive, shape, start), what, REMEDY)
        return io.NodeOutput({"samples": samples})


def sampling_of(preset: str, own: Sampling, steps: int, chunk: int, window: int, sink: int) -> Sampling:
    """The preset (`own` for auto) with what the user has set; 0, or -1 for the sink, leaves it as it is."""
    sampling = own if preset == AUTO else NAMED[preset]
    return replace(
        sampling,
        steps=tuple(1000 * (steps - i) / steps for i in range(steps)) or sampling.steps,
        chunk=chunk or sampling.chunk,
        window=window or sampling.window,
        sink=sampling.sink if sink < 0 else sink,
    )


@dataclass(frozen=True)
class Job:
    """A model and how it is run."""

    model: ModelPatcher
    wan: WanLayers
    sampling: Sampling
    noise: Noise
    cache_dtype: torch.dtype | None
    attention: Attention
    stages: Stages
    progress: Callable[[Progress], None]


def sample(job: Job, positive: list, shape: torch.Size, prefix: Tensor | None) -> Tensor:
    """A video [B, C, F, H, W] of `shape` on ComfyUI's intermediate device; like every LATENT, in raw VAE space."""
    model, wan, sampling = job.model, job.wan, job.sampling
    batch, _, frames, height, width = shape
    dtype = model.model.get_dtype_inference()
    prompts = host.prompts_of(positive, batch)
    if prefix is not None:
        prefix = model.model.process_latent_in(comfy.utils.repeat_to_batch_size(prefix, batch))
    given = 0 if prefix is None else prefix.shape[2]
    total = whole_chunks(frames, sampling, given)
    prompts = [(entrance, embeds.to(model.load_device)) for entrance, embeds in prompts]
    with host.loaded(model, Rollout(wan.config, sampling, batch, total, height, width, dtype, job.cache_dtype)):
        chunks = rollout(
            wan, sampling, cues(prompts, plan_spans(total, sampling, given)), job.noise, total, height, width,
            prefix=prefix, dtype=dtype, cache_dtype=job.cache_dtype, attention=job.attention,
            stages=job.stages, on_step=job.progress,
        )  # fmt: skip
        latents = torch.cat([chunk.latents.to(management.intermediate_device()) for chunk in chunks], dim=2)
    return model.model.process_latent_out(latents[:, :, :frames])


NODES = [SelfForcingLatent, SelfForcingSampler]
