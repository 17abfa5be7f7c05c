"""A generation that is decoded, shown and written while it goes."""

from __future__ import annotations

import base64
import json
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path

import comfy.sd
import comfy.utils
import folder_paths
from comfy.cli_args import args
from comfy_api.latest import io, ui
from latent_preview import MAX_PREVIEW_RESOLUTION
from torch import Tensor

from ...sf_core.autoencoders.stream import latent_frames, pixel_frames
from ...sf_core.video import check_destination, save_video
from ..inputs import StreamInputs
from .decoding import StreamingDecoder, check_channels, streaming_decoder
from .generation import HostGeneration, TailBuffer
from .memory import check_frames
from .progress import StepProgress, frame_picture, send

EVENT = "self_forcing.frames"  # what web/stream.js listens to


QUALITY = 92  # of the JPEGs it shows; as many pixels of colour as of brightness, since small frames are enlarged


def require_decoder(vae: comfy.sd.VAE, samples: Tensor) -> StreamingDecoder:
    """How the VAE is streamed. Raises ValueError where it cannot be, or for several videos at once."""
    check_channels(samples, vae)
    if len(samples) > 1:
        raise ValueError(
            f"Got a batch of {len(samples)}; Self Forcing Stream shows one video at a time. Set batch_size to 1, or "
            "use Self Forcing Sampler and Self Forcing Decode."
        )
    decoder = streaming_decoder(vae)
    if decoder is None:
        raise ValueError(
            f"Got a VAE of type {type(vae.first_stage_model).__name__}, which cannot decode piece by piece. Connect "
            "the Wan 2.1 VAE, a TAEHV of Load TAEHV, or the built-in one; or use Self Forcing Sampler and VAE Decode."
        )
    return decoder


def saved_result(path: Path) -> ui.SavedResult:
    folder = path.parent.relative_to(folder_paths.get_output_directory())
    return ui.SavedResult(path.name, "" if folder == Path() else folder.as_posix(), io.FolderType.output)


@dataclass(frozen=True)
class LiveVideo:
    """A generation whose chunks are decoded as they come, and shown on `node`; `given` says how."""

    generation: HostGeneration
    decoder: StreamingDecoder
    given: StreamInputs
    node: type[io.ComfyNode]

    @property
    def tile(self) -> int | None:
        """Side of the decoder's tiles in latent pixels; None: the whole picture."""
        return self.given.tile // 8 or None

    @property
    def length(self) -> int:
        """Frames of the whole video."""
        return pixel_frames(self.generation.length)

    @property
    def reserve_bytes(self) -> int:
        """Bytes that the decoder takes beside the model, with which it takes turns."""
        pixels = self.generation.pixels
        more = self.decoder.used(pixels, self.tile) - self.generation.memory.use.activations
        return self.decoder.held(pixels, self.tile) + max(0, more)

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
        """The frames [T, H, W, 3] that are kept."""
        there = self.length - self.first
        return TailBuffer(self.length, min(self.given.keep or there, there), dim=0)

    @cached_property
    def latents(self) -> TailBuffer:
        """The raw latents [1, C, F, H, W] of these frames."""
        frames, keep = self.generation.length, self.given.keep
        there = frames - self.skipped
        return TailBuffer(frames, min(latent_frames(keep), there) if keep else there, dim=2)

    def run(self, file: Path | None) -> None:
        """Makes the video. With a file, what was made stays there whatever happens."""
        if file is not None:
            check_destination(file)
        kept = self.images.total - self.images.first
        check_frames(kept, self.generation.pixels, "Give file a name, and set keep to 81.")
        self.decoder.load(self.reserve_bytes)
        with self.generation.loaded(self.reserve_bytes, self.decoder.vae.patcher):
            if file is None:
                deque(self.frames(), maxlen=0)
            else:
                written = {**_metadata(self.node), "seed": str(self.generation.seed)}
                save_video(file, self.frames(), self.given.fps, keep=True, metadata=written)

    def frames(self) -> Iterator[Tensor]:
        """The frames [T, H, W, 3] in 0..1 that are shown, chunk by chunk."""
        done, generation, stream = 0, self.generation, self.decoder.stream(self.tile)
        for chunk, x0 in generation.chunks(StepProgress(), reserve_bytes=self.reserve_bytes):
            raw = generation.model.model.process_latent_out(x0[:, :, : generation.length - chunk.start])
            piece = self.decoder.piece(stream, raw)
            self.latents.append(raw.to(piece.device))
            self.images.append(piece)
            new = piece[max(0, self.first - done) :]
            done += len(piece)
            if len(new):
                self._show(new, done - len(new))
                yield new

    def _show(self, frames: Tensor, at: int) -> None:
        """Sends frames to the browser, as small as its other previews."""
        send(
            self.node, EVENT,
            lambda: {
                "first": self.first, "at": at, "length": self.length, "fps": self.given.fps,
                "frames": [_jpeg(frame) for frame in frames],
            },
        )  # fmt: skip


def _jpeg(frame: Tensor) -> str:
    """A frame [H, W, 3] as a JPEG in base64, no larger than previews are."""
    picture, data = frame_picture(frame), BytesIO()
    picture.thumbnail((MAX_PREVIEW_RESOLUTION, MAX_PREVIEW_RESOLUTION))
    picture.save(data, "JPEG", quality=QUALITY, subsampling=0)
    return base64.b64encode(data.getvalue()).decode()


def _metadata(node: type[io.ComfyNode]) -> dict[str, str]:
    """What lets ComfyUI open the workflow from the file, as its own Save Video writes it."""
    if args.disable_metadata or node.hidden is None:
        return {}
    written = {**(node.hidden.extra_pnginfo or {}), "prompt": node.hidden.prompt}
    return {name: json.dumps(value) for name, value in written.items() if value is not None}
