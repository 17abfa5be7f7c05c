"""Frames to files and back: mp4, webm, gif, or a folder of PNGs, by the name of the file.

Frames are handed in piece by piece and go straight to the encoder, so memory does not grow with the video. Everything
is written beside its destination under another name and moved there when it is whole: an error or ^C leaves what was
there before, or, where that is asked for, ends the video at what had been made.

T frames, H W size in pixels.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path

import av
import imageio.v3 as imageio
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

FRAME_NAME = re.compile(r"frame_\d{5,}\.png")
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
SMALL = 128 * 128  # pixels of an image that takes little time, whatever is done with it
SAME_RATE = 0.05  # of a rate; nobody sees it, and containers round
NAMES = "Use a name that ends in .mp4, .webm or .gif, or in / for a folder of PNGs."


def save_video(
    path: str | Path,
    frames: Tensor | Iterable[Tensor],
    fps: float = 16,
    keep: bool = False,
    metadata: dict[str, str] | None = None,
) -> int:
    """Writes frames [T, H, W, 3] in 0..1, or an iterable of such pieces; returns how many frames were written.

    The format goes by the name: .mp4 (H.264), .webm (VP9), .gif (whose clock has 100 ticks a second), or a folder of
    PNGs when it ends in / or has no suffix. An existing video is replaced.

    keep      where `frames` raises, the frames before that become a whole video before the exception goes on
    metadata  entries of the container, for .mp4 and .webm

    Raises ValueError for a name, size or rate that cannot be written, OSError when the place cannot be written to.
    """
    check_destination(path)
    if not 1 <= fps <= 1000:
        raise ValueError(f"Got {fps} frames per second; a video needs 1 to 1000. The models make 16.")
    write, target = WRITERS[_kind(path)], Path(path).resolve()
    partial = target.with_name(f".{target.stem}.{os.getpid()}.partial{target.suffix}")
    images = _Images(frames, keep)
    try:
        count = write(partial, images, fps, metadata or {})
        _move(partial, target)
    finally:
        _remove(partial)
        images.raise_again()
    return count


def read_video(
    path: str | Path, most: int | None = None, size: tuple[int, int] | None = None, fps: float | None = None
) -> Tensor:
    """The frames [T, H, W, 3] of a video file, a folder of images or one image, float32 in 0..1; the first `most`.

    size   (H, W) they are `fitted` to, each as it is read, so that a large video is never held at its own size
    fps    frames are left out or repeated so that it has this rate at the same speed; images have no rate

    Raises OSError when it cannot be read, ValueError when it holds no frames.
    """
    path, rate = Path(path), None
    if _kind(path) in PICTURES:
        images = iter([imageio.imread(path, mode="RGB")])
    elif path.is_dir():
        images = (imageio.imread(file, mode="RGB") for file in sorted(path.glob("*.png")))
    elif _kind(path) == ".gif":
        images = imageio.imiter(path, plugin="pillow", mode="RGB")
        rate = 1000 / (imageio.immeta(path, plugin="pillow").get("duration") or 100)  # ms; 100 is what browsers take
    else:
        images = imageio.imiter(path, plugin="pyav")
        rate = imageio.immeta(path, plugin="pyav").get("fps")
    if rate and fps and abs(rate / fps - 1) > SAME_RATE:
        images = _at_rate(images, rate / fps)
    pictures = (torch.from_numpy(image).float().div_(255)[None] for image in islice(images, most))
    frames = [fitted(picture, *size) if size else picture for picture in pictures]
    if not frames:
        raise ValueError(f"Got {path}, which holds no frames. Give a video file or a folder of PNGs.")
    return torch.cat(frames)


def _at_rate(images: Iterator[np.ndarray], step: float) -> Iterator[np.ndarray]:
    """The image that is shown at each of the times 0, step, 2 step, ..., counted in images."""
    wanted = 0
    for number, image in enumerate(images):
        while int(wanted * step + 1e-6) == number:  # a rate is seldom exact
            yield image
            wanted += 1


def fitted(frames: Tensor, height: int, width: int) -> Tensor:
    """Frames [T, H, W, 3] scaled until they cover `height` x `width` pixels, and cut to that around their middle."""
    old = frames.shape[1:3]
    scale = max(height / old[0], width / old[1])
    size = [max(new, round(scale * side)) for new, side in zip((height, width), old)]
    scaled = frames.movedim(-1, 1)
    if size != list(old):
        scaled = F.interpolate(scaled, size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return scaled[:, :, top : top + height, left : left + width].movedim(1, -1)


def contact_sheet(frames: Tensor, labels: Iterable[object] | None = None, columns: int = 6) -> Image.Image:
    """One picture of frames [T, H, W, 3] in 0..1, row by row, each under its label (its number by default)."""
    count, height, width, _ = frames.shape
    scale = max(1, round(128 / min(height, width)))  # small frames are enlarged
    height, width, line, gap = height * scale, width * scale, 16, 4
    columns = min(columns, count)
    rows = -(-count // columns)
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + line + gap) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (image, label) in enumerate(zip(_images(frames), range(count) if labels is None else labels)):
        x, y = gap + i % columns * (width + gap), i // columns * (height + line + gap)
        draw.text((x, y + 3), str(label), fill="black")
        sheet.paste(Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST), (x, y + line))
    return sheet


def check_destination(path: str | Path) -> None:
    """Raises ValueError or OSError if a video cannot be written there, before the work of making one."""
    kind, target = _kind(path), Path(path).resolve()
    if kind not in WRITERS:
        raise ValueError(f"Got {str(path)!r}; videos cannot be written as {kind!r}. {NAMES}")
    if kind in CODECS and CODECS[kind] not in av.codecs_available:
        raise ValueError(
            f"Got a PyAV without {CODECS[kind]}, which {kind} needs. Reinstall it (pip install av), or use .gif."
        )
    if kind and target.is_dir():
        raise IsADirectoryError(f"Got {str(path)!r}, which is a folder. {NAMES}")
    if not kind and target.exists() and not _holds_only_frames(target):
        raise FileExistsError(f"Got {str(path)!r}, which is not a folder of frames. Choose a new or an empty folder.")
    check_folder(path)


def check_folder(path: str | Path) -> None:
    """Raises OSError if no file can be made beside `path`."""
    folder = Path(path).resolve().parent
    if not folder.is_dir():
        raise FileNotFoundError(f"Got {str(path)!r}, but there is no folder {str(folder)!r}. Make it first.")
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        reason = error.strerror or error
        raise PermissionError(f"Got {str(path)!r}, but cannot write there: {reason}. Choose another folder.") from None


def _kind(path: str | Path) -> str:
    return "" if str(path).endswith(("/", os.sep)) else Path(path).suffix.lower()


def _holds_only_frames(folder: Path) -> bool:
    return folder.is_dir() and all(FRAME_NAME.fullmatch(file.name) for file in folder.iterdir())


def _images(frames: Tensor | Iterable[Tensor]) -> Iterator[np.ndarray]:
    """Each frame as uint8 [H, W, 3]."""
    for piece in [frames] if isinstance(frames, Tensor) else frames:
        if piece.ndim != 4 or piece.shape[-1] != 3:
            raise ValueError(
                f"Got frames of shape {list(piece.shape)}; a video is written from [frames, height, width, 3]."
            )
        yield from (piece.clamp(0, 1) * 255).round().to("cpu", torch.uint8).numpy()


class _Images:
    """Each frame as uint8 [H, W, 3]. With `keep` an exception ends them and is `stopped` afterwards."""

    def __init__(self, frames: Tensor | Iterable[Tensor], keep: bool) -> None:
        self.images, self.keep = _images(frames), keep
        self.stopped: BaseException | None = None

    def __iter__(self) -> Iterator[np.ndarray]:
        return self

    def __next__(self) -> np.ndarray:
        try:
            return next(self.images)
        except StopIteration:
            raise
        except BaseException as error:
            if not self.keep:
                raise
            self.stopped = error
            raise StopIteration from None

    def raise_again(self) -> None:
        """Raises what has ended the frames, and lets go of it: its traceback holds all that made them."""
        stopped, self.stopped = self.stopped, None
        try:
            if stopped is not None:
                raise stopped
        finally:
            del stopped


def _write_av(path: Path, images: Iterator[np.ndarray], fps: float, metadata: dict[str, str]) -> int:
    count = 0
    # Without this flag mp4 drops entries that it has no name of its own for.
    options = {"options": {"movflags": "use_metadata_tags"}} if path.suffix == ".mp4" else {}
    with imageio.imopen(path, "w", plugin="pyav", **options) as file:
        file.container_metadata.update(metadata)
        file.init_video_stream(CODECS[path.suffix.lower()], fps=fps, pixel_format="yuv420p")
        for image in images:
            _check_even(image)
            file.write_frame(image)
            count += 1
        _check_any(count)
    return count


def _write_gif(path: Path, images: Iterator[np.ndarray], fps: float, metadata: dict[str, str]) -> int:
    count = 0

    def picture(image: np.ndarray) -> Image.Image:
        nonlocal count
        count += 1
        return indexed(Image.fromarray(image))

    pictures = map(picture, images)
    first = next(pictures, None)
    _check_any(count)
    first.save(path, save_all=True, append_images=pictures, duration=round(1000 / fps), loop=0)
    return count


def indexed(image: Image.Image) -> Image.Image:
    """The image in 256 colours. Pillow's median cut forgets small areas; where there is time, in small images, colours
    are chosen so that all are covered, and moved to the middle of what they stand for."""
    small = image.width * image.height <= SMALL
    choice = {"method": Image.Quantize.MAXCOVERAGE, "kmeans": 1} if small else {}
    return image.quantize(dither=Image.Dither.NONE, **choice)


def _write_folder(path: Path, images: Iterator[np.ndarray], fps: float, metadata: dict[str, str]) -> int:
    count = 0
    path.mkdir()
    for image in images:
        imageio.imwrite(path / f"frame_{count:05d}.png", image)
        count += 1
    _check_any(count)
    return count


CODECS = {".mp4": "libx264", ".webm": "libvpx-vp9"}
WRITERS: dict[str, Callable[[Path, Iterator[np.ndarray], float, dict[str, str]], int]] = {
    ".mp4": _write_av,
    ".webm": _write_av,
    ".gif": _write_gif,
    "": _write_folder,
}


def _check_even(image: np.ndarray) -> None:
    height, width, _ = image.shape
    if height % 2 or width % 2:
        raise ValueError(
            f"Got frames of {width} x {height} pixels; mp4 and webm need even sizes. Crop them, or use .gif."
        )


def _check_any(count: int) -> None:
    if not count:
        raise ValueError("Got no frames to write; a video needs at least one.")


def _move(partial: Path, target: Path) -> None:
    if target.is_dir():
        shutil.rmtree(target)
    os.replace(partial, target)


def _remove(partial: Path) -> None:
    if partial.is_dir():
        shutil.rmtree(partial)
    else:
        partial.unlink(missing_ok=True)
