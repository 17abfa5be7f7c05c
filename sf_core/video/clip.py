"""Clips read as a stream: a film, an animation, one picture, or a folder of pictures, told by content.

The time stamps count: frames have the times at which a player shows them, and at another rate each time shows the frame
that is there. T frames, H W size in pixels.
"""

from __future__ import annotations

import re
import stat
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path

import av
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .destination import LITTER
from .picture import fitted, frame_of, is_animated, open_picture, oriented, read_picture, told_damaged

SAME_RATE = 0.05  # of a rate; nobody sees it, and containers round
ROUNDING = 1e-3  # seconds: a tick of the coarsest containers
PIECE = 16  # frames that are yielded together at most
HDR = {16: "PQ", 18: "HLG"}  # transfer functions, as ITU-T H.273 counts them
NOT_FILMS = {"tty", "hls", "concat", "dash", "sdp", "image2", "lrc", "srt", "webvtt"}
Timed = tuple[float, float, Tensor]  # start and end in seconds, frame [H, W, 3]


@dataclass(frozen=True)
class Clip:
    """What can be read as frames. `width` and `height` are those of the frames, upright and with square pixels.

    duration, rate  seconds, and frames per second on average; None for pictures, which have neither
    """

    path: Path
    kind: str  # "film", "animation", "picture" or "folder"
    width: int
    height: int
    duration: float | None
    rate: float | None

    @cached_property
    def times(self) -> list[tuple[float, float]]:
        """Start and end of each frame in seconds, without decoding. Raises OSError."""
        if self.kind == "film":
            return _film_times(self.path)
        if self.kind == "animation":
            return [(start, end) for start, end, _ in _animation(self.path, decode=False)]
        return [(0.0, 0.0)] * (len(picture_files(self.path)) if self.kind == "folder" else 1)

    def count(self, fps: float | None = None, most: int | None = None) -> int:
        """Frames that `frames` yields with these settings, counted without decoding. Raises OSError."""
        count = len(self.times)
        if self._resampled(fps):
            start, end = self.times[0][0], self.times[-1][1]
            count = max(1, -int(-((end - start - ROUNDING) * fps) // 1))
        return count if most is None else min(count, most)

    def frames(
        self, size: tuple[int, int] | None = None, fps: float | None = None, most: int | None = None
    ) -> Iterator[Tensor]:
        """Pieces [n, H, W, 3] of the frames, float32 in 0..1; no more is decoded than is taken.

        size  (H, W) they are `fitted` to
        fps   frames are left out or repeated so that it has this rate at the same speed; pictures have no rate
        most  frames at most

        Raises OSError for a damaged file, ValueError for frames of several sizes.
        """
        timed = self._timed()
        images = _at_rate(timed, fps) if self._resampled(fps) else (frame for _, _, frame in timed)
        images = islice(images, most)
        while piece := [fitted(frame[None], *size) if size else frame[None] for frame in islice(images, PIECE)]:
            if len({frame.shape for frame in piece}) > 1:
                raise ValueError(f"Got {self.path} with frames of several sizes; all need one. Give a size to fit to.")
            yield torch.cat(piece)

    def _resampled(self, fps: float | None) -> bool:
        """Whether the frames' times are not already those of this rate."""
        if not fps or self.rate is None:
            return False
        times = self.times
        start, gap = times[0][0], (times[-1][1] - times[0][0]) / len(times)
        if gap <= 0:
            return False
        steady = all(abs(time - start - i * gap) < gap for i, (time, _) in enumerate(times))
        return not steady or abs(1 / (gap * fps) - 1) > SAME_RATE

    def _timed(self) -> Iterator[Timed]:
        if self.kind == "film":
            yield from _film(self.path)
        elif self.kind == "animation":
            yield from _animation(self.path)
        else:
            for file in picture_files(self.path) if self.kind == "folder" else [self.path]:
                image = open_picture(file)
                if image is None:
                    raise OSError(f"Got {file}, which is no picture. Needed are pictures only. Take it out.")
                with image:
                    yield 0.0, 0.0, read_picture(file, image)


def open_clip(path: str | Path) -> Clip:
    """The clip at a path, from its header alone. Raises OSError when it cannot be read, ValueError without frames."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"Got {path}, which is not there. Needed is a video, a picture or a folder of them.")
    if path.is_dir():
        files = picture_files(path)
        if not files:
            raise ValueError(f"Got {path}, which holds no frames. Give a video file or a folder of pictures.")
        first = open_clip(files[0])
        return Clip(path, "folder", first.width, first.height, None, None)
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(f"Got {path}, which is no ordinary file. Give a video file or a folder of pictures.")
    image = open_picture(path)
    if image is None:
        return _open_film(path)
    with image, told_damaged(path):
        if is_animated(image):
            times = [(start, end) for start, end, _ in _animation(path, decode=False)]
            return Clip(path, "animation", *image.size, times[-1][1], len(times) / times[-1][1])
        width, height = image.size
        turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
        return Clip(path, "picture", *((height, width) if turned else (width, height)), None, None)


def read_video(
    path: str | Path,
    most: int | None = None,
    size: tuple[int, int] | None = None,
    fps: float | None = None,
    on_frame: Callable[[int], object] | None = None,
) -> Tensor:
    """The frames [T, H, W, 3] of a video file, a folder of pictures or one picture, float32 in 0..1; the first `most`.

    size      (H, W) they are `fitted` to, each as it is read, so that a large video is never held at its own size
    fps       frames are left out or repeated so that it has this rate at the same speed; pictures have no rate
    on_frame  called with the number of frames that each piece adds

    Raises OSError when it cannot be read, ValueError when it holds no frames.
    """
    clip, done, frames = open_clip(path), 0, None
    for piece in clip.frames(size, fps, most):
        if frames is None:
            frames = piece.new_empty(clip.count(fps, most), *piece.shape[1:])
        if piece.shape[1:] != frames.shape[1:]:
            raise ValueError(f"Got {path} with frames of several sizes; all need one. Give a size to fit to.")
        if done + len(piece) > len(frames):  # more than its header promised
            frames = torch.cat([frames, piece.new_empty(done + len(piece) - len(frames), *piece.shape[1:])])
        frames[done : done + len(piece)] = piece
        done += len(piece)
        if on_frame:
            on_frame(len(piece))
    if frames is None:
        raise ValueError(f"Got {path}, which holds no frames. Give a video file or a folder of pictures.")
    return frames[:done]


def _at_rate(timed: Iterator[Timed], fps: float) -> Iterator[Tensor]:
    """The frame that is shown at each of the times 0, 1 / fps, 2 / fps, ..., counted from the first frame."""
    wanted, start, held, end = 0, None, None, 0.0
    for time, end, frame in timed:  # noqa: B007
        start = time if start is None else start
        while held is not None and wanted / fps < time - start - ROUNDING:
            yield held
            wanted += 1
        held = frame
    while held is not None and (wanted == 0 or wanted / fps < end - start - ROUNDING):
        yield held
        wanted += 1


# --- Folders ---------------------------------------------------------------------------------------------------------


def picture_files(folder: Path) -> list[Path]:
    """The pictures of a folder, f2 before f10. What has the suffix of a picture counts as one."""
    Image.init()
    suffixes = Image.registered_extensions().keys() | {".heic", ".heif", ".avif"}
    found = []
    for file in folder.iterdir():
        if file.name.startswith(".") or file.name.lower() in LITTER or not file.is_file():
            continue
        if file.suffix.lower() in suffixes or (not file.suffix and open_picture(file)):
            found.append(file)
    return sorted(found, key=_natural)


def _natural(file: Path) -> tuple:
    parts = re.split(r"(\d+)", file.name)
    return [(int(part), "") if part.isdecimal() else (-1, part.casefold()) for part in parts], file.name


# --- Animated pictures -----------------------------------------------------------------------------------------------


def _animation(path: Path, decode: bool = True) -> Iterator[Timed]:
    """Frames of an animated GIF, WebP, PNG or AVIF with the times at which browsers show them."""
    with open_picture(path) as image, told_damaged(path):
        time = 0.0
        for number in range(1 if getattr(image, "default_image", False) else 0, image.n_frames):
            image.seek(number)
            if decode or image.format != "GIF":  # whose times alone can be read without the pixels
                image.load()
            held = image.info.get("duration") or 100  # ms; 100 is what browsers take
            held = 100 if image.format == "GIF" and held <= 10 else held
            yield time, time + held / 1000, frame_of(image) if decode else None
            time += held / 1000


# --- Films -----------------------------------------------------------------------------------------------------------


def _container(path: Path) -> av.container.InputContainer:
    try:
        file = av.open(f"file:{path.resolve()}")
    except (av.FFmpegError, OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OSError(
            f"Got {path}, which is neither a video nor a picture that can be read ({reason}). "
            "Open it in a player or viewer to see what it is, and save it as mp4 or PNG."
        ) from None
    if not file.streams.video or NOT_FILMS & set(file.format.name.split(",")):
        file.close()
        raise OSError(f"Got {path}, which holds no pictures. Needed is a video or a picture. Give another file.")
    return file


def _open_film(path: Path) -> Clip:
    with _container(path) as file:
        stream = file.streams.video[0]
        transfer = int(getattr(stream.codec_context, "color_trc", 0) or 0)
        try:
            first = next(file.decode(stream))
        except (StopIteration, av.FFmpegError):
            raise ValueError(f"Got {path}, which holds no frames. Give a video file or a folder of pictures.") from None
        transfer = transfer if transfer in HDR else int(getattr(first, "color_trc", 0) or 0)
        if transfer in HDR:
            raise ValueError(
                f"Got {path}, a clip in high dynamic range ({HDR[transfer]}). Needed is standard range. Convert it "
                "first, in a video editor or with ffmpeg's zscale and tonemap filters."
            )
        height, width = _shown(first, _aspect(first, stream)).shape[:2]
        rate = float(stream.average_rate or stream.guessed_rate or 25)
        duration = float(stream.duration * stream.time_base) if stream.duration else None
        if duration is None and file.duration:
            duration = file.duration / av.time_base
        return Clip(path, "film", width, height, duration, rate)


def _film_times(path: Path) -> list[tuple[float, float]]:
    """Start and end of each frame that is shown, from the packets."""
    with _container(path) as file:
        stream = file.streams.video[0]
        rate = float(stream.average_rate or 25)
        packets = []
        with _told_broken(path, packets):
            for packet in file.demux(stream):
                if packet.size and not packet.is_discard and not packet.is_corrupt:
                    packets.append((packet.pts, packet.duration or 0))
        if any(pts is None for pts, _ in packets):
            return [(i / rate, (i + 1) / rate) for i in range(len(packets))]
        tick, packets = float(stream.time_base), sorted(packets)
        starts = [pts * tick for pts, _ in packets]
        if not starts:
            return [(0.0, 0.0)]
        return list(zip(starts, [*starts[1:], starts[-1] + (packets[-1][1] * tick or 1 / rate)]))


def _film(path: Path) -> Iterator[Timed]:
    done = []
    with _container(path) as file, _told_broken(path, done):
        stream = file.streams.video[0]
        stream.thread_type = "AUTO"
        gap = 1 / float(stream.average_rate or 25)
        for number, frame in enumerate(file.decode(stream)):
            start = number * gap if frame.time is None else frame.time
            length = float((getattr(frame, "duration", 0) or 0) * (frame.time_base or 0)) or gap
            yield start, start + length, _shown(frame, _aspect(frame, stream))
            done.append(start)


@contextmanager
def _told_broken(path: Path, done: list) -> Iterator[None]:
    """Turns what PyAV raises for a damaged film, after so many frames, into a sentence. Raises OSError."""
    try:
        yield
    except av.FFmpegError as error:
        raise OSError(
            f"Got {path}, damaged after {len(done)} frames ({error.strerror}). Needed is a whole file. "
            "Copy it again, or cut it before that place."
        ) from None


def _aspect(frame: av.VideoFrame, stream: av.VideoStream) -> float:
    """Width of a pixel over its height."""
    return float(stream.sample_aspect_ratio or stream.codec_context.sample_aspect_ratio or 1) or 1.0


def _shown(frame: av.VideoFrame, aspect: float) -> Tensor:
    """Frame [H, W, 3] as a player shows it: the file's matrix and range, square pixels, upright."""
    deep = any(part.bits > 8 for part in frame.format.components)
    values = frame.to_ndarray(format="rgb48le" if deep else "rgb24")
    pixels = torch.from_numpy(values.astype(np.float32) if deep else values).float().div_(65535 if deep else 255)
    height, width, _ = pixels.shape
    if abs(aspect - 1) > 1e-3:
        size = (height, round(width * aspect)) if aspect > 1 else (round(height / aspect), width)
        wide = F.interpolate(pixels.movedim(-1, 0)[None], size, mode="bicubic", antialias=True).clamp(0, 1)
        pixels = wide[0].movedim(0, -1)
    return oriented(pixels[None], *_orientation(frame))[0]


def _orientation(frame: av.VideoFrame) -> tuple[bool, bool, bool]:
    """Of the display matrix: whether it swaps the axes, and mirrors left and right, top and bottom after that."""
    try:
        matrices = [data for data in frame.side_data if data.type.name == "DISPLAYMATRIX"]
    except ValueError:  # there is side data of a kind that this PyAV has no name for; it still tells the rotation
        turn = round(getattr(frame, "rotation", 0) / 90) % 4
        return turn % 2 == 1, turn in (2, 3), turn in (1, 2)
    for data in matrices:
        a, b, _, c, d, *_ = struct.unpack("=9i", bytes(data)[:36])
        if abs(b) + abs(c) > abs(a) + abs(d):
            return True, c < 0, b < 0
        return False, a < 0, d < 0
    return False, False, False
