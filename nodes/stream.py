"""Sampling and decoding in one: frames are shown, and written to a file, as soon as their chunk exists."""

from __future__ import annotations

import logging
import secrets
from pathlib import Path

from comfy_api.latest import io

from ..sf_core.device import console_text
from . import inputs
from .host.decoding import check_tile
from .host.file_names import check_name, fill_placeholders, next_file
from .host.generation import REMEDY, HostGeneration, begin_notes, prepare_generation
from .host.live import LiveVideo, require_decoder, saved_result
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
            "way, if asked. Cancel keeps what was made.",
            search_aliases=["live video", "realtime", "real-time", "streaming", "watch", "demo", "autoregressive"],
            inputs=[
                inputs.model(), inputs.positive(), inputs.latent(),
                io.Vae.Input("vae", tooltip="VAE that belongs to the model: the built-in one, TAEHV or Wan 2.1's."),
                inputs.seed(-1),
                io.Float.Input(
                    "fps", default=16.0, min=1.0, max=120.0, step=1.0,
                    tooltip="Frames per second it is shown and saved at. 16 is Wan 2.1's own rate; fewer where the "
                    "machine is slower than that, so that it plays evenly.",
                ),
                inputs.preset(),
                io.String.Input(
                    "file", default="",
                    tooltip="File name in ComfyUI's output folder, to write an mp4 to while it runs, such as "
                    "video/self_forcing or %date:yyyy-MM-dd%/fox_%width%. Empty: no file.",
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
                io.Image.Output(tooltip="Frames of the video."),
                io.Latent.Output(tooltip="Latents of these frames, to go on from."),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.extra_pnginfo],
            is_output_node=True,
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, seed, **inputs):
        return secrets.token_hex() if seed == -1 else None

    @classmethod
    def validate_inputs(cls, file):
        if file and file.strip():
            try:
                check_name(file.strip())
            except ValueError as error:
                return str(error)
        return True

    @classmethod
    def execute(cls, **given) -> io.NodeOutput:
        given = inputs.StreamInputs(**given)
        drawn = secrets.randbelow(2**53) if given.seed == -1 else None
        generation = prepare_generation(given, drawn)
        check_tile(given.tile)
        video = LiveVideo(generation, require_decoder(given.vae, given.latent["samples"]), given, cls)
        notes = begin_notes(generation, cls)
        if drawn is not None:
            notes.add(f"seed {drawn}")
        saved = cls._next_file(given.file.strip(), generation, notes) if given.file.strip() else None
        within_memory(lambda: video.run(saved), generation.what, f"{REMEDY} {video.decoder.remedy}")
        # Not as a preview (ui.PreviewVideo): the file is what the screen has shown.
        shown = None if saved is None else {"video": [saved_result(saved)]}
        return io.NodeOutput(video.images.tensor, {"samples": video.latents.tensor}, ui=shown)

    @classmethod
    def _next_file(cls, name: str, generation: HostGeneration, notes: Notes) -> Path:
        """Where it is written, with what the name asks for filled in."""
        prompt, extra = (cls.hidden.prompt, cls.hidden.extra_pnginfo or {}) if cls.hidden else ({}, {})
        name, unknown = fill_placeholders(name, prompt, extra.get("workflow"))
        if unknown:
            message = f"file has {', '.join(unknown)}, which stands for nothing here and stays as it is."
            log.warning("Self Forcing: %s", console_text(message))
            notes.add(message)
        return next_file(name, 8 * generation.plan.width, 8 * generation.plan.height)


NODES = [SelfForcingStream]
