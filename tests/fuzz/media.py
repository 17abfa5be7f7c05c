"""Small clips and pictures of every kind that is read, damaged, and what killed runs have left, recovered."""

import os
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from random import Random

import av
import numpy as np
import torch
from PIL import Image

from sf_core.video import open_clip, read_video, recover
from sf_core.video.write import PLAYABLE, QUICK
from tests.fuzz.files import damaged, near

PIXELS = np.random.default_rng(0).integers(0, 255, (6, 4, 6, 3), np.uint8).repeat(4, 1).repeat(4, 2)  # [T, H, W, 3]
FILMS = {  # suffix: (container, codec, pixel format)
    "mp4": ("mp4", "libx264", "yuv420p"),
    "mov": ("mov", "mpeg4", "yuv420p"),
    "mkv": ("matroska", "libx264", "yuv444p"),
    "webm": ("webm", "libvpx-vp9", "yuv420p"),
    "avi": ("avi", "mpeg4", "yuv420p"),
    "ts": ("mpegts", "mpeg2video", "yuv420p"),
    "y4m": ("yuv4mpegpipe", "wrapped_avframe", "yuv420p"),
    "flv": ("flv", "flv", "yuv420p"),
    "ogv": ("ogg", "libtheora", "yuv420p"),
}
PICTURES = ("png", "jpg", "webp", "gif", "tiff", "bmp", "tga", "ppm", "ico", "avif", "pcx", "jp2")
LARGEST = 2**21  # pixels of what is read
SUFFIXES = ("mp4", "png", "jpg", "gif", "webm", "y4m", "tif", "bin", "txt", "svg", "m3u8", "heic", "mpo", "psd", "exr")


def media(folder: Path) -> Callable[[Random], object]:
    """One file damaged, and read as a start or source is; or a leftover damaged, and recovered."""
    originals = [*films(folder), *pictures(folder)]
    leftovers = [(suffix, leftover(folder, suffix)) for suffix in QUICK]
    place = folder / "case"
    place.mkdir()

    def case(random: Random) -> object:
        try:
            if random.random() < 0.15:
                return recovered(random, *random.choice(leftovers), place)
            return read(random, *random.choice(originals), place)
        finally:
            for path in place.iterdir():
                path.unlink()

    return case


def read(random: Random, suffix: str, data: bytes, place: Path) -> object:
    """A file, or a folder of it and others, through all that a start or source goes through."""
    suffix = suffix if random.random() < 0.8 else random.choice(SUFFIXES)
    for number in range(random.choice((1, 1, 1, 3))):
        (place / f"f{number}.{suffix}").write_bytes(mutated(random, data))
    path = random.choice((place / f"f0.{suffix}", place)) if random.random() < 0.3 else place / f"f0.{suffix}"
    clip = open_clip(path)
    size = random.choice(((16, 16), (32, 48), None))
    fps, most = random.choice((None, 16, 1, 120)), random.choice((None, 1, 5, 1000))
    count = clip.count(fps, 200 if most is None else min(most, 200))
    if clip.width * clip.height > LARGEST:
        return count  # is as large as it says, and takes its time
    frames = read_video(path, min(most or 200, 200), size, fps)
    assert frames.ndim == 4 and frames.shape[3] == 3 and frames.dtype == torch.float32
    assert bool(((frames >= 0) & (frames <= 1)).all()), "values outside 0..1"
    assert size is None or frames.shape[1:3] == size
    return count


def recovered(random: Random, suffix: str, data: bytes, place: Path) -> object:
    """What a killed run has left is finished, named or removed, and never raises; what is finished plays."""
    name = f"x.unfinished-{random.randrange(10**6)}{suffix}"
    cut = data[: random.randrange(len(data) + 1)]
    (place / name).write_bytes(mutated(random, cut) if random.random() < 0.7 else cut)
    if random.random() < 0.2:
        (place / f".{name}").write_bytes(random.randbytes(random.randrange(300)))
    done = recover(place)
    left = sorted(os.listdir(place))
    assert left in ([], [name], [path.name for path in done]), left
    return [read_video(path) for path in done]


# --- Valid files -----------------------------------------------------------------------------------------------------


def film(path: Path, form: tuple[str, str, str], options: dict | None = None, quick: dict | None = None) -> bytes:
    container, codec, pixels = form
    with av.open(str(path), "w", format=container, options=options or {}) as file:
        stream = file.add_stream(codec, rate=16)
        stream.height, stream.width, stream.pix_fmt = PIXELS.shape[1], PIXELS.shape[2], pixels
        stream.options = quick or {}
        for image in PIXELS:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format=pixels)))
        file.mux(stream.encode())
    return path.read_bytes()


def films(folder: Path) -> list[tuple[str, bytes]]:
    """(suffix, content) of a clip in each container that this PyAV writes."""
    found = []
    for suffix, form in FILMS.items():
        if form[1] in av.codecs_available and form[0] in av.formats_available:
            found.append((suffix, film(folder / f"film.{suffix}", form)))
    return found


def leftover(folder: Path, suffix: str) -> bytes:
    """A clip as a killed run leaves it."""
    codec = {".mp4": "libx264", ".webm": "libvpx-vp9"}[suffix]
    return film(folder / f"left{suffix}", (suffix[1:], codec, "yuv420p"), PLAYABLE[suffix], QUICK[suffix])


def pictures(folder: Path) -> list[tuple[str, bytes]]:
    """(suffix, content) of a picture in each format and mode that this Pillow writes, and of animations."""
    Image.init()
    images, found = [Image.fromarray(image) for image in PIXELS], []
    deep = Image.fromarray(PIXELS[0, ..., 0].astype(np.uint16) * 257)
    exif = Image.Exif()
    exif[0x0112] = 6
    modes = [images[0], images[0].convert("RGBA"), images[0].convert("P"), images[0].convert("LA"), deep]
    for suffix in PICTURES:
        kind = Image.registered_extensions().get(f".{suffix}")
        if kind not in Image.SAVE:
            continue
        for image in modes:
            buffer = BytesIO()
            try:
                image.save(buffer, kind, **({"exif": exif} if suffix in ("jpg", "png", "webp") else {}))
            except (OSError, ValueError, KeyError):
                continue  # a mode that the format does not hold
            found.append((suffix, buffer.getvalue()))
        if kind in ("GIF", "PNG", "WEBP", "AVIF", "TIFF"):
            buffer = BytesIO()
            images[0].save(buffer, kind, save_all=True, append_images=images[1:], duration=70)
            found.append((suffix, buffer.getvalue()))
    found.append(("tif", _float_tiff()))
    return found


def _float_tiff() -> bytes:
    buffer = BytesIO()
    Image.fromarray(PIXELS[0, ..., 0].astype(np.float32) / 255).save(buffer, "TIFF")
    return buffer.getvalue()


# --- Damage ----------------------------------------------------------------------------------------------------------


def mutated(random: Random, data: bytes) -> bytes:
    how = random.randrange(5)
    if how == 0:
        return damaged(random, data)
    if how == 1 and data.startswith(b"\x89PNG"):
        return chunks(random, data)
    if how == 2:
        return numbers(random, data)
    return near(random, data, random.choice((2, 3)))


def chunks(random: Random, data: bytes) -> bytes:
    """A PNG with a chunk changed, its checksum corrected."""
    at, out = 8, bytearray(data[:8])
    wanted = random.randrange(6)
    while at < len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        if wanted == 0:
            body = damaged(random, body)
        wanted -= 1
        out += len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")
        at += 12 + length
    return bytes(out)


def numbers(random: Random, data: bytes) -> bytes:
    """Some aligned or unaligned numbers replaced by extreme ones: sizes, counts, times."""
    data = bytearray(data)
    for _ in range(random.choice((1, 2, 4))):
        width = random.choice((1, 2, 4, 8))
        if len(data) < width:
            break
        at = random.randrange(min(len(data) - width + 1, random.choice((64, 600, len(data)))))
        value = random.choice((0, 1, 2**7, 2**8 - 1, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63)) % 256**width
        data[at : at + width] = value.to_bytes(width, random.choice(("big", "little")))
    return bytes(data)
