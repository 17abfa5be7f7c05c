"""Frames into files: mp4, webm, gif, or a folder of PNGs, by the name of the file.

Frames are handed in piece by piece and go straight to the encoder, so memory does not grow with the video. What is
being written stands beside its destination as NAME.unfinished-NUMBER.mp4 and is moved there when it is whole. That file
plays at any moment, also after a crash or a full disk: gifs and folders of PNGs do so by themselves; of mp4 and webm,
whose encoders hold many frames back, a quick copy that holds none back is written along and removed at the end. What a
killed run has left is named NAME.recovered.mp4 by the next one in that folder.

T frames, H W size in pixels.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from fractions import Fraction
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, Protocol

import av
import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ..device import console_text
from .destination import CODECS, SOFTWARE, STEM, check_destination, kind_of
from .picture import as_images

try:
    import fcntl
except ImportError:  # Windows, where an open file cannot be renamed
    fcntl = None

log = logging.getLogger(__name__)

SMALL = 128 * 128  # pixels of an image that takes little time, whatever is done with it
UNFINISHED = re.compile(r"(?P<stem>.+)\.unfinished-\d+(?P<suffix>\.mp4|\.webm|\.gif|)")
HIDDEN = re.compile(r"\..+\.unfinished-\d+(\.mp4|\.webm)")
TICKS = 100  # a second, of a GIF's clock; browsers play delays of less than two ticks slowly
QUICK = {  # encoders that hold no frame back
    ".mp4": {"preset": "ultrafast", "tune": "zerolatency", "crf": "14"},
    ".webm": {"deadline": "realtime", "cpu-used": "8", "lag-in-frames": "0", "crf": "16", "b": "0"},
}
PLAYABLE = {  # containers that need no ending
    ".mp4": {"movflags": "frag_every_frame+empty_moov+default_base_moof+use_metadata_tags", "flush_packets": "1"},
    ".webm": {"live": "1", "cluster_time_limit": "1", "flush_packets": "1"},
}
FINAL = {".mp4": {"movflags": "use_metadata_tags+faststart"}, ".webm": {}}


class Writer(Protocol):
    """A video that is being written to `path`, where what has been added plays at any moment."""

    path: Path

    def add(self, image: np.ndarray) -> None: ...

    def finish(self) -> Path:
        """Ends the video; returns where the whole one is."""

    def stop(self) -> None:
        """Closes what is open after an error; what has been added stays at `path`."""


def save_video(
    path: str | Path,
    frames: Tensor | Iterable[Tensor],
    fps: float = 16,
    keep: bool = False,
    metadata: dict[str, str] | None = None,
) -> int:
    """Writes frames [T, H, W, 3] in 0..1, or an iterable of such pieces; returns how many frames were written.

    The format goes by the name: .mp4 (H.264), .webm (VP9), .gif (at `gif_rate`), or a folder of PNGs when it ends in /
    or has no suffix. An existing video is replaced.

    keep      where `frames` raises, the frames before that become a whole video before the exception goes on
    metadata  entries of the container, for .mp4 and .webm

    Raises ValueError for a name, size or rate that cannot be written, OSError when the place cannot be written to or
    the disk is full, which leaves what was written.
    """
    check_destination(path)
    if not 1 <= fps <= 1000:
        raise ValueError(f"Got {fps} frames per second; a video needs 1 to 1000. The models make 16.")
    target = Path(os.path.realpath(path))
    recover(target.parent)
    images, count = _Images(frames, keep), 0
    writer = _writer(target, kind_of(path), fps, metadata or {})
    try:
        for image in images:
            writer.add(image)
            count += 1
        if not count:
            raise ValueError("Got no frames to write; a video needs at least one.")
        _move(writer.finish(), target)
    except OSError as error:
        if error.errno != errno.ENOSPC or not count:
            raise
        writer.stop()
        raise _full(error, writer.path, target, count, keep) from None
    finally:
        writer.stop()
        _remove(writer.path)
        images.raise_again()
    return count


def _full(error: OSError, left: Path, target: Path, count: int, keep: bool) -> OSError:
    """The error of a full disk, once what was written has a name that stays."""
    name = target if keep else _free_name(target.with_name(f"{_short(target.stem)}.recovered{target.suffix}"))
    size = _size(left) / 2**20
    _move(left, name)
    return OSError(
        errno.ENOSPC,
        f"Got a full disk after {count} frames, of which {size:.1f} MiB are kept in {str(name)!r}. A longer video "
        "needs more in proportion. Make room, or write to another disk",
    )


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.iterdir()) if path.is_dir() else path.stat().st_size


def recover(folder: str | Path) -> list[Path]:
    """Finishes what runs that were killed have left in a folder, as NAME.recovered.mp4; returns these files."""
    done = []
    for left in sorted(Path(folder).iterdir()):
        if HIDDEN.fullmatch(left.name) and _is_left(left):
            left.unlink(missing_ok=True)
        elif (match := UNFINISHED.fullmatch(left.name)) and _is_left(left):
            name = _free_name(left.with_name(f"{match['stem']}.recovered{match['suffix']}"))
            try:
                if match["suffix"] in PLAYABLE:
                    _remux(left, name)
                    left.unlink(missing_ok=True)
                elif _size(left):
                    os.replace(left, name)
                else:
                    _remove(left)
                    continue
            except (OSError, ValueError, LookupError, RuntimeError, av.FFmpegError) as error:
                name.unlink(missing_ok=True)
                if left.is_file() and left.stat().st_size < 4096:  # a header without frames
                    left.unlink()
                    continue
                log.warning(
                    "%s is what an earlier run has left, and could not be finished: %s",
                    *map(console_text, (left, error)),
                )
                continue
            log.warning(
                "An earlier run was ended before its video was whole; what it had made is in %s", console_text(name)
            )
            done.append(name)
    return done


def _is_left(path: Path) -> bool:
    """Whether nobody is writing there any more: its lock is free, or, on Windows, it can be renamed."""
    try:
        if fcntl is None:
            os.rename(path, path)
            return True
        number = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        finally:
            os.close(number)
    except OSError:
        return False
    return True


def _lock(number: int) -> None:
    """Held until the file is closed, also by a process that is killed."""
    if fcntl is not None:
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # a file system without locks
            pass


def _remux(source: Path, target: Path) -> None:
    """Copies the packets of a film into an ordinary file."""
    hidden = target.with_name(f".{target.stem}.unfinished-{os.getpid()}{target.suffix}")
    try:
        with av.open(_url(source)) as old, av.open(_url(hidden), "w", options=FINAL[target.suffix]) as new:
            stream = new.add_stream_from_template(old.streams.video[0])
            new.metadata.update(old.metadata)
            count = 0
            for packet in old.demux(video=0):
                if packet.dts is not None and packet.size:
                    packet.stream = stream
                    new.mux(packet)
                    count += 1
        if not count:
            raise OSError("it holds no frames")
        with av.open(_url(hidden)) as new:  # some versions of PyAV copy no decoder settings: then it stays as it is
            whole = next(iter(_decoded(new)), None) is not None
        os.replace(hidden if whole else source, target)
    finally:
        hidden.unlink(missing_ok=True)


def _decoded(file: av.container.InputContainer) -> Iterator[av.VideoFrame]:
    try:
        yield from file.decode(video=0)
    except av.FFmpegError:
        return


def _free_name(path: Path) -> Path:
    names = [path, *(path.with_name(f"{path.stem}-{i}{path.suffix}") for i in range(2, 1000))]
    return next(name for name in names if not name.exists())


def _short(stem: str) -> str:
    """The stem of a name, short enough for what is added to it."""
    data = os.fsencode(stem)
    if len(data) <= STEM:
        return stem
    return f"{data[:STEM].decode(errors='ignore')}-{hashlib.sha256(data).hexdigest()[:8]}"


def _url(path: Path) -> str:
    return f"file:{path}"


# --- The writers -----------------------------------------------------------------------------------------------------


def _writer(target: Path, kind: str, fps: float, metadata: dict[str, str]) -> Writer:
    stem = _short(target.stem if kind else target.name)
    path = target.with_name(f"{stem}.unfinished-{os.getpid()}{kind}")
    if kind in CODECS:
        return _Film(path, fps, metadata)
    return _Gif(path, fps) if kind else _Folder(path)


class _Film:
    """mp4 and webm: the video in a hidden file, and the quick copy at `path`."""

    def __init__(self, path: Path, fps: float, metadata: dict[str, str]) -> None:
        self.path, self.hidden = path, path.with_name(f".{path.name}")
        self.suffix, self.fps, self.metadata = path.suffix, Fraction(fps).limit_denominator(65535), metadata
        self.size: tuple[int, int] | None = None
        self.files: list[BinaryIO] = []
        self.containers: list[av.container.OutputContainer] = []
        self.streams: list[av.VideoStream] = []
        self.count = self.good = 0

    def add(self, image: np.ndarray) -> None:
        height, width, _ = image.shape
        if self.size is None:
            _check_even(image)
            self._open(height, width)
        elif self.size != (height, width):
            raise ValueError(f"Got a frame of {width} x {height} pixels among others; all need one size. Resize them.")
        for number, (container, stream) in enumerate(zip(self.containers, self.streams)):
            self.good = self.files[-1].tell() if number else self.good
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = self.count, 1 / self.fps
            container.mux(stream.encode(frame))
        self.files[-1].flush()
        self.count += 1

    def _open(self, height: int, width: int) -> None:
        self.size = height, width
        for path, options, codec in ((self.hidden, FINAL, {}), (self.path, PLAYABLE, QUICK[self.suffix])):
            file = path.open("wb")
            _lock(file.fileno())
            self.files.append(file)
            place = file if options is PLAYABLE else _url(path)  # a faststart file is read again by its name
            container = av.open(place, "w", format=self.suffix[1:], options=options[self.suffix])
            container.metadata.update(self.metadata)
            stream = container.add_stream(CODECS[self.suffix], self.fps)
            stream.time_base, stream.pix_fmt = 1 / self.fps, "yuv420p"
            stream.width, stream.height, stream.options = width, height, codec
            stream.codec_context.colorspace, stream.codec_context.color_range = 5, 1  # BT.601, limited
            self.containers.append(container)
            self.streams.append(stream)

    def finish(self) -> Path:
        container, stream = self.containers[0], self.streams[0]
        container.mux(stream.encode())
        container.close()
        return self.hidden

    def stop(self) -> None:
        for container in self.containers[::-1]:
            try:
                container.close()
            except (OSError, av.FFmpegError):
                pass  # it is an error that has brought us here, or the quick copy, which needs no ending
        self.containers.clear()
        for file in self.files:
            try:
                file.close()
            except OSError:
                pass
        self.files.clear()
        self.hidden.unlink(missing_ok=True)


class _Gif:
    """A GIF that is ended after each frame; the next one is written over the end."""

    def __init__(self, path: Path, fps: float) -> None:
        self.path, self.ticks = path, _ticks(fps)
        self.file: BinaryIO | None = None
        self.before: np.ndarray | None = None
        rate = gif_rate(fps)
        if abs(rate / fps - 1) > 1e-6:
            level = logging.WARNING if abs(rate / fps - 1) > 0.05 else logging.INFO
            log.log(level, "A GIF cannot hold %g frames per second; this one plays at %.4g.", fps, rate)

    def add(self, image: np.ndarray) -> None:
        picture = indexed(Image.fromarray(image))
        shown = np.asarray(picture.convert("RGB"))
        height, width, _ = image.shape
        if self.before is None:
            self.file = self.path.open("wb", buffering=0)
            _lock(self.file.fileno())
            head = b"GIF89a" + width.to_bytes(2, "little") + height.to_bytes(2, "little") + b"\x70\0\0"
            _write_all(self.file, head + b"\x21\xff\x0bNETSCAPE2.0\x03\x01\0\0\0\x3b")
            box = (0, 0, width, height)
        elif self.before.shape != image.shape:
            raise ValueError(f"Got a frame of {width} x {height} pixels among others; all need one size. Resize them.")
        else:
            box = _changed(self.before, shown)
        data, at = _gif_frame(picture.crop(box), box, self.ticks), self.file.seek(-1, os.SEEK_END)
        try:
            _write_all(self.file, data + b"\x3b")
        except OSError:
            self.file.truncate(at + 1)
            self.file.seek(at)
            self.file.write(b"\x3b")
            raise
        self.before = shown

    def finish(self) -> Path:
        self.file.close()
        return self.path

    def stop(self) -> None:
        if self.file is not None:
            self.file.close()


def _write_all(file: BinaryIO, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def _changed(before: np.ndarray, now: np.ndarray) -> tuple[int, int, int, int]:
    """The box (left, top, right, bottom) in which two pictures differ; one pixel where they do not."""
    rows, columns = np.nonzero((before != now).any(-1))
    if not len(rows):
        return 0, 0, 1, 1
    return int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1


def _gif_frame(picture: Image.Image, box: tuple[int, int, int, int], ticks: int) -> bytes:
    """A picture of 256 colours as the blocks of a GIF: its delay, place, colours and pixels."""
    file = BytesIO()
    picture.save(file, "GIF", optimize=False, interlace=0)
    data = file.getvalue()
    bits = data[10] & 7
    colours, rest = data[13 : 13 + 3 * 2 ** (bits + 1)], data[13 + 3 * 2 ** (bits + 1) :]
    while rest[0] == 0x21:  # extensions
        end = 2
        while rest[end]:
            end += 1 + rest[end]
        rest = rest[end + 1 :]
    left, top, right, bottom = (side.to_bytes(2, "little") for side in (*box[:2], box[2] - box[0], box[3] - box[1]))
    control = b"\x21\xf9\x04\x04" + ticks.to_bytes(2, "little") + b"\0\0"  # later frames are drawn over this one
    return control + b"\x2c" + left + top + right + bottom + bytes([0x80 | bits]) + colours + rest[10:].rstrip(b"\x3b")


def _ticks(fps: float) -> int:
    return max(2, round(TICKS / fps))


def gif_rate(fps: float) -> float:
    """The frames per second at which a GIF plays that is written at `fps`: the nearest rate that browsers keep."""
    return TICKS / _ticks(fps)


def indexed(image: Image.Image) -> Image.Image:
    """The image in 256 colours. Pillow's median cut forgets small areas; where there is time, in small images, colours
    are chosen so that all are covered, and moved to the middle of what they stand for."""
    small = image.width * image.height <= SMALL
    choice = {"method": Image.Quantize.MAXCOVERAGE, "kmeans": 1} if small else {}
    return image.quantize(dither=Image.Dither.NONE, **choice)


class _Folder:
    """PNGs frame_00000.png, frame_00001.png, ..., which say by what they were written."""

    def __init__(self, path: Path) -> None:
        self.path, self.count, self.number = path, 0, None
        self.mark = PngInfo()
        self.mark.add_text("Software", SOFTWARE)

    def add(self, image: np.ndarray) -> None:
        if not self.count:
            self.path.mkdir()
            if fcntl is not None:
                self.number = os.open(self.path, os.O_RDONLY)
                _lock(self.number)
        file = self.path / f"frame_{self.count:05d}.png"
        part = file.with_suffix(".part")
        try:
            Image.fromarray(image).save(part, "PNG", pnginfo=self.mark)
            os.replace(part, file)
        finally:
            part.unlink(missing_ok=True)
        self.count += 1

    def finish(self) -> Path:
        self.stop()
        return self.path

    def stop(self) -> None:
        if self.number is not None:
            os.close(self.number)
            self.number = None


class _Images:
    """Each frame as uint8 [H, W, 3]. With `keep` an exception ends them and is `stopped` afterwards."""

    def __init__(self, frames: Tensor | Iterable[Tensor], keep: bool) -> None:
        self.images, self.keep = as_images(frames), keep
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


def _check_even(image: np.ndarray) -> None:
    height, width, _ = image.shape
    if height % 2 or width % 2:
        raise ValueError(
            f"Got frames of {width} x {height} pixels; mp4 and webm need even sizes. Crop them, or use .gif."
        )


def _move(partial: Path, target: Path) -> None:
    if not target.is_dir():
        os.replace(partial, target)
        return
    aside = target.with_name(f".{_short(target.name)}.replaced-{os.getpid()}")
    os.rename(target, aside)
    os.rename(partial, target)
    shutil.rmtree(aside)


def _remove(partial: Path) -> None:
    if partial.is_dir():
        shutil.rmtree(partial)
    else:
        partial.unlink(missing_ok=True)
