"""Any file of tensors -> names and memory-mapped tensors. Nothing in a file is ever executed.

Two kinds are read, told by their first bytes and not by their names: safetensors, and PyTorch's zip container (`.pt`,
`.pth`, `.bin`, `.ckpt`), whose pickle is read with weights_only=True. A model cut into shards may be named by its
index, by any shard or by its folder. Nested dicts become dotted names: {"generator": {"x": t}} -> "generator.x".

Reading goes in two steps, so that a wrong file is known from its header before anything is mapped:

    file = read_header(path)                    # tensors on the meta device: shapes and dtypes only
    tensors = map_tensors(file, names)          # views of the file; pages are read when touched, never written back
"""

from __future__ import annotations

import json
import os
import pickle
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
SHARD = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})(?P<suffix>\.\w+)")
LARGEST_HEADER = 100_000_000  # bytes; safetensors' own limit
DEEPEST = 8  # dicts within dicts

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip

# First bytes of files that are neither: what they are, and what to do.
OTHERS = (
    (b"GGUF", "a GGUF file", "Load it with a GGUF loader node and connect that node's MODEL instead"),
    (
        b"\x80",
        "a bare Python pickle, which is not opened because that could run code",
        "Get the .safetensors version, or save it again with a PyTorch newer than 1.6",
    ),
    (b"version https://git-lfs", "a Git LFS pointer, not the file it stands for", "Run `git lfs pull`, or download it"),
    (b"<", "a web page", "The link led to a page instead of the file: download the file itself"),
)


class CheckpointError(ValueError):
    """A file that cannot be used: what it is, what is needed, what to do. The message says the three in that order."""

    def __init__(self, got: str, needed: str, remedy: str) -> None:
        super().__init__(f"Got {got}; {needed}. {remedy}.")


def unreadable(path: Path, what: str, remedy: str) -> CheckpointError:
    return CheckpointError(f"{path.name}, {what}", "a safetensors file or a PyTorch .pt file is needed", remedy)


DOWNLOAD_AGAIN = "Download it again and compare the size with the one shown where it comes from"


@dataclass(frozen=True)
class TensorFile:
    """What the header of a file, or of all its shards, says. `tensors` are on the meta device, by dotted name."""

    paths: tuple[Path, ...]
    tensors: dict[str, Tensor]
    metadata: dict[str, str]  # safetensors only

    @property
    def nbytes(self) -> int:
        return sum(path.stat().st_size for path in self.paths)


def read_header(path: str | Path) -> TensorFile:
    """Names, shapes and dtypes of a file's tensors; nothing is mapped. Raises CheckpointError."""
    paths = _shards(Path(path))
    tensors, metadata = {}, {}
    for shard in paths:
        if _is_torch(shard):
            tensors.update(_load_torch(shard, "meta"))
        else:
            more, about = _safetensors_header(shard)
            tensors.update(more)
            metadata.update(about)
    return TensorFile(paths, tensors, metadata)


def map_tensors(file: TensorFile, names: Iterable[str]) -> dict[str, Tensor]:
    """The named tensors as CPU views of the file. Changing one never changes the file. Raises CheckpointError."""
    names = set(names)
    tensors = {}
    for path in file.paths:
        load = _load_torch(path, "cpu") if _is_torch(path) else _load_safetensors(path, names)
        tensors.update((name, load[name]) for name in names & load.keys())
    return tensors


# --- Which files -----------------------------------------------------------------------------------------------------


def _shards(path: Path) -> tuple[Path, ...]:
    """All files of the model that `path` (a file, a shard, an index or a folder) stands for."""
    if os.path.isdir(path):  # pathlib's raises for a name that no file can have
        return _of_folder(path)
    if not os.path.isfile(path):
        raise CheckpointError(f"{path}, which does not exist", "a checkpoint is needed", "Check the path")
    if path.name.endswith(".index.json"):
        return _of_index(path)
    if shard := SHARD.fullmatch(path.name):
        count = int(shard["count"])
        names = (f"{shard['stem']}-{i:05}-of-{count:05}{shard['suffix']}" for i in range(1, min(count, 1000) + 1))
        return _all_there(path.parent, names)
    return (path,)


def _of_folder(folder: Path) -> tuple[Path, ...]:
    needed = "a folder must hold one checkpoint, or the shards of one"
    indices = sorted(folder.glob("*.index.json"))
    weights = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES)
    if len(indices) == 1:
        return _of_index(indices[0])
    if not weights:
        inside = "no weights in it" if any(folder.iterdir()) else "nothing in it"
        raise CheckpointError(f"the folder {folder} with {inside}", needed, "Name the checkpoint file itself")
    shards = _shards(weights[0])
    if set(weights) != set(shards):
        listed = ", ".join(path.name for path in weights[:4])
        raise CheckpointError(f"the folder {folder} with {len(weights)} files ({listed})", needed, "Name one of them")
    return shards


def _of_index(index: Path) -> tuple[Path, ...]:
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        names = set()
    if not names:
        raise CheckpointError(
            f"{index.name}, which does not list any shards", "an index needs a `weight_map`", "Name a shard instead"
        ) from None
    return _all_there(index.parent, (Path(str(name)).name for name in names))


def _all_there(folder: Path, names: Iterable[str]) -> tuple[Path, ...]:
    names = sorted(names)
    if missing := [name for name in names if not os.path.isfile(folder / name)]:
        raise CheckpointError(
            f"{len(names) - len(missing)} of {len(names)} shards; {missing[0][:100]} is missing",
            "all shards of a model must lie in one folder",
            "Download the missing ones",
        )
    return tuple(folder / name for name in names)


# --- One file --------------------------------------------------------------------------------------------------------


def _is_torch(path: Path) -> bool:
    """Which of the two kinds a file is of. Raises CheckpointError if it is neither."""
    with path.open("rb") as file:
        first = file.read(256)
    if first.startswith(b"PK\x03\x04"):
        return True
    if first[8:9] == b"{" and int.from_bytes(first[:8], "little") <= LARGEST_HEADER:
        return False
    raise _neither(path, first)


def _neither(path: Path, first: bytes) -> CheckpointError:
    if not first:
        return unreadable(path, "an empty file", "Download it again")
    for start, what, remedy in OTHERS:
        if first.startswith(start):
            return unreadable(path, what, remedy)
    if b"\0" not in first:
        return unreadable(path, "a text file", "Download the checkpoint itself")
    return unreadable(path, "a file of another kind, or a damaged one", DOWNLOAD_AGAIN)


def _safetensors_header(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(meta tensors, metadata). Not left to the library, which maps the file, however large, to read its header."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length)
    tensors, metadata, end = {}, {}, 0
    if len(header) == length:
        try:
            entries = json.loads(header)
            about = dict(entries.pop("__metadata__", {}))
            metadata = {name: text for name, text in about.items() if isinstance(text, str)}
            tensors = {name: _meta(entry) for name, entry in entries.items()}
            end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        except (ValueError, LookupError, TypeError, RuntimeError, AttributeError, RecursionError):
            raise unreadable(path, "a damaged safetensors file", DOWNLOAD_AGAIN) from None
    size, needed = path.stat().st_size, 8 + length + end
    if size < needed:
        raise unreadable(path, f"a truncated file: {size:,} bytes of at least {needed:,}", DOWNLOAD_AGAIN)
    return tensors, metadata


def _meta(entry: dict) -> Tensor:
    """A header's entry as a meta tensor; dtypes unknown to torch pass for bytes."""
    dtype, (start, end) = DTYPES.get(entry["dtype"]), entry["data_offsets"]
    tensor = torch.empty(entry["shape"], dtype=dtype or torch.uint8, device="meta")
    if dtype and tensor.nbytes != end - start:
        raise ValueError("shape and length disagree")
    return tensor


def _load_safetensors(path: Path, names: set[str]) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in names.intersection(file.keys())}
    except SafetensorError:
        raise unreadable(path, "a damaged safetensors file", DOWNLOAD_AGAIN) from None
    except RuntimeError:
        raise _too_large(path) from None


def _too_large(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path.name}, {path.stat().st_size / 2**30:.1f} GiB that cannot be mapped into memory",
        "memory and swap together must be larger than the file",
        "Get a smaller version of it (bf16, fp8), or add swap space",
    )


def _load_torch(path: Path, device: str) -> dict[str, Tensor]:
    """All tensors of a .pt file by dotted name, on "meta" or mapped on "cpu"."""
    if path.suffix == ".safetensors":  # torch.load goes by the name
        raise unreadable(path, "a PyTorch file under a safetensors name", "Rename it to end in .pt")
    try:
        if not zipfile.is_zipfile(path):  # the list of contents stands at the end
            raise unreadable(path, "a truncated .pt file: its end is missing", DOWNLOAD_AGAIN)
        with zipfile.ZipFile(path) as archive:
            contents = {name.rpartition("/")[2] for name in archive.namelist()}
    except CheckpointError:
        raise
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError):
        raise unreadable(path, "a damaged .pt file", DOWNLOAD_AGAIN) from None
    if "data.pkl" not in contents:
        raise unreadable(path, "a zip archive without tensors", "Unpack it and name the checkpoint inside")
    if "constants.pkl" in contents:
        raise unreadable(path, "a TorchScript program, which is not run", "Get the file with the weights alone")
    try:
        tensors = dict(_flatten(torch.load(path, map_location=device, mmap=True, weights_only=True)))
    except pickle.UnpicklingError as error:
        objects = re.findall(r"GLOBAL (\S+)", str(error))
        what = f"Python objects ({objects[0]})" if objects else "more than tensors"
        refusal = unreadable(
            path,
            f"a .pt file with {what} in it, which is not opened because that could run code",
            "Get the .safetensors version, or ask its author for a file that holds the state dict alone",
        )
    except Exception as error:  # noqa: BLE001  a damaged pickle can raise anything
        mapped = "unable to mmap" not in str(error)
        refusal = unreadable(path, "a damaged .pt file", DOWNLOAD_AGAIN) if mapped else _too_large(path)
    else:
        return _dense(tensors, path, device)
    raise refusal  # not above, where torch's error would come along and keep the file mapped


def _dense(tensors: dict[str, Tensor], path: Path, device: str) -> dict[str, Tensor]:
    """The tensors, if none is sparse or was saved without its numbers. Raises CheckpointError."""
    if empty := [name for name, tensor in tensors.items() if tensor.device.type != device]:
        raise unreadable(path, f"whose {empty[0]} was saved from the meta device, without its numbers", DOWNLOAD_AGAIN)
    if sparse := [name for name, tensor in tensors.items() if tensor.layout is not torch.strided]:
        raise CheckpointError(
            f"{path.name}, whose {sparse[0]} is a sparse tensor", "dense ones are needed", "Save it with `to_dense()`"
        )
    return tensors


def _flatten(tree: object, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    """(dotted name, tensor) of all tensors in nested dicts; whatever else a training run saved is passed over."""
    if isinstance(tree, Tensor):
        yield prefix, tree
    elif isinstance(tree, Mapping) and depth < DEEPEST:
        for key, value in tree.items():
            yield from _flatten(value, f"{prefix}.{key}" if prefix else str(key), depth + 1)
