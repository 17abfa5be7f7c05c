"""Pictures: what Pillow opens, as frames; and sheets of frames as pictures.

A picture is turned as its EXIF orientation says, what is transparent lies on white, and 16-bit and float values are
kept. H W size in pixels.
"""

from __future__ import annotations

import errno
import os
import struct
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import av
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps, UnidentifiedImageError
from torch import Tensor

ANIMATED = ("GIF", "PNG", "WEBP", "AVIF")  # the pages of other formats are not frames of a film
STUBS = {"MPEG", "BUFR", "GRIB", "HDF5", "WMF"}  # Pillow tells them by their first bytes and cannot decode them
HEIC = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
AVIF = {b"avif", b"avis"}
PLUGINS = {"HEIC": "pillow-heif", "AVIF": "pillow-avif-plugin"}
DAMAGED = (  # what Pillow's plugins, and PyAV for deep colour, raise for damaged files
    OSError, SyntaxError, EOFError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, ArithmeticError,
    AssertionError, StopIteration, struct.error, zlib.error, av.FFmpegError,
)  # fmt: skip
INTEGERS = ("I", "I;16", "I;16L", "I;16B", "I;16N")


def open_picture(path: Path) -> Image.Image | None:
    """The picture in a file, told by its content; None if it is something else. Raises OSError for a damaged one."""
    with path.open("rb") as file:
        head = file.read(16)
    brand = head[8:12] if head[4:8] == b"ftyp" else b""
    if brand in HEIC:
        _register_heif(path)
    elif brand and brand not in AVIF:
        return None
    Image.init()
    formats = [name for name in Image.OPEN if name not in STUBS]
    with told_damaged(path):
        try:
            return Image.open(path, formats=formats)
        except UnidentifiedImageError:
            kind = "AVIF" if brand in AVIF else "HEIC" if brand in HEIC else None
            if kind is None:
                return None
            raise OSError(
                f"Got {path}, a picture in {kind}, which this Pillow cannot read. Needed is a plugin. Install it "
                f"(pip install {PLUGINS[kind]}), or save the picture as PNG."
            ) from None


def _register_heif(path: Path) -> None:
    try:
        import_module("pillow_heif").register_heif_opener()
    except ImportError:
        raise OSError(
            f"Got {path}, a picture in HEIC, which Pillow reads with a plugin. Needed is pillow-heif. Install it "
            "(pip install pillow-heif), or save the picture as PNG."
        ) from None


@contextmanager
def told_damaged(path: Path) -> Iterator[None]:
    """Turns what Pillow raises for a damaged picture into a sentence. Raises OSError."""
    try:
        yield
    except Image.DecompressionBombError as error:
        raise OSError(f"Got {path}, which is too large: {error}. Save a smaller copy.") from None
    except DAMAGED as error:
        if isinstance(error, OSError) and str(error).startswith("Got "):
            raise
        raise OSError(
            f"Got {path}, a picture that cannot be read: {error}. Needed is a whole one. Save it again as PNG."
        ) from None


def is_animated(image: Image.Image) -> bool:
    return image.format in ANIMATED and getattr(image, "n_frames", 1) > 1


def read_picture(path: Path, image: Image.Image) -> Tensor:
    """Frame [H, W, 3] of an opened picture, float32 in 0..1. Raises OSError for a damaged one."""
    with told_damaged(path):
        deep = _deep(path, image)
        return frame_of(image) if deep is None else deep


def frame_of(image: Image.Image) -> Tensor:
    """Frame [H, W, 3] of a picture in any mode, float32 in 0..1: turned upright, on white where transparent."""
    image = ImageOps.exif_transpose(image)
    if image.mode in INTEGERS or image.mode == "F":
        return _grey(image)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        return _on_white(torch.from_numpy(np.array(image.convert("RGBA"))).float().div_(255))
    return torch.from_numpy(np.array(image.convert("RGB"))).float().div_(255)


def _grey(image: Image.Image) -> Tensor:
    """Frame [H, W, 3] of one channel of 16 or 32 bits: integers up to 65535, floats from 0 to 1."""
    values = np.nan_to_num(np.asarray(image).astype(np.float32))
    highest = 1.0 if image.mode == "F" else 65535.0
    if values.max() > 2 * highest:
        raise OSError(f"values up to {values.max():g}, where {highest:g} is white")
    return torch.from_numpy(values / highest).clamp(0, 1)[..., None].expand(-1, -1, 3).clone()


def _deep(path: Path, image: Image.Image) -> Tensor | None:
    """Frame [H, W, 3] of a colour picture with 16 bits a channel, which Pillow would cut to 8; else None."""
    bits = getattr(image, "tag_v2", {}).get(258, (8,))
    if image.format == "PNG":
        with path.open("rb") as file:
            head = file.read(26)
        bits = (head[24],) * (3 if head[25] in (2, 4, 6) else 1)
    if image.format not in ("PNG", "TIFF") or len(bits) < 2 or bits[0] != 16:
        return None
    with av.open(f"file:{path.resolve()}") as file:
        picture = next(file.decode(video=0))
    values = picture.to_ndarray(format="rgba64le").astype(np.float32) / 65535
    pixels = _on_white(torch.from_numpy(values))
    orientation = image.getexif().get(0x0112, 1)
    return oriented(pixels[None], *ORIENTATIONS.get(orientation, (False, False, False)))[0]


# EXIF orientation -> swap the axes, then mirror left and right, then top and bottom
ORIENTATIONS = {
    2: (False, True, False),
    3: (False, True, True),
    4: (False, False, True),
    5: (True, False, False),
    6: (True, True, False),
    7: (True, True, True),
    8: (True, False, True),
}


def oriented(frames: Tensor, transpose: bool, mirror: bool, flip: bool) -> Tensor:
    """Frames [T, H, W, 3] turned: axes swapped, then left and right, then top and bottom."""
    if transpose:
        frames = frames.transpose(1, 2)
    return frames.flip([dim for dim, wanted in ((2, mirror), (1, flip)) if wanted])


def _on_white(pixels: Tensor) -> Tensor:
    """Pixels [H, W, 4] laid on white: [H, W, 3]."""
    colour, alpha = pixels[..., :3], pixels[..., 3:]
    return colour * alpha + (1 - alpha)


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
    for i, (image, label) in enumerate(zip(as_images(frames), range(count) if labels is None else labels)):
        x, y = gap + i % columns * (width + gap), i // columns * (height + line + gap)
        draw.text((x, y + 3), str(label), fill="black")
        sheet.paste(Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST), (x, y + line))
    return sheet


def as_images(frames: Tensor | Iterable[Tensor]) -> Iterator[np.ndarray]:
    """Each frame as uint8 [H, W, 3]. Raises ValueError for another shape."""
    for piece in [frames] if isinstance(frames, Tensor) else frames:
        if piece.ndim != 4 or piece.shape[-1] != 3:
            raise ValueError(
                f"Got frames of shape {list(piece.shape)}; a video is written from [frames, height, width, 3]."
            )
        yield from (piece.clamp(0, 1) * 255).round().to("cpu", torch.uint8).numpy()


def save_picture(path: str | Path, image: Image.Image) -> None:
    """Writes a picture whole or not at all; an earlier one is replaced. Raises OSError, also for a full disk."""
    target = Path(path).resolve()
    hidden = target.with_name(f".{os.getpid()}.picture{target.suffix}")
    try:
        with told_full(path):
            image.save(hidden)
            os.replace(hidden, target)
    finally:
        hidden.unlink(missing_ok=True)


@contextmanager
def told_full(path: str | Path, kept: str = "") -> Iterator[None]:
    """Turns the system's error for a full disk into a sentence. Raises OSError (ENOSPC)."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise OSError(
            errno.ENOSPC, f"Got a full disk while writing {str(path)!r}. {kept}Make room and run again."
        ) from None
