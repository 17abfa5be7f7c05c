"""A generation that is decoded, shown and written while it goes."""

from __future__ import annotations

import base64
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from io import BytesIO
from pathlib import Path

import comfy.sd
import torch
from comfy_api.latest import InputImpl, Types, io
from torch import Tensor

from ...sf_core.autoencoders.stream import latent_frames, pixel_frames
from ...sf_core.device import console_text
from ...sf_core.sampling.rollout import Progress
from ..inputs import StreamInputs
from .decoding import StreamingDecoder, check_channels, streaming_decoder
from .files import Recording, output_name, saved_result, workflow_metadata
from .generation import HostGeneration, TailBuffer
from .memory import check_frames
from .progress import SECONDS_BETWEEN_PICTURES, Notes, StepProgress, frame_picture, list_output, send

FRAMES, STATUS = "self_forcing.frames", "self_forcing.status"  # what web/stream.js listens to

SMALL = 512  # pixels; smaller frames are enlarged, so they keep all of their colours
QUALITY = {"quality": 85}, {"quality": 92, "subsampling": 0}  # of the JPEGs it shows; of those of small frames

log = logging.getLogger(__name__)


def require_decoder(vae: comfy.sd.VAE, samples: Tensor) -> StreamingDecoder:
    """How the VAE is streamed. Raises ValueError where it cannot be."""
    check_channels(samples, vae)
    decoder = streaming_decoder(vae)
    if decoder is None:
        raise ValueError(
            f"Got a VAE of type {type(vae.first_stage_model).__name__}, which cannot decode piece by piece. Connect "
            "the Wan VAE, a TAEHV of Load TAEHV, or the built-in one; or use Self Forcing Sampler and VAE Decode."
        )
    return decoder


@dataclass(frozen=True)
class LiveVideo:
    """A generation whose chunks are decoded as they come, and shown on `node`; `given` says how. A batch is as many
    videos side by side.

    drawn  the seed, where it was drawn for this run
    """

    generation: HostGeneration
    decoder: StreamingDecoder
    given: StreamInputs
    node: type[io.ComfyNode]
    drawn: int | None = None

    @property
    def tile(self) -> int | None:
        """Side of the decoder's tiles in latent pixels; None: the whole picture."""
        return self.given.tile // self.decoder.space or None

    @property
    def batch(self) -> int:
        """Videos."""
        return self.generation.plan.batch

    @property
    def length(self) -> int:
        """Frames of the whole video."""
        return pixel_frames(self.generation.length)

    @property
    def reserve_bytes(self) -> int:
        """Bytes that the decoder takes beside the model, with which it takes turns."""
        pixels = self.generation.pixels
        more = self.decoder.used(pixels, self.tile) - self.generation.memory.use.activations
        return self.batch * self.decoder.held(pixels, self.tile) + max(0, more)

    @property
    def skipped(self) -> int:
        """Latent frames of a prefix that is left out."""
        return 0 if self.given.keep_prefix else self.generation.plan.prefix

    @property
    def first(self) -> int:
        """The first frame that is shown."""
        return pixel_frames(self.skipped) if self.skipped else 0

    @cached_property
    def images(self) -> TailBuffer:
        """The frames [B, T, H, W, 3] that are kept."""
        there = self.length - self.first
        return TailBuffer(self.length, min(self.given.keep or there, there), dim=1)

    @cached_property
    def latents(self) -> TailBuffer:
        """The raw latents [B, C, F, H, W] of these frames."""
        frames, keep = self.generation.length, self.given.keep
        there = frames - self.skipped
        return TailBuffer(frames, min(latent_frames(keep), there) if keep else there, dim=2)

    def run(self, files: list[Path], notes: Notes) -> None:
        """Makes the videos. With files, one each, what was made stays there whatever happens, and is told."""
        kept = self.images.total - self.images.first
        check_frames(self.batch * kept, self.generation.pixels, "Give filename_prefix a name, and set keep to 81.")
        self.say("loading")
        self.decoder.load(self.reserve_bytes)
        metadata = workflow_metadata(self.node, self.drawn) | {"seed": str(self.generation.seed)}
        recording, whole = Recording(files, self.given.fps, metadata, self.length - self.first), False
        try:
            with self.generation.loaded(self.reserve_bytes, self.decoder.vae.patcher), recording:
                for frames in self.frames():
                    recording.add(frames)
            whole = True
        finally:
            if not whole and recording.written:
                self._tell_stopped(recording.written, recording.count, notes)

    def frames(self) -> Iterator[Tensor]:
        """The frames [B, T, H, W, 3] in 0..1 that are shown, chunk by chunk."""
        done, generation = 0, self.generation
        streams = [self.decoder.stream(self.tile) for _ in range(self.batch)]
        for chunk, x0 in generation.chunks(LiveProgress(self), reserve_bytes=self.reserve_bytes):
            raw = generation.model.model.process_latent_out(x0[:, :, : generation.length - chunk.start])
            pieces = [self.decoder.piece(stream, video) for stream, video in zip(streams, raw.split(1))]
            piece = pieces[0][None] if self.batch == 1 else torch.stack(pieces)
            self.latents.append(raw.to(piece.device))
            self.images.append(piece)
            new = piece[:, max(0, self.first - done) :]
            done += piece.shape[1]
            if new.shape[1]:
                self._show(new, done - new.shape[1])
                yield new

    def videos(self, files: list[Path]) -> list[InputImpl.VideoFromFile | InputImpl.VideoFromComponents]:
        """The videos as ComfyUI's: of the files, or of the frames that are kept where there is none."""
        if files:
            return [InputImpl.VideoFromFile(str(path)) for path in files]
        rate = Fraction(self.given.fps).limit_denominator(65535)
        return [
            InputImpl.VideoFromComponents(Types.VideoComponents(images=images, frame_rate=rate))
            for images in self.images.tensor
        ]

    # --- What it tells ---

    def outputs(self, files: list[Path], frames: int) -> dict:
        """The files as outputs of the node, with what its screen says of them."""
        length = self.length - self.first
        facts = {"frame_rate": self.given.fps, "frames": frames, "length": length, "stopped": frames < length}
        if self.drawn is not None:
            facts["seed"] = str(self.drawn)  # JavaScript's numbers would round it
        return {"video": [saved_result(path) for path in files], "self_forcing": [facts]}

    def say(self, status: str) -> None:
        """Shows on the screen what is being done."""
        send(self.node, STATUS, lambda: {"text": status})

    def _tell_stopped(self, files: list[Path], frames: int, notes: Notes) -> None:
        names = ", ".join(output_name(path) for path in files)
        paths = console_text(", ".join(map(str, files)))
        log.warning("Self Forcing Stream was stopped; its first %d frames are in %s", frames, paths)
        notes.add(f"stopped: {frames} frames in {names}", first=True)
        list_output(self.node, self.outputs(files, frames))

    def _show(self, frames: Tensor, at: int) -> None:
        """Sends frames [B, T, H, W, 3] to the browser."""
        send(
            self.node, FRAMES,
            lambda: {
                "first": self.first, "at": at, "length": self.length, "fps": self.given.fps,
                "videos": [[_jpeg(frame) for frame in video] for video in frames],
            },
        )  # fmt: skip


class LiveProgress(StepProgress):
    """Steps that the screen tells of, too, no more often than anybody reads."""

    def __init__(self, video: LiveVideo) -> None:
        super().__init__()
        self.video, self.told = video, 0.0

    def show(self, progress: Progress) -> None:
        super().show(progress)
        if time.monotonic() > self.told + SECONDS_BETWEEN_PICTURES:
            self.told = time.monotonic()
            self.video.say(f"chunk {progress.chunk.index + 1}, step {progress.step} of {progress.steps}")


def _jpeg(frame: Tensor) -> str:
    """A frame [H, W, 3] as a JPEG in base64."""
    picture, data = frame_picture(frame), BytesIO()
    picture.save(data, "JPEG", **QUALITY[max(picture.size) <= SMALL])
    return base64.b64encode(data.getvalue()).decode()
