"""A generation that is decoded, shown and written while it goes."""

from __future__ import annotations

import base64
import json
from collections import deque
from collections.abc import Callable, Iterator
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

from ...sf_core.sampling.rollout import Progress
from ...sf_core.video import save_video
from .decoding import Decoder, check_channels, streaming_decoder
from .generation import Job, Kept
from .memory import check_frames
from .progress import check_cancelled, frame_picture, send

EVENT = "self_forcing.frames"  # what web/stream.js listens to


QUALITY = 92  # of the JPEGs it shows; as many pixels of colour as of brightness, since small frames are enlarged


def decoder_of(vae: comfy.sd.VAE, samples: Tensor) -> Decoder:
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


def destination(prefix: str, job: Job) -> Path:
    """The next free .mp4 of that name in ComfyUI's output folder."""
    _, _, _, height, width = job.shape
    folder, name, counter, _, _ = folder_paths.get_save_image_path(
        prefix, folder_paths.get_output_directory(), 8 * width, 8 * height
    )
    return Path(folder) / f"{name}_{counter:05}_.mp4"


def _result(path: Path) -> ui.SavedResult:
    folder = path.parent.relative_to(folder_paths.get_output_directory())
    return ui.SavedResult(path.name, "" if folder == Path() else folder.as_posix(), io.FolderType.output)


@dataclass(frozen=True)
class Stream:
    """A job whose chunks are decoded as they come, and shown on `node` at `fps`.

    tile         of the decoder, in latent pixels; None: the whole picture
    keep         frames at the end that are kept; 0: all
    keep_prefix  whether those of the prefix are shown, written and kept
    """

    job: Job
    decoder: Decoder
    tile: int | None
    fps: float
    node: type[io.ComfyNode]
    keep: int
    keep_prefix: bool

    @property
    def length(self) -> int:
        """Frames of the whole video."""
        return 4 * self.job.shape[2] - 3

    @property
    def beside(self) -> int:
        """Bytes that the decoder takes beside the model, with which it takes turns."""
        _, _, _, height, width = self.job.shape
        pixels = 64 * height * width
        more = self.decoder.used(pixels, self.tile) - self.job.needed.activations
        return self.decoder.held(pixels, self.tile) + max(0, more)

    @property
    def skipped(self) -> int:
        """Latent frames of a prefix that is left out."""
        return 0 if self.keep_prefix else self.job.given

    @property
    def first(self) -> int:
        """The first frame that is shown."""
        return 4 * self.skipped - 3 if self.skipped else 0

    @cached_property
    def images(self) -> Kept:
        """The frames [T, H, W, 3] that are kept."""
        there = self.length - self.first
        return Kept(self.length, min(self.keep or there, there), dim=0)

    @cached_property
    def latents(self) -> Kept:
        """The raw latents [1, C, F, H, W] of these frames."""
        frames = self.job.shape[2]
        there = frames - self.skipped
        return Kept(frames, min(1 + -(-(self.keep - 1) // 4), there) if self.keep else there, dim=2)

    def run(self, file: Path | None) -> None:
        """Makes the video. With a file, what was made stays there whatever happens."""
        pixels = 64 * self.job.shape[3] * self.job.shape[4]
        check_frames(self.images.total - self.images.first, pixels, "Give file a name, and set keep to 81.")
        self.decoder.load(self.beside)
        with self.job.loaded(self.beside, self.decoder.vae.patcher):
            if file is None:
                deque(self.frames(), maxlen=0)
            else:
                written = {**_metadata(self.node), "seed": str(self.job.seed)}
                save_video(file, self.frames(), self.fps, keep=True, metadata=written)

    def frames(self) -> Iterator[Tensor]:
        """The frames [T, H, W, 3] in 0..1 that are shown, chunk by chunk."""
        done, frames, stream = 0, self.job.shape[2], self.decoder.stream(self.tile)
        for chunk in self.job.chunks(_steps(), beside=self.beside):
            latents = chunk.latents[:, :, : frames - chunk.span.start]
            raw = self.job.model.model.process_latent_out(latents)
            piece = self.decoder.piece(stream, raw)
            self.latents.add(raw.to(piece.device))
            self.images.add(piece)
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
                "first": self.first, "at": at, "length": self.length, "fps": self.fps,
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


def _steps() -> Callable[[Progress], None]:
    """Steps on the node's progress bar; Cancel is heard here."""
    bar, done = comfy.utils.ProgressBar(1), 0

    def step(progress: Progress) -> None:
        nonlocal done
        check_cancelled()
        done += 1
        bar.update_absolute(done, progress.total)

    return step
