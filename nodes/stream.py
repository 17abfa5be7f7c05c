"""Sampling and decoding in one: frames are shown, and written to a file, as soon as their chunk exists."""

from __future__ import annotations

import logging
import secrets
from pathlib import Path

from comfy_api.latest import io

from ..sf_core.device import console_text
from . import inputs
from .host.decoding import check_tile
from .host.file_names import check_name, fill_placeholders, next_files
from .host.files import DRAWN
from .host.generation import REMEDY, HostGeneration, begin_notes, prepare_generation
from .host.live import LiveVideo, require_decoder
from .host.memory import within_memory
from .host.progress import Notes

log = logging.getLogger(__name__)


class SelfForcingStream(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SelfForcingStream",
            display_name="Self Forcing Stream",
            category=inputs.CATEGORY,
            description="Makes a video and plays it in the node while it is being made; writes it to a file on the "
            "way. Cancel keeps what was made.",
            search_aliases=[
                "live video", "realtime", "real-time", "streaming", "watch", "demo", "autoregressive", "wan sampler",
                "long video",
            ],
            inputs=[
                inputs.model(), inputs.positive(), inputs.latent(),
                io.Vae.Input("vae", tooltip="VAE that belongs to the model: the built-in one, TAEHV or Wan's."),
                inputs.seed(DRAWN),
                io.Float.Input(
                    "fps", default=16.0, min=1.0, max=120.0, step=1.0,
                    tooltip="Frames per second it is shown and saved at. 16 is Wan 2.1's own rate; fewer where the "
                    "machine is slower than that, so that it plays evenly.",
                ),
                inputs.preset(),
                io.String.Input(
                    "file", display_name="filename_prefix", default="video/self_forcing",
                    tooltip="File name in ComfyUI's output folder, to write an mp4 to while it runs, such as "
                    "video/self_forcing or %date:yyyy-MM-dd%/fox_%width%; one for each video of a batch. Empty: no "
                    "file.",
                ),
                io.Int.Input(
                    "keep", default=0, min=0, max=1_000_000,
                    tooltip="Frames kept: how many of the last ones are given to the outputs. 0: all. For very long "
                    "videos with a file: 81 or so, which is enough to go on from, and memory stays flat.",
                ),
                inputs.prefix(), inputs.compiled(), inputs.steps(), inputs.chunk(), inputs.window(),
                inputs.sink(), inputs.cache(), inputs.negative(), inputs.cfg(), inputs.denoise(),
                inputs.history(), inputs.keep_prefix(), inputs.tile(),
            ],
            outputs=[
                io.Image.Output(tooltip="Frames of the video; of a batch one video after the other."),
                io.Latent.Output(tooltip="Latents of these frames, to go on from."),
                io.Video.Output(
                    is_output_list=True,
                    tooltip="Video: the file, whole, whatever keep says; of the frames kept where there is no file. Of "
                    "a batch, each.",
                ),
                io.String.Output(
                    "path", is_output_list=True,
                    tooltip="Path of the file; empty where there is none. Of a batch, each.",
                ),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.extra_pnginfo],
            is_output_node=True,
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, seed, **inputs):
        return secrets.token_hex() if seed == DRAWN else None

    @classmethod
    def validate_inputs(cls, file):
        if file and file.strip():
            try:
                check_name(file.strip())
            except ValueError as error:
                return str(error)
        return True

    @classmethod
    @inputs.check_numbers
    def execute(cls, **given) -> io.NodeOutput:
        given = inputs.StreamInputs(**given)
        drawn = secrets.randbelow(2**53) if given.seed == DRAWN else None
        generation = prepare_generation(given, drawn)
        decoder = require_decoder(given.vae, given.latent["samples"])
        check_tile(given.tile, decoder)
        video = LiveVideo(generation, decoder, given, cls, drawn)
        notes = begin_notes(generation, cls)
        if drawn is not None:
            notes.add(f"seed {drawn}")
        files = cls._next_files(given.file.strip(), generation, notes) if given.file.strip() else []
        within_memory(lambda: video.run(files, notes), generation.what, f"{REMEDY} {decoder.remedy}")
        # Not as a preview (ui.PreviewVideo): the file is what the screen has shown.
        shown = video.outputs(files, video.length - video.first) if files else None
        paths = [str(path) for path in files] or [""] * video.batch
        images, latents = video.images.tensor.flatten(0, 1), {"samples": video.latents.tensor}
        return io.NodeOutput(images, latents, video.videos(files), paths, ui=shown)

    @classmethod
    def _next_files(cls, name: str, generation: HostGeneration, notes: Notes) -> list[Path]:
        """Where the videos are written, with what the name asks for filled in."""
        prompt, extra = (cls.hidden.prompt, cls.hidden.extra_pnginfo or {}) if cls.hidden else ({}, {})
        name, unknown = fill_placeholders(name, prompt, extra.get("workflow"))
        if unknown:
            message = f"file has {', '.join(unknown)}, which stands for nothing here and stays as it is."
            log.warning("Self Forcing: %s", console_text(message))
            notes.add(message)
        plan, space = generation.plan, generation.wan.config.space
        return next_files(name, plan.batch, space * plan.width, space * plan.height)


NODES = [SelfForcingStream]
