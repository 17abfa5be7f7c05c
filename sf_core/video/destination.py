"""Where things are written: checked before the work of making them, so that no input and no foreign thing is lost."""

from __future__ import annotations

import os
import re
import secrets
import unicodedata
from collections.abc import Mapping
from pathlib import Path, PureWindowsPath

import av
from PIL import Image

CODECS = {".mp4": "libx264", ".webm": "libvpx-vp9"}
KINDS = (*CODECS, ".gif", "")
NAMES = "Use a name that ends in .mp4, .webm or .gif, or in / for a folder of PNGs."
SOFTWARE = "Self Forcing for ComfyUI"  # in every PNG of a folder that was written here
LITTER = {"thumbs.db", "ehthumbs.db", "desktop.ini", ".ds_store"}
LONGEST = 255  # bytes of a name, where the system does not tell
LONGEST_PATH = 4095  # bytes of a path, of Linux; other systems refuse it themselves
LONGEST_SHOWN = 100  # letters of a path in an error
STEM = 200  # bytes of a name's stem that are kept while it is unfinished
BESIDE = "..unfinished-1234567"  # what is added to a name then
ON_WINDOWS = os.name == "nt"
RESERVED = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[1-9\u00b9\u00b2\u00b3])", re.I)


def kind_of(path: str | Path) -> str:
    return "" if str(path).endswith(("/", os.sep)) else Path(path).suffix.lower()


def check_destination(path: str | Path) -> None:
    """Raises ValueError or OSError if a video cannot be written there, before the work of making one."""
    check_names(path)
    kind, target = kind_of(path), Path(os.path.realpath(path))
    if kind not in KINDS:
        raise ValueError(f"Got {str(path)!r}; videos cannot be written as {kind!r}. {NAMES}")
    if kind in CODECS and CODECS[kind] not in av.codecs_available:
        raise ValueError(
            f"Got a PyAV without {CODECS[kind]}, which {kind} needs. Reinstall it (pip install av), or use .gif."
        )
    check_folder(path)
    if kind and target.is_dir():
        raise IsADirectoryError(f"Got {str(path)!r}, which is a folder. {NAMES}")
    if not kind and target.exists() and not holds_own_frames(target):
        raise FileExistsError(
            f"Got {str(path)!r}, which holds what was not written here. Choose a new or an empty folder."
        )


def check_folder(path: str | Path) -> None:
    """Raises ValueError or OSError if no file of that name can be made: no folder, no permission, no such names."""
    check_names(path)
    target = Path(os.path.realpath(path))
    folder = target.parent
    check_names(target)
    if not folder.is_dir():
        raise FileNotFoundError(f"Got {str(path)!r}, but there is no folder {str(folder)!r}. Make it first.")
    longest = min(_length(target.name), STEM + len(".-01234567.webm")) + len(BESIDE)
    probe = folder / f".{secrets.token_hex(8)}".ljust(longest, "w")
    try:
        os.close(os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        os.unlink(probe)
    except OSError as error:
        reason = error.strerror or error
        raise PermissionError(f"Got {str(path)!r}, but cannot write there: {reason}. Choose another folder.") from None


def check_names(path: str | Path) -> None:
    """Raises ValueError or OSError where the system has no such names for files and folders."""
    shown = _shortened(str(path))
    try:
        length = len(os.fsencode(path))
    except UnicodeEncodeError:
        raise ValueError(f"Got {shown!a}, which this system's file names cannot hold. Use plain letters.") from None
    if "\0" in str(path):
        raise ValueError(f"Got {shown!r}, which has a null character in it. Leave it out.")
    if ON_WINDOWS and (fault := _windows_fault(str(path))):
        raise ValueError(f"Got {shown!r}, where {fault}. Use letters, digits, - and _.")
    for name in str(path).split(os.sep):
        if (size := _length(name)) > (longest := _longest(path)):
            raise OSError(f"Got a name of {size} bytes, {name[:24]!r}...; {longest} are allowed. Use a shorter one.")
    if length > LONGEST_PATH and not ON_WINDOWS:
        raise OSError(f"Got {shown!r}, a path of {length} bytes; {LONGEST_PATH} are allowed. Use a shorter one.")


def _shortened(name: str) -> str:
    return name if len(name) <= LONGEST_SHOWN else f"{name[:LONGEST_SHOWN]}..."


def _windows_fault(path: str) -> str | None:
    """Why Windows has no such file; None where it can have it."""
    given = PureWindowsPath(path)
    for part in given.parts[1 if given.anchor else 0 :]:
        if part in (".", ".."):
            continue
        if odd := sorted({letter for letter in part if letter in '<>:"|?*' or ord(letter) < 32}):
            return f"{part!r} has {' '.join(odd)!r} in it, which Windows allows in no name"
        if part[-1] in " .":
            return f"{part!r} ends in a dot or a space, which Windows leaves out"
        if RESERVED.fullmatch(part.split(".")[0].rstrip()):
            return f"{part!r} is the name of a device on Windows"
    return None


def _length(name: str) -> int:
    """Of a name, as the file system counts it."""
    return len(name.encode("utf-16-le", "surrogatepass")) // 2 if ON_WINDOWS else len(os.fsencode(name))


def _longest(path: str | Path) -> int:
    """Bytes of a name in the nearest folder of a path that is there."""
    for folder in Path(path).parents:
        try:
            return os.pathconf(folder, "PC_NAME_MAX")
        except (AttributeError, ValueError):
            break
        except OSError:
            continue
    return LONGEST


def check_outputs(outputs: Mapping[str, str | Path | None], inputs: Mapping[str, str | Path | None]) -> None:
    """Raises ValueError where an output would replace an input or another output.

    Both by the names that the user knows them by: {"--out": "fox.mp4", "--preview": None}, {"--start": "fox.png"}.
    """
    written = {name: Path(os.path.realpath(path)) for name, path in outputs.items() if path}
    read = {name: Path(os.path.realpath(path)) for name, path in inputs.items() if path}
    for name, path in written.items():
        for other, source in read.items():
            if _same(path, source) or (path.is_dir() and _inside(source, path)) or _is_within(path, source):
                raise ValueError(
                    f"Got {name} {str(outputs[name])!r}, which would replace {other} {str(inputs[other])!r}. "
                    f"An output needs a place of its own. Give {name} another name."
                )
    names = list(written)
    for i, name in enumerate(names):
        for other in names[:i]:
            one, two = written[name], written[other]
            if _same(one, two) or _inside(one, two) or _inside(two, one):
                raise ValueError(
                    f"Got {name} {str(outputs[name])!r} and {other} {str(outputs[other])!r}, of which one would "
                    f"replace the other. Each output needs a place of its own. Give {name} another name."
                )


def _same(one: Path, two: Path) -> bool:
    """Whether both are one file or folder: by another link, or by a name that only some file systems tell apart."""
    if one.exists() and two.exists():
        return os.path.samefile(one, two)
    return _folded(one) == _folded(two)


def _folded(path: Path) -> str:
    return unicodedata.normalize("NFC", str(path)).casefold()


def _inside(path: Path, folder: Path) -> bool:
    return any(_same(parent, folder) for parent in path.parents)


def _is_within(path: Path, folder: Path) -> bool:
    """Whether an existing file is one of the files of a folder, under whatever name, or lies deeper in it."""
    if not path.exists() or not folder.is_dir():
        return False
    return _inside(path, folder) or any(_same(path, file) for file in folder.iterdir())


def holds_own_frames(folder: Path) -> bool:
    """Whether a folder holds nothing but frames that were written here, as their PNGs say."""
    return folder.is_dir() and all(_is_own_frame(file) for file in folder.iterdir())


def _is_own_frame(file: Path) -> bool:
    if file.name.lower() in LITTER or file.name.startswith("._"):
        return file.is_file()
    try:
        with Image.open(file, formats=["PNG"]) as image:
            return image.info.get("Software") == SOFTWARE
    except (OSError, SyntaxError, ValueError):
        return False
